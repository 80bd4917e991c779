//! Float32 tensors in host memory, as slices.

use std::sync::RwLockReadGuard;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Whether the vectorised versions apply: float32 in host memory, and nobody asks for gradients.
pub(super) fn is_fast(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && !t.track_op())
}

/// Runs `work` on one of the threads that operations are shared out to.
///
/// An operation that starts elsewhere hands itself over to them and sleeps until it is done, which
/// costs two wake-ups; many small ones in a row, as for one token, are better started on the spot.
pub fn on_worker<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// A borrowed float32 tensor in host memory.
pub(super) struct Floats<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    layout: &'a Layout,
}

impl<'a> Floats<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// From the first element to the end of the storage; strides are those of the tensor.
    pub(super) fn strided(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(all)) => Ok(&all[self.layout.start_offset()..]),
            _ => bail!("not a float32 tensor in host memory"),
        }
    }

    /// All elements of a contiguous tensor.
    pub(super) fn contiguous(&self) -> Result<&[f32]> {
        if !self.layout.is_contiguous() {
            bail!("not contiguous: {:?}", self.layout);
        }
        Ok(&self.strided()?[..self.layout.shape().elem_count()])
    }
}
