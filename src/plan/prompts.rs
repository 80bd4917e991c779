//! What the two agents are told. The texts are files in `prompts/`; a model folder may bring its own
//! in `prompts/`, and a caller may replace any of them.

use std::borrow::Cow;

use super::decomposition::Decomposition;
use crate::{
    error::{Error, Result},
    vlm::Message,
};

/// Where the request stands in a prompt.
const REQUEST: &str = "{request}";
/// Where the decomposition stands.
const TAGS: &str = "{tags}";
/// Where the faults of a reply stand.
const GAPS: &str = "{gaps}";

/// The prompts of the two agents, without the marks of the chat template and of pictures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts {
    texts: [Cow<'static, str>; 5],
}

/// A prompt's name, what must stand in it, and its built-in text.
const PARTS: [(&str, Option<&str>, &str); 5] = [
    ("decompose.system", None, include_str!("prompts/decompose.system.txt")),
    ("decompose.user", Some(REQUEST), include_str!("prompts/decompose.user.txt")),
    ("sequence.system", None, include_str!("prompts/sequence.system.txt")),
    ("sequence.user", Some(TAGS), include_str!("prompts/sequence.user.txt")),
    ("repair.user", Some(GAPS), include_str!("prompts/repair.user.txt")),
];

impl Default for Prompts {
    fn default() -> Self {
        Self { texts: PARTS.map(|(_, _, text)| Cow::Borrowed(without_end(text))) }
    }
}

impl Prompts {
    /// The names of the prompts.
    pub fn names() -> impl Iterator<Item = &'static str> {
        PARTS.iter().map(|(name, ..)| *name)
    }

    /// Replaces the prompt of this name; line breaks at the end do not count.
    ///
    /// # Errors
    /// A name that is none of [`Self::names`], or a text without the place for what it is about.
    pub fn set(&mut self, name: &str, text: &str) -> Result<()> {
        let Some(index) = PARTS.iter().position(|(known, ..)| *known == name) else {
            let names: Vec<&str> = Self::names().collect();
            let expected = format!("one of {}", names.join(", "));
            return Err(Error::field("planner prompt", format!("{name:?}"), expected));
        };
        if let Some(place) = PARTS[index].1.filter(|place| !text.contains(place)) {
            let found = format!("{name} without {place}");
            return Err(Error::field("planner prompt", found, format!("{place} in its text")));
        }
        self.texts[index] = Cow::Owned(without_end(text).to_owned());
        Ok(())
    }

    /// Replaces prompts by a text in sections: a line `[decompose.system]` begins the prompt of that
    /// name. Prompts without a section stay as they are.
    ///
    /// # Errors
    /// Text before the first section, no section at all, a section twice, and what [`Self::set`]
    /// refuses.
    pub fn set_sections(&mut self, sections: &str) -> Result<()> {
        let (mut current, mut done): (Option<(&str, String)>, Vec<&str>) = (None, Vec::new());
        for line in sections.trim_start_matches('\u{feff}').lines() {
            let name = line.trim_end().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            match (name, &mut current) {
                (Some(name), _) if Self::names().any(|known| known == name) => {
                    if done.contains(&name) {
                        return Err(Error::field(
                            "planner prompt",
                            format!("[{name}] twice"),
                            "once",
                        ));
                    }
                    done.push(name);
                    if let Some((name, text)) = current.replace((name, String::new())) {
                        self.set(name, &text)?;
                    }
                }
                // A slip in a section's name would make it a part of the one before.
                (Some(name), _) if is_like_a_section(name) => {
                    let known: Vec<String> = Self::names().map(|it| format!("[{it}]")).collect();
                    let expected = format!("one of {}", known.join(", "));
                    return Err(Error::field("planner prompt", format!("[{name}]"), expected));
                }
                (_, Some((_, text))) => {
                    text.push_str(line);
                    text.push('\n');
                }
                (_, None) if line.trim().is_empty() => {}
                (_, None) => {
                    let found = format!("{line:?} before any section");
                    return Err(Error::field("planner prompt", found, "a line [decompose.system]"));
                }
            }
        }
        match current {
            Some((name, text)) => self.set(name, &text),
            None => Err(Error::field("planner prompt", "no section", "a line [decompose.system]")),
        }
    }

    /// What the decomposition agent reads.
    #[must_use]
    pub fn for_decomposition(&self, pictures: usize, request: &str) -> Vec<Message> {
        let asked = self.texts[1].replace(REQUEST, request.trim());
        vec![Message::text("system", &self.texts[0]), Message::user(pictures, &asked)]
    }

    /// What the sequencing agent reads: the decomposition as [`Decomposition`] displays it.
    #[must_use]
    pub fn for_sequencing(&self, pictures: usize, parts: &Decomposition) -> Vec<Message> {
        let asked = self.texts[3].replace(TAGS, &parts.to_string());
        vec![Message::text("system", &self.texts[2]), Message::user(pictures, &asked)]
    }

    /// What the sequencing agent is told about faults.
    pub(super) fn repair_user(&self, gaps: &str) -> String {
        self.texts[4].replace(GAPS, gaps)
    }
}

/// Two words with a dot between.
fn is_like_a_section(name: &str) -> bool {
    let is_word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphabetic());
    name.split_once('.').is_some_and(|(agent, role)| is_word(agent) && is_word(role))
}

fn without_end(text: &str) -> &str {
    text.trim_end_matches(['\r', '\n'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_follow_the_format() {
        let prompts = Prompts::default();
        let example = prompts.texts[0].rsplit_once("night\"\n").unwrap().1;
        let parts = Decomposition::parse(example).unwrap();
        let lines = prompts.texts[2].rsplit_once("\n\n").unwrap().1;
        let steps: Vec<String> =
            lines.lines().map(|line| line.split_once(". ").unwrap().1.to_owned()).collect();
        crate::plan::align(&parts, &steps).unwrap();
    }

    #[test]
    fn sections_replace_prompts() {
        let mut prompts = Prompts::default();
        prompts
            .set_sections("\n[decompose.user]\nPlease: {request}\n\n[sequence.system]\nSort.\n")
            .unwrap();
        let messages = prompts.for_decomposition(1, " a {tags} b ");
        assert_eq!(messages[1], Message::user(1, "Please: a {tags} b"));
        assert_eq!(messages[0], Prompts::default().for_decomposition(1, "")[0]);
        let parts = Decomposition::default();
        assert_eq!(prompts.for_sequencing(2, &parts)[0], Message::text("system", "Sort."));
        for (text, fault) in [
            ("hello", "before any section"),
            ("", "no section"),
            ("[decompose.user]\nno place\n", "{request}"),
            ("[sequence.system]\na\n[sequence.system]\nb\n", "twice"),
            ("[sequence.system]\na\n[sequence.usr]\nb\n", "[sequence.usr], expected one of [dec"),
        ] {
            let error = Prompts::default().set_sections(text).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
        assert!(Prompts::default().set_sections("[decompose.system]\n[a]\n[1.2]\n").is_ok());
        assert!(Prompts::default().set("other", "x").unwrap_err().to_string().contains("repair"));
    }
}
