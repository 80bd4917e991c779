//! Whether what one model frees is what the next one takes, by the memory pool's own counters.

use candle_core::Device;

use super::report::{Finding, Row};

pub(super) fn check(device: &Device) -> Vec<Row> {
    let name = "a second model takes what the first one freed".to_owned();
    let finding = finding(device).unwrap_or_else(|error| Finding::failed(&error));
    vec![Row { part: "memory".into(), name, finding }]
}

/// The growth of what is taken from the driver when as much is allocated again, in bytes.
#[cfg(feature = "cuda")]
fn finding(device: &Device) -> crate::error::Result<Finding> {
    use candle_core::{DType, Tensor};

    use crate::memory::{CudaPool, Pool as _};

    /// One tensor of a model, and their number: a gigabyte together.
    const BYTES: usize = 16 << 20;
    const TENSORS: usize = 64;
    let Device::Cuda(cuda) = device else {
        return Ok(Finding::LeftOut("there is no memory pool on the CPU".to_owned()));
    };
    let pool = CudaPool::new(cuda)?;
    let model = || (0..TENSORS).map(|_| Tensor::zeros(BYTES, DType::U8, device));
    let reserved = || -> crate::error::Result<u64> {
        let _held = model().collect::<candle_core::Result<Vec<_>>>()?;
        device.synchronize()?;
        Ok(pool.usage().reserved)
    };
    let (first, second) = (reserved()?, reserved()?);
    #[expect(clippy::cast_precision_loss, reason = "some bytes")]
    let value = second.saturating_sub(first) as f64;
    Ok(Finding::Checked { value, limit: 0.0 })
}

#[cfg(not(feature = "cuda"))]
fn finding(_device: &Device) -> crate::error::Result<Finding> {
    Ok(Finding::LeftOut("there is no memory pool on the CPU".to_owned()))
}
