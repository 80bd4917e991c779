"""The miniature world: scenes, requests, pixels and the strict readout.

Everything that is drawn or said comes from `world.json`; everything random comes from one splitmix64
stream and integer arithmetic, so any port of this file yields the same scenes, words and pixels.
A place is `row * 4 + column`; a scene maps places to `(kind, color)` index pairs.
"""
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

WORLD = json.loads((Path(__file__).resolve().parent.parent / "world.json").read_text())
SIZE, CELL = WORLD["size"], WORLD["cell"]
KINDS, COLORS = WORLD["kinds"], WORLD["colors"]
BACKGROUNDS, LIGHTS = WORLD["backgrounds"], WORLD["lights"]
COLUMNS, ROWS = WORLD["columns"], WORLD["rows"]
OPERATIONS = WORLD["operations"]
PLACE_COUNT = len(ROWS) * len(COLUMNS)
STYLES = ("direct", "indirect", "picture", "any")
MASK = (1 << 64) - 1


class Rng:
    """splitmix64; `below` takes the upper 31 bits modulo n."""

    def __init__(self, seed):
        self.state = seed & MASK

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n):
        return (self.next() >> 33) % n

    def pick(self, items):
        return items[self.below(len(items))]


@dataclass
class Scene:
    """`objects`: {place: (kind, color)}; no two objects share kind and color."""

    background: int
    light: int
    objects: dict = field(default_factory=dict)

    def copy(self):
        return replace(self, objects=dict(self.objects))


@dataclass
class Wish:
    """One clause of a request and everything it means.

    `edits` are `(action, subject, goal, sub_request)` rows; `places` become empty or change;
    `dest` is the place that is filled (add, move); `thing` is the (kind, color) that results.
    """

    op: str
    style: str
    text: str
    edits: list
    places: list = field(default_factory=list)
    dest: int | None = None
    thing: tuple | None = None
    background: int | None = None
    light: int | None = None


@dataclass
class Case:
    """A scene, a request with its wishes, the exact target, and where each clause ends (characters)."""

    scene: Scene
    request: str
    wishes: list
    target: Scene
    clause_ends: list


# ---------------------------------------------------------------- names

def place_name(place):
    return f"{ROWS[place // 4]['name']} {COLUMNS[place % 4]['name']}"


def bare_name(thing):
    return f"{COLORS[thing[1]]['name']} {KINDS[thing[0]]['name']}"


def with_article(thing):
    return f"{COLORS[thing[1]]['article']} {bare_name(thing)}"


def homes(kind):
    """Places where objects of this kind may stand."""
    return [p for p in range(PLACE_COUNT) if ROWS[p // 4]["home"] == KINDS[kind]["home"]]


def fill(template, **words):
    for key, value in words.items():
        template = template.replace("{" + key + "}", value)
    return template


# ---------------------------------------------------------------- scenes

def sample_scene(rng):
    scene = Scene(rng.below(len(BACKGROUNDS)), rng.below(len(LIGHTS)))
    kinds = []
    for index in range(1 + rng.below(4)):
        twin = index > 0 and rng.below(3) == 0
        kind = rng.pick(kinds) if twin else rng.below(len(KINDS))
        color = rng.below(len(COLORS))
        taken = set(scene.objects.values())
        while (kind, color) in taken:
            color = (color + 1) % len(COLORS)
        free = [p for p in homes(kind) if p not in scene.objects]
        if free:
            scene.objects[rng.pick(free)] = (kind, color)
            kinds.append(kind)
    return scene


def apply(scene, wish):
    """The scene after one wish."""
    out = scene.copy()
    for place in wish.places:
        del out.objects[place]
    if wish.op in ("recolor", "replace"):
        out.objects[wish.places[0]] = wish.thing
    if wish.dest is not None:
        out.objects[wish.dest] = wish.thing
    if wish.background is not None:
        out.background = wish.background
    if wish.light is not None:
        out.light = wish.light
    return out


# ---------------------------------------------------------------- how an object is called

def anchor_name(scene, place):
    """`the tree` where the kind is unique in the scene, otherwise `the red tree`."""
    kind, _ = scene.objects[place]
    same = sum(k == kind for k, _ in scene.objects.values())
    return "the " + (KINDS[kind]["name"] if same == 1 else bare_name(scene.objects[place]))


def direct_reference(rng, scene, place):
    kind, _ = scene.objects[place]
    same = sum(k == kind for k, _ in scene.objects.values())
    short = rng.below(3) < 2
    if same == 1 and short:
        return "the " + KINDS[kind]["name"]
    return "the " + bare_name(scene.objects[place])


def singled_out(scene, place, axis, sign):
    """Anchors such that `place` is the only object on the given side of them."""
    coord = (lambda p: p % 4) if axis == "column" else (lambda p: p // 4)
    out = []
    for anchor in sorted(scene.objects):
        side = [p for p in scene.objects if sign * (coord(p) - coord(anchor)) > 0]
        if side == [place]:
            out.append(anchor)
    return out


def is_extreme(scene, place, axis, sign):
    coord = (lambda p: p % 4) if axis == "column" else (lambda p: p // 4)
    return len(scene.objects) > 1 and all(sign * (coord(place) - coord(p)) > 0 for p in scene.objects if p != place)


SIDES = (("left_of", "column", -1), ("right_of", "column", 1), ("above", "row", -1), ("below", "row", 1))
EXTREMES = (("leftmost", "column", -1), ("rightmost", "column", 1), ("highest", "row", -1), ("lowest", "row", 1))


def picture_modes(scene, place):
    """Every way to point at `place` that needs the picture: rows of (mode, words for the template)."""
    kind, color = scene.objects[place]
    others = [p for p in sorted(scene.objects) if p != place]
    if not others:
        return [("place", {"p": place_name(place)}), ("only", {})]
    modes = [("place", {"p": place_name(place)})]
    for mode, axis, sign in SIDES:
        modes += [(mode, {"a": anchor_name(scene, a)}) for a in singled_out(scene, place, axis, sign)]
    modes += [(mode, {}) for mode, axis, sign in EXTREMES if is_extreme(scene, place, axis, sign)]
    if all(scene.objects[p][1] != color for p in others):
        modes.append(("color", {"c": COLORS[color]["name"]}))
    twins = [p for p in others if scene.objects[p][0] == kind]
    if len(twins) == 1:
        modes.append(("other", {"k": KINDS[kind]["name"], "c": COLORS[scene.objects[twins[0]][1]]["name"]}))
    return modes


def picture_reference(rng, scene, place, held_out):
    mode, words = rng.pick(picture_modes(scene, place))
    wording = rng.pick(WORLD["references"][mode]["held_out" if held_out else "train"])
    return fill(wording, **words)


# ---------------------------------------------------------------- wishes

@dataclass
class Draft:
    """What earlier wishes of the same request have claimed."""

    scene: Scene
    state: Scene
    used: set = field(default_factory=set)
    held_out: bool = False


def wording(rng, op, style, held_out):
    table = WORLD["wordings"][op]
    if style == "indirect":
        return rng.pick(table["held_out" if held_out else "indirect"])
    return rng.pick(table["direct"])


def reference(rng, draft, place, style):
    if style == "picture":
        return picture_reference(rng, draft.scene, place, draft.held_out)
    return direct_reference(rng, draft.scene, place)


def untouched(draft):
    return [p for p in sorted(draft.scene.objects) if p not in draft.used]


def is_new(draft, thing):
    return thing not in draft.scene.objects.values() and thing not in draft.state.objects.values()


def free_homes(draft, kind):
    busy = set(draft.scene.objects) | set(draft.state.objects)
    return [p for p in homes(kind) if p not in busy]


def edit_row(action, subject, goal, op, **words):
    return (action, subject, goal, fill(WORLD["wordings"][op]["canonical"], **words))


def wish_recolor(rng, draft, style):
    targets = untouched(draft)
    if not targets:
        return None
    place = rng.pick(targets)
    old = draft.scene.objects[place]
    thing = (old[0], rng.below(len(COLORS)))
    if not is_new(draft, thing):
        return None
    goal = COLORS[thing[1]]["name"]
    words = dict(s=reference(rng, draft, place, style), c=goal)
    text = fill(wording(rng, "recolor", style, draft.held_out), **words)
    row = edit_row("recolor", bare_name(old), goal, "recolor", s="the " + bare_name(old), c=goal)
    return Wish("recolor", style, text, [row], places=[place], thing=thing)


def delete_rows(scene, places):
    names = [bare_name(scene.objects[p]) for p in places]
    return [edit_row("delete", n, WORLD["gone"], "delete", s="the " + n) for n in names]


def group_reference(rng, draft):
    """`every house` or `everything but the tree` with the places it means, or None."""
    objects, part = draft.scene.objects, "held_out" if draft.held_out else "train"
    if len(objects) < 2 or draft.used:
        return None
    place = rng.pick(sorted(objects))
    kind = objects[place][0]
    same = [p for p in sorted(objects) if objects[p][0] == kind]
    if len(same) > 1 and rng.below(2) == 0:
        words = dict(k=KINDS[kind]["name"], ks=KINDS[kind]["plural"])
        return fill(rng.pick(WORLD["groups"]["all"][part]), **words), same
    words = dict(a=anchor_name(draft.scene, place))
    return fill(rng.pick(WORLD["groups"]["but"][part]), **words), [p for p in sorted(objects) if p != place]


def wish_delete(rng, draft, style):
    targets = untouched(draft)
    if not targets:
        return None
    group = group_reference(rng, draft) if style == "picture" and rng.below(2) == 0 else None
    if group:
        subject, places = group
    else:
        places = [rng.pick(targets)]
        subject = reference(rng, draft, places[0], style)
    text = fill(wording(rng, "delete", style, draft.held_out), s=subject)
    return Wish("delete", style, text, delete_rows(draft.scene, places), places=places)


def wish_replace(rng, draft, style):
    targets = untouched(draft)
    if not targets:
        return None
    place = rng.pick(targets)
    old = draft.scene.objects[place]
    thing = (rng.below(len(KINDS)), rng.below(len(COLORS)))
    if thing[0] == old[0] or place not in homes(thing[0]) or not is_new(draft, thing):
        return None
    words = dict(s=reference(rng, draft, place, style), o=with_article(thing))
    text = fill(wording(rng, "replace", style, draft.held_out), **words)
    row = edit_row("replace", bare_name(old), bare_name(thing), "replace", s="the " + bare_name(old), o=with_article(thing))
    return Wish("replace", style, text, [row], places=[place], thing=thing)


def wish_add(rng, draft, style):
    thing = (rng.below(len(KINDS)), rng.below(len(COLORS)))
    free = free_homes(draft, thing[0])
    if not free or not is_new(draft, thing):
        return None
    dest = rng.pick(free)
    words = dict(o=with_article(thing), p=place_name(dest))
    style = "direct" if style == "picture" else style
    text = fill(wording(rng, "add", style, draft.held_out), **words)
    row = edit_row("add", bare_name(thing), place_name(dest), "add", **words)
    return Wish("add", style, text, [row], dest=dest, thing=thing)


def wish_move(rng, draft, style):
    targets = untouched(draft)
    if not targets:
        return None
    place = rng.pick(targets)
    thing = draft.scene.objects[place]
    free = free_homes(draft, thing[0])
    if not free:
        return None
    dest = rng.pick(free)
    words = dict(s=reference(rng, draft, place, style), p=place_name(dest))
    text = fill(wording(rng, "move", style, draft.held_out), **words)
    row = edit_row("move", bare_name(thing), place_name(dest), "move", s="the " + bare_name(thing), p=place_name(dest))
    return Wish("move", style, text, [row], places=[place], dest=dest, thing=thing)


def global_wish(rng, draft, style, op, table, key, subject):
    """A new background or a new light level for the whole picture."""
    value = rng.below(len(table))
    if op in draft.used or value == getattr(draft.scene, op if op == "background" else "light"):
        return None
    entry = table[value]
    if style == "indirect":
        text = rng.pick(entry["held_out" if draft.held_out else "indirect"])
    else:
        style = "direct"
        text = fill(rng.pick(WORLD["wordings"][op]["direct"]), **{key: rng.pick(entry["train"])})
    action = "replace" if op == "background" else "relight"
    row = edit_row(action, subject, entry["name"], op, **{key: entry["name"]})
    field_name = "background" if op == "background" else "light"
    return Wish(op, style, text, [row], **{field_name: value})


def wish_background(rng, draft, style):
    return global_wish(rng, draft, style, "background", BACKGROUNDS, "b", "background")


def wish_relight(rng, draft, style):
    return global_wish(rng, draft, style, "relight", LIGHTS, "l", "light")


MAKERS = {"recolor": wish_recolor, "delete": wish_delete, "replace": wish_replace, "add": wish_add,
          "background": wish_background, "relight": wish_relight, "move": wish_move}


def pick_operation(rng):
    left = rng.below(sum(o["weight"] for o in OPERATIONS))
    for operation in OPERATIONS:
        if left < operation["weight"]:
            return operation["name"]
        left -= operation["weight"]
    raise AssertionError("weights")


def pick_style(rng, style):
    if style != "any":
        return style
    roll = rng.below(10)
    return "direct" if roll < 5 else "indirect" if roll < 7 else "picture"


def claim(draft, wish):
    """Remembers what the wish touches and advances the state."""
    draft.state = apply(draft.state, wish)
    draft.used |= set(wish.places) | ({wish.op} if wish.op in ("background", "relight") else set())


# ---------------------------------------------------------------- requests

def sample_wishes(rng, scene, count, op, style, held_out):
    """Up to `count` wishes about one scene; fewer if the scene does not allow them."""
    draft, wishes = Draft(scene, scene.copy(), held_out=held_out), []
    for _ in range(12 * count):
        if len(wishes) == count:
            break
        name = op if op and not wishes else pick_operation(rng)
        wish = MAKERS[name](rng, draft, pick_style(rng, style))
        if wish:
            claim(draft, wish)
            wishes.append(wish)
    return wishes, draft.state


def join_clauses(texts, middle, last):
    """The joined text and the character offset at which each clause ends."""
    out, ends = "", []
    for index, text in enumerate(texts):
        if index:
            out += last if index == len(texts) - 1 else middle
        out += text
        ends.append(len(out))
    return out, ends


def sample_case(seed, count=0, op=None, style="any", held_out=False):
    """One case. `count` 0 draws 1–4 wishes; `op` forces the first wish; `style` is one of STYLES."""
    rng = Rng(seed)
    while True:
        scene = sample_scene(rng)
        want = count or 1 + rng.below(4)
        wishes, target = sample_wishes(rng, scene, want, op, style, held_out)
        if len(wishes) == want:
            break
    middle, last = rng.pick(WORLD["joins"]["held_out" if held_out else "train"])
    text, ends = join_clauses([w.text for w in wishes], middle, last)
    dress = rng.below(4)
    if dress >= 2:
        text = text[0].upper() + text[1:] + ("." if dress == 3 else "")
    return Case(scene, text, wishes, target, ends)


def tags(case):
    """The decomposition reply."""
    rows = [row for wish in case.wishes for row in wish.edits]
    names = ("action", "subject", "goal")
    return "\n".join(f"<{n}>" + "; ".join(r[i] for r in rows) + f"</{n}>" for i, n in enumerate(names))


def sub_requests(case):
    return [row[3] for wish in case.wishes for row in wish.edits]


def merged_prompt(case):
    """What the editor reads when all wishes are carried out in one pass."""
    return WORLD["merge"].join(sub_requests(case))


def held_out_seed(seed, index):
    """Seed of the index-th held-out case of an evaluation seed; training never reaches these."""
    return (WORLD["held_out_base"] + seed * (1 << 24) + index) & MASK


# ---------------------------------------------------------------- pixels

def mix(values, rule):
    return (np.asarray(values, np.int32) * rule["num"] + rule["to"] * (rule["den"] - rule["num"])) // rule["den"]


def _sprite(kind, color):
    """RGB [16, 16, 3] and opacity [16, 16] of one sprite in normal light."""
    rgb, solid = np.zeros((CELL, CELL, 3), np.int32), np.zeros((CELL, CELL), bool)
    for y, row in enumerate(KINDS[kind]["rows"]):
        for x, ch in enumerate(row):
            if ch != ".":
                solid[y, x] = True
                rgb[y, x] = WORLD["inks"].get(ch) or mix(COLORS[color]["rgb"], WORLD["shades"][ch])
    return rgb, solid


def _backdrop(background):
    out, y = np.zeros((SIZE, SIZE, 3), np.int32), 0
    for height, *rgb in BACKGROUNDS[background]["bands"]:
        out[y:y + height] = rgb
        y += height
    for x, top, width, height, *rgb in BACKGROUNDS[background]["marks"]:
        out[top:top + height, x:x + width] = rgb
    return out


SPRITES = {(k, c): _sprite(k, c) for k in range(len(KINDS)) for c in range(len(COLORS))}
BACKDROPS = [_backdrop(b) for b in range(len(BACKGROUNDS))]
LIT_SPRITES = {(l, t): mix(rgb, LIGHTS[l]).astype(np.uint8) for l in range(len(LIGHTS)) for t, (rgb, _) in SPRITES.items()}
LIT_BACKDROPS = [[mix(b, light).astype(np.uint8) for light in LIGHTS] for b in BACKDROPS]


def corner(place):
    return ROWS[place // 4]["y"], COLUMNS[place % 4]["x"]


def render(scene):
    """Pixels `[64, 64, 3]` u8."""
    out = LIT_BACKDROPS[scene.background][scene.light].copy()
    for place, thing in scene.objects.items():
        y, x = corner(place)
        solid = SPRITES[thing][1]
        out[y:y + CELL, x:x + CELL][solid] = LIT_SPRITES[scene.light, thing][solid]
    return out


# ---------------------------------------------------------------- strict readout

ERROR_MAX = 12.0  # mean absolute error, in levels, up to which a region still counts as readable


def _candidates(background, light, place):
    """Everything that may stand at a place: `[(thing or None, pixels [16, 16, 3])]`."""
    y, x = corner(place)
    empty = LIT_BACKDROPS[background][light][y:y + CELL, x:x + CELL]
    out = [(None, empty)]
    for kind in range(len(KINDS)):
        if place in homes(kind):
            for color in range(len(COLORS)):
                solid = SPRITES[kind, color][1][:, :, None]
                out.append(((kind, color), np.where(solid, LIT_SPRITES[light, (kind, color)], empty)))
    return [t for t, _ in out], np.stack([p for _, p in out]).astype(np.int16)


_TABLES = {}


def candidate_table(background, light, place):
    key = (background, light, place)
    if key not in _TABLES:
        _TABLES[key] = _candidates(*key)
    return _TABLES[key]


def readout(pixels):
    """Scene read from pixels `[64, 64, 3]` and the worst mean absolute error of its regions, in levels."""
    y, height = WORLD["clear"]["y"], WORLD["clear"]["height"]
    strip = pixels[y:y + height].astype(np.int16)
    errors = [[np.abs(strip - lit[y:y + height].astype(np.int16)).mean() for lit in row] for row in LIT_BACKDROPS]
    background, light = np.unravel_index(int(np.argmin(errors)), (len(BACKGROUNDS), len(LIGHTS)))
    scene, worst = Scene(int(background), int(light)), float(np.min(errors))
    for place in range(PLACE_COUNT):
        y, x = corner(place)
        things, table = candidate_table(scene.background, scene.light, place)
        error = np.abs(table - pixels[y:y + CELL, x:x + CELL].astype(np.int16)).mean((1, 2, 3))
        best = int(np.argmin(error))
        worst = max(worst, float(error[best]))
        if things[best] is not None:
            scene.objects[place] = things[best]
    return scene, worst


def succeeds(pixels, target):
    """Whether the picture shows exactly the target."""
    scene, worst = readout(pixels)
    return scene == target and worst <= ERROR_MAX
