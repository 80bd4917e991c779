"""Stage 4: the trained parts as one pipeline in the standard layout, bfloat16."""
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline
from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import dit
import lm
import packed
import train_lm
import train_vae
import words
import world
from train_dit import Frozen

AREA = 64 * 64
FACTS = {"format": 1, "name": "mini", "area": AREA, "vl_area": AREA, "steps": dit.STEPS, "cfg_scale": 1.0,
         "merge": world.WORLD["merge"], "untrained": False}


def fast_tokenizer(tok):
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    for name, token in (("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>"),
                        ("vision_bos_token", "<|vision_start|>"), ("vision_eos_token", "<|vision_end|>")):
        setattr(fast, name, token)
        setattr(fast, f"{name}_id", tok.token_to_id(token))
    return fast


def processor(fast):
    sizes = dict(patch_size=lm.VISION["patch_size"], merge_size=2, temporal_patch_size=2, min_pixels=AREA, max_pixels=AREA)
    return Qwen2VLProcessor(image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=fast,
                            video_processor=Qwen2VLVideoProcessor(**sizes), chat_template=None)


def pipeline(run):
    """The trained parts of a run folder as a stock pipeline."""
    frozen = Frozen.load(run)
    model = dit.build(lm.HIDDEN)
    model.load_state_dict(torch.load(Path(run) / "dit_final.pt"))
    mean, std = (t.flatten().tolist() for t in (frozen.mean, frozen.std))
    vae = type(frozen.vae)(**train_vae.CONFIG, latents_mean=mean, latents_std=std)
    vae.load_state_dict(frozen.vae.state_dict())
    fast = fast_tokenizer(frozen.tok)
    return QwenImageEditPipeline(scheduler=FlowMatchEulerDiscreteScheduler(**dit.SCHEDULE), vae=vae, text_encoder=frozen.model,
                                 tokenizer=fast, processor=processor(fast), transformer=model)


def compare_with_stock(pipe):
    """Raises unless the batched forwards that were trained agree with the stock classes."""
    frozen_prefix = torch.tensor(pipe.tokenizer.encode(words.prefixes()["edit"]))
    case = world.sample_case(0)
    ids = train_lm.spread(pipe.tokenizer.encode(words.body(case.request)), pipe.tokenizer.image_token_id)
    pixels = torch.from_numpy(world.render(case.scene))[None]
    for sequential in (True, False):
        lm.check_equal(pipe.text_encoder, frozen_prefix, torch.tensor([ids]), pixels, sequential)
    dit.check_equal(pipe.transformer, torch.randn(1, 20, lm.HIDDEN, generator=torch.Generator().manual_seed(1)))


def main(run, out):
    out, pipe = Path(out), pipeline(run)
    compare_with_stock(pipe)
    pipe.to(torch.bfloat16).save_pretrained(out)
    packed.pack(out)
    (out / "pentimento.json").write_text(json.dumps(FACTS) + "\n")
    for path in sorted(out.glob("*/*.safetensors")):
        print(path.relative_to(out), path.stat().st_size)
