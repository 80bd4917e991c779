//! What a GPU's driver says when something is wrong, sorted by what can be done about it.

use crate::error::Error;

/// Why a device cannot be used, or failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceFault {
    /// There is no GPU, or none is visible to this process.
    NoDevice,
    /// The driver is older than what this program was built for.
    OldDriver,
    /// The program has no code for this GPU.
    NoCode,
    /// Another process has the GPU for itself.
    Taken,
    /// The GPU's memory is used up.
    OutOfMemory,
    /// The GPU or its context failed while it computed; this process cannot use it any more.
    Lost,
    /// Anything else.
    Other,
}

/// Words of the driver's messages, in lower case, in the order in which they are looked for.
const WORDS: &[(DeviceFault, &[&str])] = &[
    (
        DeviceFault::NoDevice,
        &["no_device", "no cuda-capable", "invalid_device", "invalid device", "stub_library"],
    ),
    (
        DeviceFault::OldDriver,
        &[
            "driver_mismatch",
            "compat_not_supported",
            "insufficient_driver",
            "driver version is insufficient",
            "unsupported_ptx_version",
            "unsupported toolchain",
        ],
    ),
    (
        DeviceFault::NoCode,
        &["no_binary", "no kernel image", "invalid_ptx", "invalid_image", "not_found", "jit_"],
    ),
    (DeviceFault::Taken, &["device_unavailable", "devices_unavailable", "busy or unavailable"]),
    (DeviceFault::OutOfMemory, &["out_of_memory", "out of memory", "outofmemory"]),
    (
        DeviceFault::Lost,
        &[
            "illegal_address",
            "illegal_instruction",
            "misaligned_address",
            "invalid_address_space",
            "invalid_pc",
            "hardware_stack",
            "launch_failed",
            "launch_timeout",
            "ecc_uncorrectable",
            "nvlink_uncorrectable",
            "context_is_destroyed",
            "contained",
            "mps_",
            "cuda_error_assert",
            "cuda_error_deinitialized",
            "cuda_error_unknown",
            "external_device",
        ],
    ),
];

impl DeviceFault {
    /// By the driver's words.
    #[must_use]
    pub fn of(reason: &str) -> Self {
        let reason = reason.to_ascii_lowercase();
        let says = |words: &&(Self, &[&str])| words.1.iter().any(|word| reason.contains(word));
        WORDS.iter().find(says).map_or(Self::Other, |(fault, _)| *fault)
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(self) -> &'static str {
        match self {
            Self::NoDevice => {
                "no such GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use \
                 --device cpu"
            }
            Self::OldDriver => {
                "the driver is too old for this program, which needs one for CUDA 13: update it, or \
                 use --device cpu"
            }
            Self::NoCode => {
                "this build has no code for that GPU: build with its CUDA_COMPUTE_CAP, or use \
                 --device cpu"
            }
            Self::Taken => {
                "another process has the GPU for itself: see nvidia-smi and its compute mode, or use \
                 --device cpu"
            }
            Self::OutOfMemory => {
                "other programs hold the GPU's memory: see nvidia-smi, or use --device cpu"
            }
            Self::Lost => {
                "the GPU cannot be used by this process any more: start the program again; if that \
                 does not help, see nvidia-smi and the system's log for Xid errors, or use --device cpu"
            }
            Self::Other => "check the driver with nvidia-smi, or use --device cpu",
        }
    }
}

/// A failed operation on tensors. A lost device has an error of its own, since nothing on it can be
/// tried again.
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // The driver's message stands somewhere in candle's chain of causes.
        let text = format!("{error:?}");
        let is_driver = text.contains("CUDA_ERROR_");
        if is_driver && DeviceFault::of(&text) == DeviceFault::Lost {
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or_default().to_owned();
            return Self::Device { reason, hint: DeviceFault::Lost.hint() };
        }
        Self::Tensor(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_words_lead_to_a_way_out() {
        for (reason, fault, word) in [
            ("CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device\"", DeviceFault::NoDevice, "VISIBLE"),
            ("CUDA_ERROR_INVALID_DEVICE", DeviceFault::NoDevice, "VISIBLE"),
            ("CUDA_ERROR_STUB_LIBRARY", DeviceFault::NoDevice, "VISIBLE"),
            ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", DeviceFault::OldDriver, "too old"),
            ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", DeviceFault::OldDriver, "CUDA 13"),
            (
                "the PTX was compiled with an unsupported toolchain",
                DeviceFault::OldDriver,
                "update",
            ),
            ("CUDA_ERROR_NO_BINARY_FOR_GPU", DeviceFault::NoCode, "COMPUTE_CAP"),
            ("CUDA_ERROR_INVALID_PTX", DeviceFault::NoCode, "COMPUTE_CAP"),
            ("CUDA_ERROR_DEVICE_UNAVAILABLE", DeviceFault::Taken, "compute mode"),
            ("CUDA_ERROR_OUT_OF_MEMORY", DeviceFault::OutOfMemory, "other programs"),
            ("CUDA_ERROR_ILLEGAL_ADDRESS", DeviceFault::Lost, "again"),
            ("CUDA_ERROR_LAUNCH_FAILED", DeviceFault::Lost, "again"),
            ("CUDA_ERROR_ECC_UNCORRECTABLE", DeviceFault::Lost, "Xid"),
            ("something new", DeviceFault::Other, "nvidia-smi"),
        ] {
            let found = DeviceFault::of(reason);
            assert_eq!(found, fault, "{reason}");
            assert!(found.hint().contains(word) && found.hint().contains("--device cpu"));
        }
    }

    #[test]
    fn a_lost_device_is_an_error_of_its_own() {
        let of =
            |text: &str| Error::from(candle_core::Error::Msg(text.to_owned()).context("later"));
        let lost = of("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal address\")");
        assert!(matches!(lost, Error::Device { .. }), "{lost}");
        assert!(!super::super::ladder::is_out_of_memory(&lost), "nothing is tried again");
        let full = of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert!(super::super::ladder::is_out_of_memory(&full));
        assert!(matches!(of("shapes that are not contained in each other"), Error::Tensor(_)));
    }
}
