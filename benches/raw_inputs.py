#!/usr/bin/env python3
"""Write the inputs of a folder made by make_published.py as plain float32 numbers.

    raw_inputs.py FOLDER OUT

OUT gets target.bin and reference.bin, latents [16, side, side], and text.bin, [tokens, 3584]; it
prints the side and the number of text tokens. stable-diffusion.cpp takes latents, not tokens.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

CHANNELS = 16
PATCH = 2


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    inputs = load_file(folder / "inputs.safetensors")
    tokens = inputs["tokens"][0]
    count = tokens.shape[0] // 2
    side = int(count**0.5)
    for name, part in (("target", tokens[:count]), ("reference", tokens[count:])):
        latents = part.reshape(side, side, CHANNELS, PATCH, PATCH)  # (h, w, c, ph, pw)
        latents = latents.transpose(2, 0, 3, 1, 4)  # (c, h, ph, w, pw)
        np.ascontiguousarray(latents, dtype=np.float32).tofile(out / f"{name}.bin")
    inputs["text"].astype(np.float32).tofile(out / "text.bin")
    print(PATCH * side, inputs["text"].shape[1])


if __name__ == "__main__":
    main()
