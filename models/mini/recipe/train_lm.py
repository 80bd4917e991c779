"""Stage 2: the language model, its vision tower, and the hidden states that steer the editor.

Three kinds of samples share every step: request → tags, tags → numbered steps, and the editing prompt. The last
one has no reply; small linear heads, thrown away after training, read from the hidden state at the end of each
clause which places change and into what, so that the frozen hidden states tell the transformer just that.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import lm
import warm
import words
import world
from training import Muon, Run, rank, say

PICTURE = words.PICTURE_TOKENS
HEAD_SIZES = dict(dest=world.PLACE_COUNT + 1, kind=len(world.KINDS) + 1, color=len(world.COLORS) + 1,
                  background=len(world.BACKGROUNDS) + 1, light=len(world.LIGHTS) + 1)
CELL_SIZES = dict(kind=len(world.KINDS) + 1, color=len(world.COLORS) + 1, background=len(world.BACKGROUNDS), light=len(world.LIGHTS))
SEEN_SIZES = dict(kind=CELL_SIZES["kind"], color=CELL_SIZES["color"], place=world.PLACE_COUNT)
CELL_TOKENS = [(r["y"] // world.CELL) * lm.GRID + c["x"] // world.CELL for r in world.ROWS for c in world.COLUMNS]
EARLY_LAYERS = 2  # after so many layers the picture's tokens should know where they lie
POOL = 8  # batches that are drawn together and sorted by length


@dataclass
class Sample:
    """`ids` start at vision start; `reply` is the index of the first reply token (or the length)."""

    task: str
    ids: list
    reply: int
    scene: world.Scene
    clauses: list  # (token index, targets)
    nouns: list  # (token index, place): where a word names the only object it can mean


class Heads(nn.Module):
    """Linear readers used in training only: clause ends and picture cells."""

    def __init__(self):
        super().__init__()
        self.changed = nn.Linear(lm.HIDDEN, world.PLACE_COUNT)
        self.clause = nn.ModuleDict({k: nn.Linear(lm.HIDDEN, n) for k, n in HEAD_SIZES.items()})
        self.cell = nn.ModuleDict({k: nn.Linear(lm.HIDDEN, n) for k, n in CELL_SIZES.items()})
        self.seen = nn.ModuleDict({k: nn.Linear(lm.HIDDEN, n) for k, n in SEEN_SIZES.items()})
        self.early = nn.Linear(lm.HIDDEN, world.PLACE_COUNT)


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


def noun_end(case, text, place, start, end):
    """Where the kind of the object in `place` ends as a whole word of `text[start:end]`."""
    kind = world.KINDS[case.scene.objects[place][0]]["name"]
    return re.compile(rf"\b{kind}\b").search(text, start, end).end()


def merged_nouns(case, ends, text):
    """The same for merged sub-requests, each of which names one object by color and kind."""
    rows = [(w, i) for w in case.wishes for i in range(len(w.edits))]
    out, start = [], 0
    for (wish, i), end in zip(rows, ends):
        if wish.places:
            out.append((noun_end(case, text, wish.places[i], start, end), wish.places[i]))
        start = end
    return out


def noun_ends(case):
    """Where, in characters, a clause of the request names its object by kind, and the object's place."""
    out, start = [], 0
    for wish, end in zip(case.wishes, case.clause_ends):
        if wish.places and wish.style != "picture":
            out.append((noun_end(case, case.request, wish.places[0], start, end), wish.places[0]))
        start = end
    return out


def asked_ids(tok, text, marks):
    """Token ids of pictures and text, and the token index of every character offset in `marks`."""
    code = tok.encode(words.body(text))
    start = len(words.IMAGE)
    last = {end: i for i, (_, end) in enumerate(code.offsets)}
    return spread(code.ids, tok.token_to_id("<|image_pad|>")), [last[start + mark] + PICTURE - 1 for mark in marks]


def editing_sample(tok, rng, seed):
    case, merged = editing_case(rng, seed)
    text, ends, targets = editing_clauses(case, merged)
    nouns = merged_nouns(case, ends, text) if merged else noun_ends(case)
    ids, at = asked_ids(tok, text, ends + [end for end, _ in nouns])
    places = [place for _, place in nouns]
    return Sample("edit", ids, len(ids), case.scene, list(zip(at, targets)), list(zip(at[len(ends):], places)))


def reply_sample(tok, task, case):
    if task == "sequence":
        asked, reply, ends, nouns = world.tags(case), words.sequence_reply(case), [], []
    else:
        asked, reply, ends, nouns = case.request, world.tags(case), case.clause_ends, noun_ends(case)
    ids, at = asked_ids(tok, asked, ends + [end for end, _ in nouns])
    clauses = list(zip(at, map(clause_targets, case.wishes)))[:len(ends)]
    nouns = [(i, place) for i, (_, place) in zip(at[len(ends):], nouns)]
    return Sample(task, ids + tok.encode(reply + "<|im_end|>").ids, len(ids), case.scene, clauses, nouns)


def draw(tok, task, rng, seed):
    """Requests that point at things are the hardest to take apart, so a third of them do nothing else."""
    if task == "edit":
        return editing_sample(tok, rng, seed)
    style = "picture" if task == "decompose" and rng.below(3) == 0 else "any"
    return reply_sample(tok, task, world.sample_case(seed, style=style))


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
    share = changed / changed.sum(1, keepdim=True).clamp(min=1)
    loss = F.binary_cross_entropy_with_logits(logits, changed) * 6 - (share * logits.log_softmax(1)).sum(1).mean()
    right = ((logits > 0) == (changed > 0)).all(1)
    for key, head in heads.clause.items():
        wanted = torch.tensor([r[3][key] for r in rows])
        answer = head(state)
        loss = loss + F.cross_entropy(answer, wanted)
        right &= answer.argmax(-1) == wanted
    return loss, right


def noun_loss(heads, hidden, samples):
    """Cross-entropy of the place that a noun means, read at the noun itself."""
    rows = [(b, i, place) for b, s in enumerate(samples) for i, place in s.nouns]
    if not rows:
        return 0.0
    b, i, place = torch.tensor(rows).T
    return F.cross_entropy(heads.changed(hidden[b, i]), place)


def thing_table(samples):
    """Kind and color in every place `[b, place, 2]`; the last class of each means empty."""
    empty = (len(world.KINDS), len(world.COLORS))
    return torch.tensor([[s.scene.objects.get(p, empty) for p in range(world.PLACE_COUNT)] for s in samples])


def read_cells(heads, state, wanted):
    """Summed cross-entropy of heads that read `state: [b, place, hidden]`; `wanted: {name: [b, place]}`."""
    return sum(F.cross_entropy(heads[k](state).flatten(0, 1), w.flatten()) for k, w in wanted.items())


def picture_loss(heads, pictures, early, hidden, samples):
    """What the picture's tokens must tell: as they leave the tower, and as they leave the language model.

    The tower turns angles only, so it cannot know where a token lies; the language model can, from the distance
    to the marks before the picture. Asking for the place there is what lets words find their object.
    """
    things = thing_table(samples)
    whole = torch.tensor([[s.scene.background, s.scene.light] for s in samples])[:, None].expand(-1, world.PLACE_COUNT, -1)
    place = torch.arange(world.PLACE_COUNT).expand(len(samples), -1)
    tower = dict(kind=things[..., 0], color=things[..., 1], background=whole[..., 0], light=whole[..., 1])
    model = dict(kind=things[..., 0], color=things[..., 1], place=place)
    after = hidden[:, [1 + t for t in CELL_TOKENS]]
    soon = F.cross_entropy(heads.early(early[:, [1 + t for t in CELL_TOKENS]]).flatten(0, 1), place.flatten())
    return read_cells(heads.cell, pictures[:, CELL_TOKENS], tower) + read_cells(heads.seen, after, model) + soon


def losses(student, prefix_ids, samples):
    """Loss of one batch of one task, and which samples (or clauses) are entirely right."""
    ids, pictures = stack_ids(samples), lm.picture_tokens(student.model, stack_pixels(samples))
    task = samples[0].task
    hidden, early = lm.hidden_states(student.model, prefix_ids, ids, pictures, task == "edit", EARLY_LAYERS)
    main, right = clause_loss(student.heads, hidden, samples) if task == "edit" else reply_loss(student.model, hidden, ids, samples)
    if task == "decompose":  # most of its tokens are easy; the clauses say directly what the hard ones depend on
        main = DECOMPOSE_WEIGHT * main + 0.3 * clause_loss(student.heads, hidden, samples)[0]
    beside = 0.3 * picture_loss(student.heads, pictures, early, hidden, samples) + 0.5 * noun_loss(student.heads, hidden, samples)
    return main + beside, main, right


# ---------------------------------------------------------------- training

SIZES = dict(decompose=64, edit=56, sequence=8)
DECOMPOSE_WEIGHT = 4.0
WARM_SEEDS = 1 << 39  # further up than any training from scratch has counted
HEADS_FIRST = 100  # steps after a warm start in which the new heads alone learn, so that they do not harm the model


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
    makers = optimizers(student)
    warmed = warm.start(out, "lm", student.model, makers)
    run = Run(student, makers, Path(out) / "lm.pt", budget_s)
    first = ((1 + rank()) << 40) + run.samples * 16 + (WARM_SEEDS if warmed else 0)
    feeders = [Feeder(tok, task, size, first + (n << 36)) for n, (task, size) in enumerate(SIZES.items())]
    table, marks = prefix_table(tok), {}
    while not run.done():
        for feeder in feeders:
            with torch.autocast("cpu", torch.bfloat16):
                loss, main, right = losses(student, table[feeder.task], feeder.next())
            loss.backward()
            old = marks.get(feeder.task, (0.0, 0.0))
            marks[feeder.task] = tuple(0.95 * o + 0.05 * float(v) for o, v in zip(old, (main, right.float().mean())))
        if warmed and run.steps < HEADS_FIRST:
            student.model.zero_grad(set_to_none=True)
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        run.step(sum(SIZES.values()))
        if run.steps % 50 == 0:
            say(f"lm step {run.steps} {run.seconds:.0f}s {run.samples} samples " + " ".join(f"{k} {a:.3f}/{b:.2f}" for k, (a, b) in marks.items()))
    run.average.copy_to(student)
    if rank() == 0:
        run.save()
        result = measure(student, tok, cases) | dict(seconds=round(run.seconds), samples=run.samples)
        torch.save(student.model.state_dict(), Path(out) / "lm_final.pt")
        (Path(out) / "lm.json").write_text(json.dumps(result, indent=1))
        say("lm", result)
