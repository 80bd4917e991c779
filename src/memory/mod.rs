//! How much memory there is, how much was used, whether a piece of work fits, and which device
//! computes.

mod device;

pub use device::Device;

use crate::error::{Error, Result};

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

/// Memory that a new allocation can take in bytes; `None` where the system does not say.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let system = kib_field(&fs_err::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(system.min(cgroup_free_bytes().unwrap_or(u64::MAX)))
}

/// A ceiling for the host memory of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// The most bytes that may be used; `None` means what the system has free.
    pub bytes_max: Option<u64>,
}

impl Budget {
    /// Checks that `needed_bytes` more fit.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with both numbers, before anything is allocated.
    pub fn check(&self, what: &str, needed_bytes: u64, hint: &str) -> Result<()> {
        let free = match self.bytes_max {
            Some(max) => Some(max.saturating_sub(resident_bytes().unwrap_or(0))),
            None => available_bytes(),
        };
        match free {
            Some(free) if needed_bytes > free => Err(Error::OutOfMemory {
                what: what.to_owned(),
                needed_bytes,
                available_bytes: free,
                hint: hint.to_owned(),
            }),
            _ => Ok(()),
        }
    }
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

    #[test]
    fn a_budget_refuses_with_both_numbers() {
        let error = Budget { bytes_max: Some(1) }.check("weights", 10, "buy more").unwrap_err();
        assert!(
            matches!(error, Error::OutOfMemory { needed_bytes: 10, available_bytes: 0, .. }),
            "{error}"
        );
        Budget { bytes_max: Some(u64::MAX) }.check("weights", 10, "").unwrap();
    }
}
