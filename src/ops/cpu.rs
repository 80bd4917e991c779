//! Float32 tensors in host memory, as slices.

use std::{
    sync::{
        RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Whether the vectorised versions apply: float32 in host memory, and nobody asks for gradients.
pub(super) fn is_fast(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && !t.track_op())
}

/// Runs `work` on one of the threads that operations are shared out to.
///
/// An operation that starts elsewhere hands itself over to them and sleeps until it is done, which
/// costs two wake-ups; many small ones in a row, as for one token, are better started on the spot.
/// For the same reason the other threads look for their share without falling asleep in between.
pub fn on_worker<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let shift = Shift { over: AtomicBool::new(false) };
    rayon::scope(|scope| {
        let owner = rayon::current_thread_index();
        for _ in 1..rayon::current_num_threads() {
            let shift = &shift;
            scope.spawn(move |_| shift.stay_awake(owner));
        }
        let _over_even_after_a_panic = EndOfShift(&shift);
        work()
    })
}

/// The time in which threads stay awake.
struct Shift {
    over: AtomicBool,
}

struct EndOfShift<'a>(&'a Shift);

impl Drop for EndOfShift<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

impl Shift {
    /// Looks for work of others until the shift is over. The thread `owner` leads the shift and must
    /// not wait for its own end. The bound frees a thread that took this up in the middle of another
    /// wait, which the leader's work may depend on.
    fn stay_awake(&self, owner: Option<usize>) {
        const AT_MOST: Duration = Duration::from_millis(20);
        if rayon::current_thread_index() == owner {
            return;
        }
        let begin = Instant::now();
        while !self.over.load(Ordering::Relaxed) && begin.elapsed() < AT_MOST {
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                std::hint::spin_loop();
            }
        }
    }
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
