//! What a measurement found, as plain data.

use serde::Serialize;

use crate::{StepCache, Strategy, pixels::ModelRecord};

/// Version of the report's form.
pub const REPORT_VERSION: u32 = 1;

/// Figures over held-out cases. Equal seeds, counts and models give equal reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Version of the form.
    pub version: u32,
    /// What was measured.
    pub model: ModelRecord,
    /// The evaluation's seed.
    pub seed: u32,
    /// Cases of each row.
    pub count: u32,
    /// Seed of every picture's noise.
    pub noise_seed: u64,
    /// How many exact and how many wrong pictures the readout accepts.
    pub readout: Vec<Rate>,
    /// One wish, said directly, in one pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub single: Option<Pictures>,
    /// One wish, said in other ways, in one pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wordings: Option<Pictures>,
    /// Two to four wishes in one request, for each way to carry it out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub many: Vec<Pictures>,
    /// Plans for the requests of `many` that equal the annotation, step by step and word for word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plans: Option<Rate>,
    /// The decomposition agent's replies, written without a grammar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decomposition: Option<Vec<Replies>>,
    /// Which steps of the edits were allowed to be left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_cache: Option<StepCache>,
    /// How many were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reuse: Option<Reuse>,
}

/// Predictions that a step cache ended after the first block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Reuse {
    /// Those.
    pub reused: usize,
    /// All.
    pub of: usize,
}

/// How many of the cases went right.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rate {
    /// The kind of case.
    pub name: String,
    /// Cases that went right.
    pub right: u32,
    /// Cases.
    pub of: u32,
    /// Their quotient.
    pub share: f64,
}

/// Strict success of edits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pictures {
    /// How the requests were carried out.
    pub strategy: &'static str,
    /// Where the plans came from.
    pub plan: PlanSource,
    /// Each kind of case.
    pub rows: Vec<Rate>,
    /// All cases.
    pub all: Rate,
    /// Mean absolute difference from the exact target over the cells of 16 × 16 pixels that no wish
    /// touches, in levels of 255; `None` where every wish touches the whole picture.
    pub outside_error_levels: Option<f64>,
}

/// Where plans come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanSource {
    /// There are none: the request goes to the editor as it is.
    None,
    /// The planner.
    Planner,
    /// The case itself: what an editor makes of a faultless plan.
    Annotation,
}

/// How close the decomposition agent's replies come to the annotation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replies {
    /// The kind of case.
    pub name: String,
    /// Cases.
    pub of: u32,
    /// Share of the replies that keep the format.
    pub well_formed: f64,
    /// Mean of the F1 of actions, subjects and goals; 0 for a reply that breaks the format.
    pub f1: f64,
    /// Share of the replies that hold the annotation and nothing else.
    pub exact: f64,
}

impl PlanSource {
    /// The name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Planner => "planner",
            Self::Annotation => "annotation",
        }
    }
}

impl Pictures {
    pub(super) fn new(strategy: Strategy, plan: PlanSource) -> Self {
        Self {
            strategy: strategy.name(),
            plan,
            rows: Vec::new(),
            all: Rate::new("all"),
            outside_error_levels: None,
        }
    }
}

impl Rate {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), right: 0, of: 0, share: 0.0 }
    }

    pub(super) fn count(&mut self, right: bool) {
        self.right += u32::from(right);
        self.of += 1;
        self.share = f64::from(self.right) / f64::from(self.of);
    }
}

/// A mean in the making.
#[derive(Debug, Default)]
pub(super) struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    pub(super) fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    pub(super) fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}
