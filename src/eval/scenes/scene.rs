//! Scenes: what stands where, how it is drawn by lot, and what things and places are called.

use std::collections::BTreeMap;

use super::{
    rng::Rng,
    world::{Column, Row, WORLD},
};

/// An object: its kind and its color, as positions in the world's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Thing {
    /// House, tree, car …
    pub kind: usize,
    /// Red, orange, yellow …
    pub color: usize,
}

/// A background, a light level, and at most one object in each of twelve places. No two objects
/// share kind and color.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    /// Position in the world's list of backgrounds.
    pub background: usize,
    /// Position in the world's list of light levels.
    pub light: usize,
    /// Objects by place; a place counts along the rows, from the top left.
    pub objects: BTreeMap<usize, Thing>,
}

impl Scene {
    /// A scene with one to four objects, every third of the later ones a twin in kind.
    pub(super) fn sample(rng: &mut Rng) -> Self {
        let (background, light) =
            (rng.below(WORLD.backgrounds.len()), rng.below(WORLD.lights.len()));
        let mut scene = Self { background, light, objects: BTreeMap::new() };
        let mut kinds = Vec::new();
        for index in 0..1 + rng.below(4) {
            let twin = index > 0 && rng.below(3) == 0;
            let kind = if twin { *rng.pick(&kinds) } else { rng.below(WORLD.kinds.len()) };
            let mut thing = Thing { kind, color: rng.below(WORLD.colors.len()) };
            while scene.holds(thing) {
                thing.color = (thing.color + 1) % WORLD.colors.len();
            }
            let free: Vec<_> = homes(kind)
                .into_iter()
                .filter(|place| !scene.objects.contains_key(place))
                .collect();
            if !free.is_empty() {
                scene.objects.insert(*rng.pick(&free), thing);
                kinds.push(kind);
            }
        }
        scene
    }

    pub(super) fn holds(&self, thing: Thing) -> bool {
        self.objects.values().any(|&other| other == thing)
    }

    /// How many objects are of this kind.
    pub(super) fn count_of(&self, kind: usize) -> usize {
        self.objects.values().filter(|thing| thing.kind == kind).count()
    }

    /// `tree` where the kind is unique in the scene, otherwise `red tree`; with `the`.
    pub(super) fn anchor_name(&self, place: usize) -> String {
        let thing = self.objects[&place];
        if self.count_of(thing.kind) == 1 {
            format!("the {}", WORLD.kinds[thing.kind].name)
        } else {
            format!("the {}", thing.name())
        }
    }
}

impl Thing {
    /// `red house`.
    #[must_use]
    pub fn name(self) -> String {
        format!("{} {}", WORLD.colors[self.color].name, WORLD.kinds[self.kind].name)
    }

    /// `an orange house`.
    pub(super) fn with_article(self) -> String {
        format!("{} {}", WORLD.colors[self.color].article, self.name())
    }
}

/// How many places there are.
pub(super) fn place_count() -> usize {
    WORLD.rows.len() * WORLD.columns.len()
}

/// Row and column of a place.
pub(super) fn row_and_column(place: usize) -> (&'static Row, &'static Column) {
    let width = WORLD.columns.len();
    (&WORLD.rows[place.div_euclid(width)], &WORLD.columns[place % width])
}

/// `bottom far left`.
pub(super) fn place_name(place: usize) -> String {
    let (row, column) = row_and_column(place);
    format!("{} {}", row.name, column.name)
}

/// The places where objects of this kind may stand.
pub(super) fn homes(kind: usize) -> Vec<usize> {
    let home = &WORLD.kinds[kind].home;
    (0..place_count()).filter(|&place| row_and_column(place).0.home == *home).collect()
}

/// The template with `{key}` replaced by its word.
pub(super) fn fill(template: &str, words: &[(&str, &str)]) -> String {
    words
        .iter()
        .fold(template.to_owned(), |text, (key, word)| text.replace(&format!("{{{key}}}"), word))
}
