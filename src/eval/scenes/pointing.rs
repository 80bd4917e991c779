//! How a request points at an object: by name, by where it stands, by what sets it apart.

use super::{
    rng::Rng,
    scene::{Scene, Thing, fill, place_name},
    world::WORLD,
};

/// A way to point at an object that needs the picture: a wording's name and its words.
type Way = (&'static str, Vec<(&'static str, String)>);

/// An axis of the grid of places.
#[derive(Debug, Clone, Copy)]
enum Axis {
    Row,
    Column,
}

impl Axis {
    fn of(self, place: usize) -> usize {
        match self {
            Self::Row => place.div_euclid(WORLD.columns.len()),
            Self::Column => place % WORLD.columns.len(),
        }
    }

    /// Whether `place` lies before `other` along the axis, or after it.
    fn beyond(self, place: usize, other: usize, before: bool) -> bool {
        let (place, other) = (self.of(place), self.of(other));
        if before { place < other } else { place > other }
    }
}

const SIDES: [(&str, Axis, bool); 4] = [
    ("left_of", Axis::Column, true),
    ("right_of", Axis::Column, false),
    ("above", Axis::Row, true),
    ("below", Axis::Row, false),
];
const EXTREMES: [(&str, Axis, bool); 4] = [
    ("leftmost", Axis::Column, true),
    ("rightmost", Axis::Column, false),
    ("highest", Axis::Row, true),
    ("lowest", Axis::Row, false),
];

/// `the house` where that is clear, sometimes `the red house` all the same.
pub(super) fn by_name(rng: &mut Rng, scene: &Scene, place: usize) -> String {
    let thing = scene.objects[&place];
    let short = rng.below(3) < 2;
    if scene.count_of(thing.kind) == 1 && short {
        format!("the {}", WORLD.kinds[thing.kind].name)
    } else {
        format!("the {}", thing.name())
    }
}

/// `the thing left of the tree` and the like.
pub(super) fn by_picture(rng: &mut Rng, scene: &Scene, place: usize, held_out: bool) -> String {
    let ways = ways(scene, place);
    let (name, words) = rng.pick(&ways);
    let template = rng.pick(WORLD.references[*name].part(held_out));
    let words: Vec<_> = words.iter().map(|(key, word)| (*key, word.as_str())).collect();
    fill(template, &words)
}

fn ways(scene: &Scene, place: usize) -> Vec<Way> {
    let Thing { kind, color } = scene.objects[&place];
    let others: Vec<_> = scene.objects.iter().filter(|&(&other, _)| other != place).collect();
    let mut ways: Vec<Way> = vec![("place", vec![("p", place_name(place))])];
    if others.is_empty() {
        ways.push(("only", vec![]));
        return ways;
    }
    for (name, axis, before) in SIDES {
        let anchors = singled_out(scene, place, axis, before);
        ways.extend(anchors.map(|anchor| (name, vec![("a", scene.anchor_name(anchor))])));
    }
    for (name, axis, before) in EXTREMES {
        if others.iter().all(|&(&other, _)| axis.beyond(place, other, before)) {
            ways.push((name, vec![]));
        }
    }
    if others.iter().all(|(_, other)| other.color != color) {
        ways.push(("color", vec![("c", WORLD.colors[color].name.clone())]));
    }
    let twins: Vec<_> = others.iter().filter(|(_, other)| other.kind == kind).collect();
    if let [(_, twin)] = twins[..] {
        let words = [("k", &WORLD.kinds[kind].name), ("c", &WORLD.colors[twin.color].name)];
        ways.push(("other", words.map(|(key, word)| (key, word.clone())).to_vec()));
    }
    ways
}

/// Objects that have `place`, and nothing else, on the given side of them.
fn singled_out(
    scene: &Scene,
    place: usize,
    axis: Axis,
    before: bool,
) -> impl Iterator<Item = usize> {
    scene.objects.keys().copied().filter(move |&anchor| {
        let mut side = scene.objects.keys().filter(|&&p| axis.beyond(p, anchor, before));
        side.next() == Some(&place) && side.next().is_none()
    })
}

/// `every house` or `everything but the tree`, with the places it means; nothing where there is
/// one object only.
pub(super) fn by_group(
    rng: &mut Rng,
    scene: &Scene,
    held_out: bool,
) -> Option<(String, Vec<usize>)> {
    if scene.objects.len() < 2 {
        return None;
    }
    let places: Vec<_> = scene.objects.keys().copied().collect();
    let place = *rng.pick(&places);
    let kind = scene.objects[&place].kind;
    if scene.count_of(kind) > 1 && rng.below(2) == 0 {
        let kind_words = &WORLD.kinds[kind];
        let template = rng.pick(WORLD.groups["all"].part(held_out));
        let same = places.into_iter().filter(|p| scene.objects[p].kind == kind).collect();
        return Some((
            fill(template, &[("k", &kind_words.name), ("ks", &kind_words.plural)]),
            same,
        ));
    }
    let template = rng.pick(WORLD.groups["but"].part(held_out));
    let rest = places.into_iter().filter(|&p| p != place).collect();
    Some((fill(template, &[("a", &scene.anchor_name(place))]), rest))
}
