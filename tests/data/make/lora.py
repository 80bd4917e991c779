"""LoRA files for the transformer of reference/tiny-qwen-2511, and what diffusers computes with them. usage: lora.py TESTS_DATA

lora/every.safetensors   every matrix, ranks 2 and 3, alphas by pattern in the header, bfloat16, as diffusers saves it
lora/few.safetensors     to_q and to_out.0, rank 3, kohya's names with alphas, float32
lora/cases.safetensors   the transformer's output at timestep 0.37 and a whole edit (`pipe.nocfg`, 8-bit levels)
lora/lightning.json      noise levels of the Lightning files' scheduler
The script also checks that diffusers reads kohya's and lightx2v's spellings of the first file to the same numbers."""
import json, math, os, sys, tempfile
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from peft import LoraConfig, get_peft_model_state_dict
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pp

data = sys.argv[1]
reference, out = os.path.join(data, "reference", "tiny-qwen-2511"), os.path.join(data, "lora")
os.makedirs(out, exist_ok=True)
torch.set_grad_enabled(False)
facts = json.load(open(os.path.join(reference, "cases", "cases.json")))
recorded = load_file(os.path.join(reference, "cases", "cases.safetensors"))
pp.VAE_IMAGE_SIZE, pp.CONDITION_IMAGE_SIZE = facts["target_area"], 112 * 112
pipe = QwenImageEditPlusPipeline.from_pretrained(reference, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
dit = pipe.transformer

EVERY = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2", "img_mod.1", "txt_mod.1",
         "img_in", "txt_in", "proj_out", "norm_out.linear", "linear_1", "linear_2"]


def forward():
    return dit(hidden_states=recorded["dit.hidden_states"], timestep=torch.tensor([0.37]), encoder_hidden_states=recorded["dit.encoder_hidden_states"],
               encoder_hidden_states_mask=None, img_shapes=[[tuple(s) for s in facts["dit.img_shapes"]]], return_dict=False)[0]


def edit():
    run = facts["pipe.nocfg"]
    image = pipe(image=[Image.open(os.path.join(reference, "cases", "edit_in.png"))], prompt=run["prompt"], negative_prompt=run["negative_prompt"],
                 true_cfg_scale=run["true_cfg_scale"], num_inference_steps=run["steps"], height=run["height"], width=run["width"],
                 generator=torch.Generator().manual_seed(run["seed"]), output_type="pt").images[0]
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8)


def add(name, seed, dtype, config):
    dit.add_adapter(config, adapter_name=name)
    g = torch.Generator().manual_seed(seed)
    for key, p in sorted(dit.named_parameters()):
        if f".{name}." in key and "lora_" in key:
            p.copy_((0.6 * torch.randn(p.shape, generator=g) / p.shape[1] ** .5).to(dtype).float())
    return {key: p.to(dtype).contiguous() for key, p in get_peft_model_state_dict(dit, adapter_name=name).items()}


base = forward()
assert torch.allclose(base, recorded["dit.out.0.37"], atol=1e-4)
every = LoraConfig(r=2, lora_alpha=3, target_modules=EVERY, rank_pattern={"to_k": 3, "img_mod.1": 3},
                   alpha_pattern={"net.2": 1, "transformer_blocks.1.attn.to_v": 5, "proj_out": 1.5})
factors = add("every", 301, torch.bfloat16, every)
QwenImageEditPlusPipeline.save_lora_weights(out, transformer_lora_layers=factors, weight_name="every.safetensors",
                                            transformer_lora_adapter_metadata=every.to_dict())
few = add("few", 302, torch.float32, LoraConfig(r=3, lora_alpha=4, target_modules=["to_q", "to_out.0"]))

cases = {}
for name, weights in dict(every=dict(every=1.0), minus=dict(every=-0.7), both=dict(every=0.8, few=0.5)).items():
    dit.set_adapters(list(weights), list(weights.values()))
    cases[f"{name}.out"] = forward()
    if name in ("every", "both"):
        cases[f"{name}.levels"] = edit()
    print(name, "moves the output by", (cases[f"{name}.out"] - base).abs().max().item(), "of", base.abs().max().item())
dit.disable_adapters()
print("levels move by", (edit().float() - cases["every.levels"].float()).abs().mean().item())
dit.enable_adapters()
save_file({k: v.contiguous() for k, v in cases.items()}, os.path.join(out, "cases.safetensors"))


def spelled(factors, module, ends, alpha):
    """The same factors under other names."""
    tensors = {}
    for key, p in factors.items():
        stem, end = key.rsplit(".lora_", 1)
        tensors[module(stem) + ends[end]] = p.float()
        tensors[module(stem) + ".alpha"] = torch.tensor(float(alpha(stem)))
    return tensors


def alpha_of_every(stem):
    return {"proj_out": 1.5}.get(stem, 5 if stem == "transformer_blocks.1.attn.to_v" else 1 if stem.endswith(".net.2") else 3)


kohya = lambda stem: "lora_unet_" + stem.replace(".", "_")
down_up = {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight"}
save_file(spelled(few, kohya, down_up, lambda _: 4), os.path.join(out, "few.safetensors"))

# what diffusers makes of the other spellings
dit.delete_adapters(["every", "few"])
with tempfile.TemporaryDirectory() as folder:
    for name, module in dict(lightx2v=lambda stem: stem, kohya=kohya, own=None).items():
        path = os.path.join(folder, f"{name}.safetensors")
        if module is None:
            path = os.path.join(out, "every.safetensors")
        else:
            save_file(spelled(factors, module, down_up, alpha_of_every), path)
        pipe.load_lora_weights(path, adapter_name=name)
        dit.set_adapters([name], [1.0])
        difference = (forward() - cases["every.out"]).abs().max().item()
        print("diffusers reads", name, "to within", difference)
        assert difference < 1e-4, name
        dit.delete_adapters([name])

# Lightning
lightning = dict(base_image_seq_len=256, base_shift=math.log(3), invert_sigmas=False, max_image_seq_len=8192, max_shift=math.log(3), num_train_timesteps=1000,
                 shift=1.0, shift_terminal=None, stochastic_sampling=False, time_shift_type="exponential", use_beta_sigmas=False, use_dynamic_shifting=True,
                 use_exponential_sigmas=False, use_karras_sigmas=False)
levels = {}
for steps in (4, 8):
    for tokens in (32, 4096):
        s = FlowMatchEulerDiscreteScheduler.from_config(lightning)
        mu = pp.calculate_shift(tokens, lightning["base_image_seq_len"], lightning["max_image_seq_len"], lightning["base_shift"], lightning["max_shift"])
        s.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        levels[f"{steps}.{tokens}"] = dict(sigmas=s.sigmas.tolist(), timesteps=s.timesteps.tolist())
json.dump(levels, open(os.path.join(out, "lightning.json"), "w"), indent=1)
