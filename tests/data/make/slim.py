"""Leaves what no test loses out of recorded cases. usage: slim.py TESTS_DATA, again after each new recording

vl.pixel_bytes   [patches, 3 * 14 * 14] u8 stand for `vl.pixel_values`: checked here to give the same float32 values, bit for bit,
                 with both frames of a patch equal
pipe.*.levels    [1, 3, height, width] u8 stand for `pipe.*.image`, but where a test compares the floats (LOOPS)
vl*, vae.*, sched.*   are left out where models, inputs and numbers are those of a reference before it (TWINS)
"""
import os, sys
import numpy as np, torch
from safetensors.torch import load_file, save_file

LOOPS = {"tiny-qwen-2511": "pipe.two", "edit-23": "pipe.cfg", "tiny-qwen-plus": "pipe.nocfg"}  # as in diffusion.py
TWINS = {"tiny-qwen-plus": ["tiny-qwen-edit"], "tiny-qwen-2511": ["tiny-qwen-edit", "tiny-qwen-plus"], "edit-23": ["tiny-qwen-edit"]}
GROUPS = {"vl": "text_encoder", "vl2": "text_encoder", "vae": "vae", "sched": "scheduler"}  # and the part that computes them
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(levels):
    """Both frames of patches `[n, 3 * 14 * 14]` u8 as transformers computes them: 1 / 255 is folded into mean and deviation."""
    mean, std = (torch.tensor(t) * (1.0 / (1 / 255)) for t in (MEAN, STD))
    frame = (levels.view(-1, 3, 1, 196).float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return frame.expand(-1, 3, 2, 196).reshape(-1, 3 * 2 * 196)


def pixel_bytes(values):
    frame = values.view(-1, 3, 2, 196)[:, :, 0].double()
    mean, std = (torch.tensor(t, dtype=torch.float64).view(3, 1) for t in (MEAN, STD))
    levels = ((frame * std + mean) * 255).round().to(torch.uint8).reshape(-1, 3 * 196)
    assert torch.equal(normalised(levels), values)
    return levels.contiguous()


def same_part(folder, other, part):
    """Whether a model's files are equal, configs included."""
    names = sorted(os.listdir(os.path.join(folder, part)))
    read = lambda root, name: open(os.path.join(root, part, name), "rb").read()
    return names == sorted(os.listdir(os.path.join(other, part))) and all(read(folder, n) == read(other, n) for n in names)


def smaller(name, cases):
    """The same cases in fewer bytes."""
    out = {}
    for key, value in cases.items():
        if key == "vl.pixel_values":
            key, value = "vl.pixel_bytes", pixel_bytes(value)
        elif key.endswith(".image") and key not in ("vae.image", LOOPS.get(name, "") + ".image"):
            key, value = key.removesuffix("image") + "levels", (value * 255).round().to(torch.uint8)
        out[key] = value.contiguous()
    return out


def slim(references):
    path = lambda name: os.path.join(references, name, "cases", "cases.safetensors")
    recorded = {name: smaller(name, load_file(path(name))) for name in sorted(os.listdir(references))}
    for name, cases in recorded.items():
        twins = [(os.path.join(references, twin), recorded[twin]) for twin in TWINS.get(name, [])]
        told = lambda key, value: key.split(".")[0] in GROUPS and any(
            key in others and torch.equal(value, others[key]) and same_part(os.path.join(references, name), folder, GROUPS[key.split(".")[0]])
            for folder, others in twins)
        kept = {key: value for key, value in cases.items() if not told(key, value)}
        before = os.path.getsize(path(name))
        save_file(kept, path(name))
        print(name, before, os.path.getsize(path(name)), sorted({key.split(".")[0] for key in kept}))


if __name__ == "__main__":
    slim(os.path.join(sys.argv[1], "reference"))
