"""Stage 5: the exported pack in the stock pipeline, measured on held-out seeds; writes results.json and the samples."""
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train_vae
import world
from stock import Pack, decomposition_scores

SEED = 7  # evaluation seed; training and model selection use others


def cases_of(size, start, **how):
    return [world.sample_case(world.held_out_seed(SEED, start + i), **how) for i in range(size)]


def percent(values):
    return round(float(np.mean(values)), 4)


def outside_error(pixels, case):
    """Mean absolute error, in levels, over the cells that the request does not touch, or None where there are none."""
    before, after = world.render(case.scene), world.render(case.target)
    same = (before == after).all(-1).reshape(4, world.CELL, 4, world.CELL).all((1, 3)).repeat(world.CELL, 0).repeat(world.CELL, 1)
    return float(np.abs(pixels.astype(int) - after)[same].mean()) if same.any() else None


def one_wish(pack, count):
    """Strict success per operation, from the direct wording, in one pass."""
    out, errors = {}, []
    for index, operation in enumerate(world.OPERATIONS):
        cases = cases_of(count, 10_000 * index, count=1, op=operation["name"], style="direct")
        pictures = [pack.edit(world.render(c.scene), c.request) for c in cases]
        out[operation["name"]] = percent([world.succeeds(p, c.target) for p, c in zip(pictures, cases)])
        errors += [outside_error(p, c) for p, c in zip(pictures, cases)]
    out["all"] = percent(list(out.values()))
    return out, round(float(np.mean([e for e in errors if e is not None])), 3)


def styles(pack, count):
    """Strict success of single wishes in other wordings, in one pass."""
    out = {}
    for index, (style, held_out) in enumerate((("indirect", False), ("picture", False), ("indirect", True), ("picture", True))):
        cases = cases_of(count, 100_000 + 10_000 * index, count=1, style=style, held_out=held_out)
        name = style + ("_held_out" if held_out else "")
        out[name] = percent([world.succeeds(pack.edit(world.render(c.scene), c.request), c.target) for c in cases])
    return out


def in_turn(pack, pixels, prompts):
    for prompt in prompts:
        pixels = pack.edit(pixels, prompt)
    return pixels


def many_wishes(pack, count):
    """Whole requests of two to four wishes: as they are, with true sub-requests, and through the planner."""
    rows = {k: [] for k in ("direct", "true_single", "true_sequential", "planned_single", "planned_sequential", "plan_exact")}
    for i, case in enumerate(cases_of(count, 200_000, count=2) + cases_of(count, 300_000, count=3) + cases_of(count, 400_000, count=4)):
        before = world.render(case.scene)
        truth = world.sub_requests(case)
        plan = pack.sequence(before, pack.decompose(before, case.request))
        merge = world.WORLD["merge"].join
        pictures = dict(direct=pack.edit(before, case.request), true_single=pack.edit(before, merge(truth)),
                        true_sequential=in_turn(pack, before, truth), planned_single=pack.edit(before, merge(plan) or case.request),
                        planned_sequential=in_turn(pack, before, plan))
        for name, pixels in pictures.items():
            rows[name].append(world.succeeds(pixels, case.target))
        rows["plan_exact"].append(plan == truth)
    return {k: percent(v) for k, v in rows.items()}


def decomposition(pack, count):
    """Form, mean F1 and exactness of the decomposition by kind of request."""
    kinds = dict(direct=dict(count=1, style="direct"), indirect=dict(count=1, style="indirect"), picture=dict(count=1, style="picture"),
                 many=dict(style="any"), indirect_held_out=dict(count=1, style="indirect", held_out=True),
                 picture_held_out=dict(count=1, style="picture", held_out=True), many_held_out=dict(style="any", held_out=True))
    out = {}
    for index, (name, how) in enumerate(kinds.items()):
        cases = cases_of(count, 500_000 + 10_000 * index, **how)
        scores = [decomposition_scores(pack.decompose(world.render(c.scene), c.request), world.tags(c)) for c in cases]
        out[name] = dict(zip(("well_formed", "f1", "exact"), (percent(s) for s in zip(*scores))))
    return out


def autoencoder(pack, count):
    """PSNR of copies of held-out targets and the share of them that still reads back exactly."""
    vae, psnr, passed = pack.pipe.vae, [], []
    for case in cases_of(count, 600_000, count=1):
        truth = world.render(case.target)
        with torch.no_grad():
            z = vae.encode(train_vae.tensor_from_pixels([truth])[:, :, None]).latent_dist.mode()
            copy = train_vae.pixels_from_tensor(vae.decode(z, return_dict=False)[0][:, :, 0])[0]
        psnr.append(10 * np.log10(255 ** 2 / ((copy.astype(float) - truth) ** 2).mean()))
        passed.append(world.succeeds(copy, case.target))
    return dict(psnr=round(float(np.mean(psnr)), 2), psnr_worst=round(float(np.min(psnr)), 2), copy_passes=percent(passed))


def wrong_pictures(count):
    """How often the strict readout accepts pictures that are wrong on purpose; all but `target` must be 0."""
    rows = {k: [] for k in ("target", "unchanged", "black", "shifted", "wrong_color")}
    for case in cases_of(count, 700_000, count=1, op="recolor", style="direct"):
        truth, place = world.render(case.target), case.wishes[0].places[0]
        other = case.target.copy()
        kind, color = other.objects[place]
        other.objects[place] = (kind, (color + 1) % len(world.COLORS))
        pictures = dict(target=truth, unchanged=world.render(case.scene), black=truth * 0, shifted=np.roll(truth, 3, 1), wrong_color=world.render(other))
        for name, pixels in pictures.items():
            rows[name].append(world.succeeds(pixels, case.target))
    return {k: percent(v) for k, v in rows.items()}


# ---------------------------------------------------------------- samples

NAMED = {"street": (world.Scene(0, 1, {4: (0, 0), 6: (1, 3), 9: (2, 2)}), "paint the house blue, take away the car and make it night",
                    ["recolor the red house to blue", "remove the yellow car", "change the background to night"])}


def sample_rows():
    """Name, scene, request and sub-requests of every sample."""
    rows = [(name, *row) for name, row in NAMED.items()]
    for index, operation in enumerate(world.OPERATIONS):
        case = world.sample_case(world.held_out_seed(8, 100 + index), count=1, op=operation["name"], style="direct")
        rows.append((operation["name"], case.scene, case.request, world.sub_requests(case)))
    for count in (2, 3, 4):
        case = world.sample_case(world.held_out_seed(8, 200 + count), count=count)
        rows.append((f"wishes{count}", case.scene, case.request, world.sub_requests(case)))
    return rows


def write_samples(pack, folder):
    """Input pictures, requests, and what the stock pipeline makes of them in float32 with seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for name, scene, request, steps in sample_rows():
        before, prompt = world.render(scene), world.WORLD["merge"].join(steps)
        Image.fromarray(before).save(folder / f"{name}.png")
        Image.fromarray(pack.edit(before, prompt)).save(folder / f"{name}.expected.png")
        table.append(dict(input=f"{name}.png", request=request, sub_requests=steps, prompt=prompt, seed=0, expected=f"{name}.expected.png"))
    (folder / "prompts.json").write_text(json.dumps(table, indent=1) + "\n")


def main(pack_folder, count):
    torch.set_num_threads(1)
    pack_folder, started = Path(pack_folder), time.time()
    pack = Pack(pack_folder)
    write_samples(pack, pack_folder / "samples")
    single, outside = one_wish(pack, 2 * count)
    results = dict(seed=SEED, cases=count, autoencoder=autoencoder(pack, 4 * count), readout_accepts=wrong_pictures(count),
                   decomposition=decomposition(pack, count), one_wish=single, outside_error=outside, other_wordings=styles(pack, count),
                   many_wishes=many_wishes(pack, max(1, count * 2 // 3)))
    results["seconds"] = round(time.time() - started)
    (pack_folder / "recipe").mkdir(exist_ok=True)
    (pack_folder / "recipe" / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
