//! Whether what one model frees is what the next one takes, by the memory pool's own counters.

use candle_core::Device;

use super::report::{Finding, Row};

pub(super) fn check(device: &Device) -> Vec<Row> {
    let name = "a second model takes what the first one freed".to_owned();
    let finding = finding(device).unwrap_or_else(|error| Finding::failed(&error));
    vec![Row { part: "memory", name, finding }]
}

/// The growth of what is taken from the driver when as much is allocated again, in bytes.
#[cfg(feature = "cuda")]
fn finding(device: &Device) -> candle_core::Result<Finding> {
    use candle_core::{DType, Tensor};

    use crate::ops::cuda::{keep_freed_memory, pool_counters};

    /// One tensor of a model, and their number: a gigabyte together.
    const BYTES: usize = 16 << 20;
    const TENSORS: usize = 64;
    let Device::Cuda(cuda) = device else {
        return Ok(Finding::LeftOut("there is no memory pool on the CPU".to_owned()));
    };
    keep_freed_memory(cuda)?;
    let model = || (0..TENSORS).map(|_| Tensor::zeros(BYTES, DType::U8, device));
    let first = model().collect::<candle_core::Result<Vec<_>>>()?;
    let with_first = pool_counters(cuda)?;
    drop(first);
    let second = model().collect::<candle_core::Result<Vec<_>>>()?;
    let with_second = pool_counters(cuda)?;
    drop(second);
    let grown = with_second.reserved[0].saturating_sub(with_first.reserved[0]);
    #[expect(clippy::cast_precision_loss, reason = "some bytes")]
    let value = grown as f64;
    Ok(Finding::Checked { value, limit: 0.0 })
}

#[cfg(not(feature = "cuda"))]
fn finding(_device: &Device) -> candle_core::Result<Finding> {
    Ok(Finding::LeftOut("there is no memory pool on the CPU".to_owned()))
}
