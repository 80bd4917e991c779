//! Values that are no numbers are told where they arise, not seen in a picture.

use candle_core::{DType, Tensor};

use crate::{
    error::{Error, Result},
    ops,
    progress::Stage,
};

/// Refuses what `stage` made if it holds NaN or infinity. `x: [.., n, c]`.
///
/// # Errors
/// [`Error::NotFinite`] with the stage, or a failure of the device.
pub(crate) fn require_finite(x: &Tensor, stage: Stage) -> Result<()> {
    // Far fewer numbers are read back from a device.
    let sums = ops::row_sizes(x)?.to_vec1::<f32>()?;
    if sums.iter().all(|sum| sum.is_finite()) {
        return Ok(());
    }
    let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let count = values.iter().filter(|value| !value.is_finite()).count();
    if count == 0 {
        return Ok(()); // large, but finite
    }
    Err(Error::NotFinite {
        stage: stage.label(),
        count,
        total: values.len(),
        hint: "the weights may be damaged; a wider type of the computation may help, too",
    })
}
