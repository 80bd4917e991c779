"""Turns an exported pack back into the files of a run folder, so that training goes on from it.

The pack holds rounded weights and no optimiser state: stages that start from it warm their averages up anew and
take smaller steps than from scratch.
"""
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

PARTS = dict(vae=("vae", AutoencoderKLQwenImage), lm=("text_encoder", Qwen2_5_VLForConditionalGeneration),
             dit=("transformer", QwenImageTransformer2DModel))
LR_SCALE = 0.5  # of the peaks from scratch


def from_pack(pack, run):
    """Every part of the pack as the finished stages left it, and as what the stages `lm` and `dit` start from."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(pack) / "tokenizer" / "tokenizer.json", run / "tokenizer.json")
    config = json.loads((Path(pack) / "vae" / "config.json").read_text())
    (run / "vae.json").write_text(json.dumps({k: config[k] for k in ("latents_mean", "latents_std")}, indent=1))
    for stage, (folder, kind) in PARTS.items():
        weights = kind.from_pretrained(Path(pack) / folder, torch_dtype=torch.float32).state_dict()
        torch.save(weights, run / f"{stage}_final.pt")
        torch.save(weights, run / f"{stage}_start.pt")


def start(run, stage, module, optimizers):
    """Loads what `stage` starts from, if the run folder has it, and lowers the learning rates; says whether it did."""
    path = Path(run) / f"{stage}_start.pt"
    if not path.exists():
        return False
    module.load_state_dict(torch.load(path))
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] *= LR_SCALE
    return True
