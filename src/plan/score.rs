//! How close a reply comes to an annotation: its form, and the F1 of each of its three sets.

use std::collections::BTreeSet;

use super::{
    action::Action,
    decomposition::{Decomposition, lists},
};
use crate::plan::text::normalized;

/// The four parts of a reply's score, each from 0 to 1. A reply that breaks the format scores 0 in
/// all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Score {
    /// 1 for a reply in the format.
    pub format: f64,
    /// F1 of the actions.
    pub actions: f64,
    /// F1 of the subjects.
    pub subjects: f64,
    /// F1 of the goals.
    pub goals: f64,
}

impl Score {
    /// Scores a reply against the annotation of its request.
    #[must_use]
    pub fn of(reply: &str, truth: &Decomposition) -> Self {
        let Ok(found) = lists(reply) else { return Self::default() };
        let [actions, subjects, goals] = truth.normalized();
        let [found_actions, found_subjects, found_goals] = found;
        let label = |(_, item): (usize, &str)| {
            Action::named(item).map_or_else(|| normalized(item), |action| action.label().to_owned())
        };
        let text = |(_, item): (usize, &str)| normalized(item);
        Self {
            format: 1.0,
            actions: set_f1(found_actions.into_iter().map(label), actions),
            subjects: set_f1(found_subjects.into_iter().map(text), subjects),
            goals: set_f1(found_goals.into_iter().map(text), goals),
        }
    }

    /// The mean of the three F1.
    #[must_use]
    pub fn f1(&self) -> f64 {
        (self.actions + self.subjects + self.goals) / 3.0
    }

    /// The mean of all four parts: the reward of the method with equal weights.
    #[must_use]
    pub fn mean(&self) -> f64 {
        (self.format + self.actions + self.subjects + self.goals) / 4.0
    }

    /// Whether the reply holds the annotation's sets and nothing else.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.mean() >= 1.0
    }
}

/// F1 of two sets of items that are already normalized: 2·PR/(P + R); 1 where both are empty, 0
/// where nothing is shared.
pub fn set_f1(
    found: impl IntoIterator<Item = String>,
    wanted: impl IntoIterator<Item = String>,
) -> f64 {
    let (found, wanted): (BTreeSet<_>, BTreeSet<_>) =
        (found.into_iter().collect(), wanted.into_iter().collect());
    if found.is_empty() && wanted.is_empty() {
        return 1.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "sets are small")]
    let count = |n: usize| n as f64;
    2.0 * count(found.intersection(&wanted).count()) / count(found.len() + wanted.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth() -> Decomposition {
        let reply = "<action>recolor; delete</action>\n<subject>coat; car</subject>\n<goal>red; gone</goal>";
        Decomposition::parse(reply).unwrap()
    }

    #[test]
    fn sets_are_compared_without_order_and_case() {
        let reply = "<action>delete; re-color</action>\n<subject>Car; COAT ; coat</subject>\n<goal>gone; red</goal>";
        assert!(Score::of(reply, &truth()).is_exact());
    }

    #[test]
    fn parts_are_scored_alone() {
        let reply = "<action>delete</action>\n<subject>car; hat</subject>\n<goal></goal>";
        let score = Score::of(reply, &truth());
        assert!((score.actions - 2.0 / 3.0).abs() < 1e-12);
        assert!((score.subjects - 0.5).abs() < 1e-12);
        assert!(score.goals.abs() < 1e-12 && (score.format - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_broken_reply_scores_nothing() {
        assert_eq!(Score::of("I would recolor the coat", &truth()), Score::default());
        assert!((set_f1([], []) - 1.0).abs() < 1e-12);
        assert!(set_f1(["a".to_owned()], []).abs() < 1e-12);
    }
}
