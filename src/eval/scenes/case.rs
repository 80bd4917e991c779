//! Cases: a scene, a request about it, and the exact target.

use super::{
    rng::Rng,
    scene::Scene,
    wish::{Draft, Edit, Operation, Wish},
    world::WORLD,
};

/// How a wish is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// An instruction that names its object.
    Direct,
    /// What should be, rather than what should be done.
    Indirect,
    /// An instruction whose object only the picture tells.
    Picture,
    /// Any of the others, half of them direct.
    #[default]
    Any,
}

/// What kind of case is wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spec {
    /// How many wishes; 0 draws one to four.
    pub wishes: usize,
    /// What the first wish does, if that matters.
    pub operation: Option<Operation>,
    /// How wishes are said.
    pub style: Style,
    /// Whether indirect wordings, pointing and joining are the ones that training never sees.
    pub held_out: bool,
}

/// A scene, a request, what it means, and the exact result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The scene of the input picture.
    pub scene: Scene,
    /// The request, as a person would put it.
    pub request: String,
    /// Its clauses.
    pub wishes: Vec<Wish>,
    /// The scene of the edited picture.
    pub target: Scene,
}

/// The seed of the index-th held-out case of an evaluation; training never reaches these.
#[must_use]
pub fn held_out_seed(seed: u64, index: u64) -> u64 {
    WORLD.held_out_base.wrapping_add(seed.wrapping_mul(1 << 24)).wrapping_add(index)
}

impl Case {
    /// The case of a seed.
    #[must_use]
    pub fn sample(seed: u64, spec: &Spec) -> Self {
        let mut rng = Rng::new(seed);
        loop {
            let scene = Scene::sample(&mut rng);
            let count = if spec.wishes == 0 { 1 + rng.below(4) } else { spec.wishes };
            let (wishes, target) = sample_wishes(&mut rng, &scene, count, spec);
            if wishes.len() == count {
                let request = phrase(&mut rng, &wishes, spec.held_out);
                return Self { scene, request, wishes, target };
            }
        }
    }

    /// The rows of the decomposition.
    pub fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.wishes.iter().flat_map(|wish| &wish.edits)
    }

    /// The decomposition's reply.
    #[must_use]
    pub fn tags(&self) -> String {
        let list = |of: fn(&Edit) -> &str| self.edits().map(of).collect::<Vec<_>>().join("; ");
        format!(
            "<action>{}</action>\n<subject>{}</subject>\n<goal>{}</goal>",
            list(|edit| edit.action),
            list(|edit| &edit.subject),
            list(|edit| &edit.goal),
        )
    }

    /// The instructions for the editor, one per edit.
    #[must_use]
    pub fn sub_requests(&self) -> Vec<String> {
        self.edits().map(|edit| edit.sub_request.clone()).collect()
    }

    /// What the editor reads when all wishes are carried out in one pass.
    #[must_use]
    pub fn merged_prompt(&self) -> String {
        self.sub_requests().join(&WORLD.merge)
    }
}

/// Up to `count` wishes, fewer where the scene does not allow them, and the scene after them.
fn sample_wishes(rng: &mut Rng, scene: &Scene, count: usize, spec: &Spec) -> (Vec<Wish>, Scene) {
    let (mut draft, mut wishes) = (Draft::new(scene, spec.held_out), Vec::new());
    for _ in 0..12 * count {
        if wishes.len() == count {
            break;
        }
        let forced = spec.operation.filter(|_| wishes.is_empty());
        let operation = forced.unwrap_or_else(|| Operation::sample(rng));
        let style = sample_style(rng, spec.style);
        wishes.extend(draft.draw(rng, operation, style));
    }
    (wishes, draft.state)
}

fn sample_style(rng: &mut Rng, style: Style) -> Style {
    if style != Style::Any {
        return style;
    }
    match rng.below(10) {
        0..5 => Style::Direct,
        5..7 => Style::Indirect,
        _ => Style::Picture,
    }
}

/// The clauses as one request, sometimes with a capital and a full stop.
fn phrase(rng: &mut Rng, wishes: &[Wish], held_out: bool) -> String {
    let [middle, last] = rng.pick(WORLD.joins.part(held_out));
    let mut text = String::new();
    for (index, wish) in wishes.iter().enumerate() {
        if index > 0 {
            text += if index + 1 == wishes.len() { last } else { middle };
        }
        text += &wish.text;
    }
    let dress = rng.below(4);
    if dress >= 2 {
        text[..1].make_ascii_uppercase();
    }
    if dress == 3 {
        text.push('.');
    }
    text
}
