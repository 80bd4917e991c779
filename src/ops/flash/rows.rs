//! A few queries, as when one token is generated at a time: keys and values are read where they
//! lie, and registers run along the head's dimensions.

use pulp::{Simd, WithSimd};

use super::{Inputs, Scratch, Span};
use crate::ops::simd::{math, tiles::Tile};

/// Keys whose scores are held at a time.
const KEYS: usize = 256;
/// Registers of values summed at a time.
const VECTORS: usize = 8;

pub(super) struct Rows<'a, 't> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) span: Span,
    pub(super) scratch: &'a mut Scratch,
    pub(super) tile: &'a mut Tile<'t>,
}

impl WithSimd for Rows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { inputs, span, scratch, tile } = self;
        let (group, dim) = (inputs.group, inputs.dim);
        let rows = span.queries.len() * group;
        let width = dim.next_multiple_of(S::F32_LANES);
        scratch.state.clear();
        scratch.state.resize(rows, f32::NEG_INFINITY);
        scratch.sums.clear();
        scratch.sums.resize(rows * (width + 1), 0.0);
        scratch.scores.resize(KEYS, 0.0);
        for start in span.keys.clone().step_by(KEYS) {
            for row in 0..rows {
                let token = span.queries.start + row.checked_div(group).unwrap_or(0);
                let end = span.keys_end(token).min(start + KEYS);
                if end <= start {
                    continue;
                }
                let q = inputs.q.row(span.batch, token, span.head_kv * group + row % group);
                let scores = &mut scratch.scores[..end - start];
                for (score, key) in scores.iter_mut().zip(start..) {
                    let key = inputs.k.row(span.batch, key, span.head_kv);
                    *score = inputs.scale * dot(simd, q, key);
                }
                let (sum, out) = scratch.sums[row * (width + 1)..][..=width].split_at_mut(1);
                let rescale = weights(simd, scores, &mut scratch.state[row], &mut sum[0]);
                let value = |i: usize| inputs.v.row(span.batch, start + i, span.head_kv);
                add_values(simd, out, rescale, scores, value);
            }
        }
        for row in 0..rows {
            let token = row.checked_div(group).unwrap_or(0);
            let token = span.queries.start + token - tile.rows.start;
            let (sum, sums) = scratch.sums[row * (width + 1)..][..=width].split_at(1);
            let out = &mut tile.row(token)[row % group * dim..][..dim];
            out.iter_mut().zip(sums).for_each(|(out, x)| *out = *x / sum[0]);
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = S::as_simd_f32s(a);
    let (b, b_rest) = S::as_simd_f32s(b);
    let zero = simd.splat_f32s(0.0);
    let mut sums = [zero; 4];
    let (a_fours, a_left) = pulp::as_arrays::<4, _>(a);
    let (b_fours, b_left) = pulp::as_arrays::<4, _>(b);
    for (a, b) in a_fours.iter().zip(b_fours) {
        for i in 0..4 {
            sums[i] = simd.mul_add_e_f32s(a[i], b[i], sums[i]);
        }
    }
    for (a, b) in a_left.iter().zip(b_left) {
        sums[0] = simd.mul_add_e_f32s(*a, *b, sums[0]);
    }
    let (a, b) = (simd.partial_load_f32s(a_rest), simd.partial_load_f32s(b_rest));
    sums[1] = simd.mul_add_e_f32s(a, b, sums[1]);
    let sums = [simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3])];
    simd.reduce_sum_f32s(simd.add_f32s(sums[0], sums[1]))
}

/// Replaces scores by weights relative to the largest so far; returns what earlier sums are to be
/// multiplied with.
#[inline(always)]
fn weights<S: Simd>(simd: S, scores: &mut [f32], max: &mut f32, sum: &mut f32) -> f32 {
    let old = *max;
    *max = scores.iter().fold(old, |max, x| max.max(*x));
    let reference = if *max < f32::MIN { 0.0 } else { *max };
    let rescale = (old - reference).exp();
    let minus = simd.splat_f32s(-reference);
    let (whole, rest) = S::as_mut_simd_f32s(scores);
    let mut sums = simd.splat_f32s(0.0);
    for score in whole {
        *score = math::exp(simd, simd.add_f32s(*score, minus));
        sums = simd.add_f32s(sums, *score);
    }
    let mut tail = 0.0;
    for score in rest {
        *score = (*score - reference).exp();
        tail += *score;
    }
    *sum = *sum * rescale + simd.reduce_sum_f32s(sums) + tail;
    rescale
}

/// `out = out · rescale + Σ weight · value`.
#[inline(always)]
fn add_values<'a, S: Simd>(
    simd: S,
    out: &mut [f32],
    rescale: f32,
    weights: &[f32],
    value: impl Fn(usize) -> &'a [f32],
) {
    let rescale = simd.splat_f32s(rescale);
    let lanes = S::F32_LANES;
    let out = S::as_mut_simd_f32s(out).0;
    for (block, out) in out.chunks_mut(VECTORS).enumerate() {
        let first = block * VECTORS * lanes;
        let mut sums = [simd.splat_f32s(0.0); VECTORS];
        for (i, weight) in weights.iter().enumerate() {
            let weight = simd.splat_f32s(*weight);
            let value = &value(i)[first..];
            let (whole, rest) = S::as_simd_f32s(value);
            if out.len() == VECTORS && whole.len() >= VECTORS {
                for (sum, value) in sums.iter_mut().zip(whole) {
                    *sum = simd.mul_add_e_f32s(weight, *value, *sum);
                }
                continue;
            }
            let count = whole.len().min(out.len());
            for i in 0..count {
                sums[i] = simd.mul_add_e_f32s(weight, whole[i], sums[i]);
            }
            if count < out.len() && count < VECTORS {
                let rest = simd.partial_load_f32s(rest);
                sums[count] = simd.mul_add_e_f32s(weight, rest, sums[count]);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = simd.mul_add_e_f32s(*out, rescale, sum);
        }
    }
}
