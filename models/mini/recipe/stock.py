"""The exported pack in the stock pipeline: loading, editing, planning."""
import re
from pathlib import Path

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as reference
import numpy as np
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

import dit
import words
import world

AREA = 64 * 64
REPLY_TOKENS_MAX = 160


def use_small_area():
    """The stock pipeline resizes every picture to about a megapixel; the pack works at 64 × 64."""
    original = reference.calculate_dimensions
    reference.calculate_dimensions = lambda area, ratio: original(AREA, ratio)


class Pack:
    """The pipeline in float32, as a picture editor and as the two planning agents."""

    def __init__(self, folder):
        use_small_area()
        self.pipe = QwenImageEditPipeline.from_pretrained(Path(folder), torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)

    def edit(self, pixels, prompt, seed=0):
        """Edited pixels `[64, 64, 3]` u8."""
        result = self.pipe(image=Image.fromarray(pixels), prompt=prompt, true_cfg_scale=1.0, num_inference_steps=dit.STEPS,
                           height=world.SIZE, width=world.SIZE, generator=torch.Generator().manual_seed(seed))
        return np.asarray(result.images[0].convert("RGB"))

    @torch.no_grad()
    def _reply(self, pixels, system, user):
        text = words.chat_prefix(words.prompt_file(system)) + words.IMAGE + user + "<|im_end|>\n<|im_start|>assistant\n"
        inputs = self.pipe.processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
        out = self.pipe.text_encoder.generate(**inputs, max_new_tokens=REPLY_TOKENS_MAX, do_sample=False)
        return self.pipe.tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

    def decompose(self, pixels, request):
        """The tag reply of the decomposition agent."""
        return self._reply(pixels, "decompose.system.txt", words.prompt_file("decompose.user.txt").replace("{request}", request))

    def sequence(self, pixels, tags):
        """Ordered sub-requests of the sequencing agent."""
        reply = self._reply(pixels, "sequence.system.txt", words.prompt_file("sequence.user.txt").replace("{tags}", tags))
        return [re.sub(r"^\d+\. ", "", line) for line in reply.split("\n") if line.strip()]


# ---------------------------------------------------------------- scores of a decomposition

TAGS = re.compile(r"\A<action>(.*)</action>\n<subject>(.*)</subject>\n<goal>(.*)</goal>\Z")


def parse_tags(reply):
    """Three sets of items, or None where the reply is not well-formed."""
    match = TAGS.match(reply)
    if not match:
        return None
    return [{" ".join(item.lower().split()) for item in part.split(";") if item.strip()} for part in match.groups()]


def f1(found, wanted):
    if not found and not wanted:
        return 1.0
    shared = len(found & wanted)
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def decomposition_scores(reply, truth):
    """Whether the reply is well-formed, the mean of the three F1, and whether it is exactly the annotation."""
    found, wanted = parse_tags(reply), parse_tags(truth)
    if found is None:
        return 0.0, 0.0, 0.0
    return 1.0, sum(map(f1, found, wanted)) / 3, float(found == wanted)
