#!/usr/bin/env python3
"""Time diffusers on a folder made by make_published.py.

    peer.py FOLDER transformer|encode|decode f32|bf16 REPEATS

Prints one line for each repeat after a first, untimed one:

    seconds,peak_bytes,checksum

The checksum is the mean magnitude of the output, to see that both sides did the same work.
"""

import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file

THREADS = 2
TIMESTEP = 0.5


def transformer(folder: Path, dtype: torch.dtype):
    """One forward pass over the tokens of the picture and its reference."""
    model = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    inputs = load_file(folder / "inputs.safetensors")
    tokens, text = inputs["tokens"].to(dtype), inputs["text"].to(dtype)
    side = int((tokens.shape[1] // 2) ** 0.5)
    arguments = dict(
        hidden_states=tokens,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=torch.ones(text.shape[:2], dtype=torch.long),
        timestep=torch.tensor([TIMESTEP], dtype=dtype),
        img_shapes=[[(1, side, side), (1, side, side)]],
        return_dict=False,
    )
    return lambda: model(**arguments)[0]


def encode(folder: Path, dtype: torch.dtype):
    """A picture to its latents."""
    model = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype)
    picture = load_file(folder / "inputs.safetensors")["picture"].to(dtype).unsqueeze(2)
    return lambda: model.encode(picture, return_dict=False)[0].mode()


def decode(folder: Path, dtype: torch.dtype):
    """Latents to a picture."""
    model = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype)
    latents = encode(folder, dtype)()
    return lambda: model.decode(latents, return_dict=False)[0]


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def main() -> None:
    folder, what, dtype, repeats = Path(sys.argv[1]), *sys.argv[2:5]
    torch.set_num_threads(THREADS)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with torch.inference_mode():
        run = {"transformer": transformer, "encode": encode, "decode": decode}[what](folder, dtype)
        run()
        for _ in range(int(repeats)):
            start = time.perf_counter()
            out = run()
            seconds = time.perf_counter() - start
            print(f"{seconds:.4f},{peak_bytes()},{out.float().abs().mean().item():.5f}", flush=True)


if __name__ == "__main__":
    main()
