//! Which held-out cases are measured: rows of cases of one kind, as the recipe's check has them.

use serde::Serialize;

use super::{
    case::{Case, Spec, Style, held_out_seed},
    wish::Operation,
};

/// Rows lie this far apart in the held-out cases, so no row is longer.
pub(super) const ROW: u32 = 10_000;

/// A part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// One wish, said directly: a row for each operation.
    Single,
    /// One wish, said in other ways, also in ones that training never sees.
    Wordings,
    /// Two to four wishes in one request, carried out in several ways.
    Many,
    /// What the decomposition agent makes of a request.
    Decomposition,
}

/// Cases of one kind.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) name: &'static str,
    /// The first one's number among the held-out cases.
    start: u32,
    spec: Spec,
}

impl Row {
    fn new(name: &'static str, start: u32, spec: Spec) -> Self {
        Self { name, start, spec }
    }

    /// The first `count` cases of an evaluation's seed.
    pub(super) fn cases(&self, seed: u32, count: u32) -> impl Iterator<Item = Case> {
        let (start, spec) = (self.start, self.spec);
        (start..start + count)
            .map(move |index| Case::sample(held_out_seed(u64::from(seed), u64::from(index)), &spec))
    }
}

impl Part {
    /// All parts, in the order of reports.
    pub const ALL: [Self; 4] = [Self::Single, Self::Wordings, Self::Many, Self::Decomposition];

    pub(super) fn rows(self) -> Vec<Row> {
        match self {
            Self::Single => single(),
            Self::Wordings => wordings(),
            Self::Many => many(),
            Self::Decomposition => decomposition(),
        }
    }
}

fn single() -> Vec<Row> {
    let row = |(index, operation): (u32, Operation)| {
        let spec = Spec { operation: Some(operation), ..one(Style::Direct, false) };
        Row::new(operation.name(), ROW * index, spec)
    };
    (0..).zip(Operation::ALL).map(row).collect()
}

fn wordings() -> Vec<Row> {
    vec![
        Row::new("indirect", 100_000, one(Style::Indirect, false)),
        Row::new("pointing", 110_000, one(Style::Picture, false)),
        Row::new("indirect, held out", 120_000, one(Style::Indirect, true)),
        Row::new("pointing, held out", 130_000, one(Style::Picture, true)),
    ]
}

fn many() -> Vec<Row> {
    let spec = |wishes| Spec { wishes, ..Spec::default() };
    vec![
        Row::new("2 wishes", 200_000, spec(2)),
        Row::new("3 wishes", 300_000, spec(3)),
        Row::new("4 wishes", 400_000, spec(4)),
    ]
}

fn decomposition() -> Vec<Row> {
    let any = Spec::default();
    vec![
        Row::new("direct", 500_000, one(Style::Direct, false)),
        Row::new("indirect", 510_000, one(Style::Indirect, false)),
        Row::new("pointing", 520_000, one(Style::Picture, false)),
        Row::new("1 to 4 wishes", 530_000, any),
        Row::new("indirect, held out", 540_000, one(Style::Indirect, true)),
        Row::new("pointing, held out", 550_000, one(Style::Picture, true)),
        Row::new("1 to 4 wishes, held out", 560_000, Spec { held_out: true, ..any }),
    ]
}

fn one(style: Style, held_out: bool) -> Spec {
    Spec { wishes: 1, operation: None, style, held_out }
}
