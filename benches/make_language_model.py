#!/usr/bin/env python3
"""Write one language model at the dimensions of Qwen2.5-VL with random weights, for two programs.

    make_language_model.py FOLDER [--size 3b|7b] [--layers 4]

FOLDER/text_encoder and FOLDER/processor are what pentimento reads, FOLDER/model-bf16.gguf is what
llama.cpp's llama-quantize reads. Both hold the same bfloat16 numbers. 3b: hidden 2048, inner 11008,
16 heads of 128 on 2 for keys and values, a tied vocabulary of 2048 tokens. 7b: hidden 3584, inner
18944, 28 heads on 4, and the whole vocabulary of 152064 tokens, so that its logits cost what they
cost. The vision tower, which llama.cpp does not have in this file, is as small as it may be.

Needs numpy and gguf.
"""

import argparse
import json
import shutil
from pathlib import Path

import gguf
import numpy as np

SIZES = {"3b": (2048, 11008, 16, 2, 2048), "7b": (3584, 18944, 28, 4, 152064)}
HEAD_DIM = 128
WIDTH, INNER, HEADS, KV_HEADS, VOCAB = SIZES["3b"]
VISION_WIDTH, VISION_INNER = 64, 64
EPS, ROPE_BASE, ROPE_SECTIONS, CONTEXT = 1e-6, 1e6, [16, 24, 24], 32768
PROCESSOR = Path(__file__).parent.parent / "tests/data/vlm/deep/processor"


def language_tensors(layers):
    """Names in a checkpoint, names in a GGUF file, shapes."""
    kv_width = KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", "token_embd.weight", (VOCAB, WIDTH)
    yield "model.norm.weight", "output_norm.weight", (WIDTH,)
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, out in [("q", WIDTH), ("k", kv_width), ("v", kv_width)]:
            yield f"{ours}.self_attn.{name}_proj.weight", f"{theirs}.attn_{name}.weight", (out, WIDTH)
            yield f"{ours}.self_attn.{name}_proj.bias", f"{theirs}.attn_{name}.bias", (out,)
        yield f"{ours}.self_attn.o_proj.weight", f"{theirs}.attn_output.weight", (WIDTH, WIDTH)
        yield f"{ours}.mlp.gate_proj.weight", f"{theirs}.ffn_gate.weight", (INNER, WIDTH)
        yield f"{ours}.mlp.up_proj.weight", f"{theirs}.ffn_up.weight", (INNER, WIDTH)
        yield f"{ours}.mlp.down_proj.weight", f"{theirs}.ffn_down.weight", (WIDTH, INNER)
        yield f"{ours}.input_layernorm.weight", f"{theirs}.attn_norm.weight", (WIDTH,)
        yield f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight", (WIDTH,)


def vision_tensors():
    """Names and shapes of the smallest vision tower."""
    width, inner, merged = VISION_WIDTH, VISION_INNER, 4 * VISION_WIDTH
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    yield "visual.blocks.0.norm1.weight", (width,)
    yield "visual.blocks.0.norm2.weight", (width,)
    parts = [
        ("blocks.0.attn.qkv", 3 * width, width),
        ("blocks.0.attn.proj", width, width),
        ("blocks.0.mlp.gate_proj", inner, width),
        ("blocks.0.mlp.up_proj", inner, width),
        ("blocks.0.mlp.down_proj", width, inner),
        ("merger.mlp.0", merged, merged),
        ("merger.mlp.2", WIDTH, merged),
    ]
    for name, out, into in parts:
        yield f"visual.{name}.weight", (out, into)
        yield f"visual.{name}.bias", (out,)
    yield "visual.merger.ln_q.weight", (width,)


def random_bf16(random, shape):
    numbers = random.standard_normal(shape, dtype=np.float32)
    numbers = 1 + 0.1 * numbers if len(shape) == 1 else 0.02 * numbers
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def save_safetensors(tensors, path):
    header, start = {}, 0
    for name, numbers in tensors.items():
        end = start + numbers.nbytes
        header[name] = {"dtype": "BF16", "shape": numbers.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for numbers in tensors.values():
            file.write(numbers.tobytes())


def save_gguf(tensors, layers, path):
    writer = gguf.GGUFWriter(path, "qwen2vl")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_sections([*ROPE_SECTIONS, 0])
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{token}" for token in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    for name, numbers in tensors.items():
        if numbers.ndim == 1:
            wide = numbers.astype(np.uint32) << 16
            writer.add_tensor(name, wide.view(np.float32))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, numbers.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def config(layers):
    added = json.loads((PROCESSOR / "tokenizer.json").read_text())["added_tokens"]
    image = next(token["id"] for token in added if token["content"] == "<|image_pad|>")
    return {
        "model_type": "qwen2_5_vl",
        "image_token_id": image,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": ROPE_BASE,
        "rope_scaling": {"type": "mrope", "mrope_section": ROPE_SECTIONS},
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 1,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_INNER,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    global WIDTH, INNER, HEADS, KV_HEADS, VOCAB
    WIDTH, INNER, HEADS, KV_HEADS, VOCAB = SIZES[arguments.size]
    folder, layers = arguments.folder, arguments.layers
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    shutil.copytree(PROCESSOR, folder / "processor", dirs_exist_ok=True)

    random = np.random.default_rng(1)
    ours, theirs = {}, {}
    for our_name, their_name, shape in language_tensors(layers):
        ours[our_name] = theirs[their_name] = random_bf16(random, shape)
    for name, shape in vision_tensors():
        ours[name] = random_bf16(random, shape)
    save_safetensors(ours, folder / "text_encoder/model.safetensors")
    save_gguf(theirs, layers, folder / "model-bf16.gguf")
    (folder / "text_encoder/config.json").write_text(json.dumps(config(layers), indent=2) + "\n")


if __name__ == "__main__":
    main()
