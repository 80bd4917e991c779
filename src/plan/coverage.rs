//! Whether sub-requests carry out a decomposition: every element of it is named, none is invented.

use std::{collections::BTreeSet, fmt};

use super::{
    action::Action,
    decomposition::Decomposition,
    document::Step,
    text::{find_words, normalized},
};

/// What is wrong with a list of sub-requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gap {
    /// No step does this, names this or reaches this.
    Missing {
        /// `action`, `subject` or `goal`.
        list: &'static str,
        /// The item.
        item: String,
    },
    /// A step that belongs to nothing in the decomposition.
    Invented {
        /// Its number, from 1.
        step: usize,
        /// Its text.
        text: String,
    },
    /// A step that does what an earlier one does.
    Repeated {
        /// Its number, from 1.
        step: usize,
        /// Its text.
        text: String,
    },
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { list, item } => write!(f, "no step has the {list} \"{item}\""),
            Self::Invented { step, text } => {
                write!(f, "step {step} is not in the request: \"{text}\"")
            }
            Self::Repeated { step, text } => {
                write!(f, "step {step} was there before: \"{text}\"")
            }
        }
    }
}

/// An action with the subject and the goal that may belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Triple<'a> {
    pub(super) action: Action,
    pub(super) subject: &'a str,
    pub(super) goal: &'a str,
}

/// First words of instructions, and what they can mean. A first word that is not here says nothing.
const VERBS: &[(&[&str], &[Action])] = {
    use Action::{
        Add, Adjust, Apply, Clone, Crop, Delete, Merge, Move, Recolor, Relight, Replace,
        SuperResolution, Transform, Zoom,
    };
    &[
        (&["add", "put", "place", "insert", "draw", "include"], &[Add, Move, Replace, Clone]),
        (&["remove", "delete", "erase", "take", "get"], &[Delete]),
        (&["recolor", "re-color", "recolour", "paint", "color", "colour", "dye"], &[Recolor]),
        (&["tint"], &[Recolor, Adjust, Apply]),
        (&["replace", "swap", "exchange", "substitute"], &[Replace]),
        (&["move", "shift", "bring", "carry", "slide"], &[Move]),
        (&["relight", "light", "brighten", "darken", "dim"], &[Relight, Adjust]),
        (&["crop", "trim"], &[Crop]),
        (&["flip", "rotate", "scale", "mirror", "resize", "skew", "transform"], &[Transform]),
        (&["zoom"], &[Zoom]),
        (&["clone", "copy", "duplicate"], &[Clone, Add]),
        (&["apply"], &[Apply]),
        (&["adjust"], &[Adjust, Relight]),
        (&["merge", "combine", "blend"], &[Merge]),
        (&["upscale"], &[SuperResolution]),
    ]
};

/// Gives each sub-request its action, subject and goal.
///
/// A sub-request belongs to an action, a subject and a goal of the decomposition when it names the
/// subject and the goal literally (compared as the method compares items) and its first word does
/// not speak of another action. Goals that say no more than their verb, such as `gone` for a
/// removal, need not be named. Where the three lists are of one length (or of length one) their
/// items belong together in their order; otherwise every combination may be meant.
///
/// # Errors
/// All gaps: elements that no sub-request covers, sub-requests that are invented or repeated.
pub fn align(parts: &Decomposition, texts: &[String]) -> Result<Vec<Step>, Vec<Gap>> {
    let triples = triples(parts);
    let mut used = vec![false; triples.len()];
    let (mut steps, mut gaps) = (Vec::with_capacity(texts.len()), Vec::new());
    for (index, text) in texts.iter().enumerate() {
        let (step, text) = (index + 1, text.trim());
        let spoken = normalized(text);
        let fits: Vec<usize> =
            (0..triples.len()).filter(|&at| belongs(&spoken, triples[at])).collect();
        // New work first; then the triple that says most.
        let weight = |&&at: &&usize| (!used[at], said(triples[at]), triples.len() - at);
        match fits.iter().max_by_key(weight) {
            None => gaps.push(Gap::Invented { step, text: text.to_owned() }),
            Some(&at) if used[at] => gaps.push(Gap::Repeated { step, text: text.to_owned() }),
            Some(&at) => {
                used[at] = true;
                let Triple { action, subject, goal } = triples[at];
                steps.push(Step::new(action, subject, goal, text));
            }
        }
    }
    gaps.extend(missing(parts, &steps));
    if gaps.is_empty() { Ok(steps) } else { Err(gaps) }
}

/// The combinations that a step may carry out.
fn triples(parts: &Decomposition) -> Vec<Triple<'_>> {
    let longest = parts.steps_min();
    let fits = |length: usize| length <= 1 || length == longest;
    let (actions, subjects, goals) = (&parts.actions, texts(&parts.subjects), texts(&parts.goals));
    if [actions.len(), subjects.len(), goals.len()].into_iter().all(fits) {
        return (0..longest)
            .filter_map(|at| {
                let action = *actions.get(at).or(actions.first())?;
                let (subject, goal) = (nth(&subjects, at), nth(&goals, at));
                Some(Triple { action, subject, goal })
            })
            .collect();
    }
    let mut all = Vec::new();
    for &action in actions {
        for &subject in &subjects {
            all.extend(goals.iter().map(|goal| Triple { action, subject, goal }));
        }
    }
    all
}

/// The items, or one empty item.
fn texts(items: &[String]) -> Vec<&str> {
    if items.is_empty() { vec![""] } else { items.iter().map(String::as_str).collect() }
}

/// The item at `at`, or the only one.
fn nth<'a>(items: &[&'a str], at: usize) -> &'a str {
    items.get(at).or(items.first()).copied().unwrap_or_default()
}

fn belongs(spoken: &str, triple: Triple<'_>) -> bool {
    let names = |item: &str| item.is_empty() || find_words(spoken, &normalized(item)).is_some();
    let goal = normalized(triple.goal);
    let implied = triple.action.implied_goals().contains(&goal.as_str());
    may_mean(spoken, triple.action) && names(triple.subject) && (implied || names(triple.goal))
}

/// Whether the first word leaves room for the action.
fn may_mean(spoken: &str, action: Action) -> bool {
    let first = spoken.split(' ').next().unwrap_or_default();
    let known = VERBS.iter().find(|(words, _)| words.contains(&first));
    known.is_none_or(|(_, actions)| actions.contains(&action))
}

fn said(triple: Triple<'_>) -> usize {
    triple.subject.len() + triple.goal.len()
}

fn missing(parts: &Decomposition, steps: &[Step]) -> Vec<Gap> {
    let covered = |of: fn(&Step) -> String| steps.iter().map(of).collect::<BTreeSet<_>>();
    let found = [
        covered(|step| step.action.label().to_owned()),
        covered(|step| normalized(&step.subject)),
        covered(|step| normalized(&step.goal)),
    ];
    let wanted = parts.normalized();
    let mut gaps = Vec::new();
    for ((list, found), wanted) in ["action", "subject", "goal"].into_iter().zip(found).zip(wanted)
    {
        let lacking: BTreeSet<String> =
            wanted.into_iter().filter(|item| !found.contains(item)).collect();
        gaps.extend(lacking.into_iter().map(|item| Gap::Missing { list, item }));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(reply: [&str; 3]) -> Decomposition {
        let [actions, subjects, goals] = reply;
        let reply = format!(
            "<action>{actions}</action>\n<subject>{subjects}</subject>\n<goal>{goals}</goal>"
        );
        Decomposition::parse(&reply).unwrap()
    }

    fn texts(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn steps_get_their_elements() {
        let parts = parts(["recolor; delete", "red house; yellow car", "blue; gone"]);
        let steps =
            align(&parts, &texts(&["remove the yellow car", "recolor the red house to blue"]))
                .unwrap();
        assert_eq!(
            steps[0],
            Step::new(Action::Delete, "yellow car", "gone", "remove the yellow car")
        );
        assert_eq!((steps[1].action, steps[1].goal.as_str()), (Action::Recolor, "blue"));
    }

    #[test]
    fn one_goal_for_two_subjects_is_aligned() {
        let parts = parts(["recolor", "coat; hair", "scarlet; copper red"]);
        let lines = ["Recolor the coat to scarlet", "recolor the Hair to copper  red"];
        assert_eq!(align(&parts, &texts(&lines)).unwrap()[1].subject, "hair");
        let shared = super::tests::parts(["recolor; delete", "coat; hair; hat", "scarlet; gone"]);
        let lines =
            ["recolor the coat to scarlet", "recolor the hair to scarlet", "remove the hat"];
        let steps = align(&shared, &texts(&lines)).unwrap();
        assert_eq!((steps[1].goal.as_str(), steps[2].goal.as_str()), ("scarlet", "gone"));
    }

    #[test]
    fn gaps_are_told_apart() {
        let parts = parts(["recolor; delete", "house; car", "blue; gone"]);
        let gaps = |lines: &[&str]| align(&parts, &texts(lines)).unwrap_err();
        let missing = |list, item: &str| Gap::Missing { list, item: item.to_owned() };
        assert_eq!(
            gaps(&["recolor the house to blue"]),
            [missing("action", "delete"), missing("subject", "car"), missing("goal", "gone")]
        );
        assert_eq!(gaps(&[]).len(), 6);
        let invented = gaps(&["recolor the house to blue", "remove the car", "add a dog"]);
        assert_eq!(invented, [Gap::Invented { step: 3, text: "add a dog".to_owned() }]);
        let twice = gaps(&["recolor the house to blue", "remove the car", "delete the car"]);
        assert_eq!(twice, [Gap::Repeated { step: 3, text: "delete the car".to_owned() }]);
        // The right words under another verb are another edit.
        assert!(matches!(
            gaps(&["move the house to the blue", "remove the car"])[0],
            Gap::Invented { .. }
        ));
    }

    #[test]
    fn the_more_exact_subject_wins() {
        let parts = parts(["delete; delete", "house; red house", "gone; gone"]);
        let steps = align(&parts, &texts(&["remove the red house", "remove the house"])).unwrap();
        assert_eq!((steps[0].subject.as_str(), steps[1].subject.as_str()), ("red house", "house"));
    }

    #[test]
    fn other_languages_are_aligned() {
        let chinese = parts(["recolor; delete", "房子; 汽车", "蓝色; gone"]);
        assert!(align(&chinese, &texts(&["把房子涂成蓝色", "去掉汽车"])).is_ok());
        let german = parts(["recolor", "Häuser", "grün"]);
        assert!(align(&german, &texts(&["male die häuser grün an"])).is_ok());
    }
}
