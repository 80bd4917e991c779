//! Pictures as tensors in −1..1, and back.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::sizes::Size;
use crate::error::{Error, Result};

/// A picture as `[1, 3, h, w]` in −1..1, `f32`: `2 · (x / 255) − 1`, in the order of diffusers'
/// [`VaeImageProcessor`](https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/image_processor.py).
///
/// # Errors
/// A failure of the device.
pub fn tensor_from_rgb(picture: &RgbImage, device: &Device) -> Result<Tensor> {
    let of_level: Vec<f32> = (0..=255_u8).map(|x| 2.0 * (f32::from(x) / 255.0) - 1.0).collect();
    let (pixels, _) = picture.as_raw().as_chunks::<3>();
    let mut values = Vec::with_capacity(3 * pixels.len());
    for channel in 0..3 {
        values.extend(pixels.iter().map(|pixel| of_level[usize::from(pixel[channel])]));
    }
    let Size { width, height } = Size::of(picture);
    Ok(Tensor::from_vec(values, (1, 3, height as usize, width as usize), device)?) // (1, c, h, w)
}

/// A picture from `[1, 3, h, w]` or `[3, h, w]` in −1..1: `clamp(x · 0.5 + 0.5, 0, 1) · 255`,
/// halves rounded to even, in `f32` as diffusers' `numpy_to_pil` does.
///
/// # Errors
/// [`Error::NotFinite`] under the name `stage` when a value is NaN or infinite; another shape.
pub fn rgb_from_tensor(tensor: &Tensor, stage: &'static str) -> Result<RgbImage> {
    let tensor = if tensor.rank() == 4 { tensor.squeeze(0)? } else { tensor.clone() };
    let (channels, height, width) = tensor.dims3()?;
    let not_rgb = || Error::field("tensor", format!("{:?}", tensor.dims()), "[3, height, width]");
    let size = match (channels, u32::try_from(width), u32::try_from(height)) {
        (3, Ok(width), Ok(height)) if width > 0 && height > 0 => Size { width, height },
        _ => return Err(not_rgb()),
    };
    let values: Vec<f32> = tensor
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .permute((1, 2, 0))? // (h, w, c)
        .flatten_all()?
        .to_vec1()?;
    let count = values.iter().filter(|value| !value.is_finite()).count();
    if count > 0 {
        let hint = "a wider dtype (--dtype f32) helps where half precision overflows; otherwise check the model's files";
        return Err(Error::NotFinite { stage, count, total: values.len(), hint });
    }
    let levels = values.into_iter().map(level).collect();
    RgbImage::from_raw(size.width, size.height, levels).ok_or_else(not_rgb)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn level(value: f32) -> u8 {
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
