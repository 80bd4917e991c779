//! Launches of the CUDA kernels in `kernels/`: one function for each operation, which gives `None`
//! where no kernel fits the types and sizes, so that the plain version runs.
//!
//! The kernels also run without a GPU, in the emulation of `kernels/host`, on bf16 tensors in host
//! memory. `parity` holds one suite of checks for both.

mod attention;
mod blas;
#[cfg(feature = "cuda")]
mod blas_lt;
mod conv;
mod decode;
mod few;
mod ffi;
mod float8;
mod joint;
mod latents;
mod launch;
mod linear;
mod maps;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub mod parity;
mod pictures;
mod queue;
#[cfg(all(test, feature = "cuda-emulation"))]
mod races;
mod recorded;
mod rows;
mod runs;
mod tensors;

use std::{
    cell::Cell,
    sync::atomic::{AtomicBool, Ordering},
};

use candle_core::{DType, Device, Error, Result, Tensor};

pub(super) use attention::attention;
pub(super) use blas::{Epilogue, linear as blas_linear};
pub use blas::{SCRATCH_BYTES, use_blas_lt};
pub(super) use conv::{Shortcut, StoredKernel};
pub use decode::{
    DecodeLayer, DecodeModel, DecodePart, DecodePlan, DecodeStarts, DecodeToken, use_decode,
};
pub use ffi::launches;
pub(super) use float8::{Activations, float8_rows};
pub(super) use joint::joint_attention;
pub(super) use latents::{pack_patches, timestep_embedding, unpack_patches};
pub(super) use linear::row_by_each;
pub use linear::{Format, StoredMatrix};
pub(super) use pictures::Pixels;
pub use recorded::{AtWork, Recorded, Recording, at_work, records};
pub(super) use rows::{
    Activation, activate, channel_rms_norm, gated_add, gated_add_norm, guided_step, layer_norm,
    rms_norm, rotate,
};
pub(super) use runs::{gated_add_norm_streams, gated_add_streams, layer_norm_streams};
pub(super) use tensors::{clamp, combine, laid_out, row_sizes, take_rows};

thread_local! {
    static EMULATED: Cell<Option<u32>> = const { Cell::new(None) };
    /// Allocations for kernels' results that still succeed in the emulation.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// Runs `work` with the kernels in place of the plain versions for bf16 tensors in host memory, in
/// this thread. `order` is the order in which a block's threads run: 0 first come, first served;
/// 1 last come, first served; others, seeds of random orders. No result may depend on it. In random orders accesses to
/// memory are watched, and two that nothing orders are an error.
#[cfg(feature = "cuda-emulation")]
pub fn emulated<T>(order: u32, work: impl FnOnce() -> T) -> T {
    with_order(Some(order), work)
}

/// Runs `work` in the emulation on a device whose memory is used up after so many allocations of kernels.
/// Returns what came of it and how many there were.
#[cfg(feature = "cuda-emulation")]
pub fn emulated_with_room_for<T>(allocations: u64, work: impl FnOnce() -> T) -> (T, u64) {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            ALLOCATIONS.set(u64::MAX);
        }
    }
    ALLOCATIONS.set(allocations);
    let _reset = Reset;
    let result = emulated(0, work);
    (result, allocations - ALLOCATIONS.get())
}

/// Counts an allocation in host memory for a kernel.
///
/// # Errors
/// In the words of CUDA's driver, where the emulated memory is used up.
fn allocated_on_host() -> Result<()> {
    match ALLOCATIONS.get().checked_sub(1) {
        Some(left) => {
            ALLOCATIONS.set(left);
            Ok(())
        }
        None => Err(Error::msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"emulated\")")),
    }
}

/// Runs `work` without the emulation, even within [`emulated`].
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub fn not_emulated<T>(work: impl FnOnce() -> T) -> T {
    with_order(None, work)
}

/// The device's name and compute capability.
///
/// # Errors
/// A device that is not a CUDA device, or a failure of it.
pub fn device_name(device: &Device) -> Result<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => ffi::device_name(device),
        _ => Err(Error::msg(format!("{device:?} is not a CUDA device"))),
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
fn with_order<T>(order: Option<u32>, work: impl FnOnce() -> T) -> T {
    struct Reset(Option<u32>);
    impl Drop for Reset {
        fn drop(&mut self) {
            EMULATED.set(self.0);
        }
    }
    let _reset = Reset(EMULATED.replace(order));
    work()
}

/// Whether joint attention and convolutions use Hopper's own instructions where there are any.
static HOPPER: AtomicBool = AtomicBool::new(true);

/// Lets joint attention and convolutions use Hopper's own instructions on devices that have them, or not.
/// On at the start.
pub fn use_hopper(on: bool) {
    HOPPER.store(on, Ordering::Relaxed);
}

/// Runs `work` with [`use_hopper`] set to `on`, and sets it back. One at a time does.
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub(crate) fn with_hopper<T>(on: bool, work: impl FnOnce() -> T) -> T {
    use std::sync::{Mutex, PoisonError};
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = HOPPER.swap(on, Ordering::Relaxed);
    let result = work();
    use_hopper(before);
    result
}

/// Whether `device` has Hopper's own instructions, or emulates them.
#[must_use]
pub fn has_hopper(device: &Device) -> bool {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => ffi::capability(device).is_ok_and(|(major, _)| major == 9),
        device => runs_on(device),
    }
}

/// The compute capability whose products in fp8 have a scale for each row of both operands: Hopper's.
#[cfg(feature = "cuda")]
const FLOAT8_CAPABILITY: (i32, i32) = (9, 0);

/// Whether products on `device` can multiply numbers of eight bits that have a scale for each row.
#[must_use]
pub fn multiplies_float8(device: &Device) -> bool {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => ffi::capability(device).is_ok_and(|of| of == FLOAT8_CAPABILITY),
        _ => false,
    }
}

fn hopper_is_used(device: &Device) -> bool {
    // Kernels for other architectures than `90a` leave those out.
    const COMPILED: bool = option_env!("PENTIMENTO_HAS_HOPPER").is_some();
    HOPPER.load(Ordering::Relaxed) && has_hopper(device) && (COMPILED || device.is_cpu())
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
    tensors.iter().all(|x| runs_on(x.device()) && !x.track_op())
}

/// Whether kernels run on what lies on `device`.
#[must_use]
pub fn runs_on(device: &Device) -> bool {
    device.is_cuda() || (device.is_cpu() && emulated_order().is_some())
}
