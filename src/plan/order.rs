//! Sub-requests without a model: what is done when the sequencing agent fails twice.
//!
//! Steps are ordered by what they do: removals, then geometry (move, transform, crop, zoom), then
//! replacements and additions (replace, add, clone, merge), then color (recolor), then what changes
//! the whole picture (specialized, adjust, relight, apply), and more pixels last. Steps of one kind
//! keep the order of the request.

use super::{action::Action, decomposition::Decomposition, document::Step, text::normalized};

/// Words that make a goal a place.
const PLACES: &[&str] = &[
    "top",
    "bottom",
    "left",
    "right",
    "middle",
    "center",
    "centre",
    "corner",
    "edge",
    "background",
    "foreground",
    "front",
    "sky",
    "ground",
];
/// Words after which no article is put.
const DETERMINERS: &[&str] = &[
    "the",
    "a",
    "an",
    "all",
    "every",
    "each",
    "both",
    "my",
    "his",
    "her",
    "their",
    "its",
    "this",
    "that",
    "these",
    "those",
    "everything",
    "everyone",
];
const VOWELS: &str = "aeiou";

/// The place of an action in the order.
fn rank(action: Action) -> u8 {
    match action {
        Action::Delete => 0,
        Action::Move | Action::Transform | Action::Crop | Action::Zoom => 1,
        Action::Replace => 2,
        Action::Add | Action::Clone | Action::Merge => 3,
        Action::Recolor => 4,
        Action::Specialized => 5,
        Action::Adjust => 6,
        Action::Relight => 7,
        Action::Apply => 8,
        Action::SuperResolution => 9,
    }
}

/// Steps for a decomposition: as many as its longest list has items. The shorter lists' last items
/// are used again, so every element is covered.
#[must_use]
pub fn ordered(parts: &Decomposition) -> Vec<Step> {
    let Some(&last) = parts.actions.last() else { return Vec::new() };
    let item =
        |items: &[String], at: usize| items.get(at).or(items.last()).cloned().unwrap_or_default();
    let mut steps: Vec<Step> = (0..parts.steps_min())
        .map(|at| {
            let action = parts.actions.get(at).copied().unwrap_or(last);
            let (subject, goal) = (item(&parts.subjects, at), item(&parts.goals, at));
            let prompt = sentence(action, &subject, &goal);
            Step { action, subject, goal, prompt }
        })
        .collect();
    steps.sort_by_key(|step| rank(step.action));
    steps.dedup();
    steps
}

/// An instruction that names subject and goal literally.
fn sentence(action: Action, subject: &str, goal: &str) -> String {
    let implied = action.implied_goals().contains(&normalized(goal).as_str());
    let goal = if implied { "" } else { goal };
    let the = definite(if subject.is_empty() { "picture" } else { subject });
    let (whole, place) = (normalized(subject), is_place(goal));
    let to = |verb: &str, link: &str| match goal {
        "" => format!("{verb} {the}"),
        goal => format!("{verb} {the} {link} {goal}"),
    };
    match action {
        Action::Add if place => format!("add {} at {}", indefinite(subject), definite(goal)),
        Action::Add if goal.is_empty() => format!("add {}", indefinite(subject)),
        Action::Add => format!("add {}, {goal}", indefinite(subject)),
        Action::Delete => to("remove", "so that it is"),
        Action::Move if place => format!("move {the} to {}", definite(goal)),
        Action::Move => to("move", "to"),
        Action::Replace if whole == "background" => to("change", "to"),
        Action::Replace if goal.is_empty() => to("replace", "with"),
        Action::Replace => format!("replace {the} with {}", indefinite(goal)),
        Action::Recolor => to("recolor", "to"),
        Action::Relight if whole == "light" => to("set", "to"),
        Action::Relight => to("relight", "to be"),
        Action::Adjust => to("adjust", "to be"),
        Action::Apply if goal.is_empty() => to("apply", "to"),
        Action::Apply => format!("apply {goal} to {the}"),
        Action::Clone => to("clone", "as"),
        Action::Crop => to("crop", "to"),
        Action::Merge => to("merge", "with"),
        Action::Specialized => to("change", "to"),
        Action::SuperResolution => to("upscale", "to"),
        Action::Transform => to("transform", "to"),
        Action::Zoom => to("zoom", "to"),
    }
}

fn is_place(goal: &str) -> bool {
    let goal = normalized(goal);
    goal.split([' ', '-']).any(|word| PLACES.contains(&word))
}

/// `the …`, unless it has a determiner or is not English enough to take one.
fn definite(name: &str) -> String {
    if takes_article(name) { format!("the {name}") } else { name.to_owned() }
}

fn indefinite(name: &str) -> String {
    let vowel = name.chars().next().is_some_and(|c| VOWELS.contains(c.to_ascii_lowercase()));
    match takes_article(name) {
        false => name.to_owned(),
        true if vowel => format!("an {name}"),
        true => format!("a {name}"),
    }
}

fn takes_article(name: &str) -> bool {
    let first = normalized(name);
    let first = first.split(' ').next().unwrap_or_default();
    name.is_ascii() && !first.is_empty() && !DETERMINERS.contains(&first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::coverage::align;

    fn prompts(reply: [&str; 3]) -> Vec<String> {
        let [actions, subjects, goals] = reply;
        let reply = format!(
            "<action>{actions}</action>\n<subject>{subjects}</subject>\n<goal>{goals}</goal>"
        );
        let steps = ordered(&Decomposition::parse(&reply).unwrap());
        steps.into_iter().map(|step| step.prompt).collect()
    }

    #[test]
    fn removals_come_first_and_the_whole_picture_last() {
        let found = prompts([
            "relight; recolor; add; move; delete; replace; apply",
            "light; red house; orange ball; boat; yellow car; background; picture",
            "dim; blue; bottom left; top right; gone; night; sketch style",
        ]);
        let expected = [
            "remove the yellow car",
            "move the boat to the top right",
            "change the background to night",
            "add an orange ball at the bottom left",
            "recolor the red house to blue",
            "set the light to dim",
            "apply sketch style to the picture",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn shorter_lists_are_used_again() {
        let found = prompts(["recolor", "coat; hair", "scarlet red"]);
        assert_eq!(found, ["recolor the coat to scarlet red", "recolor the hair to scarlet red"]);
        assert_eq!(prompts(["super-resolution", "", ""]), ["upscale the picture"]);
        assert!(ordered(&Decomposition::default()).is_empty());
    }

    fn item() -> impl Strategy<Value = String> {
        let word =
            prop_oneof!["[a-zA-Z]{1,8}", "[äöüß北京房子車]{1,3}", "[a-z]{1,3}-[a-z0-9]{1,3}"];
        prop::collection::vec(word, 1..4).prop_map(|words| words.join(" "))
    }

    proptest! {
        #[test]
        fn every_element_is_covered_and_none_invented(
            actions in prop::collection::vec(0_usize..15, 1..6),
            subjects in prop::collection::vec(item(), 0..6),
            goals in prop::collection::vec(item(), 0..6),
        ) {
            let actions = actions.into_iter().map(|at| Action::ALL[at]).collect();
            let parts = Decomposition { actions, subjects, goals };
            let steps = ordered(&parts);
            let [actions, subjects, goals] = parts.normalized();
            for (list, of) in [
                (actions, (|step: &Step| step.action.label().to_owned()) as fn(&Step) -> String),
                (subjects, |step| normalized(&step.subject)),
                (goals, |step| normalized(&step.goal)),
            ] {
                let found: Vec<String> = steps.iter().map(of).collect();
                prop_assert!(list.iter().all(|item| found.contains(item)));
                prop_assert!(list.is_empty() || found.iter().all(|item| list.contains(item)));
            }
            for step in &steps {
                let spoken = normalized(&step.prompt);
                let implied = step.action.implied_goals().contains(&normalized(&step.goal).as_str());
                prop_assert!(spoken.contains(&normalized(&step.subject)), "{step:?}");
                prop_assert!(implied || spoken.contains(&normalized(&step.goal)), "{step:?}");
            }
        }

        #[test]
        fn aligned_lists_pass_the_check_of_the_agents_reply(
            rows in prop::collection::btree_set((item(), item()), 1..6),
            actions in prop::collection::vec(0_usize..15, 6),
        ) {
            let (subjects, goals): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
            let actions = actions.into_iter().take(subjects.len()).map(|at| Action::ALL[at]).collect();
            let parts = Decomposition { actions, subjects, goals };
            let texts: Vec<String> = ordered(&parts).into_iter().map(|step| step.prompt).collect();
            // A subject may hold another row's words, so a step may be read as that row's; but no
            // step of a full list is invented.
            if let Err(gaps) = align(&parts, &texts) {
                prop_assert!(
                    gaps.iter().all(|gap| !matches!(gap, crate::plan::Gap::Invented { .. })),
                    "{gaps:?}"
                );
            }
        }
    }
}
