"""Low-rank adapters by `peft` on tiny Qwen2.5-VL references, and what the models compute with them. usage: adapter.py TESTS_DATA

qv   q_proj and v_proj of vlm/flat, rank 4, float32
all  every matrix of reference/tiny-qwen-edit's decoder, rank 8, rank-stabilised, with patterns of ranks and alphas, bfloat16
"""
import os, shutil, sys
import torch
from PIL import Image
from common import *
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from slim import normalised
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

data = sys.argv[1]
torch.set_grad_enabled(False)
DECODER = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
VARIANTS = dict(
    qv=("vlm/flat", torch.float32, 201, LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])),
    all=("reference/tiny-qwen-edit", torch.bfloat16, 202,
         LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=DECODER,
                    rank_pattern={"layers.1.self_attn.q_proj": 3, "down_proj": 12, "q_proj": 5},
                    alpha_pattern={r"layers\.[02]\.mlp\.(gate|up)_proj": 7.5, "k_proj": 2})))
LAST = 4  # logits are kept for the last tokens only


def flat_inputs(folder, recorded, config):
    """A text, and a text with a picture that is whole tokens already, so that no resampling is part of the numbers."""
    geometry = config.vision_config
    area = (geometry.patch_size * geometry.spatial_merge_size) ** 2
    ip = Qwen2VLImageProcessorPil(min_pixels=area * 3, max_pixels=area * 40, patch_size=geometry.patch_size, merge_size=geometry.spatial_merge_size,
                                  temporal_patch_size=geometry.temporal_patch_size)
    picture = ip(images=[Image.open(os.path.join(folder, "cases", "3.png"))], return_tensors="pt")
    count = int(picture["image_grid_thw"].prod()) // geometry.spatial_merge_size ** 2
    written = recorded["one.input_ids"]
    at = (written[0] == config.image_token_id).nonzero()[:, 0]
    ids = torch.cat([written[:, :at[0]], torch.full((1, count), config.image_token_id), written[:, at[-1] + 1:]], 1)
    return dict(text=dict(input_ids=recorded["text.input_ids"]), one=dict(input_ids=ids, **picture))


def recorded_inputs(recorded):
    return dict(vl=dict(input_ids=recorded["vl.input_ids"], pixel_values=normalised(recorded["vl.pixel_bytes"]), image_grid_thw=recorded["vl.image_grid_thw"][:1]))


for variant, (base, dtype, seed, config) in VARIANTS.items():
    folder, out = os.path.join(data, base), os.path.join(data, "vlm", "adapters", variant)
    shutil.rmtree(out, ignore_errors=True)
    te = Qwen2_5_VLForConditionalGeneration.from_pretrained(os.path.join(folder, "text_encoder"), dtype=torch.float32, attn_implementation="eager").eval()
    recorded = load_file(os.path.join(folder, "cases", "cases.safetensors"))
    prompts = flat_inputs(folder, recorded, te.config) if variant == "qv" else recorded_inputs(recorded)
    c = Cases(os.path.join(out, "cases"))

    def record(model, prefix):
        for name, inputs in prompts.items():
            ids = inputs["input_ids"]
            inputs = dict(inputs, attention_mask=torch.ones_like(ids))
            if "pixel_values" in inputs:
                inputs["mm_token_type_ids"] = (ids == te.config.image_token_id).int()
            te.model.rope_deltas = None
            o = model(**inputs, output_hidden_states=True)
            c.put(f"{prefix}.{name}.hidden_last", o.hidden_states[-1]); c.put(f"{prefix}.{name}.logits", o.logits[:, -LAST:])
            end = te.config.text_config.eos_token_id
            gen = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=16, do_sample=False, repetition_penalty=1.0, eos_token_id=end, pad_token_id=0))
            c.put(f"{prefix}.{name}.greedy", gen[0, ids.shape[1]:])

    record(te, "base")
    first = next(iter(prompts))
    assert torch.allclose(c.t[f"base.{first}.hidden_last"], recorded[f"{first}.hidden_last"], atol=1e-4)
    model = get_peft_model(te, config).eval()
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.copy_((torch.randn(p.shape, generator=g) / p.shape[1] ** .5).to(dtype).float())
    record(model, "adapted")
    c.fact("prompts", list(prompts)); c.write()
    for name, p in model.named_parameters():
        if "lora_" in name: p.data = p.data.to(dtype)
    model.save_pretrained(out)
    os.remove(os.path.join(out, "README.md"))
    for name in prompts:
        print(variant, name, "logits move by", (c.t[f"adapted.{name}.logits"] - c.t[f"base.{name}.logits"]).abs().max().item())
