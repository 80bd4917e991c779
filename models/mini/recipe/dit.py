"""The transformer as batched matrix products over the stock modules' weights, its initialisation and its sampler."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift

AXES = (8, 12, 12)
HEADS, HEAD = 6, sum(AXES)
WIDTH = HEADS * HEAD
LATENT = 64  # 16 channels of a 2 × 2 patch
SIDE = 4  # tokens per side of a picture
TOKENS = SIDE * SIDE
STEPS = 4
CONFIG = dict(patch_size=2, in_channels=LATENT, out_channels=16, num_layers=4, attention_head_dim=HEAD, num_attention_heads=HEADS,
              axes_dims_rope=AXES)
SCHEDULE = dict(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
                max_image_seq_len=8192, shift_terminal=None, time_shift_type="exponential", invert_sigmas=False)


# ---------------------------------------------------------------- initialisation

def random_weights(module):
    """Every matrix about norm-preserving; whatever writes to the residual stream starts smaller."""
    writers = ("to_out.0.weight", "to_add_out.weight", "net.2.weight")
    for name, p in module.named_parameters():
        if p.ndim == 2:
            gain = 0.35 if name.endswith(writers) else 1.0
            p.normal_(0, gain / math.sqrt(p.shape[1]))
        elif name.endswith("bias"):
            p.zero_()


def open_gates(block):
    """Modulation starts as: no shift, no scale, gates of one."""
    for linear in (block.img_mod[1], block.txt_mod[1]):
        linear.weight.mul_(0.05)
        for part in (2, 5):
            linear.bias[part * WIDTH:(part + 1) * WIDTH] = 1.0


def same_place(attn, head):
    """Makes one head of the picture look at the same place of the reference, one frame on.

    Only the fastest rotary pair of each axis is used; the queries' frame pair leads by one radian, which is
    the rotation between frame 0 and frame 1.
    """
    rows = slice(head * HEAD, (head + 1) * HEAD)
    lead = {0: 1.0, AXES[0]: 0.0, AXES[0] + AXES[1]: 0.0}  # first dimension of each axis: phase of the query
    for linear, phases in ((attn.to_q, lead), (attn.to_k, dict.fromkeys(lead, 0.0))):
        linear.weight[rows] *= 0.05
        for at, phase in phases.items():
            linear.bias[head * HEAD + at] = 2 * math.cos(phase)
            linear.bias[head * HEAD + at + 1] = 2 * math.sin(phase)


def copy_through(model):
    """The first block copies the reference latents into the noisy tokens; the output is `noisy − reference`."""
    model.img_in.weight.mul_(0.1)
    model.img_in.weight[:LATENT] += torch.eye(LATENT)
    model.img_in.bias[2 * LATENT:] = 2.0 * (1 - 2 * (torch.arange(WIDTH - 2 * LATENT) % 2))
    attn = model.transformer_blocks[0].attn
    for head in range(2):
        rows, source = slice(head * HEAD, (head + 1) * HEAD), slice(head * HEAD, (head + 1) * HEAD)
        attn.to_v.weight[rows] = 0
        attn.to_v.weight[rows, source] = torch.eye(HEAD)
        attn.to_out[0].weight[:, rows] = 0
        attn.to_out[0].weight[LATENT + head * HEAD:LATENT + (head + 1) * HEAD, rows] = torch.eye(HEAD)
    model.proj_out.weight.mul_(0.1)
    model.proj_out.weight[:, :LATENT] += 1.6 * torch.eye(LATENT)
    model.proj_out.weight[:, LATENT:2 * LATENT] -= 1.6 * torch.eye(LATENT)


def build(hidden):
    """A fresh transformer that starts out by copying the reference."""
    model = QwenImageTransformer2DModel(joint_attention_dim=hidden, **CONFIG)
    with torch.no_grad():
        random_weights(model)
        model.norm_out.linear.weight.mul_(0.05)
        for index, block in enumerate(model.transformer_blocks):
            open_gates(block)
            for head in range(2 if index == 0 else 1):
                same_place(block.attn, head)
            sharpen(block.attn, 2.6 if index == 0 else 1.8)
        copy_through(model)
    return model


def sharpen(attn, weight):
    """Larger norms on the first rotary pair of each axis, which the same-place heads use."""
    for at in (0, AXES[0], AXES[0] + AXES[1]):
        attn.norm_q.weight[at:at + 2] = weight
        attn.norm_k.weight[at:at + 2] = weight


# ---------------------------------------------------------------- forward

_ANGLES = {}


def rotary(text):
    """Unit complex rotations `[text + 32, head / 2]`: text, then noisy picture, then reference."""
    if text not in _ANGLES:
        place = torch.arange(SIDE) - (SIDE - SIDE // 2)
        frames = torch.arange(2).repeat_interleave(TOKENS)
        rows, columns = place.repeat_interleave(SIDE).repeat(2), place.repeat(SIDE).repeat(2)
        words = SIDE // 2 + torch.arange(text)
        parts = []
        for dim, index in zip(AXES, (frames, rows, columns)):
            frequency = 1.0 / torch.pow(10000, torch.arange(0, dim, 2).float() / dim)
            parts.append(torch.cat([words, index])[:, None] * frequency)
        angles = torch.cat(parts, 1)
        _ANGLES[text] = torch.polar(torch.ones_like(angles), angles)
    return _ANGLES[text]


def modulate(x, parts):
    shift, scale, gate = parts.unsqueeze(1).chunk(3, -1)
    return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift, gate


def heads_of(x):
    return x.unflatten(-1, (HEADS, HEAD))  # b, n, head, d


def turned(x, weight, angles):
    x = F.rms_norm(x.float(), (HEAD,), weight, 1e-6)
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles[:, None]
    return torch.view_as_real(x).flatten(-2)


def joint_attention(attn, img, txt, angles, mask):
    """Attention over text and picture `[b, n, width]` each; `mask: [b, 1, 1, text + 32]` added to the scores."""
    n = txt.shape[1]
    q = torch.cat([turned(heads_of(attn.add_q_proj(txt)), attn.norm_added_q.weight, angles[:n]),
                   turned(heads_of(attn.to_q(img)), attn.norm_q.weight, angles[n:])], 1).transpose(1, 2)
    k = torch.cat([turned(heads_of(attn.add_k_proj(txt)), attn.norm_added_k.weight, angles[:n]),
                   turned(heads_of(attn.to_k(img)), attn.norm_k.weight, angles[n:])], 1).transpose(1, 2)
    v = torch.cat([heads_of(attn.add_v_proj(txt)), heads_of(attn.to_v(img))], 1).transpose(1, 2)
    weights = ((q @ k.transpose(-1, -2)) * HEAD ** -0.5 + mask).softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)  # b, n, width
    return attn.to_out[0](out[:, n:]), attn.to_add_out(out[:, :n])


def block_forward(block, img, txt, temb, angles, mask):
    act = F.silu(temb)
    img_1, img_2 = block.img_mod[1](act).chunk(2, -1)
    txt_1, txt_2 = block.txt_mod[1](act).chunk(2, -1)
    img_in, img_gate = modulate(img, img_1)
    txt_in, txt_gate = modulate(txt, txt_1)
    img_out, txt_out = joint_attention(block.attn, img_in, txt_in, angles, mask)
    img, txt = img + img_gate * img_out, txt + txt_gate * txt_out
    img_in, img_gate = modulate(img, img_2)
    txt_in, txt_gate = modulate(txt, txt_2)
    return img + img_gate * block.img_mlp(img_in), txt + txt_gate * block.txt_mlp(txt_in)


def forward(model, noisy, reference, text, lengths, sigma):
    """Predicted velocity `[b, 16, 64]`.

    `noisy, reference: [b, 16, 64]` packed latents, `text: [b, n, hidden]` padded on the right to `lengths: [b]`,
    `sigma: [b]` noise level in 0…1.
    """
    img = model.img_in(torch.cat([noisy, reference], 1))
    n = text.shape[1]
    padding = torch.arange(n) >= lengths[:, None]
    mask = torch.cat([padding.float() * -1e9, torch.zeros(len(text), 2 * TOKENS)], 1)[:, None, None]
    txt = model.txt_in(F.rms_norm(text, (text.shape[-1],), model.txt_norm.weight, 1e-6))
    temb = model.time_text_embed(sigma, img)
    angles = rotary(n)
    for block in model.transformer_blocks:
        img, txt = block_forward(block, img, txt, temb, angles, mask)
    scale, shift = model.norm_out.linear(F.silu(temb)).unsqueeze(1).chunk(2, -1)
    img = F.layer_norm(img[:, :TOKENS], (WIDTH,), eps=1e-6) * (1 + scale) + shift
    return model.proj_out(img)


@torch.no_grad()
def check_equal(model, text, tolerance=2e-4):
    """Raises unless the stock forward agrees. `text: [1, n, hidden]`."""
    g = torch.Generator().manual_seed(0)
    noisy, reference = torch.randn(2, 1, TOKENS, LATENT, generator=g)
    ours = forward(model, noisy, reference, text, torch.tensor([text.shape[1]]), torch.tensor([0.6]))
    theirs = model(hidden_states=torch.cat([noisy, reference], 1), timestep=torch.tensor([0.6]), encoder_hidden_states=text,
                   img_shapes=[[(1, SIDE, SIDE), (1, SIDE, SIDE)]], return_dict=False)[0][:, :TOKENS]
    gap = float((ours - theirs).abs().max())
    if not gap <= tolerance:
        raise ValueError(f"velocity differs from the stock forward by {gap}")
    return gap


# ---------------------------------------------------------------- sampling

def pack(latents):
    """`[b, 16, 8, 8]` → `[b, 16, 64]`, as the pipeline packs."""
    b = len(latents)
    return latents.view(b, 16, SIDE, 2, SIDE, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, TOKENS, LATENT)


def unpack(packed):
    """`[b, 16, 64]` → `[b, 16, 8, 8]`."""
    b = len(packed)
    return packed.view(b, SIDE, SIDE, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, 16, 2 * SIDE, 2 * SIDE)


def sigmas(steps=STEPS):
    """The pack's noise levels, ending in 0: `[steps + 1]`."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULE)
    mu = calculate_shift(TOKENS, SCHEDULE["base_image_seq_len"], SCHEDULE["max_image_seq_len"], SCHEDULE["base_shift"], SCHEDULE["max_shift"])
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@torch.no_grad()
def sample(model, reference, text, lengths, seed=0, steps=STEPS):
    """Packed latents of the edited pictures `[b, 16, 64]`."""
    x = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))
    levels = sigmas(steps)
    for now, then in zip(levels[:-1], levels[1:]):
        v = forward(model, x, reference, text, lengths, now.expand(len(x)))
        x = x + (then - now) * v.float()
    return x
