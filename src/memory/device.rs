//! Which device computes.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device as TensorDevice};

use crate::error::{Error, RequestError, Result};

/// The device of the computation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The first CUDA device where this build and the machine have one that computes, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its index.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::field("--device", format!("{text:?}"), "auto, cpu, cuda or cuda:N");
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
                index.map(Self::Cuda).ok_or_else(wrong)
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl Device {
    /// Whether this build can use CUDA devices.
    pub const CUDA_BUILT: bool = cfg!(feature = "cuda");

    /// Opens the device.
    ///
    /// # Errors
    /// A CUDA device in a build without CUDA, or one that cannot be opened.
    pub fn open(self) -> Result<TensorDevice> {
        match self {
            Self::Cpu => Ok(TensorDevice::Cpu),
            Self::Auto => Ok(open_cuda(0).unwrap_or(TensorDevice::Cpu)),
            Self::Cuda(index) => open_cuda(index),
        }
    }

    /// The type of the computation on an opened device: f32 on the CPU, bf16 on a GPU. Never f16,
    /// whose range these models' activations exceed.
    #[must_use]
    pub fn compute_type(device: &TensorDevice) -> DType {
        if device.is_cuda() { DType::BF16 } else { DType::F32 }
    }
}

fn open_cuda(index: usize) -> Result<TensorDevice> {
    let unsupported = |what: String, hint: &str| -> Error {
        RequestError::Unsupported { model: "this program".to_owned(), what, hint: hint.to_owned() }
            .into()
    };
    if !Device::CUDA_BUILT {
        let what = format!("device cuda:{index}: it was built without the feature `cuda`");
        return Err(unsupported(what, "use --device cpu, or build with --features cuda"));
    }
    let opened = TensorDevice::new_cuda(index).and_then(|device| probe(&device).map(|()| device));
    opened.map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default();
        unsupported(format!("device cuda:{index}: {reason}"), hint(reason))
    })
}

/// Computes something, since a device opens whether or not this build has code for it.
fn probe(device: &TensorDevice) -> candle_core::Result<()> {
    let one = candle_core::Tensor::ones(1, DType::F32, device)?;
    let two: Vec<f32> = (one + 1.0)?.to_vec1()?;
    match two.as_slice() {
        [sum] if (sum - 2.0).abs() < f32::EPSILON => Ok(()),
        other => candle_core::bail!("it computes 1 + 1 = {other:?}"),
    }
}

/// What to do about a device that cannot be used, by the driver's words.
fn hint(reason: &str) -> &'static str {
    let reason = reason.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    if says(&["no_device", "no cuda-capable", "invalid_device", "invalid device"]) {
        "no such GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"
    } else if says(&["no_binary", "no kernel image", "ptx", "invalid_image", "not_found"]) {
        "this build has no code for that GPU: build with its CUDA_COMPUTE_CAP, or use --device cpu"
    } else if says(&["out_of_memory", "out of memory"]) {
        "other programs hold the GPU's memory: see nvidia-smi, or use --device cpu"
    } else {
        "check the driver with nvidia-smi, or use --device cpu"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_shown() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        for text in ["", "gpu", "cuda:", "cuda:-1", "CUDA"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_drivers_words_lead_to_a_way_out() {
        for (reason, word) in [
            ("DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device\")", "VISIBLE"),
            ("DriverError(CUDA_ERROR_INVALID_DEVICE)", "VISIBLE"),
            ("CUDA_ERROR_NO_BINARY_FOR_GPU", "COMPUTE_CAP"),
            ("the provided PTX was compiled with an unsupported toolchain", "COMPUTE_CAP"),
            ("CUDA_ERROR_OUT_OF_MEMORY", "other programs"),
            ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "driver"),
        ] {
            assert!(hint(reason).contains(word) && hint(reason).contains("--device cpu"));
        }
        assert!(probe(&TensorDevice::Cpu).is_ok());
    }

    #[test]
    fn a_device_that_cannot_be_opened_says_why() {
        assert!(Device::Cpu.open().unwrap().is_cpu());
        if !Device::CUDA_BUILT {
            let message = Device::Cuda(1).open().unwrap_err().to_string();
            assert!(message.contains("cuda:1") && message.contains("--device cpu"), "{message}");
        }
    }
}
