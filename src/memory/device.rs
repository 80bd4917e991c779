//! Which device computes.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device as TensorDevice};

use crate::error::{Error, RequestError, Result};

/// The device of the computation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The first CUDA device where this build and the machine have one, else the CPU.
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
    TensorDevice::new_cuda(index).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default();
        let hint = "check the driver with nvidia-smi, or use --device cpu";
        unsupported(format!("device cuda:{index}: {reason}"), hint)
    })
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
    fn a_device_that_cannot_be_opened_says_why() {
        assert!(Device::Cpu.open().unwrap().is_cpu());
        if !Device::CUDA_BUILT {
            let message = Device::Cuda(1).open().unwrap_err().to_string();
            assert!(message.contains("cuda:1") && message.contains("--device cpu"), "{message}");
        }
    }
}
