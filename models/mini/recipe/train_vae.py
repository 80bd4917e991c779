"""Stage 1: the autoencoder. Trained as 2-D convolutions on the last time slice of its 3-D weights."""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as reference

import world
from training import Muon, Run, rank, say

CONFIG = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 6], num_res_blocks=1, temperal_downsample=[False, True, True])
LATENT_NOISE = 0.05  # noise on the latents, relative to their spread, so that the decoder forgives the transformer


def flat_forward(self, x, cache_x=None):
    """A causal 3-D convolution on a single frame `[b, c, 1, h, w]`: only its last time slice meets pixels."""
    out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (self._padding[2], self._padding[0]))
    return out.unsqueeze(2)


def build():
    """A fresh autoencoder whose unused time slices are zero."""
    vae = AutoencoderKLQwenImage(**CONFIG)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, reference.QwenImageCausalConv3d):
                module.weight[:, :, :-1] = 0
    return vae


def single_frame():
    """From here on causal convolutions of this process expect single frames and run as 2-D ones."""
    reference.QwenImageCausalConv3d.forward = flat_forward


def encode(vae, pixels):
    """Means `[b, 16, 1, 8, 8]` of pictures `[b, 3, 64, 64]` in −1…1."""
    return vae.quant_conv(vae.encoder(pixels.unsqueeze(2)))[:, :16]


def decode(vae, latents):
    """Pictures `[b, 3, 64, 64]`, not clamped, of latents `[b, 16, 1, 8, 8]`."""
    return vae.decoder(vae.post_quant_conv(latents))[:, :, 0]


def crowded_scene(rng):
    """A scene with many more sprites than a sampled one, so that each picture teaches more."""
    scene = world.Scene(rng.below(len(world.BACKGROUNDS)), rng.below(len(world.LIGHTS)))
    for place in range(world.PLACE_COUNT):
        kind, color = rng.below(len(world.KINDS)), rng.below(len(world.COLORS))
        if rng.below(10) < 7 and place in world.homes(kind):
            scene.objects[place] = (kind, color)
    return scene


def tensor_from_pixels(pictures):
    """`[b, 3, 64, 64]` in −1…1 from u8 pictures `[64, 64, 3]`."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels_from_tensor(pictures):
    """u8 `[b, 64, 64, 3]`, rounded as the pipelines round."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def batch(rng, size):
    makers = (crowded_scene, world.sample_scene)
    return tensor_from_pixels([world.render(makers[i % 4 == 3](rng)) for i in range(size)])


@torch.no_grad()
def measure(vae, count):
    """PSNR in dB (mean and worst picture) on held-out targets, and the share whose copy still reads back exactly."""
    cases = [world.sample_case(world.held_out_seed(1, i), count=1) for i in range(count)]
    psnr, passed = [], 0
    for start in range(0, count, 50):
        part = cases[start:start + 50]
        x = tensor_from_pixels([world.render(c.target) for c in part])
        y = pixels_from_tensor(decode(vae, encode(vae, x)))
        for case, copy in zip(part, y):
            mse = ((world.render(case.target).astype(float) - copy) ** 2).mean()
            psnr.append(10 * np.log10(255 ** 2 / max(mse, 1e-9)))
            passed += world.succeeds(copy, case.target)
    return dict(psnr=round(float(np.mean(psnr)), 2), psnr_worst=round(float(np.min(psnr)), 2), copy_passes=passed / count)


@torch.no_grad()
def latent_statistics(vae, count=600):
    """Per-channel mean and standard deviation of latents, for the pipeline's normalisation."""
    rng = world.Rng(77)
    z = torch.cat([encode(vae, batch(rng, 50)) for _ in range(count // 50)])
    return z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()


def optimizers(vae):
    matrices = [p for n, p in vae.named_parameters() if p.ndim >= 4 and "time_conv" not in n and "conv_out" not in n and "conv_in" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=0.01), torch.optim.Adam(rest, lr=2e-3, betas=(0.9, 0.99))]


def train(out, budget_s, cases=300):
    single_frame()
    torch.manual_seed(1 + rank())
    vae = build()
    run = Run(vae, optimizers(vae), Path(out) / "vae.pt", budget_s)
    rng = world.Rng(10_000_000 * (1 + rank()) + run.steps * 1_000)
    while not run.done():
        x = batch(rng, 16)
        z = encode(vae, x)
        noisy = z + LATENT_NOISE * z.detach().std() * torch.randn_like(z)
        y = decode(vae, noisy)
        loss = F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 1e-4 * z.square().mean()
        loss.backward()
        run.step(16)
        if run.steps % 200 == 0:
            say(f"vae step {run.steps} {run.seconds:.0f}s loss {float(loss):.4f} psnr {-10 * np.log10(float(F.mse_loss(y, x)) / 4):.2f}")
    run.average.copy_to(vae)
    result = measure(vae, cases) | dict(seconds=round(run.seconds), samples=run.samples)
    mean, std = latent_statistics(vae)
    result |= dict(latents_mean=mean, latents_std=std)
    if rank() == 0:
        run.save()
        torch.save(vae.state_dict(), Path(out) / "vae_final.pt")
        (Path(out) / "vae.json").write_text(json.dumps(result, indent=1))
    say("vae", {k: v for k, v in result.items() if not isinstance(v, list)})
