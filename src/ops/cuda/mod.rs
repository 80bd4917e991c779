//! Launches of the CUDA kernels in `kernels/`: one function for each operation, which gives `None`
//! where no kernel fits the types and sizes, so that the plain version runs.
//!
//! The kernels also run without a GPU, in the emulation of `kernels/host`, on bf16 tensors in host
//! memory. [`parity`] holds one suite of checks for both.

mod attention;
mod ffi;
mod joint;
mod launch;
pub mod parity;

use std::cell::Cell;

use candle_core::{DType, Tensor};

pub(super) use attention::attention;
pub(super) use joint::joint_attention;

thread_local! {
    static EMULATED: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Runs `work` with the kernels in place of the plain versions for bf16 tensors in host memory, in
/// this thread. `order` is the order in which a block's threads run: 0 first come, first served;
/// 1 last come, first served; others, seeds of random orders. No result may depend on it.
#[cfg(feature = "cuda-emulation")]
pub fn emulated<T>(order: u32, work: impl FnOnce() -> T) -> T {
    struct Reset(Option<u32>);
    impl Drop for Reset {
        fn drop(&mut self) {
            EMULATED.set(self.0);
        }
    }
    let _reset = Reset(EMULATED.replace(Some(order)));
    work()
}

/// The order of an emulated block's threads, where kernels are emulated in this thread.
fn emulated_order() -> Option<u32> {
    EMULATED.get()
}

/// Whether kernels run on these tensors: all bf16 on a CUDA device, or in host memory while kernels are
/// emulated.
pub(super) fn takes(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|x| x.dtype() == DType::BF16) && are_near(tensors)
}

/// Whether all tensors are where kernels run.
fn are_near(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|x| {
        let near = x.device().is_cuda() || (x.device().is_cpu() && emulated_order().is_some());
        near && !x.track_op()
    })
}
