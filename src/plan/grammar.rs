//! The grammars that the two agents' replies follow, in llguidance's dialect of Lark.

use std::fmt::Write as _;

use super::{action::Action, decomposition::LIST_ITEMS_MAX, document::STEPS_MAX};

/// The longest item of a decomposition, in characters.
const ITEM_CHARS_MAX: usize = 80;
/// The longest sub-request that an agent writes, in characters.
const STEP_CHARS_MAX: usize = 200;

/// Replies of the decomposition agent: three lists in their tags, at least one action, every action
/// one of the 15, subjects and goals free. Every reply ends: items and lists have a longest form.
#[must_use]
pub fn decomposition_grammar() -> String {
    let more = LIST_ITEMS_MAX - 1;
    let verbs: Vec<String> = Action::ALL
        .iter()
        .map(|action| format!("\"{action}\""))
        .chain(["\"re-color\"".to_owned()])
        .collect();
    let inner = ITEM_CHARS_MAX - 2;
    format!(
        r#"start: "<action>" verb ("; " verb){{0,{more}}} "</action>\n<subject>" list "</subject>\n<goal>" list "</goal>"
list: (ITEM ("; " ITEM){{0,{more}}})?
verb: {}
ITEM: /[^<>;\s\x00-\x1f]([^<>;\n\r\x00-\x1f]{{0,{inner}}}[^<>;\s\x00-\x1f])?/
"#,
        verbs.join(" | ")
    )
}

/// Replies of the sequencing agent: `1. …`, `2. …`, one sub-request on each line.
#[must_use]
pub fn steps_grammar() -> String {
    let inner = STEP_CHARS_MAX - 2;
    let mut grammar = String::from("start: line_1\n");
    for number in 1..=STEPS_MAX {
        let before = if number == 1 { "" } else { r"\n" };
        let next =
            if number < STEPS_MAX { format!(" line_{}?", number + 1) } else { String::new() };
        // Writing to a string cannot fail.
        writeln!(grammar, "line_{number}: \"{before}{number}. \" TEXT{next}").unwrap_or_default();
    }
    writeln!(grammar, r"TEXT: /[^\s\x00-\x1f]([^\n\r\x00-\x1f]{{0,{inner}}}[^\s\x00-\x1f])?/")
        .unwrap_or_default();
    grammar
}
