"""What Qwen2VLImageProcessor makes of pictures of many sizes. usage: vlm_sizes.py OUT.json

Pictures are computed: byte c of pixel (x, y) is (31 x² + 17 y² + 7 x y + 101 c) // 8 mod 256. Recorded are the grid, the SHA-256 of the
patches brought back to bytes, and four pixel values.
"""
import hashlib, json, sys
import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

SETTINGS = [dict(patch=14, merge=2, frames=2, low=56 * 56, high=28 * 28 * 1280), dict(patch=14, merge=2, frames=2, low=28 * 28 * 4, high=28 * 28 * 64),
            dict(patch=8, merge=2, frames=2, low=1024, high=16 * 16 * 50), dict(patch=16, merge=1, frames=1, low=256, high=10 ** 6), dict(patch=6, merge=3, frames=2, low=5000, high=9000)]
SIZES = [(1, 1), (1, 200), (200, 1), (2, 3), (13, 14), (14, 14), (27, 29), (28, 28), (42, 70), (56, 84), (98, 150), (150, 98), (3, 600), (900, 5), (333, 77),
         (199, 201), (384, 384), (640, 480), (511, 1023), (70, 700), (112, 113), (1200, 900)]


def picture(w, h):
    x, y, c = np.arange(w)[None, :, None], np.arange(h)[:, None, None], np.arange(3)[None, None, :]
    return Image.fromarray(((31 * x * x + 17 * y * y + 7 * x * y + 101 * c) // 8 % 256).astype(np.uint8))


cases = []
for s in SETTINGS:
    ip = Qwen2VLImageProcessor(min_pixels=s["low"], max_pixels=s["high"], patch_size=s["patch"], merge_size=s["merge"], temporal_patch_size=s["frames"])
    for w, h in SIZES:
        if w * h > 400_000 and s is not SETTINGS[0]:
            continue
        o = ip(images=[picture(w, h)], return_tensors="pt")
        p = o["pixel_values"].double().numpy()
        channel = np.repeat(np.arange(3), s["frames"] * s["patch"] ** 2)
        back = (p * np.array(ip.image_std)[channel] + np.array(ip.image_mean)[channel]) * 255
        assert abs(back - back.round()).max() < 1e-3
        at = [0, p.size // 3, p.size // 2, p.size - 1]
        cases.append(dict(settings=s, width=w, height=h, grid=o["image_grid_thw"][0].tolist(), sha256=hashlib.sha256(back.round().astype(np.uint8).tobytes()).hexdigest(),
                          at=at, values=[float(p.reshape(-1)[i]) for i in at]))
json.dump(cases, open(sys.argv[1], "w"), separators=(",", ":"))
print(len(cases))
