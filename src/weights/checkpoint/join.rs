//! Other names for tensors, and tensors that are put together from parts.

use std::collections::BTreeMap;

use super::{Checkpoint, Data, StoredType, TensorEntry};
use crate::error::{ModelError, Result};

impl Checkpoint {
    /// Gives every tensor the name that `canonical` makes of its own.
    ///
    /// # Errors
    /// Two tensors that get the same name.
    pub fn rename(mut self, canonical: impl Fn(&str) -> String) -> Result<Self> {
        let name = self.name().to_owned();
        let mut renamed = BTreeMap::new();
        for (old, entry) in std::mem::take(&mut self.entries) {
            let new = canonical(&old);
            if renamed.insert(new.clone(), entry).is_some() {
                return Err(ModelError::Corrupt {
                    path: name,
                    found: format!("tensor {new} twice, under two spellings"),
                    expected: "each tensor once".to_owned(),
                    hint: "the file was merged from two models; use the original".to_owned(),
                }
                .into());
            }
        }
        self.entries = renamed;
        Ok(self)
    }

    /// Makes `whole` of `parts`, one after the other along the first axis.
    ///
    /// # Errors
    /// A part that is missing, or one of another width.
    pub(crate) fn join_rows(&mut self, whole: String, parts: &[String]) -> Result<()> {
        let parts = self.take_parts(parts, |first, other| first.get(1..) == other.get(1..))?;
        let mut shape = parts[0].shape.clone();
        if let Some(rows) = shape.first_mut() {
            let counts = parts.iter().filter_map(|part| part.shape.first());
            *rows = counts.fold(0_usize, |sum, &rows| sum.saturating_add(rows));
        }
        self.insert_whole(whole, shape, parts, Data::Rows)
    }

    /// Makes `whole` of `parts`, side by side along a new axis before `axis`.
    ///
    /// # Errors
    /// A part that is missing, or one of another shape.
    pub(crate) fn stack(&mut self, whole: String, parts: &[String], axis: usize) -> Result<()> {
        let parts = self.take_parts(parts, |first, other| first == other && axis <= first.len())?;
        let mut shape = parts[0].shape.clone();
        shape.insert(axis, parts.len());
        self.insert_whole(whole, shape, parts, |parts| Data::Stack { axis, parts })
    }

    /// Takes tensors out that `fit` the first of them.
    fn take_parts(
        &mut self,
        names: &[String],
        fit: impl Fn(&[usize], &[usize]) -> bool,
    ) -> Result<Vec<TensorEntry>> {
        let mut parts: Vec<TensorEntry> = Vec::with_capacity(names.len());
        for name in names {
            let Some(part) = self.entries.remove(name) else { return Err(self.missing(name)) };
            let first = parts.first().unwrap_or(&part);
            if part.shape.is_empty() || !fit(&first.shape, &part.shape) {
                return Err(ModelError::TensorShape {
                    path: self.name().to_owned(),
                    tensor: name.clone(),
                    found: part.shape.clone(),
                    expected: first.shape.clone(),
                }
                .into());
            }
            parts.push(part);
        }
        if parts.is_empty() { Err(self.missing("of nothing")) } else { Ok(parts) }
    }

    fn insert_whole(
        &mut self,
        whole: String,
        shape: Vec<usize>,
        parts: Vec<TensorEntry>,
        data: impl FnOnce(Vec<TensorEntry>) -> Data,
    ) -> Result<()> {
        let first = parts[0].kind;
        let same = parts.iter().all(|part| part.kind == first && part.scale.is_none());
        let kind = if same { first } else { StoredType::Plain(safetensors::Dtype::F32) };
        let entry = TensorEntry { kind, shape, scale: None, data: data(parts) };
        match self.entries.insert(whole.clone(), entry) {
            None => Ok(()),
            Some(_) => Err(ModelError::Corrupt {
                path: self.name().to_owned(),
                found: format!("tensor {whole} both whole and in parts"),
                expected: "each tensor once".to_owned(),
                hint: "the file was merged from two models; use the original".to_owned(),
            }
            .into()),
        }
    }
}
