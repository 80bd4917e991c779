"""The vision-language model as batched matrix products over the stock modules' weights.

The stock forward treats pictures one by one and repeats the fixed prompt for every sample; here pictures go
through the tower together and the prompt's keys and values are computed once. `check_equal` compares both.
"""
import math

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 128, 5, 4, 2, 320
HEAD = HIDDEN // HEADS
SECTIONS = [4, 6, 6]
THETA = 1_000_000.0
VISION = dict(depth=3, hidden_size=64, intermediate_size=160, num_heads=2, out_hidden_size=HIDDEN, patch_size=8,
              spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[0, 1, 2], window_size=64, hidden_act="silu")
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
GRID = 4  # merged picture tokens per side


def build(tokenizer):
    """A fresh model whose activations stay near one at this width."""
    ident = tokenizer.token_to_id
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-6, max_position_embeddings=1024,
                         rope_parameters={"rope_type": "default", "rope_theta": THETA, "mrope_section": SECTIONS},
                         bos_token_id=ident("<|endoftext|>"), eos_token_id=ident("<|im_end|>")),
        vision_config=VISION, image_token_id=ident("<|image_pad|>"), video_token_id=ident("<|video_pad|>"),
        vision_start_token_id=ident("<|vision_start|>"), vision_end_token_id=ident("<|vision_end|>"), tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
                gain = 1 / math.sqrt(2 * LAYERS) if deep else 1.0
                p.normal_(0, 0.5 if "embed_tokens" in name else gain / math.sqrt(p[0].numel()))
            elif name.endswith("bias"):
                p.zero_()
    return model


def patches_from_pixels(pixels):
    """`[b, 64, 384]` patches in the processor's merge order, of u8 pictures `[b, 64, 64, 3]`."""
    x = (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD
    x = x.view(-1, GRID, 2, 8, GRID, 2, 8, 3)  # b, row, row in merge, y, column, column in merge, x, channel
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)  # b, row, column, 2, 2, channel, time, y, x
    return x.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(len(pixels), 4 * GRID * GRID, -1)


def vision_angles(head):
    """Rotary angles `[64, head]` of the patches in merge order."""
    index = torch.arange(2 * GRID)
    rows = index[:, None].expand(-1, 2 * GRID).reshape(GRID, 2, GRID, 2).transpose(1, 2).flatten()
    columns = index[None].expand(2 * GRID, -1).reshape(GRID, 2, GRID, 2).transpose(1, 2).flatten()
    frequency = 1.0 / 10000.0 ** (torch.arange(0, head // 2, 2).float() / (head // 2))
    angles = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], -1)
    return torch.cat([angles, angles], -1)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def picture_tokens(model, pixels):
    """Merged picture tokens `[b, 16, hidden]`."""
    tower = model.model.visual
    x = F.linear(patches_from_pixels(pixels), tower.patch_embed.proj.weight.flatten(1))
    b, n, d = x.shape
    heads = VISION["num_heads"]
    angles = vision_angles(d // heads)
    cos, sin = angles.cos(), angles.sin()
    for block in tower.blocks:
        h = norm(x, block.norm1.weight)
        q, k, v = block.attn.qkv(h).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)  # 3, b, head, n, d
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2) / math.sqrt(d // heads)
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))
        h = norm(x, block.norm2.weight)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
    x = norm(x, tower.merger.ln_q.weight).view(b, n // 4, 4 * d)
    return tower.merger.mlp(x)


def positions(prefix, length, sequential):
    """Rotary positions `[3, prefix + length]` of prompt, vision start, 16 picture tokens and text.

    The stock editing pipeline leaves out the token types, so its text encoder counts every token, the picture's too,
    one after the other (`sequential`); `generate` passes them, so the planning agents see rows and columns.
    """
    if sequential:
        return torch.arange(prefix + length).expand(3, -1)
    text = torch.arange(prefix + 1)
    start = prefix + 1
    rows = start + torch.arange(GRID).repeat_interleave(GRID)
    columns = start + torch.arange(GRID).repeat(GRID)
    rest = start + GRID + torch.arange(length - 1 - GRID * GRID)
    picture = torch.stack([torch.full_like(rows, start), rows, columns])
    return torch.cat([text.expand(3, -1), picture, rest.expand(3, -1)], 1)


def text_rotary(prefix, length, sequential):
    """cos and sin, each `[prefix + length, head]`."""
    frequency = 1.0 / THETA ** (torch.arange(0, HEAD, 2).float() / HEAD)
    angles = positions(prefix, length, sequential)[..., None].float() * frequency
    parts = angles.split(SECTIONS, -1)
    angles = torch.cat([part[i] for i, part in enumerate(parts)], -1)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def qkv(layer, x, cos, sin):
    """Queries `[b, 2, 2, n, d]` grouped by key head, keys and values `[b, 2, 1, n, d]`."""
    b, n, _ = x.shape
    q = layer.q_proj(x).view(b, n, KV_HEADS, HEADS // KV_HEADS, HEAD).permute(0, 2, 3, 1, 4)
    k = layer.k_proj(x).view(b, n, KV_HEADS, 1, HEAD).permute(0, 2, 3, 1, 4)
    v = layer.v_proj(x).view(b, n, KV_HEADS, 1, HEAD).permute(0, 2, 3, 1, 4)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def attend(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) * HEAD ** -0.5 + mask
    out = scores.softmax(-1) @ v
    b, _, _, n, _ = out.shape
    return out.permute(0, 3, 1, 2, 4).reshape(b, n, HIDDEN)


def causal(n):
    return torch.full((n, n), float("-inf")).triu(1)


def feed(layer, x):
    h = norm(x, layer.post_attention_layernorm.weight)
    return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))


def hidden_states(model, prefix_ids, ids, pictures, sequential, tap=None):
    """Last hidden states `[b, n, hidden]` of the text after a shared prompt; with `tap`, also those after that many layers.

    `prefix_ids: [p]`, `ids: [b, n]` padded on the right and starting with vision start and one pad token per
    picture token, `pictures: [b, 16, hidden]`; `sequential` as in `positions`.
    """
    stack = model.model.language_model
    p, n = len(prefix_ids), ids.shape[1]
    cos, sin = text_rotary(p, n, sequential)
    x = stack.embed_tokens(ids)
    x = torch.cat([x[:, :1], pictures, x[:, 1 + GRID * GRID:]], 1)
    prompt = stack.embed_tokens(prefix_ids)[None]
    prompt_mask, mask = causal(p), torch.cat([torch.zeros(n, p), causal(n)], 1)
    tapped = None
    for index, layer in enumerate(stack.layers):
        tapped = x if index == tap else tapped
        hp, hx = norm(prompt, layer.input_layernorm.weight), norm(x, layer.input_layernorm.weight)
        qp, kp, vp = qkv(layer.self_attn, hp, cos[:p], sin[:p])
        q, k, v = qkv(layer.self_attn, hx, cos[p:], sin[p:])
        keys = torch.cat([kp.expand(len(x), -1, -1, -1, -1), k], 3)
        values = torch.cat([vp.expand(len(x), -1, -1, -1, -1), v], 3)
        prompt = feed(layer, prompt + layer.self_attn.o_proj(attend(qp, kp, vp, prompt_mask)))
        x = feed(layer, x + layer.self_attn.o_proj(attend(q, keys, values, mask)))
    out = norm(x, stack.norm.weight)
    return out if tap is None else (out, F.rms_norm(tapped, (HIDDEN,)))


@torch.no_grad()
def check_equal(model, prefix_ids, ids, pixels, sequential, tolerance=1e-4):
    """Raises unless the stock forward of one sample gives the same last hidden states."""
    ours = hidden_states(model, prefix_ids, ids, picture_tokens(model, pixels), sequential)
    full = torch.cat([prefix_ids, ids[0]])[None]
    grid = torch.tensor([[1, 2 * GRID, 2 * GRID]])
    kinds = {} if sequential else dict(mm_token_type_ids=(full == model.config.image_token_id).int())
    theirs = model(input_ids=full, attention_mask=torch.ones_like(full), pixel_values=patches_from_pixels(pixels[:1])[0],
                   image_grid_thw=grid, **kinds, output_hidden_states=True).hidden_states[-1]
    gap = float((ours[0] - theirs[0, len(prefix_ids):]).abs().max())
    if not gap <= tolerance:
        raise ValueError(f"hidden states differ from the stock forward by {gap}")
    return gap
