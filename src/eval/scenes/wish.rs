//! Wishes: one clause of a request, what it says and what it does to the scene.

use std::collections::BTreeSet;

use super::{
    case::Style,
    pointing,
    rng::Rng,
    scene::{Scene, Thing, fill, homes, place_name},
    world::{Said, WORLD},
};

/// What a wish does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Another color for one object.
    Recolor,
    /// Objects go away.
    Delete,
    /// Another object in the place of one.
    Replace,
    /// A new object in a named place.
    Add,
    /// Another background.
    Background,
    /// Another light level.
    Relight,
    /// One object goes to a named place.
    Move,
}

impl Operation {
    /// All operations, in the order of world.json.
    pub const ALL: [Self; 7] = [
        Self::Recolor,
        Self::Delete,
        Self::Replace,
        Self::Add,
        Self::Background,
        Self::Relight,
        Self::Move,
    ];

    /// The name in world.json and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Recolor => "recolor",
            Self::Delete => "delete",
            Self::Replace => "replace",
            Self::Add => "add",
            Self::Background => "background",
            Self::Relight => "relight",
            Self::Move => "move",
        }
    }

    /// The operation of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }

    /// One operation by its weight.
    pub(super) fn sample(rng: &mut Rng) -> Self {
        let mut left = rng.below(WORLD.operations.iter().map(|operation| operation.weight).sum());
        let drawn = WORLD.operations.iter().find(|operation| {
            let hit = left < operation.weight;
            left = left.saturating_sub(operation.weight);
            hit
        });
        drawn.and_then(|operation| Self::named(&operation.name)).expect("a test names them all")
    }
}

/// One row of the decomposition, and the sub-request that carries it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// What is done: `recolor`, `delete` …
    pub action: &'static str,
    /// To what: `red house`.
    pub subject: String,
    /// With which result: `blue`.
    pub goal: String,
    /// The instruction for the editor: `recolor the red house to blue`.
    pub sub_request: String,
}

/// One clause of a request and everything it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// What is done.
    pub operation: Operation,
    /// How it is said.
    pub style: Style,
    /// The clause.
    pub text: String,
    /// Its rows of the decomposition.
    pub edits: Vec<Edit>,
    change: Change,
}

/// What a wish does to a scene.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    Remove(Vec<usize>),
    Put(usize, Thing),
    Move(usize, usize),
    Background(usize),
    Light(usize),
}

impl Wish {
    /// The scene after the wish.
    #[must_use]
    pub fn apply(&self, scene: &Scene) -> Scene {
        let mut after = scene.clone();
        match &self.change {
            Change::Remove(places) => after.objects.retain(|place, _| !places.contains(place)),
            Change::Put(place, thing) => {
                after.objects.insert(*place, *thing);
            }
            Change::Move(from, to) => {
                if let Some(thing) = after.objects.remove(from) {
                    after.objects.insert(*to, thing);
                }
            }
            Change::Background(background) => after.background = *background,
            Change::Light(light) => after.light = *light,
        }
        after
    }
}

/// A request in the making: the scene, the state after the wishes so far, and what they touch.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    scene: &'a Scene,
    pub(super) state: Scene,
    used: BTreeSet<usize>,
    whole: BTreeSet<Operation>,
    held_out: bool,
}

impl<'a> Draft<'a> {
    pub(super) fn new(scene: &'a Scene, held_out: bool) -> Self {
        Self {
            scene,
            state: scene.clone(),
            used: BTreeSet::new(),
            whole: BTreeSet::new(),
            held_out,
        }
    }

    /// Draws one wish and takes it in; nothing where the draw does not fit the scene.
    pub(super) fn draw(
        &mut self,
        rng: &mut Rng,
        operation: Operation,
        style: Style,
    ) -> Option<Wish> {
        let wish = match operation {
            Operation::Recolor => self.recolor(rng, style),
            Operation::Delete => self.delete(rng, style),
            Operation::Replace => self.replace(rng, style),
            Operation::Add => self.add(rng, style),
            Operation::Background => self.background(rng, style),
            Operation::Relight => self.relight(rng, style),
            Operation::Move => self.shift(rng, style),
        }?;
        self.claim(&wish);
        Some(wish)
    }

    fn claim(&mut self, wish: &Wish) {
        self.state = wish.apply(&self.state);
        match &wish.change {
            Change::Remove(places) => self.used.extend(places),
            Change::Put(place, _) if wish.operation != Operation::Add => {
                self.used.insert(*place);
            }
            Change::Put(..) => {}
            Change::Move(from, _) => {
                self.used.insert(*from);
            }
            Change::Background(_) | Change::Light(_) => {
                self.whole.insert(wish.operation);
            }
        }
    }

    fn recolor(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let place = self.target(rng)?;
        let old = self.scene.objects[&place];
        let thing = Thing { kind: old.kind, color: rng.below(WORLD.colors.len()) };
        if !self.is_new(thing) {
            return None;
        }
        let goal = WORLD.colors[thing.color].name.clone();
        let subject = self.reference(rng, place, style);
        let text = self.say(rng, Operation::Recolor, style, &[("s", &subject), ("c", &goal)]);
        let name = format!("the {}", old.name());
        let sub_request = canonical(Operation::Recolor, &[("s", &name), ("c", &goal)]);
        let edit = Edit { action: "recolor", subject: old.name(), goal, sub_request };
        Some(Wish {
            operation: Operation::Recolor,
            style,
            text,
            edits: vec![edit],
            change: Change::Put(place, thing),
        })
    }

    fn delete(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let targets = self.untouched();
        if targets.is_empty() {
            return None;
        }
        let fresh = self.used.is_empty() && self.whole.is_empty();
        let in_group = style == Style::Picture && rng.below(2) == 0;
        let group = if in_group && fresh {
            pointing::by_group(rng, self.scene, self.held_out)
        } else {
            None
        };
        let (subject, places) = group.unwrap_or_else(|| {
            let place = *rng.pick(&targets);
            (self.reference(rng, place, style), vec![place])
        });
        let text = self.say(rng, Operation::Delete, style, &[("s", &subject)]);
        let edits = places.iter().map(|place| {
            let subject = self.scene.objects[place].name();
            let name = format!("the {subject}");
            let sub_request = canonical(Operation::Delete, &[("s", &name)]);
            Edit { action: "delete", subject, goal: WORLD.gone.clone(), sub_request }
        });
        let edits = edits.collect();
        let change = Change::Remove(places);
        Some(Wish { operation: Operation::Delete, style, text, edits, change })
    }

    fn replace(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let place = self.target(rng)?;
        let old = self.scene.objects[&place];
        let thing = sample_thing(rng);
        let fits = thing.kind != old.kind && homes(thing.kind).contains(&place);
        if !fits || !self.is_new(thing) {
            return None;
        }
        let (subject, object) = (self.reference(rng, place, style), thing.with_article());
        let text = self.say(rng, Operation::Replace, style, &[("s", &subject), ("o", &object)]);
        let name = format!("the {}", old.name());
        let sub_request = canonical(Operation::Replace, &[("s", &name), ("o", &object)]);
        let (subject, goal) = (old.name(), thing.name());
        Some(Wish {
            operation: Operation::Replace,
            style,
            text,
            edits: vec![Edit { action: "replace", subject, goal, sub_request }],
            change: Change::Put(place, thing),
        })
    }

    fn add(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let thing = sample_thing(rng);
        let free = self.free_homes(thing.kind);
        if free.is_empty() || !self.is_new(thing) {
            return None;
        }
        let place = *rng.pick(&free);
        let (object, goal) = (thing.with_article(), place_name(place));
        let style = if style == Style::Picture { Style::Direct } else { style };
        let words = [("o", object.as_str()), ("p", goal.as_str())];
        let text = self.say(rng, Operation::Add, style, &words);
        let sub_request = canonical(Operation::Add, &words);
        Some(Wish {
            operation: Operation::Add,
            style,
            text,
            edits: vec![Edit { action: "add", subject: thing.name(), goal, sub_request }],
            change: Change::Put(place, thing),
        })
    }

    fn shift(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let from = self.target(rng)?;
        let thing = self.scene.objects[&from];
        let free = self.free_homes(thing.kind);
        if free.is_empty() {
            return None;
        }
        let to = *rng.pick(&free);
        let (subject, goal) = (self.reference(rng, from, style), place_name(to));
        let text = self.say(rng, Operation::Move, style, &[("s", &subject), ("p", &goal)]);
        let name = format!("the {}", thing.name());
        let sub_request = canonical(Operation::Move, &[("s", &name), ("p", &goal)]);
        Some(Wish {
            operation: Operation::Move,
            style,
            text,
            edits: vec![Edit { action: "move", subject: thing.name(), goal, sub_request }],
            change: Change::Move(from, to),
        })
    }

    fn background(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let value = rng.below(WORLD.backgrounds.len());
        let said = &WORLD.backgrounds[value].said;
        let differs = value != self.scene.background;
        let change = Change::Background(value);
        self.whole_picture(rng, style, said, (Operation::Background, change, differs))
    }

    fn relight(&self, rng: &mut Rng, style: Style) -> Option<Wish> {
        let value = rng.below(WORLD.lights.len());
        let said = &WORLD.lights[value].said;
        let differs = value != self.scene.light;
        let change = Change::Light(value);
        self.whole_picture(rng, style, said, (Operation::Relight, change, differs))
    }

    /// A wish about the whole picture, once per request.
    fn whole_picture(
        &self,
        rng: &mut Rng,
        style: Style,
        said: &Said,
        (operation, change, differs): (Operation, Change, bool),
    ) -> Option<Wish> {
        if self.whole.contains(&operation) || !differs {
            return None;
        }
        let (action, subject, key) = match operation {
            Operation::Background => ("replace", "background", "b"),
            _ => ("relight", "light", "l"),
        };
        let (style, text) = if style == Style::Indirect {
            let texts = if self.held_out { &said.held_out } else { &said.indirect };
            (style, rng.pick(texts).clone())
        } else {
            let template = rng.pick(&WORLD.wordings[operation.name()].direct);
            (Style::Direct, fill(template, &[(key, rng.pick(&said.train).as_str())]))
        };
        let sub_request = canonical(operation, &[(key, &said.name)]);
        let edit =
            Edit { action, subject: subject.to_owned(), goal: said.name.clone(), sub_request };
        Some(Wish { operation, style, text, edits: vec![edit], change })
    }

    /// The objects that no wish has touched yet.
    fn untouched(&self) -> Vec<usize> {
        self.scene.objects.keys().copied().filter(|place| !self.used.contains(place)).collect()
    }

    fn target(&self, rng: &mut Rng) -> Option<usize> {
        let targets = self.untouched();
        (!targets.is_empty()).then(|| *rng.pick(&targets))
    }

    /// Whether neither the scene nor its state holds such an object.
    fn is_new(&self, thing: Thing) -> bool {
        !self.scene.holds(thing) && !self.state.holds(thing)
    }

    fn free_homes(&self, kind: usize) -> Vec<usize> {
        let busy = |place: &usize| {
            self.scene.objects.contains_key(place) || self.state.objects.contains_key(place)
        };
        homes(kind).into_iter().filter(|place| !busy(place)).collect()
    }

    fn reference(&self, rng: &mut Rng, place: usize, style: Style) -> String {
        if style == Style::Picture {
            pointing::by_picture(rng, self.scene, place, self.held_out)
        } else {
            pointing::by_name(rng, self.scene, place)
        }
    }

    fn say(
        &self,
        rng: &mut Rng,
        operation: Operation,
        style: Style,
        words: &[(&str, &str)],
    ) -> String {
        let wording = &WORLD.wordings[operation.name()];
        let templates = match (style, self.held_out) {
            (Style::Indirect, true) => &wording.held_out,
            (Style::Indirect, false) => &wording.indirect,
            _ => &wording.direct,
        };
        fill(rng.pick::<String>(templates), words)
    }
}

fn sample_thing(rng: &mut Rng) -> Thing {
    let kind = rng.below(WORLD.kinds.len());
    Thing { kind, color: rng.below(WORLD.colors.len()) }
}

/// The sub-request that carries an operation out.
fn canonical(operation: Operation, words: &[(&str, &str)]) -> String {
    fill(&WORLD.wordings[operation.name()].canonical, words)
}
