"""Pictures of a size that is not the one of the model's area. usage: other_size.py REFERENCE_FOLDER OUT

Writes OUT/other-size-NAME.png: what the pipelines make of a request with height and width of its own."""
import os, sys
import torch
from PIL import Image
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as pe
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as pp

references, out = sys.argv[1], sys.argv[2]
torch.set_grad_enabled(False)
AREA = 96 * 96
calculate = pe.calculate_dimensions
pe.calculate_dimensions = lambda area, ratio: calculate(AREA, ratio)
pp.VAE_IMAGE_SIZE, pp.CONDITION_IMAGE_SIZE = AREA, 112 * 112
for name, pipeline, pictures in (("tiny-qwen-edit", QwenImageEditPipeline, 1), ("tiny-qwen-2511", QwenImageEditPlusPipeline, 2)):
    folder = os.path.join(references, name)
    pipe = pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.open(os.path.join(folder, "cases", f)).convert("RGB") for f in ("edit_in.png", "edit_in2.png")[:pictures]]
    made = pipe(image=images if pictures > 1 else images[0], prompt="make the coat red", negative_prompt=" ", true_cfg_scale=3.0, num_inference_steps=3,
                height=48, width=80, generator=torch.Generator().manual_seed(11)).images[0]
    made.save(os.path.join(out, f"other-size-{name}.png"))
