//! Parts of a model that are alike: one is read, the others are checked without reading them.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use super::Weights;
use crate::error::Result;

/// Names and shapes of tensors that were asked for.
#[derive(Debug, Default)]
pub(super) struct Asked(Mutex<BTreeSet<(String, Vec<usize>)>>);

impl Asked {
    /// Notes one; a tensor that is asked for twice is noted once.
    pub(super) fn note(&self, name: &str, shape: &[usize]) {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        asked.insert((name.to_owned(), shape.to_vec()));
    }
}

/// What a part of a model asks for: names below its place, and shapes.
#[derive(Debug, Clone)]
pub(crate) struct Pattern(Vec<(String, Vec<usize>)>);

impl Weights {
    /// What `load` makes of this place, and what it asks for on the way.
    pub(crate) fn pattern_of<T>(
        &self,
        load: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<(T, Pattern)> {
        let asked = Arc::new(Asked::default());
        let loaded = load(&self.noting(&asked))?;
        let start = self.full_name("");
        let asked = asked.0.lock().unwrap_or_else(PoisonError::into_inner);
        let below = |(name, shape): &(String, Vec<usize>)| {
            Some((name.strip_prefix(&start)?.to_owned(), shape.clone()))
        };
        Ok((loaded, Pattern(asked.iter().filter_map(below).collect())))
    }

    /// Checks that everything of `pattern` is below this place and can be read, and counts it as
    /// read, low-rank changes of its matrices included. No number is touched.
    ///
    /// # Errors
    /// A tensor that is missing, or has another shape or an unsupported type; cancellation.
    pub(crate) fn check_alike(&self, pattern: &Pattern) -> Result<()> {
        for (name, shape) in &pattern.0 {
            let full_name = self.check(name, shape)?;
            self.checkpoint().survey(&full_name)?;
            if let (Some(place), [_, _]) = (name.strip_suffix(".weight"), shape.as_slice()) {
                drop(self.pp(place).take_changes());
            }
        }
        Ok(())
    }
}
