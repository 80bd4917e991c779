//! Resampling of 8-bit pictures, equal to Pillow and to torch bit by bit.
//!
//! Both work in two passes with an 8-bit picture in between and weights in fixed point. They differ
//! in how many bits a weight has: 22 after the point in Pillow, and in torch as many as let the
//! largest weight fit into 16 bits; and in the order of the passes. Crates have 16-bit weights and
//! one order, and are off by a level or, where a picture is clipped between the passes, by more.

use image::{GrayImage, ImageBuffer, Pixel, RgbImage};
use rayon::prelude::*;

use super::sizes::Size;
use crate::{
    error::{Error, Result},
    progress::CancelToken,
};

/// How a picture is resampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// Pillow's `LANCZOS`: a sinc windowed to three lobes.
    Lanczos3,
    /// Pillow's `BICUBIC`: a cubic with a = −0.5.
    Bicubic,
    /// What `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` makes of a `uint8`
    /// tensor: the same cubic with weights of 16 bits.
    BicubicTorch,
}

/// Bits after the point of Pillow's weights: 32 less 8 for the picture and 2 for overshoot.
const PILLOW_WEIGHT_BITS: u32 = 32 - 8 - 2;
/// A weight of torch stays below this.
const TORCH_WEIGHT_MAX: f64 = 32768.0;
/// Longest side that is resampled, in pixels.
const SIDE_PX_MAX: u32 = 1 << 20;

/// Resamples a picture to `width` × `height`; the same size is an unchanged copy.
///
/// Equal to [Pillow's `ImagingResample`](https://github.com/python-pillow/Pillow/blob/13.0.0/src/libImaging/Resample.c)
/// or, with [`Filter::BicubicTorch`], to
/// [torch's `uint8` kernel](https://github.com/pytorch/pytorch/blob/v2.8.0/aten/src/ATen/native/cpu/UpSampleKernel.cpp).
///
/// # Errors
/// A side of zero or of more than 2²⁰ px.
pub fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> Result<RgbImage> {
    resize_unless(picture, Size { width, height }, filter, &CancelToken::new())
}

/// [`resize`], which stops between two rows when `cancel` says so; no memory is taken before it is
/// first looked at.
///
/// # Errors
/// As [`resize`], and cancellation.
pub fn resize_unless(
    picture: &RgbImage,
    to: Size,
    filter: Filter,
    cancel: &CancelToken,
) -> Result<RgbImage> {
    resize_channels::<image::Rgb<u8>, 3>(picture, to, filter, cancel)
}

/// Resamples a mask or an alpha channel like [`resize`].
///
/// # Errors
/// A side of zero or of more than 2²⁰ px.
pub fn resize_gray(
    picture: &GrayImage,
    width: u32,
    height: u32,
    filter: Filter,
) -> Result<GrayImage> {
    let to = Size { width, height };
    resize_channels::<image::Luma<u8>, 1>(picture, to, filter, &CancelToken::new())
}

type Buffer<P> = ImageBuffer<P, Vec<u8>>;

fn resize_channels<P: Pixel<Subpixel = u8>, const C: usize>(
    picture: &Buffer<P>,
    to: Size,
    filter: Filter,
    cancel: &CancelToken,
) -> Result<Buffer<P>> {
    let from = Size { width: picture.width(), height: picture.height() };
    for size in [from, to] {
        if !(1..=SIDE_PX_MAX).contains(&size.width) || !(1..=SIDE_PX_MAX).contains(&size.height) {
            return Err(Error::field("size", size, format!("sides of 1 to {SIDE_PX_MAX} px")));
        }
    }
    cancel.check()?;
    let rows = |pixels: Vec<u8>| match from.width == to.width {
        true => pixels,
        false => {
            let weights = Weights::new(from.width, to.width, filter);
            along_rows::<C>(&pixels, from.width as usize, &weights, cancel)
        }
    };
    let columns = |pixels: Vec<u8>, width: u32| match from.height == to.height {
        true => pixels,
        false => {
            let weights = Weights::new(from.height, to.height, filter);
            along_columns(&pixels, width as usize * C, &weights, cancel)
        }
    };
    let pixels = picture.as_raw().clone();
    let between = |pixels: Vec<u8>| cancel.check().map(|()| pixels);
    let pixels = if columns_first(from, to, filter) {
        rows(between(columns(pixels, from.width))?)
    } else {
        columns(between(rows(pixels))?, to.width)
    };
    cancel.check()?;
    ImageBuffer::from_raw(to.width, to.height, pixels)
        .ok_or_else(|| Error::field("size", to, "a picture that fits into memory"))
}

/// Pillow begins with the columns when that saves work: the height loses more than twice as many
/// pixels as the width (since Pillow 13; before, it always began with the rows, as torch does).
fn columns_first(from: Size, to: Size, filter: Filter) -> bool {
    let lost_w = i64::from(from.width) - i64::from(to.width);
    let lost_h = i64::from(from.height) - i64::from(to.height);
    filter != Filter::BicubicTorch && lost_h > 0 && lost_h > 2 * lost_w
}

/// The weights of one pass: for each output the inputs it is made of.
struct Weights {
    /// Per output: the first input, and where its weights are in `values`.
    spans: Vec<(usize, std::ops::Range<usize>)>,
    values: Vec<i32>,
    /// Bits after the point.
    bits: u32,
}

impl Weights {
    fn new(from_px: u32, to_px: u32, filter: Filter) -> Self {
        let scale = f64::from(from_px) / f64::from(to_px);
        let (kernel, radius): (fn(f64) -> f64, f64) = match filter {
            Filter::Lanczos3 => (lanczos3, 3.0),
            Filter::Bicubic | Filter::BicubicTorch => (bicubic, 2.0),
        };
        let stretch = scale.max(1.0);
        let support = radius * stretch;
        let mut spans = Vec::with_capacity(to_px as usize);
        let mut exact: Vec<f64> = Vec::new();
        for output in 0..to_px {
            let centre = (f64::from(output) + 0.5) * scale;
            let first = index(centre - support + 0.5, from_px);
            let end = index(centre + support + 0.5, from_px);
            let begin = exact.len();
            exact.extend(
                (first..end)
                    .map(|input| kernel((f64::from(input) - centre + 0.5) * (1.0 / stretch))),
            );
            let sum: f64 = exact[begin..].iter().sum();
            if sum != 0.0 {
                exact[begin..].iter_mut().for_each(|weight| *weight /= sum);
            }
            spans.push((first as usize, begin..exact.len()));
        }
        let bits = match filter {
            Filter::Lanczos3 | Filter::Bicubic => PILLOW_WEIGHT_BITS,
            Filter::BicubicTorch => torch_bits(&exact),
        };
        let one = f64::from(1_u32 << bits);
        let values = exact.iter().map(|weight| fixed(weight * one)).collect();
        Self { spans, values, bits }
    }

    fn each(&self) -> impl IndexedParallelIterator<Item = (usize, &[i32])> {
        self.spans.par_iter().map(|(first, span)| (*first, &self.values[span.clone()]))
    }

    /// Half a level, so that the shift rounds.
    fn half(&self) -> i32 {
        1 << (self.bits - 1)
    }
}

/// As many bits after the point as let the largest weight stay below 2¹⁵, at most 22.
fn torch_bits(weights: &[f64]) -> u32 {
    let largest = weights.iter().fold(0.0_f64, |max, &weight| max.max(weight));
    (0..PILLOW_WEIGHT_BITS)
        .find(|bits| (0.5 + largest * f64::from(1_u32 << (bits + 1))).floor() >= TORCH_WEIGHT_MAX)
        .unwrap_or(PILLOW_WEIGHT_BITS)
}

/// Towards zero, kept between 0 and `end`.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn index(position: f64, end: u32) -> u32 {
    position.clamp(0.0, f64::from(end)) as u32
}

/// Rounds half away from zero.
#[expect(clippy::cast_possible_truncation, reason = "weights are below 2 and have 22 bits")]
fn fixed(weight: f64) -> i32 {
    (weight + 0.5_f64.copysign(weight)) as i32
}

/// `[rows, from, C]` → `[rows, to, C]`; rows that come after a cancellation are left black.
fn along_rows<const C: usize>(
    pixels: &[u8],
    from_px: usize,
    weights: &Weights,
    cancel: &CancelToken,
) -> Vec<u8> {
    let to_px = weights.spans.len();
    let rows = pixels.len().checked_div(from_px * C).unwrap_or(0);
    let mut out = vec![0; rows * to_px * C];
    let rows = out.par_chunks_exact_mut(to_px * C).zip(pixels.par_chunks_exact(from_px * C));
    rows.filter(|_| !cancel.is_cancelled()).for_each(|(out_row, row)| {
        let outputs = out_row.as_chunks_mut::<C>().0.iter_mut();
        let inputs = row.as_chunks::<C>().0;
        for (output, (first, span)) in outputs.zip(&weights.spans) {
            let mut sums = [weights.half(); C];
            for (weight, input) in weights.values[span.clone()].iter().zip(&inputs[*first..]) {
                for channel in 0..C {
                    sums[channel] += weight * i32::from(input[channel]);
                }
            }
            *output = sums.map(|sum| level(sum >> weights.bits));
        }
    });
    out
}

/// `[from, row]` → `[to, row]`; rows that come after a cancellation are left black.
fn along_columns(pixels: &[u8], row: usize, weights: &Weights, cancel: &CancelToken) -> Vec<u8> {
    let mut out = vec![0; weights.spans.len() * row];
    let rows = out.par_chunks_exact_mut(row).zip(weights.each());
    rows.filter(|_| !cancel.is_cancelled()).for_each_init(
        || vec![0_i32; row],
        |sums, (out_row, (first, values))| {
            sums.fill(weights.half());
            for (weight, line) in values.iter().zip(pixels[first * row..].chunks_exact(row)) {
                for (sum, &value) in sums.iter_mut().zip(line) {
                    *sum += weight * i32::from(value);
                }
            }
            for (output, sum) in out_row.iter_mut().zip(sums) {
                *output = level(*sum >> weights.bits);
            }
        },
    );
    out
}

#[expect(clippy::cast_sign_loss, reason = "clamped before")]
fn level(value: i32) -> u8 {
    value.clamp(0, 255) as u8
}

fn lanczos3(x: f64) -> f64 {
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let angle = x * std::f64::consts::PI;
    angle.sin() / angle
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::AtomicBool};

    use super::*;

    /// A picture of another size each way, in whichever order the passes come.
    const WAYS: [(Size, Filter); 3] = [
        (Size { width: 40, height: 3 }, Filter::Lanczos3),
        (Size { width: 3, height: 40 }, Filter::Bicubic),
        (Size { width: 40, height: 40 }, Filter::BicubicTorch),
    ];

    #[test]
    fn a_cancelled_resize_is_an_error_and_takes_no_memory() {
        let picture = RgbImage::new(16, 16);
        let cancel = CancelToken::from_flag(Arc::new(AtomicBool::new(true)));
        for (to, filter) in WAYS {
            let stopped = resize_unless(&picture, to, filter, &cancel);
            assert!(matches!(stopped, Err(Error::Cancelled)));
        }
        // A terabyte: room for it would be asked for before the first row.
        let huge = Size { width: SIDE_PX_MAX, height: SIDE_PX_MAX };
        let stopped = resize_unless(&picture, huge, Filter::Lanczos3, &cancel);
        assert!(matches!(stopped, Err(Error::Cancelled)));
    }

    #[test]
    fn rows_after_a_cancellation_are_not_computed() {
        let white = vec![255; 16 * 16 * 3];
        let weights = Weights::new(16, 32, Filter::Bicubic);
        let cancel = CancelToken::new();
        assert!(along_rows::<3>(&white, 16, &weights, &cancel).iter().all(|x| *x == 255));
        assert!(along_columns(&white, 48, &weights, &cancel).iter().all(|x| *x == 255));
        cancel.cancel();
        assert!(along_rows::<3>(&white, 16, &weights, &cancel).iter().all(|x| *x == 0));
        assert!(along_columns(&white, 48, &weights, &cancel).iter().all(|x| *x == 0));
    }
}
