"""Stage 3: the transformer, steered by the frozen language model, between latents of the frozen autoencoder."""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import dit
import lm
import train_lm
import train_vae
import warm
import words
import world
from training import Muon, Run, rank, say

BATCH = 64
POOL = 8  # batches whose pictures are encoded together and passed through twice, with two different prompts
EDITED_WEIGHT = 4.0
TOLERANCE = 0.03  # of the summed success; less is chance, and later weights saw more at a lower learning rate
WORN_SHARE = 4  # every so many-th reference of a pool is a worn copy
WORN_NOISE = 0.4  # largest noise on its latents, in units of their spread
WARM_SEEDS = 1 << 43  # further up than any training from scratch has counted


@dataclass
class Frozen:
    """What the transformer is trained on top of."""

    tok: object
    model: torch.nn.Module
    vae: torch.nn.Module
    mean: torch.Tensor  # [1, 16, 1, 1]
    std: torch.Tensor
    prefix: torch.Tensor

    @classmethod
    def load(cls, out):
        out = Path(out)
        tok = words.load_tokenizer(out / "tokenizer.json")
        model = lm.build(tok)
        model.load_state_dict(torch.load(out / "lm_final.pt"))
        train_vae.single_frame()
        vae = train_vae.build()
        vae.load_state_dict(torch.load(out / "vae_final.pt"))
        facts = json.loads((out / "vae.json").read_text())
        mean, std = (torch.tensor(facts[k]).view(1, 16, 1, 1) for k in ("latents_mean", "latents_std"))
        for module in (model, vae):
            module.requires_grad_(False)
            round_weights(module)
        return cls(tok, model, vae, mean, std, train_lm.prefix_table(tok)["edit"])

    @torch.no_grad()
    def latents(self, scenes):
        """Packed, normalised latents `[b, 16, 64]`."""
        x = train_vae.tensor_from_pixels([world.render(s) for s in scenes])
        z = torch.cat([train_vae.encode(self.vae, part)[:, :, 0] for part in x.split(32)])
        return dit.pack((z - self.mean) / self.std)

    @torch.no_grad()
    def pictures(self, packed):
        """u8 `[b, 64, 64, 3]`."""
        z = dit.unpack(packed) * self.std + self.mean
        return train_vae.pixels_from_tensor(train_vae.decode(self.vae, z[:, :, None]))

    @torch.no_grad()
    def worn(self, packed):
        """Latents of pictures like the editor's own: a little wrong, decoded, and encoded again.

        Wishes that are carried out one after the other start from such pictures.
        """
        noise = WORN_NOISE * torch.rand(len(packed), 1, 1) * torch.randn_like(packed)
        x = train_vae.tensor_from_pixels(list(self.pictures(packed + noise)))
        return dit.pack((train_vae.encode(self.vae, x)[:, :, 0] - self.mean) / self.std)

    @torch.no_grad()
    def condition(self, scenes, prompts):
        """Hidden states `[b, n, hidden]` of the editing prompt without its 64 dropped tokens, and lengths `[b]`."""
        image_id = self.tok.token_to_id("<|image_pad|>")
        rows = [train_lm.spread(e.ids, image_id) for e in self.tok.encode_batch([words.body(p) for p in prompts])]
        samples = [train_lm.Sample("edit", ids, len(ids), scene, [], []) for ids, scene in zip(rows, scenes)]
        with torch.autocast("cpu", torch.bfloat16):
            pictures = lm.picture_tokens(self.model, train_lm.stack_pixels(samples))
            hidden = lm.hidden_states(self.model, self.prefix, train_lm.stack_ids(samples), pictures, sequential=True)
        return hidden.float(), torch.tensor([len(r) for r in rows])


@torch.no_grad()
def round_weights(module):
    """The pack stores bfloat16, so what is trained later sees these very values."""
    for p in module.parameters():
        p.copy_(p.bfloat16().float())


# ---------------------------------------------------------------- samples

def prompts_of(case):
    """Two prompts that ask for the same picture: the request, and the merged sub-requests."""
    return case.request, world.merged_prompt(case)


def edited_weights(case):
    """`[16]`: 4 for every token whose pixels change, 1 elsewhere."""
    changed = (world.render(case.scene) != world.render(case.target)).any(-1)
    cells = changed.reshape(dit.SIDE, world.CELL, dit.SIDE, world.CELL).any((1, 3)).flatten()
    return torch.from_numpy(cells).float() * (EDITED_WEIGHT - 1) + 1


def is_hard(case):
    """Bright light, where colors lie close together, or objects that share their kind."""
    kinds = [kind for kind, _ in case.scene.objects.values()]
    return case.target.light == len(world.LIGHTS) - 1 or len(set(kinds)) < len(kinds)


class Feeder:
    """Batches `(reference, target, weights, text, lengths)`; seeds count upwards and never repeat."""

    def __init__(self, frozen, first_seed):
        self.frozen, self.seed = frozen, first_seed
        self.rng, self.ready, self.pool = world.Rng(first_seed ^ 0xD17), [], None

    def _draw(self):
        """Replacements fit fewer scenes than other wishes, and moves change two places, so some are asked for."""
        self.seed += 1
        count = 1 if self.rng.below(20) < 11 else 2 + self.rng.below(3)
        return world.sample_case(self.seed, count=count, op=("replace", "move", None, None, None)[self.rng.below(5)])

    def _case(self):
        """A third of the easy cases are drawn again."""
        case = self._draw()
        return self._draw() if self.rng.below(3) == 0 and not is_hard(case) else case

    def _refill(self):
        cases = [self._case() for _ in range(BATCH * POOL)]
        reference, target = (self.frozen.latents([getattr(c, k) for c in cases]) for k in ("scene", "target"))
        reference[::WORN_SHARE] = self.frozen.worn(reference[::WORN_SHARE])
        weights = torch.stack([edited_weights(c) for c in cases])
        self.pool = (cases, reference, target, weights)
        for side in range(2):
            texts = [prompts_of(c)[side ^ (i % 2)] for i, c in enumerate(cases)]
            order = sorted(range(len(cases)), key=lambda i: len(texts[i]))
            chunks = [order[i:i + BATCH] for i in range(0, len(order), BATCH)]
            self.ready += [(texts, chunk) for chunk in chunks]
        for i in range(len(self.ready) - 1, 0, -1):
            j = self.rng.below(i + 1)
            self.ready[i], self.ready[j] = self.ready[j], self.ready[i]

    def next(self):
        if not self.ready:
            self._refill()
        texts, chunk = self.ready.pop()
        cases, reference, target, weights = self.pool
        text, lengths = self.frozen.condition([cases[i].scene for i in chunk], [texts[i] for i in chunk])
        return reference[chunk], target[chunk], weights[chunk], text, lengths


def draw_sigmas(count, levels):
    """Mostly the pack's own noise levels, otherwise anything in 0.05…1."""
    own = levels[torch.randint(0, len(levels), (count,))]
    return torch.where(torch.rand(count) < 0.7, own, 0.05 + 0.95 * torch.rand(count))


def loss_of(model, batch, levels):
    reference, target, weights, text, lengths = batch
    sigma = draw_sigmas(len(target), levels)
    noise, s = torch.randn_like(target), sigma[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        v = dit.forward(model, (1 - s) * target + s * noise, reference, text, lengths, sigma)
    error = (v.float() - (noise - target)).square().mean(-1)
    return (error * weights).sum() / weights.sum()


# ---------------------------------------------------------------- measuring

@torch.no_grad()
def carry_out(model, frozen, scenes, prompts, seed=0):
    """Edited pictures, u8 `[b, 64, 64, 3]`."""
    text, lengths = frozen.condition(scenes, prompts)
    return frozen.pictures(dit.sample(model, frozen.latents(scenes), text, lengths, seed))


def success(model, frozen, cases, prompts):
    pictures = carry_out(model, frozen, [c.scene for c in cases], prompts)
    return round(sum(world.succeeds(p, c.target) for p, c in zip(pictures, cases)) / len(cases), 3)


def measure(model, frozen, count, seed=3):
    """Strict success on held-out seeds: each operation alone from its direct wording, and 2–4 wishes merged."""
    out, start = {}, 0
    for operation in world.OPERATIONS:
        name = operation["name"]
        cases = [world.sample_case(world.held_out_seed(seed, start + i), count=1, op=name, style="direct") for i in range(count)]
        out[name] = success(model, frozen, cases, [c.request for c in cases])
        start += count
    cases = [world.sample_case(world.held_out_seed(seed, start + i), count=2 + i % 3) for i in range(2 * count)]
    out["single"] = round(sum(out.values()) / len(out), 3)
    out["merged"] = success(model, frozen, cases, [world.merged_prompt(c) for c in cases])
    return out


# ---------------------------------------------------------------- training

def optimizers(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer_blocks" in n and "_mod" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=5e-3), torch.optim.Adam(rest, lr=1.5e-3, betas=(0.9, 0.98))]


def averaged(run, frozen):
    """A copy of the model with averaged, rounded weights."""
    model = dit.build(lm.HIDDEN)
    run.average.copy_to(model)
    round_weights(model)
    return model


def report(run, frozen, out, count):
    """Measures the averaged weights; keeps them unless earlier ones were clearly better."""
    model = averaged(run, frozen)
    figures = measure(model, frozen, count)
    run.log.append(dict(seconds=round(run.seconds), samples=run.samples, **figures))
    best = max(entry["single"] + entry["merged"] for entry in run.log)
    if figures["single"] + figures["merged"] >= best - TOLERANCE:
        torch.save(model.state_dict(), Path(out) / "dit_final.pt")
    (Path(out) / "dit.json").write_text(json.dumps(run.log, indent=1))
    say("dit", figures)


def train(out, budget_s, cases=50):
    frozen = Frozen.load(out)
    torch.manual_seed(5)
    model = dit.build(lm.HIDDEN)
    makers = optimizers(model)
    warmed = warm.start(out, "dit", model, makers)
    run = Run(model, makers, Path(out) / "dit.pt", budget_s, decay=0.998)
    torch.manual_seed(100 + rank() + run.steps * 10)
    feeder = Feeder(frozen, ((1 + rank()) << 44) + run.samples * 4 + (WARM_SEEDS if warmed else 0))
    levels, mark, reported = dit.sigmas()[:-1], None, run.seconds
    while not run.done():
        loss = loss_of(model, feeder.next(), levels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        run.step(BATCH)
        mark = float(loss) if mark is None else 0.98 * mark + 0.02 * float(loss)
        if run.steps % 50 == 0:
            say(f"dit step {run.steps} {run.seconds:.0f}s {run.samples} samples loss {mark:.4f}")
        if rank() == 0 and run.seconds - reported > 240:
            reported = run.seconds
            report(run, frozen, out, 20)
    run.save()
    if rank() == 0:
        report(run, frozen, out, cases)
