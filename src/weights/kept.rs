//! What tensors take in memory when they are read.

use candle_core::DType;

use super::{
    checkpoint::{Checkpoint, TensorEntry},
    cursor::{Precision, Storage},
    stored::StoredType,
};
use crate::ops::{Kept, cuda::SCRATCH_BYTES};

/// Outputs of a panel of blocks.
const PANEL: usize = 32;

impl TensorEntry {
    /// How a matrix is laid out for the CPU from its bytes; `None` where that is not done. Plain numbers
    /// that nobody asked to change stay as they are stored, if computing is in single precision: a
    /// product widens them to the same numbers.
    pub(super) fn kept_as(&self, precision: &Precision) -> Option<Kept> {
        if !precision.device.is_cpu() || self.shape.len() != 2 {
            return None;
        }
        match (self.kind, precision.storage) {
            (StoredType::Blocks(_), Storage::Plain(_)) => None,
            (StoredType::Blocks(_), _) => self.multiplied_as().map(|_| Kept::Stored),
            (_, Storage::Plain(DType::F32)) => Some(Kept::F32),
            (_, Storage::Plain(DType::F16)) => Some(Kept::F16),
            (_, Storage::Plain(DType::BF16)) => Some(Kept::Bf16),
            (_, Storage::Plain(_)) => None,
            (_, Storage::Q8_0) => Some(Kept::Q8_0),
            (_, Storage::Q4K) => Some(Kept::Q4K),
            (StoredType::Plain(_), Storage::Compute) => {
                let exact = precision.compute == DType::F32 || self.is_float8();
                exact.then_some(Kept::Stored)
            }
        }
    }

    /// Bytes that the tensor takes in memory when it is read as `precision` says: a matrix as that
    /// of a linear layer, with the rows that its layout adds; anything else in the type of the
    /// computation.
    #[must_use]
    pub fn kept_bytes(&self, precision: &Precision) -> u64 {
        let plain = |numbers: u64, dtype: DType| numbers * dtype.size_in_bytes() as u64;
        let [rows, width] = *self.shape.as_slice() else {
            return plain(self.elements(), precision.compute);
        };
        let numbers = rows.next_multiple_of(PANEL) as u64 * width as u64;
        let blocks = |(block, bytes): (usize, usize)| numbers.div_ceil(block as u64) * bytes as u64;
        match (precision.storage, self.multiplied_as()) {
            (Storage::Plain(dtype), _) => plain(numbers, dtype),
            (_, Some(_)) if precision.device.is_cpu() => blocks(self.kind.block()),
            (_, Some(dtype)) => blocks((dtype.block_size(), dtype.type_size())),
            (Storage::Q4K, None) if self.has_rows_of(256) => blocks((256, 144)),
            (Storage::Q8_0 | Storage::Q4K, None) if self.has_rows_of(32) => blocks((32, 34)),
            (_, None) if self.kept_as(precision).is_some() => numbers * self.kind.block().1 as u64,
            (Storage::Q8_0 | Storage::Q4K, None) => {
                plain(numbers, self.kind.plain_type().unwrap_or(DType::F32))
            }
            // A kernel multiplies the bytes of the file.
            (Storage::Compute, None) if self.is_e4m3() && precision.device.is_cuda() => {
                // With a scale for each output.
                numbers
                    + if precision.multiplies_float8() { plain(rows as u64, DType::F32) } else { 0 }
            }
            (Storage::Compute, None) => plain(numbers, self.compute_type(precision.compute)),
        }
    }

    /// Bytes that a product with the matrix takes at most besides its operands and its result: on a GPU, what
    /// blocks and fp8 are widened into.
    #[must_use]
    pub fn widening_bytes(&self, precision: &Precision) -> u64 {
        let is_narrow = match precision.storage {
            Storage::Plain(_) => false,
            Storage::Q8_0 | Storage::Q4K => self.multiplied_as().is_some() || self.has_rows_of(32),
            Storage::Compute => self.multiplied_as().is_some() || self.is_e4m3(),
        };
        if !precision.device.is_cuda() || self.shape.len() != 2 || !is_narrow {
            return 0;
        }
        (self.elements() * DType::BF16.size_in_bytes() as u64).min(SCRATCH_BYTES as u64)
    }

    /// Bytes that reading the tensor takes at most besides what is kept of it. On the CPU a matrix is
    /// laid out from the bytes of its file; to quantize it, each thread holds a panel in float32 twice.
    /// What cannot be read so is held as it is stored and, piece by piece, in the new type.
    #[must_use]
    pub fn loading_bytes(&self, precision: &Precision) -> u64 {
        let as_stored =
            self.multiplied_as().is_some() && !matches!(precision.storage, Storage::Plain(_));
        match (self.kept_as(precision), self.shape.as_slice()) {
            (Some(Kept::Q8_0 | Kept::Q4K), [_, width]) => {
                let panels = PANEL * rayon::current_num_threads();
                (2 * 4 * panels as u64 * *width as u64).min(2 * 4 * self.elements())
            }
            (Some(_), _) => 0,
            (None, shape) if shape.len() < 2 || as_stored => 0,
            _ => 4 * self.elements(),
        }
    }
}

impl Checkpoint {
    /// The most that reading one tensor after the other takes besides what is kept.
    #[must_use]
    pub fn loading_bytes(&self, precision: &Precision) -> u64 {
        self.tensors().map(|(_, entry)| entry.loading_bytes(precision)).max().unwrap_or(0)
    }

    /// The most that a product with one matrix takes besides its operands and its result.
    #[must_use]
    pub fn widening_bytes(&self, precision: &Precision) -> u64 {
        self.tensors().map(|(_, entry)| entry.widening_bytes(precision)).max().unwrap_or(0)
    }

    /// Size of all tensors in memory in bytes when they are read as `precision` says.
    #[must_use]
    pub fn kept_bytes(&self, precision: &Precision) -> u64 {
        self.tensors().map(|(_, entry)| entry.kept_bytes(precision)).sum()
    }
}
