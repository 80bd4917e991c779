//! How much memory there is, how much was used, whether a piece of work fits, and which device
//! computes.

mod budget;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod fault;
mod heap;
pub mod ladder;
mod lead;
pub mod ledger;
pub mod pool;
mod slot;

pub use budget::{Budget, Limit};
#[cfg(feature = "cuda")]
pub use cuda::CudaPool;
#[cfg(feature = "cuda")]
pub(crate) use cuda::{note_device_peak, trim_recorded};
pub use device::Device;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub(crate) use device::cuda_device;
pub use fault::DeviceFault;
pub use ladder::{Ladder, Rung};
pub use lead::Lead;
pub use ledger::{DeviceMemory, Holding, Lease};
pub use pool::{HostPool, Pool, PoolUse, SimulatedDevice};
pub(crate) use slot::Slot;

/// Peak resident memory of this process so far in bytes; `None` where the system does not say.
#[must_use]
pub fn peak_resident_bytes() -> Option<u64> {
    status_field("VmHWM:")
}

/// Resident memory of this process now in bytes; `None` where the system does not say.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    status_field("VmRSS:")
}

/// Memory of this process that no file stands behind, now, in bytes: its allocations, and the
/// stacks of its threads; `None` where the system does not say.
#[must_use]
pub fn private_bytes() -> Option<u64> {
    status_field("RssAnon:")
}

/// Memory that a new allocation can take in bytes; `None` where the system does not say.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let system = kib_field(&fs_err::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(system.min(cgroup_free_bytes().unwrap_or(u64::MAX)))
}

/// What a GPU's memory is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceUse {
    /// Bytes that this process has taken.
    pub used: u64,
    /// Bytes that it can still take.
    pub free: u64,
}

/// The most that a GPU's memory was used for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct DevicePeak {
    /// Taken by this process at a time.
    pub peak_device_bytes: u64,
    /// Held by its pool at a time, taken or free to be taken again.
    pub reserved_device_bytes: u64,
}

/// The most that a GPU's memory was used for so far; `None` for the CPU.
#[must_use]
pub fn device_peak(device: &candle_core::Device) -> Option<DevicePeak> {
    #[cfg(feature = "cuda")]
    return cuda::device_peak(device);
    #[cfg(not(feature = "cuda"))]
    (device.is_cuda()).then_some(DevicePeak { peak_device_bytes: 0, reserved_device_bytes: 0 })
}

/// What the memory of a GPU is used for; `None` for the CPU and where the driver does not say.
#[must_use]
pub fn device_memory(device: &candle_core::Device) -> Option<DeviceUse> {
    #[cfg(feature = "cuda")]
    return cuda::device_use(device);
    #[cfg(not(feature = "cuda"))]
    (device.is_cuda()).then_some(DeviceUse { used: 0, free: 0 })
}

/// Gives back to the system what a GPU's pools hold and nobody uses, but for so many bytes, after what is queued
/// was done. Nothing on the CPU.
pub(crate) fn trim_device(device: &candle_core::Device, kept: u64) {
    #[cfg(feature = "cuda")]
    cuda::trim_device(device, kept);
    let _nothing_on_others = (device, kept);
}

/// Bytes that a GPU's recorded work holds; none on the CPU.
pub(crate) fn recorded_bytes(device: &candle_core::Device) -> u64 {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = device {
        return CudaPool::new(device).map_or(0, |pool| pool.recorded_bytes());
    }
    let _nothing_on_others = device;
    0
}

/// The memory of the device that computes, from which planner and editor take under one budget.
///
/// # Errors
/// A GPU whose driver has no memory pools.
pub fn device_pool(device: &candle_core::Device, budget: Budget) -> crate::Result<DeviceMemory> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = device {
        return Ok(DeviceMemory::new(cuda::CudaPool::new(device)?, budget.vram.within_pool()));
    }
    Ok(DeviceMemory::new(HostPool::default(), budget.limit(device)))
}

fn status_field(name: &str) -> Option<u64> {
    kib_field(&fs_err::read_to_string("/proc/self/status").ok()?, name)
}

/// The value of a `Name:   123 kB` line in bytes.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn cgroup_free_bytes() -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs_err::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
    };
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_kib_line() {
        assert_eq!(kib_field("VmPeak:\t 9 kB\nVmHWM:\t  12 kB\n", "VmHWM:"), Some(12 * 1024));
        assert_eq!(kib_field("VmHWM: many kB", "VmHWM:"), None);
    }
}
