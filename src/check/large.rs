//! Sizes whose scores would be more than 2³¹, where 32-bit offsets would wrap: sampled rows against
//! float64.

use candle_core::{DType, Device, Result, Tensor};

use super::report::{Finding, Row};
use crate::ops::{JointShape, JointStream, joint_attention};

/// Text and picture tokens, heads and their width, batch: 4.7e9 scores.
const TEXT: usize = 400;
const IMAGE: usize = 9500;
const HEADS: usize = 24;
const WIDTH: usize = 128;
const BATCH: usize = 2;
/// Rows that are computed in float64.
const SAMPLES: usize = 48;

pub(super) fn check(device: &Device, shrink: usize) -> Vec<Row> {
    let small = |n: usize| n.div_ceil(shrink.max(1));
    let (text, image) = (small(TEXT), small(IMAGE));
    let heads = small(HEADS);
    let scores = BATCH * heads * (text + image).pow(2);
    let finding =
        joint(device, [text, image, heads]).unwrap_or_else(|error| Finding::failed(&error));
    vec![Row { part: "large".into(), name: format!("joint attention, {scores} scores"), finding }]
}

/// The largest error of the sampled rows, and what rounding to bf16 explains.
fn joint(device: &Device, [text, image, heads]: [usize; 3]) -> Result<Finding> {
    let random = |n: usize| {
        let x = Tensor::randn(0.0_f32, 1.0, (BATCH, n, heads, WIDTH), device)?;
        x.to_dtype(DType::BF16)
    };
    let ones = Tensor::ones(WIDTH, DType::BF16, device)?;
    let angles = |n: usize| -> Result<[Tensor; 2]> {
        let half = WIDTH >> 1;
        Ok([
            Tensor::ones((n, half), DType::F32, device)?,
            Tensor::zeros((n, half), DType::F32, device)?,
        ])
    };
    let all = [text, image]
        .map(|n| -> Result<_> { Ok(([random(n)?, random(n)?, random(n)?], angles(n)?)) });
    let [text, image] = all;
    let (text, image) = (text?, image?);
    /// Sharper than `1 / sqrt(d)`, so that rows differ.
    const SCALE: f32 = 0.3;
    let shape = JointShape { scale: SCALE, eps: 1e-6, text_lengths: None };
    let out = joint_attention(&stream(&text, &ones), &stream(&image, &ones), shape)?;
    let Some(found) = out.image else { candle_core::bail!("no output of the picture") };

    let n = found.dim(1)?;
    let (mut worst, mut largest) = (0.0_f64, 0.0_f64);
    for sample in 0..SAMPLES {
        // The last rows of the last heads lie farthest.
        let (b, head) = (sample % BATCH, heads - 1 - (sample * 7) % heads);
        let row = n - 1 - (sample * 509) % n;
        let of = |x: &Tensor| -> Result<Tensor> {
            x.get(b)?
                .narrow(1, head, 1)?
                .squeeze(1)?
                .contiguous()?
                .to_device(&Device::Cpu)?
                .to_dtype(DType::F64)
        };
        let both = |i: usize| Tensor::cat(&[of(&text.0[i])?, of(&image.0[i])?], 0); // (tokens, d)
        let query = normalised(&of(&image.0[0].narrow(1, row, 1)?)?)?; // (1, d)
        let scores = (query.matmul(&normalised(&both(1)?)?.t()?)? * f64::from(SCALE))?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
        let expected = weights.matmul(&both(2)?)?.flatten_all()?.to_vec1::<f64>()?;
        let found = of(&found.narrow(1, row, 1)?)?.flatten_all()?.to_vec1::<f64>()?;
        for (found, expected) in found.iter().zip(&expected) {
            let error = (found - expected).abs();
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
            largest = largest.max(expected.abs());
        }
    }
    /// Queries, keys, weights and the result are each rounded to eight bits.
    const ROUNDING: f64 = 4.0 / 256.0;
    Ok(Finding::Checked { value: worst, limit: ROUNDING * largest.max(0.1) })
}

/// Query, key and value, and the angles' cosines and sines.
type Inputs = ([Tensor; 3], [Tensor; 2]);

fn stream<'a>(([query, key, value], [cos, sin]): &'a Inputs, norm: &'a Tensor) -> JointStream<'a> {
    JointStream { query: Some(query), key, value, norm_query: norm, norm_key: norm, cos, sin }
}

/// Rows of `[n, d]` divided by the root of their mean square.
fn normalised(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(1)? + 1e-6)?.sqrt()?)
}
