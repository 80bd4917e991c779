//! Which device computes.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device as TensorDevice};

use super::DeviceFault;
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
        Ok(self.open_noting()?.0)
    }

    /// As [`Self::open`], and why [`Device::Auto`] is not a GPU in a build that could use one.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_noting(self) -> Result<(TensorDevice, Option<String>)> {
        match self {
            Self::Cpu => Ok((TensorDevice::Cpu, None)),
            Self::Cuda(index) => Ok((open_cuda(index)?, None)),
            Self::Auto if !Self::CUDA_BUILT => Ok((TensorDevice::Cpu, None)),
            Self::Auto => match open_cuda(0) {
                Ok(device) => Ok((device, None)),
                Err(error) => {
                    let error = error.to_string();
                    let reason = error.lines().next().unwrap_or_default();
                    let note = format!("the CPU computes: {reason}");
                    Ok((TensorDevice::Cpu, Some(note)))
                }
            },
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
    let opened = cuda_device(index).and_then(|device| probe(&device).map(|()| device));
    opened.map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().next().unwrap_or_default();
        let what = format!("device cuda:{index}: {reason}{}", driver());
        unsupported(what, DeviceFault::of(reason).hint())
    })
}

/// A CUDA device on one stream for all threads.
///
/// # Errors
/// A build without CUDA, no such device, or no driver.
pub(crate) fn cuda_device(index: usize) -> candle_core::Result<TensorDevice> {
    #[cfg(feature = "cuda")]
    return super::cuda::open(index);
    #[cfg(not(feature = "cuda"))]
    TensorDevice::new_cuda(index)
}

/// Which CUDA the driver is for, where there is a driver that says so.
fn driver() -> String {
    #[cfg(feature = "cuda")]
    if let Some((major, minor)) = super::cuda::driver_version() {
        return format!(" (the driver is for CUDA {major}.{minor})");
    }
    String::new()
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
        assert!(probe(&TensorDevice::Cpu).is_ok());
        let (device, note) = Device::Auto.open_noting().unwrap();
        assert_eq!(note.is_some(), Device::CUDA_BUILT && device.is_cpu());
        if !Device::CUDA_BUILT {
            let message = Device::Cuda(1).open().unwrap_err().to_string();
            assert!(message.contains("cuda:1") && message.contains("--device cpu"), "{message}");
        }
    }
}
