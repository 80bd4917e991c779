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

/// Ceilings for the memory of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// Memory of the host. Files that are mapped do not count: the system takes their pages back
    /// when it needs them.
    pub ram: Limit,
    /// Memory of a GPU.
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
        self.vram.room(used, free)
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
