//! What a request is made of: actions, subjects and goals, and the reply that names them.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};

use super::{action::Action, text::normalized};

/// The most items of one list.
pub const LIST_ITEMS_MAX: usize = 16;
/// The tags of a reply, in their order.
const TAGS: [&str; 3] = ["action", "subject", "goal"];

/// The parts of a request. The lists are sets: an item of one need not belong to the item in the
/// same place of another, although models often write them so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Decomposition {
    /// What is done.
    pub actions: Vec<Action>,
    /// To what.
    pub subjects: Vec<String>,
    /// What should result.
    pub goals: Vec<String>,
}

/// Why a reply is no decomposition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {at}: {found}, expected {expected}")]
pub struct Malformed {
    /// Where in the reply, in bytes.
    pub at: usize,
    /// What stands there.
    pub found: String,
    /// What should stand there.
    pub expected: String,
}

impl Decomposition {
    /// Reads a reply: three lines, `<action>…</action>`, `<subject>…</subject>`, `<goal>…</goal>`,
    /// items separated by `;`, and nothing else.
    ///
    /// # Errors
    /// A reply that breaks the format, an action that is none of the 15, or a list that is too
    /// long.
    pub fn parse(reply: &str) -> Result<Self, Malformed> {
        let [actions, subjects, goals] = lists(reply)?;
        let named = |(at, label): &(usize, &str)| {
            Action::named(label).ok_or_else(|| Malformed {
                at: *at,
                found: format!("the action {label:?}"),
                expected: Action::ALL.map(Action::label).join(", "),
            })
        };
        let text = |items: Vec<(usize, &str)>| {
            items.into_iter().map(|(_, item)| item.to_owned()).collect::<Vec<_>>()
        };
        Ok(Self {
            actions: actions.iter().map(named).collect::<Result<_, _>>()?,
            subjects: text(subjects),
            goals: text(goals),
        })
    }

    /// How many steps it takes at least: the length of the longest list.
    #[must_use]
    pub fn steps_min(&self) -> usize {
        self.actions.len().max(self.subjects.len()).max(self.goals.len())
    }

    /// The items of the three lists in the form in which they are compared.
    pub(super) fn normalized(&self) -> [Vec<String>; 3] {
        let texts = |items: &[String]| items.iter().map(|item| normalized(item)).collect();
        let labels = self.actions.iter().map(|action| action.label().to_owned()).collect();
        [labels, texts(&self.subjects), texts(&self.goals)]
    }
}

/// The reply that [`Decomposition::parse`] reads.
impl Display for Decomposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<&str> = self.actions.iter().map(|action| action.label()).collect();
        let lists = [labels.join("; "), self.subjects.join("; "), self.goals.join("; ")];
        for (index, (tag, list)) in TAGS.iter().zip(lists).enumerate() {
            let before = if index == 0 { "" } else { "\n" };
            write!(f, "{before}<{tag}>{list}</{tag}>")?;
        }
        Ok(())
    }
}

/// The items of the three lists, each with its place in the reply.
pub(super) fn lists(reply: &str) -> Result<[Vec<(usize, &str)>; 3], Malformed> {
    let mut at = 0;
    let mut lists = [Vec::new(), Vec::new(), Vec::new()];
    for (index, (tag, list)) in TAGS.iter().zip(&mut lists).enumerate() {
        let opening = format!("{}<{tag}>", if index == 0 { "" } else { "\n" });
        at = after(reply, at, &opening)?;
        let closing = format!("</{tag}>");
        let Some(length) = reply[at..].find(&closing) else {
            return Err(malformed(reply, at, &closing));
        };
        *list = items(&reply[..at + length], at)?;
        at += length + closing.len();
    }
    if at < reply.len() { Err(malformed(reply, at, "the end")) } else { Ok(lists) }
}

/// The items of the list that begins at byte `at` of `text` and ends with it.
fn items(text: &str, at: usize) -> Result<Vec<(usize, &str)>, Malformed> {
    if let Some(bad) = text[at..].find(['<', '>', '\n']) {
        return Err(malformed(text, at + bad, "items separated by `;`"));
    }
    let (mut items, mut place) = (Vec::new(), at);
    for item in text[at..].split(';') {
        let trimmed = item.trim();
        if !trimmed.is_empty() {
            items.push((place + item.len() - item.trim_start().len(), trimmed));
        }
        place += item.len() + 1;
    }
    if items.len() > LIST_ITEMS_MAX {
        let found = format!("{} items", items.len());
        return Err(Malformed { at, found, expected: format!("at most {LIST_ITEMS_MAX}") });
    }
    Ok(items)
}

/// The place after `wanted`, which must stand at `at`.
fn after(reply: &str, at: usize, wanted: &str) -> Result<usize, Malformed> {
    if reply[at..].starts_with(wanted) {
        return Ok(at + wanted.len());
    }
    Err(malformed(reply, at, wanted))
}

fn malformed(reply: &str, at: usize, expected: &str) -> Malformed {
    const SHOWN: usize = 20;
    let rest: String = reply[at..].chars().take(SHOWN).collect();
    let found = if rest.is_empty() { "the end".to_owned() } else { format!("{rest:?}") };
    Malformed { at, found, expected: format!("{expected:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_read_and_written() {
        let reply = "<action>recolor; delete</action>\n<subject>coat; car</subject>\n\
                     <goal>scarlet red; empty street</goal>";
        let parts = Decomposition::parse(reply).unwrap();
        assert_eq!(parts.actions, [Action::Recolor, Action::Delete]);
        assert_eq!(parts.subjects, ["coat", "car"]);
        assert_eq!(parts.goals, ["scarlet red", "empty street"]);
        assert_eq!(parts.to_string(), reply);
        let empty = "<action></action>\n<subject></subject>\n<goal></goal>";
        assert_eq!(Decomposition::parse(empty).unwrap(), Decomposition::default());
    }

    #[test]
    fn other_scripts_are_read() {
        let reply =
            "<action>re-color</action>\n<subject>房子；屋顶</subject>\n<goal>Öl grün</goal>";
        let parts = Decomposition::parse(reply).unwrap();
        assert_eq!((parts.subjects.len(), parts.goals[0].as_str()), (1, "Öl grün"));
    }

    #[test]
    fn a_reply_that_breaks_the_format_is_refused_with_the_place() {
        let whole = "<action>delete</action>\n<subject>car</subject>\n<goal>gone</goal>";
        for (reply, at) in [
            ("", 0),
            ("delete the car", 0),
            (&whole[..30], 23),
            (&whole[1..], 0),
            (&whole.replace('\n', " "), 23),
            (&whole.replace("delete", "explode"), 8),
            (&whole.replace("car", "a<b"), 34),
            (&format!("{whole}\n"), whole.len()),
            (&format!("Here you are: {whole}"), 0),
            (&whole.replace("car", &"x; ".repeat(17)), 33),
        ] {
            let error = Decomposition::parse(reply).unwrap_err();
            assert_eq!(error.at, at, "{reply:?}: {error}");
        }
    }
}
