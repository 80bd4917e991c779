//! Buffers of large float32 tensors in host memory, used again and again: fresh memory must be
//! cleared by the system page by page, which costs a transformer step several percent.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};

use super::simd::hugepage;

/// Buffers of fewer numbers are not worth keeping.
const KEPT_LEN_MIN: usize = 1 << 18;
/// The most bytes that are kept.
const KEPT_BYTES_MAX: usize = 1 << 30;

static KEPT: Mutex<Kept> =
    Mutex::new(Kept { users: 0, buffers: Vec::new(), given: BTreeMap::new() });

#[derive(Debug)]
struct Kept {
    users: usize,
    buffers: Vec<Vec<f32>>,
    /// By length: buffers that were given out, less those that came back. What comes back beyond
    /// that was made elsewhere; nobody asks for it again, so it is not kept.
    given: BTreeMap<usize, usize>,
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While one of these lives, buffers that are [given back](recycle) are kept for later operations.
#[derive(Debug)]
#[must_use = "buffers are freed when the last of these is dropped"]
pub struct KeepBuffers(());

impl KeepBuffers {
    /// Begins to keep buffers.
    pub fn new() -> Self {
        kept().users += 1;
        Self(())
    }
}

impl Default for KeepBuffers {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for KeepBuffers {
    fn drop(&mut self) {
        let mut kept = kept();
        kept.users -= 1;
        if kept.users == 0 {
            let freed = mem::take(&mut kept.buffers);
            kept.given.clear();
            drop(kept);
            drop(freed);
        }
    }
}

/// Gives back the memory of a tensor that is not needed any more. Nobody else may hold the tensor
/// or a view of it: whoever reads it later finds no numbers, which fails.
///
/// # Errors
/// None that a tensor in host memory can have.
pub fn recycle(tensor: Tensor) -> Result<()> {
    let worthwhile = tensor.elem_count() >= KEPT_LEN_MIN;
    if !worthwhile || !tensor.device().is_cpu() || tensor.dtype() != DType::F32 {
        return Ok(());
    }
    tensor.inplace_op1(&Take)
}

/// `len` numbers, of which each must be written before it is read.
pub(super) fn of_len(len: usize) -> Vec<f32> {
    if len >= KEPT_LEN_MIN {
        let mut kept = kept();
        if kept.users > 0 {
            *kept.given.entry(len).or_default() += 1;
        }
        if let Some(i) = kept.buffers.iter().rposition(|buffer| buffer.len() == len) {
            return kept.buffers.swap_remove(i);
        }
    }
    hugepage::zeros(len)
}

fn keep(buffer: Vec<f32>) {
    let mut kept = kept();
    let bytes: usize = kept.buffers.iter().map(|buffer| size_of_val(buffer.as_slice())).sum();
    let Some(given) = kept.given.get_mut(&buffer.len()).filter(|given| **given > 0) else { return };
    *given -= 1;
    if kept.users > 0 && bytes + size_of_val(buffer.as_slice()) <= KEPT_BYTES_MAX {
        kept.buffers.push(buffer);
    }
}

/// Takes a tensor's memory away.
struct Take;

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "recycle"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        if let CpuStorage::F32(buffer) = storage {
            keep(mem::take(buffer));
        }
        Ok(())
    }
}

/// Changes the numbers of a contiguous float32 tensor in host memory where they lie. Nobody else
/// may hold the tensor or a view of it.
pub(super) fn in_place(tensor: &Tensor, change: impl Fn(&mut [f32])) -> Result<()> {
    tensor.inplace_op1(&Change(change))
}

struct Change<F>(F);

impl<F: Fn(&mut [f32])> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "change in place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(x), Some((start, end))) => (self.0)(&mut x[start..end]),
            _ => bail!("change in place: not contiguous float32 numbers: {layout:?}"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    // One test, since the buffers belong to the whole process.
    #[test]
    fn buffers_are_used_again_while_somebody_keeps_them() {
        // A length that no other test uses.
        const LEN: usize = KEPT_LEN_MIN + 77;
        let marked = || {
            let mut buffer = of_len(LEN);
            buffer.fill(1.0);
            Tensor::from_vec(buffer, LEN, &Device::Cpu).unwrap()
        };
        let first = |buffer: &[f32]| buffer[0].to_bits();
        {
            let _outer = KeepBuffers::new();
            {
                let _inner = KeepBuffers::new();
                recycle(marked()).unwrap();
            }
            let buffer = of_len(LEN);
            assert_eq!(first(&buffer), 1.0_f32.to_bits(), "a buffer that was given back");
            assert_eq!(first(&of_len(LEN)), 0, "it is given out once");
            recycle(Tensor::from_vec(buffer, LEN, &Device::Cpu).unwrap()).unwrap();
            // Three were given out by now and did not come back. Whatever else comes was made
            // elsewhere.
            let _two = (of_len(LEN), of_len(LEN));
            for _ in 0..5 {
                recycle(Tensor::zeros(LEN, DType::F32, &Device::Cpu).unwrap()).unwrap();
            }
            assert_eq!(kept().buffers.iter().filter(|buffer| buffer.len() == LEN).count(), 3);
        }
        let still = kept().users > 0;
        assert!(still || first(&of_len(LEN)) == 0, "freed with the last user");
    }

    #[test]
    fn a_recycled_tensor_has_no_numbers() {
        let x = Tensor::zeros(KEPT_LEN_MIN, DType::F32, &Device::Cpu).unwrap();
        let alias = x.clone();
        recycle(x).unwrap();
        let read =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| alias.to_vec1::<f32>()));
        assert!(!matches!(read, Ok(Ok(values)) if !values.is_empty()));
    }
}
