//! How much memory may be used, and how much of that is left.

use candle_core::Device as TensorDevice;

use super::{available_bytes, device_memory, private_bytes};

/// A ceiling for one kind of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Limit {
    /// What is free.
    #[default]
    Free,
    /// So many bytes for this process, and no more than are free.
    AtMost(u64),
    /// All that is free but so many bytes.
    LeaveFree(u64),
}

/// Of a ceiling for a GPU's memory one of so many parts is left to what the driver's pool holds and cannot use: it
/// held 5.6 % more than was said at most.
const POOL_SHARE: u64 = 16;

/// Ceilings for the memory of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// Memory of the host. Files that are mapped do not count: the system takes their pages back
    /// when it needs them.
    pub ram: Limit,
    /// Memory of a GPU, as its pool holds it: of [`Limit::AtMost`] tensors may take 15 parts of 16.
    pub vram: Limit,
}

impl Limit {
    /// What may still be taken when the process has taken `used` bytes and `free` are left, where
    /// that is known.
    #[must_use]
    pub fn room(self, used: u64, free: Option<u64>) -> Option<u64> {
        match self {
            Self::Free => free,
            Self::AtMost(bytes) => Some(bytes.saturating_sub(used).min(free.unwrap_or(u64::MAX))),
            Self::LeaveFree(bytes) => free.map(|free| free.saturating_sub(bytes)),
        }
    }

    /// How much more a ceiling for a pool has to be, so that tensors may take so many bytes more.
    #[must_use]
    pub(crate) fn with_pool(bytes: u64) -> u64 {
        bytes.saturating_add(bytes.div_ceil(POOL_SHARE - 1))
    }

    /// What tensors may take where this is the ceiling for the pool that holds them.
    #[must_use]
    pub(super) fn within_pool(self) -> Self {
        match self {
            Self::AtMost(bytes) => Self::AtMost(bytes - bytes.div_ceil(POOL_SHARE)),
            Self::Free | Self::LeaveFree(_) => self,
        }
    }
}

impl Budget {
    /// At most so many bytes of host memory.
    #[must_use]
    pub fn ram_at_most(bytes: u64) -> Self {
        Self { ram: Limit::AtMost(bytes), ..Self::default() }
    }

    /// The ceiling for the memory in which `device` computes.
    #[must_use]
    pub fn limit(&self, device: &TensorDevice) -> Limit {
        if device.is_cpu() { self.ram } else { self.vram }
    }

    /// Bytes that may still be taken where `device` computes; `None` where the system does not say
    /// and no ceiling was set.
    #[must_use]
    pub fn room(&self, device: &TensorDevice) -> Option<u64> {
        if device.is_cpu() {
            return self.ram.room(private_bytes().unwrap_or(0), available_bytes());
        }
        let (used, free) = device_memory(device).map_or((0, None), |m| (m.used, Some(m.free)));
        self.vram.within_pool().room(used, free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_counts_what_is_used_and_what_is_free() {
        let most = Limit::AtMost(10);
        assert_eq!(most.room(3, None), Some(7));
        assert_eq!(most.room(3, Some(5)), Some(5));
        assert_eq!(most.room(11, Some(5)), Some(0));
        assert_eq!(Limit::LeaveFree(4).room(3, Some(5)), Some(1));
        assert_eq!(Limit::LeaveFree(6).room(3, Some(5)), Some(0));
        assert_eq!(Limit::AtMost(161).within_pool(), Limit::AtMost(150));
        assert_eq!(Limit::LeaveFree(4).within_pool(), Limit::LeaveFree(4));
        for (ceiling, more) in (0..40).flat_map(|ceiling| (0..40).map(move |more| (ceiling, more)))
        {
            let room = |ceiling| Limit::AtMost(ceiling).within_pool().room(0, None).unwrap();
            assert!(room(ceiling + Limit::with_pool(more)) >= room(ceiling) + more);
        }
        assert_eq!((Limit::Free.room(3, Some(5)), Limit::Free.room(3, None)), (Some(5), None));
    }

    #[test]
    fn the_host_says_what_is_left() {
        let room = |budget: Budget| budget.room(&TensorDevice::Cpu);
        if let Some(free) = room(Budget::default()) {
            assert!(free > 0 && room(Budget::ram_at_most(1)) == Some(0));
        }
    }
}
