#!/usr/bin/env python3
"""Write a checkpoint folder at the published dimensions, with random weights.

    make_published.py FOLDER [--layers 2]

The transformer keeps its width (hidden 3072, 24 heads of 128) and has few layers; the autoencoder is
whole (base_dim 96, z_dim 16, dim_mult 1 2 4 4, 2 residual blocks). Weights are stored in bfloat16:
about 1.6 GB with two layers. Beside them stand the inputs of one forward pass at 512 x 512 pixels
with one reference: inputs.safetensors.

Needs torch and diffusers 0.42.1.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import save_file

SIDE_PX = 512
PX_PER_TOKEN = 16
TEXT_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(1)
    transformer = QwenImageTransformer2DModel(num_layers=arguments.layers)
    config = transformer.config
    transformer.to(torch.bfloat16).save_pretrained(arguments.folder / "transformer")
    del transformer
    autoencoder = AutoencoderKLQwenImage()
    autoencoder.to(torch.bfloat16).save_pretrained(arguments.folder / "vae")

    tokens = (SIDE_PX // PX_PER_TOKEN) ** 2
    inputs = {
        # The noisy picture's tokens, then the reference's.
        "tokens": torch.randn(1, 2 * tokens, config.in_channels),
        "text": torch.randn(1, TEXT_TOKENS, config.joint_attention_dim),
        "picture": torch.rand(1, 3, SIDE_PX, SIDE_PX) * 2 - 1,
    }
    save_file(inputs, arguments.folder / "inputs.safetensors")
    index = {
        "_class_name": "QwenImageEditPlusPipeline",
        "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (arguments.folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
