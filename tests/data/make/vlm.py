"""Tiny Qwen2.5-VL references with other geometry, names and config forms. usage: vlm.py OUT SEED {flat,merge3,deep}

flat    the older files: a flat config.json, preprocessor_config.json, vocab.json + merges.txt, tied embeddings, patches of 8 px
merge3  the newer files: nested configs, chat_template.jinja, two shards with the newer tensor names, tokens of 3 × 3 patches, one frame
deep    more layers and windows, one key head, embeddings tied but two matrices in the file, generation settings
"""
import json, os, shutil, sys
import numpy as np, torch
from PIL import Image
from common import *
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

out, seed, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(seed); torch.set_grad_enabled(False)
G = dict(
    flat=dict(patch=8, merge=2, frames=2, window=48, depth=3, full=[1], vheads=1, vdim=16, heads=6, kv=3, hd=8, mrope=[1, 1, 2], layers=2, tie=True, theta=1e4, eps=1e-5),
    merge3=dict(patch=6, merge=3, frames=1, window=40, depth=2, full=[], vheads=3, vdim=24, heads=2, kv=2, hd=20, mrope=[2, 3, 5], layers=2, tie=False, theta=1e6, eps=1e-6),
    deep=dict(patch=14, merge=2, frames=2, window=112, depth=5, full=[0, 4], vheads=2, vdim=24, heads=5, kv=1, hd=12, mrope=[1, 2, 1, 2], layers=3, tie=True, theta=5e5, eps=1e-6),
)[kind]
for d in ("text_encoder", "tokenizer", "processor", "cases"):
    os.makedirs(os.path.join(out, d), exist_ok=True)
tk = tiny_tokenizer(480 + 16 * (seed % 3)); V = tk.get_vocab_size(); ids = {s: tk.token_to_id(s) for s in SPECIALS}
fast = PreTrainedTokenizerFast(tokenizer_object=tk, eos_token="<|im_end|>", pad_token="<|endoftext|>")
fast.image_token, fast.video_token = "<|image_pad|>", "<|video_pad|>"
fast.image_token_id, fast.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
token = G["patch"] * G["merge"]
low, high = token * token * 3, token * token * 40
ip = Qwen2VLImageProcessor(min_pixels=low, max_pixels=high, patch_size=G["patch"], merge_size=G["merge"], temporal_patch_size=G["frames"],
                           **(dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.3, 0.5]) if kind == "merge3" else {}))
hid = G["heads"] * G["hd"]
cfg = Qwen2_5_VLConfig(
    text_config=dict(vocab_size=V + 5, hidden_size=hid, intermediate_size=40, num_hidden_layers=G["layers"], num_attention_heads=G["heads"], num_key_value_heads=G["kv"],
                     rope_parameters={"rope_type": "default", "rope_theta": G["theta"], "mrope_section": G["mrope"]}, rms_norm_eps=G["eps"],
                     bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], max_position_embeddings=600),
    vision_config=dict(depth=G["depth"], hidden_size=G["vdim"], intermediate_size=28, num_heads=G["vheads"], out_hidden_size=hid, fullatt_block_indexes=G["full"],
                       window_size=G["window"], patch_size=G["patch"], spatial_merge_size=G["merge"], temporal_patch_size=G["frames"], hidden_act="silu"),
    image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
    vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=G["tie"])
te = seeded(Qwen2_5_VLForConditionalGeneration(cfg).float(), seed + 1)
if kind == "deep":  # tied by config, but the file has another matrix for the logits: the reference then uses that one
    te.lm_head.weight = torch.nn.Parameter((torch.randn(V + 5, hid, generator=torch.Generator().manual_seed(seed)) / hid ** .5).bfloat16().float())
proc = Qwen2VLProcessor(image_processor=ip, tokenizer=fast, video_processor=Qwen2VLVideoProcessor(), chat_template=None)

c = Cases(os.path.join(out, "cases"))
P = "<|vision_start|><|image_pad|><|vision_end|>"
sizes = [(70, 44), (33, 90), (200, 9), (token * 4, token * 3)]
prompts = [("text", "<|im_start|>user\nturn the cat into a dog 你好<|im_end|>\n<|im_start|>assistant\n", 0),
           ("one", f"<|im_start|>user\n{P}remove the parked car<|im_end|>\n<|im_start|>assistant\n", 1),
           ("four", f"{P}Picture 2: {P}{P} and <|vision_start|><|image_pad|><|vision_end|>", 4),
           ("bare", "<|image_pad|>", 1)]
images = [scene(w, h, seed + i) for i, (w, h) in enumerate(sizes)]
for i, im in enumerate(images): im.save(os.path.join(out, "cases", f"{i}.png"))
c.fact("prompts", [dict(name=n, text=t, pictures=k) for n, t, k in prompts])
for name, text, count in prompts:
    inp = proc(text=[text], images=images[:count] or None, return_tensors="pt")
    c.put(f"{name}.input_ids", inp["input_ids"])
    if count:
        pos, delta = te.model.get_rope_index(inp["input_ids"], mm_token_type_ids=inp["mm_token_type_ids"], image_grid_thw=inp["image_grid_thw"], attention_mask=inp["attention_mask"])
        c.put(f"{name}.position_ids", pos); c.put(f"{name}.rope_delta", delta); c.put(f"{name}.image_grid_thw", inp["image_grid_thw"])
        c.put(f"{name}.vision_embeds", torch.cat(list(te.model.get_image_features(inp["pixel_values"], inp["image_grid_thw"]).pooler_output)))
    o = te(**inp, output_hidden_states=True)
    c.put(f"{name}.hidden_last", o.hidden_states[-1]); c.put(f"{name}.logits_last", o.logits[:, -1:])
    # without token types, as the editing pipelines call their text encoder
    few = {k: v for k, v in inp.items() if k != "mm_token_type_ids"}
    te.model.rope_deltas = None
    c.put(f"{name}.hidden_sequential", te(**few, output_hidden_states=True).hidden_states[-1])
    # generation counts on from the last position, which is wrong when that is a picture's: prompts never end so
    for penalty in (1.0, 1.3) if name != "bare" else ():
        gen = te.generate(**inp, generation_config=GenerationConfig(max_new_tokens=20, do_sample=False, repetition_penalty=penalty, eos_token_id=ids["<|im_end|>"], pad_token_id=0))
        c.put(f"{name}.greedy.{penalty}", gen[0, inp["input_ids"].shape[1]:])
c.write()

enc = os.path.join(out, "text_encoder")
te.to(torch.bfloat16).save_pretrained(enc, **(dict(max_shard_size="60KB", save_original_format=False) if kind == "merge3" else {}))
if kind == "deep":
    w = load_file(os.path.join(enc, "model.safetensors")); w["lm_head.weight"] = te.lm_head.weight.detach().contiguous()
    save_file(w, os.path.join(enc, "model.safetensors"), metadata={"format": "pt"})
    json.dump(dict(bos_token_id=ids["<|endoftext|>"], do_sample=True, eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], repetition_penalty=1.05, temperature=0.1, top_k=1, top_p=0.001),
              open(os.path.join(enc, "generation_config.json"), "w"), indent=1)
config = json.load(open(os.path.join(enc, "config.json")))
TEMPLATE = """{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
if kind == "flat":
    text = config.pop("text_config"); rope = text.pop("rope_parameters"); text.pop("layer_types"); text.pop("model_type")
    vision = config["vision_config"]; vision["in_chans"] = vision.pop("in_channels"); vision["spatial_patch_size"] = vision["patch_size"]; vision.pop("rope_parameters")
    vision["model_type"] = "qwen2_5_vl"
    config.update(text, rope_theta=rope["rope_theta"], rope_scaling={"type": "mrope", "mrope_section": rope["mrope_section"]}, sliding_window=32768, max_window_layers=2, use_sliding_window=False,
                  torch_dtype="bfloat16", vision_token_id=ids["<|vision_pad|>"])
    json.dump(config, open(os.path.join(enc, "config.json"), "w"), indent=1)
    json.dump(dict(min_pixels=low, max_pixels=high, patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=ip.image_mean, image_std=ip.image_std,
                   image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor"), open(os.path.join(out, "processor", "preprocessor_config.json"), "w"), indent=1)
    tj = json.loads(tk.to_str())
    json.dump(tj["model"]["vocab"], open(os.path.join(out, "tokenizer", "vocab.json"), "w"), ensure_ascii=False)
    open(os.path.join(out, "tokenizer", "merges.txt"), "w").write("#version: 0.2\n" + "\n".join(" ".join(m) for m in tj["model"]["merges"]) + "\n")
    json.dump({s: ids[s] for s in SPECIALS}, open(os.path.join(out, "tokenizer", "added_tokens.json"), "w"), indent=1)
    json.dump(dict(chat_template=TEMPLATE, tokenizer_class="Qwen2Tokenizer"), open(os.path.join(out, "tokenizer", "tokenizer_config.json"), "w"), indent=1)
else:
    proc.save_pretrained(os.path.join(out, "processor"))
    os.rmdir(os.path.join(out, "tokenizer"))
    if kind == "merge3":
        open(os.path.join(out, "processor", "chat_template.jinja"), "w").write(TEMPLATE)
print("ok", out, sum(p.numel() for p in te.parameters()), {k: list(v.shape) for k, v in c.t.items() if "hidden_last" in k})
