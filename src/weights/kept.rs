//! What tensors take in memory when they are read.

use candle_core::DType;

use super::{
    checkpoint::{Checkpoint, TensorEntry},
    cursor::{Precision, Storage},
};

impl TensorEntry {
    /// Bytes that the tensor takes in memory when it is read as `precision` says: a matrix as that
    /// of a linear layer, with the rows that its layout adds; anything else in the type of the
    /// computation.
    #[must_use]
    pub fn kept_bytes(&self, precision: &Precision) -> u64 {
        const PANEL: usize = 32;
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
            (Storage::Q8_0 | Storage::Q4K, None) => {
                plain(numbers, self.kind.plain_type().unwrap_or(DType::F32))
            }
            (Storage::Compute, None)
                if self.kind.packed().is_some() && precision.device.is_cpu() =>
            {
                numbers
            }
            // A kernel multiplies the bytes of the file.
            (Storage::Compute, None) if self.is_e4m3() && precision.device.is_cuda() => numbers,
            (Storage::Compute, None) => plain(numbers, self.compute_type(precision.compute)),
        }
    }
}

impl TensorEntry {
    /// Bytes that reading the tensor takes at most besides what is kept of it: a matrix whose type
    /// changes on the way is held as it is stored and, piece by piece, in the new type.
    #[must_use]
    pub fn loading_bytes(&self, precision: &Precision) -> u64 {
        let as_stored =
            self.multiplied_as().is_some() && !matches!(precision.storage, Storage::Plain(_));
        if self.shape.len() < 2 || as_stored { 0 } else { 4 * self.elements() }
    }
}

impl Checkpoint {
    /// The most that reading one tensor after the other takes besides what is kept.
    #[must_use]
    pub fn loading_bytes(&self, precision: &Precision) -> u64 {
        self.tensors().map(|(_, entry)| entry.loading_bytes(precision)).max().unwrap_or(0)
    }

    /// Size of all tensors in memory in bytes when they are read as `precision` says.
    #[must_use]
    pub fn kept_bytes(&self, precision: &Precision) -> u64 {
        self.tensors().map(|(_, entry)| entry.kept_bytes(precision)).sum()
    }
}
