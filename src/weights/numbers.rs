//! A stretch of a tensor's numbers at a time, so that no tensor has to be in memory as a whole.

use std::ops::Range;

use candle_core::{DType, Device};

use super::{
    Checkpoint, TensorEntry,
    checkpoint::Data,
    stored::{self, SUPPORTED, StoredType},
};
use crate::error::{ModelError, Result};

impl Checkpoint {
    /// The numbers `range` of the tensor `name`, row after row, as f32. Where the tensor is stored
    /// in blocks, both ends are those of blocks.
    ///
    /// # Errors
    /// A tensor that is missing or of a type that is not read.
    pub(crate) fn numbers(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let Some(entry) = self.entry(name) else { return Err(self.missing(name)) };
        let mut numbers = Vec::with_capacity(range.len());
        self.push_numbers(name, entry, range, &mut numbers)?;
        Ok(numbers)
    }

    fn push_numbers(
        &self,
        name: &str,
        entry: &TensorEntry,
        range: Range<usize>,
        numbers: &mut Vec<f32>,
    ) -> Result<()> {
        match &entry.data {
            Data::Bytes { file, range: bytes } => {
                let (path, file) = self.file(*file);
                let stretch = stretch(entry, &range, &file[bytes.clone()]);
                let shape = [range.len()];
                match stored::decode(entry.kind, stretch, entry.scale, &shape, &Device::Cpu)? {
                    Some(tensor) => {
                        numbers.extend(tensor.to_dtype(DType::F32)?.to_vec1::<f32>()?);
                        Ok(())
                    }
                    None => Err(ModelError::TensorType {
                        path: path.to_owned(),
                        tensor: name.to_owned(),
                        found: entry.kind.to_string(),
                        supported: SUPPORTED,
                    }
                    .into()),
                }
            }
            Data::Rows(parts) => {
                let mut start = 0;
                for part in parts {
                    let end = start + part.count();
                    let inside = range.start.clamp(start, end)..range.end.clamp(start, end);
                    if !inside.is_empty() {
                        let inside = inside.start - start..inside.end - start;
                        self.push_numbers(name, part, inside, numbers)?;
                    }
                    start = end;
                }
                Ok(())
            }
            // Frames of a patch embedding: small, and side by side.
            Data::Stack { .. } => {
                let whole = self.plain(name, entry, &Device::Cpu)?.to_dtype(DType::F32)?;
                let whole = whole.flatten_all()?.narrow(0, range.start, range.len())?;
                numbers.extend(whole.to_vec1::<f32>()?);
                Ok(())
            }
        }
    }

    /// The bytes of the numbers `range`, where the tensor lies in one piece.
    pub(crate) fn stored_bytes_of(&self, name: &str, range: &Range<usize>) -> Option<&[u8]> {
        let entry = self.entry(name)?;
        match &entry.data {
            Data::Bytes { file, range: bytes } => {
                Some(stretch(entry, range, &self.file(*file).1[bytes.clone()]))
            }
            _ => None,
        }
    }
}

/// The bytes of the numbers `range` of a tensor that lies in `bytes`.
fn stretch<'a>(entry: &TensorEntry, range: &Range<usize>, bytes: &'a [u8]) -> &'a [u8] {
    let (block, size) = entry.kind.block();
    let at = |number: usize| number.checked_div(block).unwrap_or(0).saturating_mul(size);
    bytes.get(at(range.start)..at(range.end)).unwrap_or_default()
}

impl TensorEntry {
    /// Number of values, which are in a file that is mapped.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// What its numbers are multiplied by.
    pub(crate) fn scale(&self) -> f32 {
        self.scale.unwrap_or(1.0)
    }

    /// Whether its numbers are quantized in blocks.
    pub(crate) fn is_blocks(&self) -> bool {
        matches!(self.kind, StoredType::Blocks(_))
    }

    /// Whether it lies in the file as it is.
    pub(crate) fn is_in_one_piece(&self) -> bool {
        matches!(self.data, Data::Bytes { .. })
    }
}
