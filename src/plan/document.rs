//! The plan as a document: plain data that a person can read, change and hand back.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{action::Action, decomposition::Decomposition, text::normalized};
use crate::error::{RequestError, Result};

/// The version of [`Plan`] that this crate writes and reads.
pub const PLAN_VERSION: u32 = 1;
/// The most steps of a plan.
pub const STEPS_MAX: usize = 32;
/// The longest text in a plan, in characters.
const TEXT_CHARS_MAX: usize = 2000;
/// The largest plan that is read, in bytes.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// What is done for a request, step by step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Plan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// The request, as it was made.
    #[serde(default)]
    pub request: String,
    /// What the request is made of; for the reader, the steps alone are carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decomposition: Option<Decomposition>,
    /// The sub-requests, in the order in which they are carried out.
    pub steps: Vec<Step>,
}

/// One sub-request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// To what.
    pub subject: String,
    /// What should result.
    #[serde(default)]
    pub goal: String,
    /// What the editor is told.
    pub prompt: String,
}

impl Step {
    /// A step.
    #[must_use]
    pub fn new(action: Action, subject: &str, goal: &str, prompt: &str) -> Self {
        let [subject, goal, prompt] = [subject, goal, prompt].map(str::to_owned);
        Self { action, subject, goal, prompt }
    }
}

/// Refuses a list where an object belongs: it would pass for the fields in their order.
fn check_object(place: &str, value: &Value) -> Result<()> {
    if value.is_array() { Err(refused(place, "a list", "an object")) } else { Ok(()) }
}

impl Plan {
    /// A plan made by hand.
    #[must_use]
    pub fn new(request: &str, steps: Vec<Step>) -> Self {
        Self { version: PLAN_VERSION, request: request.to_owned(), decomposition: None, steps }
    }

    /// Reads a plan from JSON and checks it.
    ///
    /// # Errors
    /// Bytes that are not UTF-8 or not a plan, with their place, and what [`Self::check`] refuses.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        if json.len() > DOCUMENT_BYTES_MAX {
            let found = format!("{} bytes", json.len());
            return Err(refused("the plan", found, &format!("at most {DOCUMENT_BYTES_MAX} bytes")));
        }
        let text = std::str::from_utf8(json).map_err(|error| {
            refused(
                &format!("byte {}", error.valid_up_to()),
                "not UTF-8",
                "a plan as JSON in UTF-8",
            )
        })?;
        let text = text.trim_start_matches('\u{feff}');
        let shape: Value = serde_json::from_str(text).map_err(|error| at(&error))?;
        check_object("the plan", &shape)?;
        // The version is looked at first: another version may have other fields.
        let version = serde_json::from_str::<Versioned>(text).map_err(|error| at(&error))?.version;
        if version != PLAN_VERSION {
            return Err(refused("version", version, &PLAN_VERSION.to_string()));
        }
        check_object("decomposition", &shape["decomposition"])?;
        for (index, step) in shape["steps"].as_array().into_iter().flatten().enumerate() {
            check_object(&format!("steps[{index}]"), step)?;
        }
        let plan: Self = serde_json::from_str(text).map_err(|error| at(&error))?;
        plan.check()?;
        Ok(plan)
    }

    /// The plan as JSON, with line breaks.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan holds strings and numbers only")
    }

    /// # Errors
    /// Another version; no step or more than [`STEPS_MAX`]; a prompt or subject without text or a
    /// text that is too long; two steps that contradict each other. The error names the place.
    pub fn check(&self) -> Result<()> {
        if self.version != PLAN_VERSION {
            return Err(refused("version", self.version, &PLAN_VERSION.to_string()));
        }
        if self.steps.is_empty() || self.steps.len() > STEPS_MAX {
            let found = format!("{} steps", self.steps.len());
            return Err(refused("steps", found, &format!("1 to {STEPS_MAX}")));
        }
        for (index, step) in self.steps.iter().enumerate() {
            let place = |field: &str| format!("steps[{index}].{field}");
            for (field, text) in [("prompt", &step.prompt), ("subject", &step.subject)] {
                if text.trim().is_empty() {
                    return Err(refused(&place(field), "no text", "at least one word"));
                }
            }
            for (field, text) in
                [("prompt", &step.prompt), ("subject", &step.subject), ("goal", &step.goal)]
            {
                let count = text.chars().count();
                if count > TEXT_CHARS_MAX {
                    let expected = format!("at most {TEXT_CHARS_MAX}");
                    return Err(refused(&place(field), format!("{count} characters"), &expected));
                }
            }
            for (earlier, other) in self.steps[..index].iter().enumerate() {
                if let Some(reason) = contradiction(other, step) {
                    let found = format!("{:?} after {:?}", step.prompt, other.prompt);
                    let expected = format!("no contradiction to steps[{earlier}]: {reason}");
                    return Err(refused(&format!("steps[{index}]"), found, &expected));
                }
            }
        }
        Ok(())
    }

    /// All sub-requests as one prompt, word for word, in their order.
    #[must_use]
    pub fn merged(&self, separator: &str) -> String {
        let prompts: Vec<&str> = self.steps.iter().map(|step| step.prompt.trim()).collect();
        prompts.join(separator)
    }
}

/// The plan for a person, a line for each list and each step.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request   {}", self.request)?;
        if let Some(parts) = &self.decomposition {
            let actions: Vec<&str> = parts.actions.iter().map(|action| action.label()).collect();
            write!(f, "\nactions   {}", actions.join("; "))?;
            write!(f, "\nsubjects  {}", parts.subjects.join("; "))?;
            write!(f, "\ngoals     {}", parts.goals.join("; "))?;
        }
        for (index, step) in self.steps.iter().enumerate() {
            write!(f, "\nstep {:<4} {}", index + 1, step.prompt)?;
        }
        Ok(())
    }
}

/// Why a step cannot follow an earlier one, if it cannot.
fn contradiction(earlier: &Step, later: &Step) -> Option<&'static str> {
    let same = |a: &str, b: &str| normalized(a) == normalized(b);
    if !same(&earlier.subject, &later.subject) {
        return None;
    }
    if earlier.action == Action::Delete && !matches!(later.action, Action::Add | Action::Clone) {
        return Some("what was removed cannot be edited");
    }
    let one_state =
        matches!(later.action, Action::Recolor | Action::Relight | Action::Move | Action::Replace);
    if one_state && earlier.action == later.action && !same(&earlier.goal, &later.goal) {
        return Some("one thing cannot have two goals of one kind");
    }
    None
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Versioned {
    version: u32,
}

fn at(error: &serde_json::Error) -> crate::error::Error {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or_default();
    let place = format!("line {}, column {}", error.line(), error.column());
    refused(&place, reason, "a plan as `pentimento plan --json` prints it")
}

fn refused(place: &str, found: impl ToString, expected: &str) -> crate::error::Error {
    let (place, expected) = (place.to_owned(), expected.to_owned());
    RequestError::Plan { place, found: found.to_string(), expected }.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Prints how to make the file anew.
    #[test]
    fn the_published_schema_is_the_codes() {
        const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/plan.schema.json");
        let schema = schemars::schema_for!(Plan);
        let expected = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        let found = fs_err::read_to_string(COMMITTED).unwrap_or_default();
        if std::env::var_os("PENTIMENTO_WRITE").is_some() {
            fs_err::write(COMMITTED, &expected).unwrap();
        }
        assert!(
            found == expected || std::env::var_os("PENTIMENTO_WRITE").is_some(),
            "docs/plan.schema.json is out of date; PENTIMENTO_WRITE=1 cargo test published_schema"
        );
    }

    fn error(json: &str) -> String {
        Plan::from_json(json.as_bytes()).unwrap_err().to_string()
    }

    fn step(action: &str, subject: &str, goal: &str) -> String {
        format!(
            r#"{{"action":"{action}","subject":"{subject}","goal":"{goal}","prompt":"{action} {subject}"}}"#
        )
    }

    fn plan(steps: &[String]) -> String {
        format!(r#"{{"version":1,"request":"r","steps":[{}]}}"#, steps.join(","))
    }

    #[test]
    fn bad_plans_are_refused_with_the_place() {
        assert!(error("").contains("line 1, column 0"), "{}", error(""));
        assert!(error("{\"version\":1,\n\"steps\":3}").contains("line 2"));
        assert!(error(r#"{"version":2,"steps":[]}"#).contains("version: 2, expected 1"));
        assert!(error(r#"{"version":1,"steps":[],"colour":1}"#).contains("colour"));
        assert!(error(&plan(&[])).contains("steps: 0 steps"));
        for (list, place) in [
            (r#"[1,"r",null,[]]"#, "the plan: a list"),
            (r#"{"version":1,"steps":[["add","ball","","add a ball"]]}"#, "steps[0]: a list"),
            (r#"{"version":1,"decomposition":[[],[],[]],"steps":[]}"#, "decomposition: a list"),
            (r#"{"version":2,"steps":[["add"]]}"#, "version: 2, expected 1"),
        ] {
            assert!(error(list).contains(place), "{}", error(list));
        }
        let many = vec![step("add", "ball", ""); 1000];
        assert!(error(&plan(&many)).contains("1000 steps, expected 1 to 32"));
        assert!(error(&plan(&[step("explode", "car", "")])).contains("explode"));
        assert!(error(&plan(&[step("add", " ", "")])).contains("steps[0].subject: no text"));
        let long = step("add", &"x".repeat(3000), "");
        assert!(error(&plan(&[long])).contains("steps[0].prompt: 3004 characters"));
        let bytes =
            Plan::from_json(b"{\"version\":1,\"request\":\"\xff\"").unwrap_err().to_string();
        assert!(bytes.contains("byte 24: not UTF-8"), "{bytes}");
        let large = Plan::from_json(&vec![b' '; DOCUMENT_BYTES_MAX + 1]).unwrap_err().to_string();
        assert!(large.contains("1048577 bytes"), "{large}");
    }

    #[test]
    fn contradictions_are_refused() {
        let twice = plan(&[step("recolor", "coat", "red"), step("re-color", "Coat", "blue")]);
        assert!(error(&twice).contains("steps[1]") && error(&twice).contains("steps[0]"));
        let gone = plan(&[step("delete", "car", "gone"), step("move", "car", "left")]);
        assert!(error(&gone).contains("removed"));
        let again = plan(&[step("delete", "car", "gone"), step("add", "car", "left")]);
        Plan::from_json(again.as_bytes()).unwrap();
        let two = plan(&[step("recolor", "coat", "red"), step("recolor", "hat", "red")]);
        Plan::from_json(two.as_bytes()).unwrap();
    }

    #[test]
    fn a_byte_order_mark_is_no_fault() {
        let json = format!("\u{feff}{}", plan(&[step("add", "ball", "")]));
        assert_eq!(Plan::from_json(json.as_bytes()).unwrap().steps[0].subject, "ball");
    }

    proptest! {
        #[test]
        fn plans_come_back_as_they_were(
            request in ".*",
            rows in prop::collection::vec((0_usize..15, "\\PC{1,20}", "\\PC{0,20}", "[a-z]\\PC{0,40}"), 1..8),
            with_parts: bool,
        ) {
            let steps: Vec<Step> = rows
                .into_iter()
                .enumerate()
                .map(|(at, (action, subject, goal, prompt))| {
                    Step::new(Action::ALL[action], &format!("{at} {subject}"), &goal, &prompt)
                })
                .collect();
            let decomposition = with_parts.then(|| Decomposition {
                actions: steps.iter().map(|step| step.action).collect(),
                subjects: steps.iter().map(|step| step.subject.clone()).collect(),
                goals: vec![],
            });
            let plan = Plan { decomposition, ..Plan::new(&request, steps) };
            let back = Plan::from_json(plan.to_json().as_bytes()).unwrap();
            prop_assert_eq!(&back, &plan);
            for step in &plan.steps {
                prop_assert!(plan.merged("; ").contains(step.prompt.trim()));
            }
        }
    }
}
