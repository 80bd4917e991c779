"""Numbers for the diffusion tests beyond the reference checkpoints' own cases. usage: diffusion.py REFERENCE_FOLDER OUT

Writes OUT/noise.safetensors (torch's CPU generator), OUT/schedules.{json,safetensors} (noise levels of other scheduler
configs) and OUT/loop-NAME.safetensors (what goes into the denoising loop of a recorded pipeline run: conditioning, reference
tokens and noise, so that the loop can be tested without a text encoder)."""
import json, os, sys
import numpy as np, torch
from PIL import Image
from safetensors.torch import save_file
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline, QwenImageEditPlusPipeline
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as pe
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pp

references, out = sys.argv[1], sys.argv[2]
os.makedirs(out, exist_ok=True)
torch.set_grad_enabled(False)

# 1. noise
noise = {}
randn = lambda seed, *counts: [torch.randn(n, generator=g) for g in [torch.Generator().manual_seed(seed)] for n in counts]
for n in list(range(1, 41)) + [64, 100, 1000, 4096 + 3]:
    noise[f"seed.{n}.{n}"] = randn(n, n)[0]
for seed in (0, 1, 2**31, 2**32 - 1, 2**32 + 7, 2**53 + 1, 2**63 + 12345, 2**64 - 1):
    noise[f"seed.{seed}.5"], noise[f"seed.{seed}.35"] = randn(seed, 5)[0], randn(seed, 35)[0]
for i, x in enumerate(randn(77, 3, 20, 2, 1, 33)):  # one generator, several calls: the odd number of the short path is kept
    noise[f"calls.{i}"] = x
save_file(noise, os.path.join(out, "noise.safetensors"))

# 2. schedules
base = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02)
configs = {
    "published": base,
    "no_terminal": base | dict(shift_terminal=None),
    "zero_terminal": base | dict(shift_terminal=0.0),
    "lightning": base | dict(base_shift=float(np.log(3)), max_shift=float(np.log(3)), shift_terminal=None),
    "linear": base | dict(time_shift_type="linear"),
    "static": dict(shift=3.0),
    "static_terminal": dict(shift=1.7, shift_terminal=0.1),
    "plain": dict(),
    "defaults": dict(use_dynamic_shifting=True),
    "karras": base | dict(use_karras_sigmas=True),
    "exponential": base | dict(use_exponential_sigmas=True),
    "inverted": base | dict(invert_sigmas=True),
    "trained_500": base | dict(num_train_timesteps=500),
}
levels = {}
for name, config in configs.items():
    for steps in (range(1, 51) if name in ("published", "static") else (1, 2, 3, 7, 20, 50)):
        if steps == 1 and config.get("shift_terminal"):
            continue  # the reference divides by zero
        for tokens in (24, 1024, 9000) if steps in (7, 20) else (4096,):
            s = FlowMatchEulerDiscreteScheduler(**config)
            c = s.config
            mu = pp.calculate_shift(tokens, c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096), c.get("base_shift", 0.5), c.get("max_shift", 1.15))
            s.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            levels[f"{name}.{steps}.{tokens}.sigmas"], levels[f"{name}.{steps}.{tokens}.timesteps"] = s.sigmas.clone(), s.timesteps.clone()
json.dump(configs, open(os.path.join(out, "schedules.json"), "w"), indent=1)
save_file(levels, os.path.join(out, "schedules.safetensors"))

# 3. what goes into the loop
def record(name, tag, kind):
    folder = os.path.join(references, name)
    facts = json.load(open(os.path.join(folder, "cases", "cases.json")))
    area, run = facts["target_area"], facts[tag]
    original = pe.calculate_dimensions
    pe.calculate_dimensions = lambda _, ratio: original(area, ratio)
    pp.VAE_IMAGE_SIZE, pp.CONDITION_IMAGE_SIZE = area, 112 * 112
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = {}
    encode, prepare = pipe.encode_prompt, pipe.prepare_latents
    def encode_prompt(*a, **k):
        result = encode(*a, **k)
        seen["negative" if "positive" in seen else "positive"] = result[0].clone()
        assert result[1] is None or result[1].all()
        return result
    def prepare_latents(*a, **k):
        result = prepare(*a, **k)
        seen["noise"], seen["references"] = result[0].clone(), result[1].clone()
        return result
    pipe.encode_prompt, pipe.prepare_latents = encode_prompt, prepare_latents
    forward = pipe.transformer.forward
    def transformer(*a, **k):
        seen.setdefault("grids", torch.tensor(k["img_shapes"][0])[:, 1:].clone())
        return forward(*a, **k)
    pipe.transformer.forward = transformer
    pictures = [Image.open(os.path.join(folder, "cases", p)) for p in (["edit_in.png", "edit_in2.png"] if tag == "pipe.two" else ["edit_in.png"])]
    final = pipe(image=pictures if kind is QwenImageEditPlusPipeline else pictures[0], prompt=run["prompt"], negative_prompt=run["negative_prompt"],
                 true_cfg_scale=run["true_cfg_scale"], num_inference_steps=run["steps"], height=run["height"], width=run["width"],
                 generator=torch.Generator().manual_seed(run["seed"]), output_type="latent").images
    pe.calculate_dimensions = original
    from safetensors.torch import load_file
    expected = load_file(os.path.join(folder, "cases", "cases.safetensors"))[f"{tag}.latents.{run['steps'] - 1}"]
    assert torch.allclose(final, expected, atol=1e-4), (name, tag, (final - expected).abs().max())
    seen = {k: v.contiguous() for k, v in seen.items()}
    save_file(seen, os.path.join(out, f"loop-{name}-{tag}.safetensors"))

record("tiny-qwen-2511", "pipe.two", QwenImageEditPlusPipeline)
record("edit-23", "pipe.cfg", QwenImageEditPipeline)
record("tiny-qwen-plus", "pipe.nocfg", QwenImageEditPlusPipeline)
