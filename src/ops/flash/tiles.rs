//! Many queries: registers hold queries across and keys (or the head's dimensions) down, so that
//! the running maximum and sum are plain vectors.

use pulp::{Simd, WithSimd, as_arrays_mut};

use super::{Inputs, Scratch, Span};
use crate::ops::simd::{
    math,
    product::{self, VECTORS},
    tiles::Tile,
};

/// Keys whose scores are held at a time.
const KEYS: usize = 128;

pub(super) struct Tiles<'a, 't> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) span: Span,
    pub(super) scratch: &'a mut Scratch,
    pub(super) tile: &'a mut Tile<'t>,
}

impl WithSimd for Tiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.pack_keys_and_values::<S>();
        let rows = self.span.queries.len() * self.inputs.group;
        let full = self.inputs.shape.columns();
        for first in (0..rows).step_by(full) {
            let count = full.min(rows - first);
            let one = self.inputs.shape.vectors(count) == 1;
            if const { product::rows_of::<S>() == 8 } {
                match one {
                    true => self.query_tile::<S, 8, 1>(simd, first, count),
                    false => self.query_tile::<S, 8, VECTORS>(simd, first, count),
                }
            } else {
                match one {
                    true => self.query_tile::<S, 4, 1>(simd, first, count),
                    false => self.query_tile::<S, 4, VECTORS>(simd, first, count),
                }
            }
        }
    }
}

impl Tiles<'_, '_> {
    /// Keys as `[tile of keys][dim][key]`, values as `[tile of dims][key][dim]`.
    #[inline(always)]
    fn pack_keys_and_values<S: Simd>(&mut self) {
        let (rows, dim) = (product::rows_of::<S>(), self.inputs.dim);
        let keys = self.span.keys.clone();
        let count = keys.len();
        let zeros = |buffer: &mut Vec<f32>, len: usize| {
            buffer.clear();
            buffer.resize(len, 0.0);
        };
        zeros(&mut self.scratch.keys, count.next_multiple_of(rows) * dim);
        zeros(&mut self.scratch.values, count * dim.next_multiple_of(rows));
        for (i, token) in keys.enumerate() {
            let row = self.inputs.k.row(self.span.batch, token, self.span.head_kv);
            let (tile, lane) = (i - i % rows, i % rows);
            let packed = self.scratch.keys[tile * dim + lane..].iter_mut().step_by(rows);
            packed.zip(row).for_each(|(packed, x)| *packed = *x);
            let row = self.inputs.v.row(self.span.batch, token, self.span.head_kv);
            for (tile, x) in row.chunks(rows).enumerate() {
                let start = (tile * count + i) * rows;
                self.scratch.values[start..start + x.len()].copy_from_slice(x);
            }
        }
    }

    /// The token and the query head of row `row`.
    #[inline(always)]
    fn place(&self, row: usize) -> (usize, usize) {
        let group = self.inputs.group;
        let token = row.checked_div(group).unwrap_or(0);
        (self.span.queries.start + token, row % group)
    }

    #[inline(always)]
    fn query_tile<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        first: usize,
        count: usize,
    ) {
        let (columns, dim) = (V * S::F32_LANES, self.inputs.dim);
        self.load_queries(first, count, columns);
        let sums_len = dim.next_multiple_of(R) * columns;
        self.scratch.sums.clear();
        self.scratch.sums.resize(sums_len, 0.0);
        self.scratch.scores.resize(KEYS.next_multiple_of(R) * columns, 0.0);
        let mut running = Running::<S, V> {
            max: [simd.splat_f32s(f32::NEG_INFINITY); V],
            sum: [simd.splat_f32s(0.0); V],
        };
        let log2_scale = self.inputs.scale.abs() * std::f32::consts::LOG2_E;
        let keys = self.span.keys.clone();
        let first_end = self.span.keys_end(self.place(first).0);
        let last_end = self.span.keys_end(self.place(first + count - 1).0);
        for start in (keys.start..last_end).step_by(KEYS) {
            let end = last_end.min(start + KEYS);
            self.scores::<S, R, V>(simd, start - keys.start, end - start);
            if end > first_end {
                self.hide_later_keys(first, count, start, end - start, columns);
            }
            let scores = &mut self.scratch.scores[..(end - start) * columns];
            let rescale = running.update(simd, scores, log2_scale);
            self.add_values::<S, R, V>(simd, start - keys.start, end - start, rescale);
        }
        self.store::<S, V>(simd, first, count, running.sum);
    }

    /// Queries as `[dim][row]`; the sign of the scale goes with them.
    #[inline(always)]
    fn load_queries(&mut self, first: usize, count: usize, columns: usize) {
        self.scratch.queries.clear();
        self.scratch.queries.resize(self.inputs.dim * columns, 0.0);
        let sign = 1.0_f32.copysign(self.inputs.scale);
        for lane in 0..count {
            let (token, head) = self.place(first + lane);
            let head = self.span.head_kv * self.inputs.group + head;
            let row = self.inputs.q.row(self.span.batch, token, head);
            let packed = self.scratch.queries[lane..].iter_mut().step_by(columns);
            packed.zip(row).for_each(|(packed, x)| *packed = sign * *x);
        }
    }

    /// `scores[key][row] = k · q` for `count` keys.
    #[inline(always)]
    fn scores<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        first: usize,
        count: usize,
    ) {
        let dim = self.inputs.dim;
        let columns = V * S::F32_LANES;
        let scores = self.scratch.scores.chunks_exact_mut(R * columns);
        let tiles = self.scratch.keys[first * dim..].chunks_exact(R * dim);
        for (scores, keys) in scores.zip(tiles).take(count.div_ceil(R)) {
            let sums = product::tile::<S, R, V>(simd, keys, &self.scratch.queries);
            for (scores, sums) in scores.chunks_exact_mut(columns).zip(sums) {
                product::update_row(simd, sums, scores, product::Store);
            }
        }
    }

    /// Minus infinity where a row's query stands before the key.
    #[inline(always)]
    fn hide_later_keys(
        &mut self,
        first: usize,
        rows: usize,
        start: usize,
        count: usize,
        columns: usize,
    ) {
        for lane in 0..rows {
            let end = self.span.keys_end(self.place(first + lane).0);
            let hidden = end.saturating_sub(start)..count;
            for key in hidden {
                self.scratch.scores[key * columns + lane] = f32::NEG_INFINITY;
            }
        }
    }

    /// `sums[dim][row] = sums · rescale + v · weights`.
    #[inline(always)]
    fn add_values<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        first: usize,
        count: usize,
        rescale: [S::f32s; V],
    ) {
        let columns = V * S::F32_LANES;
        let keys = self.span.keys.len();
        let weights = &self.scratch.scores[..count * columns];
        let sums = self.scratch.sums.chunks_exact_mut(R * columns);
        let tiles = self.scratch.values.chunks_exact(R * keys);
        for (sums, values) in sums.zip(tiles) {
            let added = product::tile::<S, R, V>(simd, &values[first * R..], weights);
            for (sums, added) in sums.chunks_exact_mut(columns).zip(added) {
                product::update_row(simd, added, sums, product::Rescale::<S, V>(rescale));
            }
        }
    }

    /// Divides by the sum of weights and writes the rows out.
    #[inline(always)]
    fn store<S: Simd, const V: usize>(
        &mut self,
        simd: S,
        first: usize,
        count: usize,
        sum: [S::f32s; V],
    ) {
        let (columns, dim) = (V * S::F32_LANES, self.inputs.dim);
        for row in self.scratch.sums.chunks_exact_mut(columns) {
            product::update_row(simd, sum, row, product::Divide);
        }
        for lane in 0..count {
            let (token, head) = self.place(first + lane);
            let row = self.tile.row(token - self.tile.rows.start);
            let column = self.scratch.sums[lane..].iter().step_by(columns);
            row[head * dim..][..dim].iter_mut().zip(column).for_each(|(out, x)| *out = *x);
        }
    }
}

/// The running softmax of each row.
struct Running<S: Simd, const V: usize> {
    /// The largest score so far, before scaling.
    max: [S::f32s; V],
    /// The sum of weights so far, relative to `max`.
    sum: [S::f32s; V],
}

impl<S: Simd, const V: usize> Running<S, V> {
    /// Replaces scores by weights; returns what earlier sums are to be multiplied with.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
    fn update(&mut self, simd: S, scores: &mut [f32], log2_scale: f32) -> [S::f32s; V] {
        let scores = as_arrays_mut::<V, _>(S::as_mut_simd_f32s(scores).0).0;
        let old = self.max;
        for row in scores.iter() {
            for i in 0..V {
                self.max[i] = simd.max_f32s(self.max[i], row[i]);
            }
        }
        let zero = simd.splat_f32s(0.0);
        let log2_scale = simd.splat_f32s(log2_scale);
        let mut reference = self.max;
        let mut rescale = old;
        for i in 0..V {
            // All scores so far minus infinity: any finite reference makes their weights 0.
            let infinite = simd.less_than_f32s(self.max[i], simd.splat_f32s(f32::MIN));
            reference[i] = math::select(simd, infinite, zero, self.max[i]);
            rescale[i] = weight(simd, old[i], reference[i], log2_scale);
            self.sum[i] = simd.mul_f32s(self.sum[i], rescale[i]);
        }
        for row in scores.iter_mut() {
            for i in 0..V {
                row[i] = weight(simd, row[i], reference[i], log2_scale);
                self.sum[i] = simd.add_f32s(self.sum[i], row[i]);
            }
        }
        rescale
    }
}

/// `2^((score − reference) · log2_scale)`.
#[inline(always)]
fn weight<S: Simd>(simd: S, score: S::f32s, reference: S::f32s, log2_scale: S::f32s) -> S::f32s {
    math::exp2_of_negative(simd, simd.mul_f32s(simd.sub_f32s(score, reference), log2_scale))
}
