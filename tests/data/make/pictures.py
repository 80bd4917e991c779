"""Makes tests/data/pictures: small picture files and what Pillow 13 and torch 2.8 make of them.

Run in the repository's root: python tests/data/make/pictures.py
"""
import hashlib, json, struct, zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

OUT = Path("tests/data/pictures")
W, H = 24, 16
cases = {}


def scene(width=W, height=H, depth=8):
    """A smooth picture that no flip or turn leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    top = (1 << depth) - 1
    planes = [x * top / (width - 1), y * top / (height - 1), (x + y) * top / (width + height - 2) * 0.5 + top * 0.25]
    return np.stack([np.round(p) for p in planes], -1).astype(np.uint16 if depth == 16 else np.uint8)


def mask():
    return Image.fromarray(np.linspace(0, 255, W * H).reshape(H, W).astype(np.uint8))


def expect(name, tolerance=0, **facts):
    """Notes what Pillow shows: upright, over white, RGB."""
    image = ImageOps.exif_transpose(Image.open(OUT / name))
    image.load()
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        facts["alpha"] = rgba.getchannel("A").tobytes().hex()
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        tolerance = max(tolerance, 1)
    rgb = image.convert("RGB")
    cases[name] = {"size": list(rgb.size), "rgb": rgb.tobytes().hex(), "tolerance": tolerance, **facts}


def save(image, name, tolerance=0, facts=None, **options):
    image.save(OUT / name, **options)
    expect(name, tolerance, **(facts or {}))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def wide(name, colour, samples):
    """A PNG with 16 bits per channel, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    (OUT / name).write_bytes(png(samples.shape[1], samples.shape[0], 16, colour, rows))


def files():
    rgb = Image.fromarray(scene())
    rgba = rgb.copy(); rgba.putalpha(mask())
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    srgb[24:36] = bytes(12)  # the time it was made
    srgb = bytes(srgb)
    for value in range(1, 9):
        exif = Image.Exif(); exif[0x0112] = value; exif[0x010F] = "Maker"
        save(rgb, f"oriented-{value}.jpg", 3, exif=exif, quality=95, subsampling=0)
    save(rgb, "oriented.png", exif=exif)
    save(rgb, "oriented.webp", exif=exif, lossless=True)
    exif = Image.Exif(); exif[0x0112] = 6
    save(rgb, "oriented.tif", exif=exif)
    save(rgb, "plain.bmp"); save(rgb, "plain.ppm"); save(rgb, "plain.tif"); save(rgb, "plain.qoi")
    save(rgb, "plain.webp", lossless=True)
    save(rgb, "lossy.webp", 12)
    save(rgb, "progressive.jpg", 3, progressive=True, quality=90, subsampling=0)
    save(rgb, "subsampled.jpg", 12, quality=90, subsampling=2)
    save(rgb.convert("L"), "grey.png"); save(rgb.convert("L"), "grey.jpg", 3, quality=95)
    save(Image.merge("LA", (rgb.convert("L"), mask())), "grey-alpha.png")
    save(rgb.convert("1"), "one-bit.png")
    save(rgb.quantize(16), "palette.png"); save(rgb.quantize(16), "palette.gif")
    save(rgba, "alpha.png"); save(rgba, "alpha.webp", lossless=True)
    indexed = rgb.quantize(8); indexed.info["transparency"] = 3
    save(indexed, "palette-alpha.png", transparency=3)
    opaque = rgb.copy(); opaque.putalpha(255)
    save(opaque, "opaque-alpha.png")
    cmyk = rgb.convert("CMYK")
    dark = np.array(cmyk); dark[..., 3] = np.linspace(0, 200, H).astype(np.uint8)[:, None]
    cmyk = Image.fromarray(dark, "CMYK")
    save(cmyk, "cmyk.jpg", 6, quality=95, subsampling=0); save(cmyk, "cmyk.tif", 2)
    save(rgb, "icc.png", icc_profile=srgb, facts={"icc": len(srgb)})
    save(rgb, "icc.jpg", 3, icc_profile=srgb, quality=95, subsampling=0, facts={"icc": len(srgb)})
    grey_icc = bytearray(srgb); grey_icc[16:20] = b"GRAY"
    save(rgb.convert("L"), "icc-grey.png", icc_profile=bytes(grey_icc))
    wide("rgb16.png", 2, scene(depth=16)); expect("rgb16.png")
    wide("grey16.png", 0, scene(depth=16)[..., :1])
    # Pillow clips 16-bit grey instead of scaling it, so the expectation is written out.
    grey = (scene(depth=16)[..., :1] >> 8).repeat(3, -1).astype(np.uint8)
    cases["grey16.png"] = {"size": [W, H], "rgb": grey.tobytes().hex(), "tolerance": 0}
    others = [rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rgb.rotate(180)]
    save(rgb.quantize(16), "animated.gif", save_all=True, append_images=others, duration=50)
    save(rgb, "animated.png", save_all=True, append_images=others, duration=50)
    save(rgb, "animated.webp", save_all=True, append_images=others, duration=50, lossless=True)
    save(rgb, "pages.tif", save_all=True, append_images=others)
    save(Image.new("RGB", (1, 1), (12, 200, 90)), "one-pixel.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a caf\u00e9\nSteps: 3"); info.add_text("packed", "x" * 3000, zip=True)
    info.add_itxt("Chinese", "\u4fee\u6539\u56fe\u50cf"); info.add_itxt("packed too", "\u4fee" * 2000, zip=True)
    save(rgb, "texts.png", pnginfo=info)
    data = (OUT / "texts.png").read_bytes()
    late = chunk(b"tEXt", b"late\0after the pixels")
    bomb = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(b"\0" * (64 << 20), 9))
    (OUT / "texts.png").write_bytes(data[:-12] + late + bomb + data[-12:])


def pattern(width, height):
    """The pattern of the same name in tests/suite/pixels.rs: noise with hard edges."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    mixed = (x * 374761393 + y * 668265263 + c * 2147483647).astype(np.uint64) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1274126177) & 0xFFFFFFFF
    value = (mixed >> 16) & 0xFF
    return np.where((x // 7 + y // 5) % 2 == 0, value, np.where(value > 127, 255, 0)).astype(np.uint8)


def resized():
    sizes = [(1, 1, 32, 32), (5, 7, 3, 2), (37, 23, 96, 64), (64, 48, 160, 96), (64, 48, 64, 20), (64, 48, 20, 48),
             (101, 67, 32, 32), (67, 101, 32, 32), (30, 200, 28, 20), (200, 30, 20, 28), (255, 257, 256, 256),
             (640, 480, 352, 256), (1000, 3, 32, 64), (3, 1000, 64, 32), (8, 8, 16, 4), (31, 33, 30, 32)]
    found = []
    for w, h, to_w, to_h in sizes:
        source = pattern(w, h)
        image = Image.fromarray(source)
        planes = torch.from_numpy(source).permute(2, 0, 1)[None].contiguous()
        cubic = torch.nn.functional.interpolate(planes, (to_h, to_w), mode="bicubic", antialias=True)
        results = {
            "lanczos": np.array(image.resize((to_w, to_h), Image.LANCZOS)),
            "bicubic": np.array(image.resize((to_w, to_h), Image.BICUBIC)),
            "torch": cubic[0].permute(1, 2, 0).numpy(),
            "grey": np.array(Image.fromarray(np.ascontiguousarray(source[..., 0])).resize((to_w, to_h), Image.LANCZOS)),
        }
        digests = {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in results.items()}
        found.append({"from": [w, h], "to": [to_w, to_h], **digests})
    return found


def dimensions():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
    found = []
    for area in (96 * 96, 384 * 384, 1024 * 1024, 1328 * 1328):
        for w, h in [(1, 1), (64, 48), (48, 64), (1920, 1080), (1080, 1920), (4000, 3000), (333, 500), (16, 9), (3, 7), (640, 100), (100, 801)]:
            found.append([area, w, h, *calculate_dimensions(area, w / h)])
    return found


def pixels():
    """Levels that diffusers makes of values around every rounding edge."""
    from diffusers.image_processor import VaeImageProcessor
    levels = np.arange(256, dtype=np.uint8)
    there = VaeImageProcessor.normalize(levels.astype(np.float32) / 255.0)
    edges = ((np.arange(-2, 514, dtype=np.float32) / 2) / 255 * 2 - 1).astype(np.float32)
    back = VaeImageProcessor.denormalize(torch.from_numpy(edges)).numpy()
    return {"there": there.view(np.uint32).tolist(), "edges": edges.view(np.uint32).tolist(),
            "back": (back * 255).round().astype("uint8").tolist()}


def chunks():
    """The chunks that Pillow writes for the texts of a record with these prompts, by prompt."""
    rest = ("\nNegative prompt: blurry\nSteps: 4, Sampler: Euler, CFG scale: 4.5, Seed: 18446744073709551615, "
            'Size: 40x30, Model hash: 0123456789, Model: "tiny, random", Version: pentimento 0')
    found = {}
    for prompt in ("caf\u00e9", "\u4fee\u6539"):
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", prompt + rest)
        found[prompt] = chunk(*info.chunks[0][:2]).hex()
    return found


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    files()
    facts = {"files": cases, "resized": resized(), "dimensions": dimensions(), "tensor": pixels(), "chunks": chunks()}
    (OUT / "expected.json").write_text(json.dumps(facts, indent=1).replace("\n   ", "").replace("\n  ", " "))
