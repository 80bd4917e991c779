#!/usr/bin/env python3
"""Time PyTorch on the operations that pentimento-gpu-check times; names and sizes agree.

    peer_gpu.py FILE.csv

Needs torch with CUDA; diffusers 0.42.1 too for the transformer, which is left out without it. Columns are
those of raw.csv: part, name, kind, value in seconds (the median), rate, unit.
"""

import csv
import statistics
import sys
import time
import traceback

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
except ImportError:
    AutoencoderKLQwenImage = None

IMAGE_TOKENS = 8192
TEXT_TOKENS = 512
DEVICE = "cuda"
WARM_UP_S = 0.06
BF16 = torch.bfloat16

rows = []


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(BF16)


def timed(part, name, amount, unit, work, runs=20):
    begin = time.perf_counter()
    while True:  # a GPU that was idle needs a while to reach its clocks
        work()
        torch.cuda.synchronize()
        if time.perf_counter() - begin > WARM_UP_S:
            break
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    rows.append([part, name, "timed", f"{median:e}", f"{amount / median:e}", unit])
    print(f"time {part}: {name}: {median * 1e3:.3f} ms, {amount / median:.1f} {unit}", flush=True)


def rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def rotate(x, turn):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).to(x.dtype)


def joint(text, image, weight, turns):
    """As diffusers writes it: norm and rotate each stream, concatenate, attend, split."""
    parts = []
    for (query, key, value), turn in zip((text, image), turns):
        parts.append((rotate(rms_norm(query, weight), turn), rotate(rms_norm(key, weight), turn), value))
    query, key, value = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(*parts))
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return out.split([text[0].shape[1], image[0].shape[1]], 1)


def attentions():
    heads, d = 24, 128
    weight = random(d)
    for image, batch in ((IMAGE_TOKENS, 1), (IMAGE_TOKENS, 2), (2 * IMAGE_TOKENS, 1)):
        n = TEXT_TOKENS + image
        streams = [[random(batch, tokens, heads, d) for _ in range(3)] for tokens in (TEXT_TOKENS, image)]
        turns = [torch.ones(tokens, 1, d // 2, device=DEVICE, dtype=torch.complex64) for tokens in (TEXT_TOKENS, image)]
        work = 4 * batch * heads * n * n * d / 1e12
        name = f"joint attention, {n} tokens, batch {batch}"
        timed("operations", name, work, "TFLOP/s", lambda: joint(*streams, weight, turns))
        plain = [torch.cat(pair, 1).transpose(1, 2) for pair in zip(*streams)]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                timed("operations", f"only SDPA ({backend.name}), {n} tokens, batch {batch}", work, "TFLOP/s",
                      lambda: F.scaled_dot_product_attention(*plain))
    for n, m in ((1500, 1500), (1, 1500), (1, 8000)):
        query, key = random(1, 28, n, d), random(1, 4, m, d)
        work, unit = (2 * 28 * n * m * d / 1e12, "TFLOP/s") if n > 1 else (4 * m * 4 * d / 1e9, "GB/s")
        timed("operations", f"causal attention, {n} of {m} tokens", work, unit,
              lambda: F.scaled_dot_product_attention(query, key, key, is_causal=n > 1, enable_gqa=True))


def others():
    n, dim = IMAGE_TOKENS, 3072
    x, y, wide = random(1, n, dim), random(1, n, dim), random(1, n, 4 * dim)
    gate, shift = random(1, 1, dim), random(1, 1, dim)
    gigabytes = n * dim * 2 / 1e9

    def norm(x):
        return F.layer_norm(x, (dim,), eps=1e-6) * (1 + gate) + shift

    timed("operations", f"modulated norm, {n} rows", 2 * gigabytes, "GB/s", lambda: norm(x))
    timed("operations", f"gated add, {n} rows", 3 * gigabytes, "GB/s", lambda: x + gate * y)
    timed("operations", f"gated add and norm, {n} rows", 4 * gigabytes, "GB/s", lambda: norm(x + gate * y))
    timed("operations", f"gelu, {n} rows of four times the width", 8 * gigabytes, "GB/s", lambda: F.gelu(wide, approximate="tanh"))
    picture, weight = random(1, 96, 1024, 1024), random(96, 96, 3, 3)
    timed("operations", "convolution 3 × 3, 96 channels, side 1024", 2 * 1024**2 * 96 * 96 * 9 / 1e12, "TFLOP/s",
          lambda: F.conv2d(picture, weight, padding=1))
    for count, depth, outs in ((n, 3072, 3072), (n, 3072, 12288), (1, 3584, 18944)):
        x, weight = random(count, depth), random(outs, depth)
        work, unit = (depth * outs * 2 / 1e9, "GB/s") if count == 1 else (2 * count * depth * outs / 1e12, "TFLOP/s")
        timed("products", f"product bf16 of the library, {count} rows, {depth} to {outs}", work, unit, lambda: F.linear(x, weight))


def copy():
    x = torch.empty(2 << 30, device=DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)
    timed("operations", "copy, read and written", 2 * x.numel() / 1e9, "GB/s", lambda: y.copy_(x))


def autoencoder():
    with torch.device(DEVICE):
        model = AutoencoderKLQwenImage().to(BF16).eval()
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    picture = random(1, 3, 1, 1024, 1024).contiguous(memory_format=torch.channels_last_3d)
    latents = random(1, 16, 1, 128, 128).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        timed("autoencoder", "encode 1024 × 1024", 1.0, "pictures/s", lambda: model.encode(picture), runs=5)
        timed("autoencoder", "decode 1024 × 1024", 1.0, "pictures/s", lambda: model.decode(latents), runs=5)


def transformer():
    with torch.device(DEVICE):
        model = QwenImageTransformer2DModel(num_layers=1).to(BF16).eval()
    blocks = model.transformer_blocks
    model.transformer_blocks = torch.nn.ModuleList([blocks[0]] * 60)
    tokens, text = random(1, IMAGE_TOKENS, 64), random(1, TEXT_TOKENS, 3584)
    arguments = dict(
        hidden_states=tokens,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=torch.ones(1, TEXT_TOKENS, device=DEVICE, dtype=torch.int64),
        timestep=torch.tensor([0.5], device=DEVICE, dtype=BF16),
        img_shapes=[[(1, 64, 64), (1, 64, 64)]],
        return_dict=False,
    )
    with torch.inference_mode():
        timed("transformer", f"60 layers, {IMAGE_TOKENS + TEXT_TOKENS} tokens, Compute", 1.0, "steps/s", lambda: model(**arguments), runs=3)


def main():
    if not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    parts = [copy, attentions, others]
    if AutoencoderKLQwenImage is None:
        print("no diffusers here: the transformer and the autoencoder are left out")
    else:
        parts += [transformer, autoencoder]
    for part in parts:
        try:
            with torch.inference_mode():
                part()
        except Exception:  # the other parts are worth having
            traceback.print_exc()
        torch.cuda.empty_cache()
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "name", "kind", "value", "limit_or_rate", "unit_or_reason"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
