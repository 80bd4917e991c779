//! Pictures that a model has looked at: patches, and their tokens once they were computed.

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use super::preprocess::{PatchGrid, Patches};
use crate::error::Result;

/// Pictures ready for any number of prompts about them. The vision tower runs when the first prompt
/// needs its output, and never again; clones share it.
#[derive(Debug, Clone)]
pub struct Seen(Arc<Pictures>);

#[derive(Debug)]
struct Pictures {
    /// The model that looked.
    model: Arc<()>,
    /// Each picture's grid of tokens.
    grids: Vec<PatchGrid>,
    patches: Option<Patches>,
    /// `[tokens, hidden]`.
    embeddings: OnceLock<Tensor>,
}

impl Seen {
    pub(super) fn new(model: &Arc<()>, grids: Vec<PatchGrid>, patches: Option<Patches>) -> Self {
        let (model, embeddings) = (Arc::clone(model), OnceLock::new());
        Self(Arc::new(Pictures { model, grids, patches, embeddings }))
    }

    /// Whether the vision tower has run for these pictures.
    #[must_use]
    pub fn is_embedded(&self) -> bool {
        self.0.embeddings.get().is_some()
    }

    pub(super) fn is_of(&self, model: &Arc<()>) -> bool {
        Arc::ptr_eq(&self.0.model, model)
    }

    /// Each picture's grid of tokens, patches already merged.
    #[must_use]
    pub fn grids(&self) -> &[PatchGrid] {
        &self.0.grids
    }

    pub(super) fn patches(&self) -> Option<&Patches> {
        self.0.patches.as_ref()
    }

    /// The pictures' tokens, computed by `compute` the first time; `None` without a picture.
    pub(super) fn embeddings(
        &self,
        compute: impl FnOnce() -> Result<Option<Tensor>>,
    ) -> Result<Option<Tensor>> {
        if let Some(known) = self.0.embeddings.get() {
            return Ok(Some(known.clone()));
        }
        let computed = compute()?;
        Ok(computed.map(|computed| self.0.embeddings.get_or_init(|| computed).clone()))
    }
}
