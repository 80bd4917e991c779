//! The memory pool of a CUDA device, as its driver keeps it.
//!
//! cudarc allocates every tensor from the device's default pool, in the order of its stream. What
//! one model frees is there for the next without a call to the system, if the pool is told to keep
//! it; the driver's own counters are the honest peak. What recorded work takes comes from a second pool,
//! which the driver keeps for graphs.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice, Device as TensorDevice,
    cuda_backend::cudarc::driver::{CudaContext, CudaStream, sys},
};

use super::{
    DevicePeak, DeviceUse,
    pool::{BlockId, Pool, PoolExhausted, PoolUse},
};
use crate::error::Result;

/// Opens a CUDA device whose work, from whatever thread, is queued on one stream of its own.
///
/// The stream that candle takes by itself is another one in each thread, so that what one thread has queued
/// would not be waited for by the next.
///
/// # Errors
/// No such device, or no driver.
pub(super) fn open(index: usize) -> candle_core::Result<TensorDevice> {
    let device = CudaDevice::new_with_stream(index)?;
    #[expect(unsafe_code, reason = "a promise about streams")]
    // SAFETY: there is one stream, so everything is in the order in which it was queued. Two events for
    // each tensor are not needed, and their making and waiting takes the host's time.
    unsafe {
        device.disable_event_tracking();
    }
    Ok(TensorDevice::Cuda(device))
}

/// The default pool of a CUDA device. Tensors take their memory from it by themselves; what is
/// allocated here are claims, which are counted beside what the driver says is taken.
#[derive(Debug)]
pub struct CudaPool {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    pool: sys::CUmemoryPool,
    claims: BTreeMap<u64, u64>,
    next: u64,
    claimed: u64,
    claimed_high: u64,
}

#[expect(unsafe_code, reason = "a handle of the driver is a pointer")]
// SAFETY: the driver's functions on a pool may be called from any thread, and the handle is the
// device's own for as long as the process lives.
unsafe impl Send for CudaPool {}

impl CudaPool {
    /// The pool of an opened device, told to keep what is freed.
    ///
    /// # Errors
    /// A device that is no CUDA device, or one without pools.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = Arc::clone(stream.context());
        let mut pool: sys::CUmemoryPool = std::ptr::null_mut();
        #[expect(unsafe_code, reason = "a call of the driver")]
        // SAFETY: `pool` is a place for the handle, and the device is open.
        let asked = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) };
        asked.result().map_err(candle_core::Error::wrap)?;
        let claims = BTreeMap::new();
        let made = Self { context, stream, pool, claims, next: 0, claimed: 0, claimed_high: 0 };
        made.set(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX);
        Ok(made)
    }

    fn set(&self, attribute: sys::CUmemPool_attribute, mut value: u64) {
        #[expect(unsafe_code, reason = "a call of the driver")]
        // SAFETY: these attributes take a 64-bit number, and `value` is one.
        let set = unsafe {
            sys::cuMemPoolSetAttribute(self.pool, attribute, (&raw mut value).cast::<c_void>())
        };
        if let Err(error) = set.result() {
            tracing::debug!(?attribute, %error, "the pool refused a setting");
        }
    }

    /// A counter; 0 where the driver refuses.
    fn get(&self, attribute: sys::CUmemPool_attribute) -> u64 {
        let mut value = 0_u64;
        #[expect(unsafe_code, reason = "a call of the driver")]
        // SAFETY: these attributes are 64-bit numbers, and `value` is a place for one.
        let got = unsafe {
            sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut value).cast::<c_void>())
        };
        got.result().map_or(0, |()| value)
    }

    /// Bytes that the device's graphs hold, whether they run or not.
    pub(super) fn recorded_bytes(&self) -> u64 {
        let mut value = 0_u64;
        let attribute = sys::CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT;
        #[expect(unsafe_code, reason = "a call of the driver")]
        // SAFETY: this attribute is a 64-bit number, and `value` is a place for one.
        let got = unsafe {
            let device = self.context.cu_device();
            sys::cuDeviceGetGraphMemAttribute(device, attribute, (&raw mut value).cast::<c_void>())
        };
        got.result().map_or(0, |()| value)
    }

    /// What the device can still give: what nobody has, and what the pool holds unused.
    fn free_bytes(&self) -> Option<u64> {
        let (free, _) = self.context.mem_get_info().ok()?;
        let usage = self.driver_usage();
        Some(free as u64 + usage.reserved.saturating_sub(usage.used))
    }

    /// The driver's counters of the default pool, and with them what graphs hold: all of it counts as taken,
    /// since no tensor can have it.
    fn driver_usage(&self) -> PoolUse {
        use sys::CUmemPool_attribute as Attribute;
        let recorded = self.recorded_bytes();
        let noted = noted_peak(self.context.cu_device());
        let used = self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT) + recorded;
        let used_high = self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH);
        let reserved = self.get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) + recorded;
        let reserved_high = self.get(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH);
        PoolUse {
            used,
            used_high: used_high.max(noted.used).max(used),
            reserved,
            reserved_high: reserved_high.max(noted.reserved).max(reserved),
        }
    }
}

/// The most that was counted while graphs held memory, which no counter of the driver has.
#[derive(Debug, Clone, Copy, Default)]
struct Noted {
    used: u64,
    reserved: u64,
}

/// By device.
static NOTED: Mutex<BTreeMap<sys::CUdevice, Noted>> = Mutex::new(BTreeMap::new());

fn noted_peak(device: sys::CUdevice) -> Noted {
    let noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner);
    noted.get(&device).copied().unwrap_or_default()
}

impl CudaPool {
    /// Counts what is taken now among the peaks. Where graphs hold memory, nobody else does.
    fn note_peak(&self) {
        let PoolUse { used, reserved, .. } = self.driver_usage();
        let mut noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = noted.entry(self.context.cu_device()).or_default();
        *noted = Noted { used: noted.used.max(used), reserved: noted.reserved.max(reserved) };
    }

    /// Gives back to the system what nobody holds, but for so many bytes.
    fn trim_but(&self, kept: u64) {
        // What is freed in the stream's order is nobody's only when the stream has come there.
        if let Err(error) = self.stream.synchronize() {
            tracing::debug!(%error, "the pool is trimmed while its stream is busy");
        }
        let kept = match kept {
            0 => 0,
            kept => kept + self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT),
        };
        let kept = usize::try_from(kept).unwrap_or(usize::MAX);
        #[expect(unsafe_code, reason = "a call of the driver")]
        // SAFETY: the pool gives back only what nobody holds.
        let trimmed = unsafe { sys::cuMemPoolTrimTo(self.pool, kept) };
        if let Err(error) = trimmed.result() {
            tracing::debug!(%error, "the pool was not trimmed");
        }
        self.trim_recorded();
    }

    /// Gives back to the system what no graph holds any more.
    fn trim_recorded(&self) {
        #[expect(unsafe_code, reason = "a call of the driver")]
        // SAFETY: the driver gives back only what no graph has.
        let trimmed = unsafe { sys::cuDeviceGraphMemTrim(self.context.cu_device()) };
        if let Err(error) = trimmed.result() {
            tracing::debug!(%error, "memory of graphs was not given back");
        }
    }
}

/// Does `work` on the pool of a CUDA device; nothing for others.
fn on_pool(device: &TensorDevice, work: impl FnOnce(CudaPool)) {
    let TensorDevice::Cuda(device) = device else { return };
    match CudaPool::new(device) {
        Ok(pool) => work(pool),
        Err(error) => tracing::debug!(%error, "there is no pool"),
    }
}

/// Counts what is taken now among a device's peaks; while graphs have memory no counter of the driver does.
pub(crate) fn note_device_peak(device: &TensorDevice) {
    on_pool(device, |pool| pool.note_peak());
}

/// Gives back to the system what a device's graphs do not hold any more.
pub(crate) fn trim_recorded(device: &TensorDevice) {
    on_pool(device, |pool| pool.trim_recorded());
}

/// Gives back to the system what nobody holds of a device's memory, but for so many bytes.
pub(super) fn trim_device(device: &TensorDevice, kept: u64) {
    on_pool(device, |pool| pool.trim_but(kept));
}

impl Pool for CudaPool {
    fn allocate(&mut self, bytes: u64) -> std::result::Result<BlockId, PoolExhausted> {
        let used = self.usage().used;
        let free = self.capacity().map_or(u64::MAX, |all| all.saturating_sub(used));
        if bytes > free {
            return Err(PoolExhausted { wanted: bytes, free });
        }
        self.next += 1;
        self.claims.insert(self.next, bytes);
        self.claimed += bytes;
        self.claimed_high = self.claimed_high.max(self.claimed);
        Ok(BlockId(self.next))
    }

    fn free(&mut self, block: BlockId) {
        self.claimed -= self.claims.remove(&block.0).unwrap_or(0);
    }

    /// Takes so much once and frees it, so that the pool has it.
    fn reserve(&mut self, bytes: u64) -> std::result::Result<(), PoolExhausted> {
        let missing = bytes.saturating_sub(self.driver_usage().used);
        let refused = |free| PoolExhausted { wanted: missing, free };
        let free = self.free_bytes().unwrap_or(0);
        let Ok(size) = usize::try_from(missing) else { return Err(refused(free)) };
        #[expect(unsafe_code, reason = "memory that is given back before anybody reads it")]
        // SAFETY: the bytes are never looked at.
        let taken = unsafe { self.stream.alloc::<u8>(size) };
        taken.map(drop).map_err(|_driver_error| refused(free))
    }

    fn trim(&mut self) {
        self.trim_but(0);
    }

    fn usage(&self) -> PoolUse {
        let usage = self.driver_usage();
        PoolUse {
            used: usage.used.max(self.claimed),
            used_high: usage.used_high.max(self.claimed_high),
            ..usage
        }
    }

    fn capacity(&self) -> Option<u64> {
        Some(self.free_bytes()?.saturating_add(self.driver_usage().used))
    }
}

/// What the memory of a CUDA device is used for.
pub(super) fn device_use(device: &TensorDevice) -> Option<DeviceUse> {
    let TensorDevice::Cuda(device) = device else { return None };
    let pool = CudaPool::new(device).ok()?;
    let (used, free) = (pool.driver_usage().used, pool.free_bytes()?);
    Some(DeviceUse { used, free })
}

/// The most that the pool of a CUDA device gave and held.
pub(super) fn device_peak(device: &TensorDevice) -> Option<DevicePeak> {
    let TensorDevice::Cuda(device) = device else { return None };
    let usage = CudaPool::new(device).ok()?.driver_usage();
    Some(DevicePeak {
        peak_device_bytes: usage.used_high,
        reserved_device_bytes: usage.reserved_high,
    })
}

/// The newest CUDA that the driver supports; `None` where it does not say.
pub(super) fn driver_version() -> Option<(i32, i32)> {
    let mut version = 0;
    #[expect(unsafe_code, reason = "a call of the driver")]
    // SAFETY: `version` is a place for the number.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let (major, minor) = (version.div_euclid(1000), version.rem_euclid(1000).div_euclid(10));
    (asked.result().is_ok() && version > 0).then_some((major, minor))
}
