"""Stage 2: the language model, its vision tower, and the hidden states that steer the editor.

Three kinds of samples share every step: request → tags, tags → numbered steps, and the editing prompt. The last
one has no reply; small linear heads, thrown away after training, read from the hidden state at the end of each
clause which places change and into what, so that the frozen hidden states tell the transformer just that.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import lm
import words
import world
from training import Muon, Run, rank, say

PICTURE = words.PICTURE_TOKENS
HEAD_SIZES = dict(dest=world.PLACE_COUNT + 1, kind=len(world.KINDS) + 1, color=len(world.COLORS) + 1,
                  background=len(world.BACKGROUNDS) + 1, light=len(world.LIGHTS) + 1)
CELL_SIZES = dict(kind=len(world.KINDS) + 1, color=len(world.COLORS) + 1, background=len(world.BACKGROUNDS), light=len(world.LIGHTS))
POOL = 8  # batches that are drawn together and sorted by length


@dataclass
class Sample:
    """`ids` start at vision start; `reply` is the index of the first reply token (or the length)."""

    task: str
    ids: list
    reply: int
    scene: world.Scene
    clauses: list  # (token index, targets)


class Heads(nn.Module):
    """Linear readers used in training only: clause ends and picture cells."""

    def __init__(self):
        super().__init__()
        self.changed = nn.Linear(lm.HIDDEN, world.PLACE_COUNT)
        self.clause = nn.ModuleDict({k: nn.Linear(lm.HIDDEN, n) for k, n in HEAD_SIZES.items()})
        self.cell = nn.ModuleDict({k: nn.Linear(lm.HIDDEN, n) for k, n in CELL_SIZES.items()})


class Student(nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.model, self.heads = lm.build(tokenizer), Heads()


# ---------------------------------------------------------------- samples

def spread(ids, image_id):
    """The picture mark repeated once per picture token."""
    at = ids.index(image_id)
    return ids[:at] + [image_id] * PICTURE + ids[at + 1:]


def clause_targets(wish, row=None):
    """What the heads should read: changed places, and one class per head (the last class means none)."""
    places = wish.places if row is None else wish.places[row:row + 1]
    thing = wish.thing or (len(world.KINDS), len(world.COLORS))
    none = {k: n - 1 for k, n in HEAD_SIZES.items()}
    picked = dict(dest=wish.dest, kind=thing[0], color=thing[1], background=wish.background, light=wish.light)
    return places, {k: none[k] if v is None else v for k, v in picked.items()}


def editing_clauses(case, merged):
    """The prompt for the editor, where its clauses end, and their targets."""
    if not merged:
        return case.request, case.clause_ends, [clause_targets(w) for w in case.wishes]
    middle = world.WORLD["merge"]
    text, ends = world.join_clauses(world.sub_requests(case), middle, middle)
    targets = [clause_targets(w, i if w.op == "delete" else None) for w in case.wishes for i in range(len(w.edits))]
    return text, ends, targets


def editing_case(rng, seed):
    """A case for the editor and whether it reads the merged sub-requests instead of the request itself."""
    roll = rng.below(20)
    single, merged = roll < 10, 7 <= roll < 17
    return world.sample_case(seed, count=1 if single else 2 + rng.below(3)), merged


def editing_sample(tok, rng, seed):
    case, merged = editing_case(rng, seed)
    text, ends, targets = editing_clauses(case, merged)
    code = tok.encode(words.body(text))
    start = len(words.IMAGE)
    last = {end: i for i, (_, end) in enumerate(code.offsets)}
    clauses = [(last[start + end] + PICTURE - 1, t) for end, t in zip(ends, targets)]
    ids = spread(code.ids, tok.token_to_id("<|image_pad|>"))
    return Sample("edit", ids, len(ids), case.scene, clauses)


def reply_sample(tok, task, case):
    asked, reply = (case.request, world.tags(case)) if task == "decompose" else (world.tags(case), words.sequence_reply(case))
    ids = spread(tok.encode(words.body(asked)).ids, tok.token_to_id("<|image_pad|>"))
    return Sample(task, ids + tok.encode(reply + "<|im_end|>").ids, len(ids), case.scene, [])


def draw(tok, task, rng, seed):
    return editing_sample(tok, rng, seed) if task == "edit" else reply_sample(tok, task, world.sample_case(seed))


class Feeder:
    """Batches of samples of similar length; training seeds count upwards per process and never repeat."""

    def __init__(self, tok, task, size, first_seed):
        self.tok, self.task, self.size, self.seed = tok, task, size, first_seed
        self.rng, self.ready = world.Rng(first_seed ^ 0x5EED), []

    def next(self):
        if not self.ready:
            pool = [draw(self.tok, self.task, self.rng, self.seed + i) for i in range(self.size * POOL)]
            self.seed += len(pool)
            pool.sort(key=lambda s: len(s.ids))
            chunks = [pool[i:i + self.size] for i in range(0, len(pool), self.size)]
            while chunks:
                self.ready.append(chunks.pop(self.rng.below(len(chunks))))
        return self.ready.pop()


def stack_ids(samples):
    """`[b, n]` padded on the right with 0; padding is never attended to nor read."""
    longest = max(len(s.ids) for s in samples)
    return torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in samples])


def stack_pixels(samples):
    return torch.from_numpy(np.stack([world.render(s.scene) for s in samples]))


# ---------------------------------------------------------------- losses

def reply_loss(model, hidden, ids, samples):
    """Mean cross-entropy per reply token, and per sample whether every token is the likeliest one."""
    rows = [(b, i) for b, s in enumerate(samples) for i in range(s.reply - 1, len(s.ids) - 1)]
    b, i = torch.tensor(rows).T
    logits, wanted = model.lm_head(hidden[b, i]), ids[b, i + 1]
    right = torch.ones(len(samples)).index_put_((b,), (logits.argmax(-1) == wanted).float() - 1, accumulate=True)
    counts = torch.tensor([len(s.ids) - s.reply for s in samples])
    return F.cross_entropy(logits, wanted), right == 1


def clause_loss(heads, hidden, samples):
    rows = [(b, i, places, picked) for b, s in enumerate(samples) for i, (places, picked) in s.clauses]
    state = hidden[torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])]
    changed = torch.zeros(len(rows), world.PLACE_COUNT)
    for n, (_, _, places, _) in enumerate(rows):
        changed[n, places] = 1
    logits = heads.changed(state)
    loss = F.binary_cross_entropy_with_logits(logits, changed) * 6
    right = ((logits > 0) == (changed > 0)).all(1)
    for key, head in heads.clause.items():
        wanted = torch.tensor([r[3][key] for r in rows])
        answer = head(state)
        loss = loss + F.cross_entropy(answer, wanted)
        right &= answer.argmax(-1) == wanted
    return loss, right


def cell_loss(heads, pictures, samples):
    """The vision tower's tokens, read cell by cell: kind, color, background, light."""
    token_of = [(r["y"] // world.CELL) * lm.GRID + c["x"] // world.CELL for r in world.ROWS for c in world.COLUMNS]
    state = pictures[:, token_of]  # b, place, hidden
    things = [[s.scene.objects.get(p, (len(world.KINDS), len(world.COLORS))) for p in range(world.PLACE_COUNT)] for s in samples]
    things = torch.tensor(things)  # b, place, 2
    whole = torch.tensor([[s.scene.background, s.scene.light] for s in samples])[:, None].expand(-1, world.PLACE_COUNT, -1)
    loss = 0
    for index, (key, head) in enumerate(heads.cell.items()):
        wanted = (things if index < 2 else whole)[..., index % 2]
        loss = loss + F.cross_entropy(head(state).flatten(0, 1), wanted.flatten())
    return loss


def losses(student, prefix_ids, samples):
    """Loss of one batch of one task, and which samples (or clauses) are entirely right."""
    ids, pictures = stack_ids(samples), lm.picture_tokens(student.model, stack_pixels(samples))
    hidden = lm.hidden_states(student.model, prefix_ids, ids, pictures)
    task = samples[0].task
    main, right = clause_loss(student.heads, hidden, samples) if task == "edit" else reply_loss(student.model, hidden, ids, samples)
    return main + 0.3 * cell_loss(student.heads, pictures, samples), main, right


# ---------------------------------------------------------------- training

SIZES = dict(decompose=40, edit=48, sequence=12)


def prefix_table(tok):
    return {k: torch.tensor(tok.encode(v).ids) for k, v in words.prefixes().items()}


def held_out_samples(tok, task, size, **how):
    cases = [world.sample_case(world.held_out_seed(2, i), **how) for i in range(size)]
    if task != "edit":
        return [reply_sample(tok, task, c) for c in cases]
    rng = world.Rng(5)
    return [editing_sample(tok, rng, world.held_out_seed(2, i)) for i in range(size)]


@torch.no_grad()
def measure(student, tok, count=200):
    """Share of held-out samples whose whole reply (or clause reading) is right, teacher-forced."""
    table, out = prefix_table(tok), {}
    sets = dict(edit=("edit", {}), sequence=("sequence", {}), direct=("decompose", dict(count=1, style="direct")),
                indirect=("decompose", dict(count=1, style="indirect")), picture=("decompose", dict(count=1, style="picture")),
                many=("decompose", dict(style="any")), indirect_held_out=("decompose", dict(count=1, style="indirect", held_out=True)),
                picture_held_out=("decompose", dict(count=1, style="picture", held_out=True)),
                many_held_out=("decompose", dict(style="any", held_out=True)))
    for name, (task, how) in sets.items():
        samples = held_out_samples(tok, task, count, **how)
        right = [losses(student, table[task], samples[i:i + 50])[2] for i in range(0, len(samples), 50)]
        out[name] = round(float(torch.cat(right).float().mean()), 3)
    return out


def optimizers(student):
    matrices = [p for n, p in student.model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in student.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=6e-3), torch.optim.Adam(rest, lr=2e-3, betas=(0.9, 0.98))]


def train(out, budget_s, cases=200):
    tok = words.load_tokenizer(Path(out) / "tokenizer.json")
    torch.manual_seed(3)
    student = Student(tok)
    run = Run(student, optimizers(student), Path(out) / "lm.pt", budget_s)
    first = ((1 + rank()) << 40) + run.samples * 16
    feeders = [Feeder(tok, task, size, first + (n << 36)) for n, (task, size) in enumerate(SIZES.items())]
    table, marks = prefix_table(tok), {}
    while not run.done():
        for feeder in feeders:
            with torch.autocast("cpu", torch.bfloat16):
                loss, main, right = losses(student, table[feeder.task], feeder.next())
            loss.backward()
            old = marks.get(feeder.task, (0.0, 0.0))
            marks[feeder.task] = tuple(0.95 * o + 0.05 * float(v) for o, v in zip(old, (main, right.float().mean())))
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        run.step(sum(SIZES.values()))
        if run.steps % 50 == 0:
            say(f"lm step {run.steps} {run.seconds:.0f}s {run.samples} samples " + " ".join(f"{k} {a:.3f}/{b:.2f}" for k, (a, b) in marks.items()))
    run.average.copy_to(student)
    if rank() == 0:
        run.save()
        result = measure(student, tok, cases) | dict(seconds=round(run.seconds), samples=run.samples)
        torch.save(student.state_dict(), Path(out) / "lm_final.pt")
        (Path(out) / "lm.json").write_text(json.dumps(result, indent=1))
        say("lm", result)
