//! Rows of a matrix that stays in its file.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{
    Weights,
    checkpoint::{Checkpoint, Data, TensorEntry},
    stored,
};
use crate::error::Result;

/// A matrix `[rows, width]` of which single rows are read when they are asked for. It takes no memory
/// but the system's cache of the file.
#[derive(Debug, Clone)]
pub struct FileRows {
    checkpoint: Arc<Checkpoint>,
    name: String,
}

impl Weights {
    /// The matrix `name` below this place; `None` where its rows do not stand in one piece of a file as
    /// whole blocks, or are not for the CPU.
    ///
    /// # Errors
    /// A tensor that is missing, or has another shape or an unsupported type.
    pub fn file_rows(&self, name: &str, shape: [usize; 2]) -> Result<Option<FileRows>> {
        let name = self.check(name, &shape)?;
        let checkpoint = self.shared_checkpoint();
        checkpoint.survey(&name)?;
        let there = checkpoint.entry(&name).is_some_and(TensorEntry::has_rows_in_file);
        let here = there && self.precision().device.is_cpu();
        Ok(here.then(|| FileRows { checkpoint: Arc::clone(checkpoint), name }))
    }
}

impl TensorEntry {
    /// Whether rows can be read where they lie.
    pub(crate) fn has_rows_in_file(&self) -> bool {
        matches!(self.data, Data::Bytes { .. }) && self.has_rows_of(self.kind.block().0)
    }
}

impl FileRows {
    /// The rows `indices`, `[n, width]`, in the type that plain numbers of the file have, blocks in
    /// float32.
    ///
    /// # Errors
    /// An index beyond the matrix.
    pub fn pick(&self, indices: &[u32]) -> Result<Tensor> {
        let Some(entry) = self.checkpoint.entry(&self.name) else {
            return Err(self.checkpoint.missing(&self.name));
        };
        let (bytes, rows) = (self.checkpoint.raw(entry), entry.shape.first().copied().unwrap_or(0));
        let width = entry.shape.last().copied().unwrap_or(0);
        let row_bytes = bytes.len().checked_div(rows).unwrap_or(0);
        let mut picked = Vec::with_capacity(indices.len() * row_bytes);
        for index in indices {
            let start = usize::try_from(*index).ok().filter(|index| *index < rows);
            let Some(start) = start.map(|index| index * row_bytes) else {
                return Err(beyond(*index, rows).into());
            };
            picked.extend_from_slice(&bytes[start..start + row_bytes]);
        }
        let shape = [indices.len(), width];
        let rows = stored::decode(entry.kind, &picked, entry.scale, &shape, &Device::Cpu)?;
        rows.ok_or_else(|| self.checkpoint.missing(&self.name))
    }
}

fn beyond(index: u32, rows: usize) -> candle_core::Error {
    candle_core::Error::Msg(format!("row {index} of a matrix of {rows} rows"))
}
