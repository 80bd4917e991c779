#!/usr/bin/env python3
"""Write the files that users of Qwen-Image-Edit have, at their full size, with random weights.

    make_full_size.py FOLDER [--layers 60] [--language-layers 28] [--vision-layers 32]

FOLDER gets qwen-image-edit-2511-Q4_K.gguf (11.5 GB), Qwen2.5-VL-7B-Instruct-Q4_K.gguf (4.5 GB) with the
whole vocabulary, mmproj-F16.gguf (1.3 GB) and qwen_image_vae.safetensors (0.25 GB, Wan's names): what
`pentimento edit --diffusion-model … --llm … --vae …` and stable-diffusion.cpp take. Pictures made with them are noise; times and memory are not.
Matrices are Q4_K with random nibbles, written piece by piece.

Needs numpy, gguf, safetensors, torch and diffusers 0.42.1.
"""

import argparse
import gzip
import json
import re
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

SUPER_BLOCK, SUPER_BLOCK_BYTES = 256, 144
SPREAD = 0.02
VOCABULARY = Path(__file__).parent.parent / "tests/data/vlm/qwen2"
HIDDEN, TEXT, HEAD_DIM, LATENT = 3072, 3584, 128, 64
INNER, KV_WIDTH, VOCAB, EPS = 18944, 512, 152064, 1e-6
VISION, VISION_INNER = 1280, 3420
random = np.random.default_rng(1)


def q4_k(shape, spread):
    """Random super-blocks whose numbers have mean zero and about this standard deviation."""
    count = int(np.prod(shape)) // SUPER_BLOCK
    # Scales and minimums are 32 everywhere: 6-bit numbers in ggml's twelve bytes.
    six_bits = np.array([32] * 8 + [0] * 4, np.uint8)
    six_bits[8:] = (32 & 15) | ((32 & 15) << 4)
    six_bits[:8] |= (32 >> 4) << 6
    step = spread / (32 * 4.6)
    head = np.concatenate([np.array([step, step * 7.5], np.float16).view(np.uint8), six_bits])
    blocks = random.integers(0, 256, (count, SUPER_BLOCK_BYTES), np.uint8)
    blocks[:, :16] = head
    return blocks.reshape(*shape[:-1], shape[-1] // SUPER_BLOCK * SUPER_BLOCK_BYTES)


def plain(shape, spread=SPREAD, around=0.0):
    return (around + spread * random.standard_normal(shape, np.float32)).astype(np.float32)


class Writer:
    """A GGUF file whose tensors are made while they are written."""

    def __init__(self, path, architecture):
        self.gguf = gguf.GGUFWriter(path, architecture)
        self.made = []

    def add(self, name, shape, kind, make):
        stored = np.float16 if kind == Type.F16 else np.float32
        bytes_of = {Type.Q4_K: int(np.prod(shape)) // SUPER_BLOCK * SUPER_BLOCK_BYTES}
        size = bytes_of.get(kind, int(np.prod(shape)) * np.dtype(stored).itemsize)
        if kind == Type.Q4_K:
            shape_of = (*shape[:-1], shape[-1] // SUPER_BLOCK * SUPER_BLOCK_BYTES)
            self.gguf.add_tensor_info(name, shape_of, np.dtype(np.uint8), size, kind)
        else:
            self.gguf.add_tensor_info(name, shape, np.dtype(stored), size)
        self.made.append(make)

    def matrix(self, name, out, width, spread=SPREAD, kind=Type.Q4_K):
        shape = (out, width)
        if kind == Type.Q4_K and width % SUPER_BLOCK == 0:
            self.add(name, shape, kind, lambda: q4_k(shape, spread))
        else:
            stored = np.float16 if kind == Type.F16 else np.float32
            plain_kind = Type.F16 if kind == Type.F16 else Type.F32
            self.add(name, shape, plain_kind, lambda: plain(shape, spread).astype(stored))

    def vector(self, name, width, around=0.0):
        self.add(name, (width,), Type.F32, lambda: plain((width,), 0.01, around))

    def linear(self, name, out, width, **options):
        self.matrix(f"{name}.weight", out, width, **options)
        self.vector(f"{name}.bias", out)

    def write(self):
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_ti_data_to_file()
        for make in self.made:
            self.gguf.write_tensor_data(make())
        self.gguf.close()


def transformer(path, layers):
    file = Writer(path, "qwen_image")
    file.gguf.add_name("Qwen Image Edit 2511, random")
    file.linear("img_in", HIDDEN, LATENT)
    file.linear("txt_in", HIDDEN, TEXT)
    file.vector("txt_norm.weight", TEXT, 1.0)
    file.linear("time_text_embed.timestep_embedder.linear_1", HIDDEN, 256)
    file.linear("time_text_embed.timestep_embedder.linear_2", HIDDEN, HIDDEN)
    for layer in range(layers):
        block = f"transformer_blocks.{layer}"
        for stream in ("img", "txt"):
            file.linear(f"{block}.{stream}_mod.1", 6 * HIDDEN, HIDDEN, spread=SPREAD / 10)
            file.linear(f"{block}.{stream}_mlp.net.0.proj", 4 * HIDDEN, HIDDEN)
            file.linear(f"{block}.{stream}_mlp.net.2", HIDDEN, 4 * HIDDEN)
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            file.linear(f"{block}.attn.{name}", HIDDEN, HIDDEN)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            file.vector(f"{block}.attn.{name}.weight", HEAD_DIM, 1.0)
    file.linear("norm_out.linear", 2 * HIDDEN, HIDDEN, spread=SPREAD / 10)
    file.linear("proj_out", LATENT, HIDDEN)
    file.write()


def tokens():
    """The vocabulary's tokens with their types, and its merges."""
    merges = gzip.decompress((VOCABULARY / "merges.txt.gz").read_bytes()).decode().splitlines()[1:]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    added = json.loads((VOCABULARY / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    names = alphabet + [merge.replace(" ", "") for merge in merges]
    kinds = [gguf.TokenType.NORMAL] * len(names)
    for number, token in sorted(added.items(), key=lambda item: int(item[0])):
        assert int(number) == len(names)
        names.append(token["content"])
        kinds.append(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    unused = VOCAB - len(names)
    names += [f"[PAD{len(names) + i}]" for i in range(unused)]
    return names, kinds + [gguf.TokenType.UNUSED] * unused, merges


def language_model(path, layers):
    file = Writer(path, "qwen2vl")
    keys = file.gguf
    keys.add_name("Qwen2.5-VL 7B Instruct, random")
    keys.add_block_count(layers)
    keys.add_context_length(32768)
    keys.add_embedding_length(TEXT)
    keys.add_feed_forward_length(INNER)
    keys.add_head_count(TEXT // HEAD_DIM)
    keys.add_head_count_kv(KV_WIDTH // HEAD_DIM)
    keys.add_rope_freq_base(1e6)
    keys.add_rope_dimension_sections([16, 24, 24, 0])
    keys.add_layer_norm_rms_eps(EPS)
    names, kinds, merges = tokens()
    keys.add_tokenizer_model("gpt2")
    keys.add_tokenizer_pre("qwen2")
    keys.add_token_list(names)
    keys.add_token_types(kinds)
    keys.add_token_merges(merges)
    keys.add_eos_token_id(names.index("<|im_end|>"))
    file.matrix("token_embd.weight", VOCAB, TEXT)
    file.vector("output_norm.weight", TEXT, 1.0)
    file.matrix("output.weight", VOCAB, TEXT)
    for layer in range(layers):
        block = f"blk.{layer}"
        for part, out in (("q", TEXT), ("k", KV_WIDTH), ("v", KV_WIDTH)):
            file.linear(f"{block}.attn_{part}", out, TEXT)
        file.matrix(f"{block}.attn_output.weight", TEXT, TEXT)
        file.matrix(f"{block}.ffn_gate.weight", INNER, TEXT)
        file.matrix(f"{block}.ffn_up.weight", INNER, TEXT)
        file.matrix(f"{block}.ffn_down.weight", TEXT, INNER)
        file.vector(f"{block}.attn_norm.weight", TEXT, 1.0)
        file.vector(f"{block}.ffn_norm.weight", TEXT, 1.0)
    file.write()


def vision_tower(path, layers):
    file = Writer(path, "clip")
    keys, half = file.gguf, dict(kind=Type.F16)
    keys.add_type("mmproj")
    keys.add_string("clip.projector_type", "qwen2.5vl_merger")
    keys.add_bool("clip.use_silu", True)
    for key, value in (("block_count", layers), ("attention.head_count", 16), ("patch_size", 14), ("n_wa_pattern", 8)):
        keys.add_uint32(f"clip.vision.{key}", value)
    keys.add_float32("clip.vision.attention.layer_norm_epsilon", EPS)
    keys.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    keys.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        shape = (VISION, 3, 14, 14)
        file.add(name, shape, Type.F16, lambda: plain(shape).astype(np.float16))
    for layer in range(layers):
        block = f"v.blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            file.linear(f"{block}.{name}", VISION, VISION, **half)
        file.linear(f"{block}.ffn_gate", VISION_INNER, VISION, **half)
        file.linear(f"{block}.ffn_up", VISION_INNER, VISION, **half)
        file.linear(f"{block}.ffn_down", VISION, VISION_INNER, **half)
        file.vector(f"{block}.ln1.weight", VISION, 1.0)
        file.vector(f"{block}.ln2.weight", VISION, 1.0)
    file.vector("v.post_ln.weight", VISION, 1.0)
    file.linear("mm.0", 4 * VISION, 4 * VISION, **half)
    file.linear("mm.2", TEXT, 4 * VISION, **half)
    file.write()


# Parts of the autoencoder's names in diffusers, and in Wan's files, which users of single files have.
WAN_NAMES = [
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"coder\.conv_in", "coder.conv1"),
    (r"coder\.norm_out", "coder.head.0"),
    (r"coder\.conv_out", "coder.head.2"),
    (r"mid_block\.resnets\.(\d)\.", lambda found: f"middle.{2 * int(found[1])}."),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"down_blocks\.", "downsamples."),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{4 * int(found[1]) + 3}"),
    (r"\.norm1\.", ".residual.0."),
    (r"(samples|middle)\.(\d+)\.conv1\.", r"\1.\2.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(samples|middle)\.(\d+)\.conv2\.", r"\1.\2.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
]


def wan_name(name):
    for pattern, wan in WAN_NAMES:
        name = re.sub(pattern, wan, name)
    return name


def autoencoder(path):
    import torch
    from diffusers import AutoencoderKLQwenImage
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = AutoencoderKLQwenImage().to(torch.bfloat16).state_dict()
    save_file({wan_name(name): tensor.contiguous() for name, tensor in tensors.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--language-layers", type=int, default=28)
    parser.add_argument("--vision-layers", type=int, default=32)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder(folder / "qwen_image_vae.safetensors")
    vision_tower(folder / "mmproj-F16.gguf", arguments.vision_layers)
    language_model(folder / "Qwen2.5-VL-7B-Instruct-Q4_K.gguf", arguments.language_layers)
    transformer(folder / "qwen-image-edit-2511-Q4_K.gguf", arguments.layers)


if __name__ == "__main__":
    main()
