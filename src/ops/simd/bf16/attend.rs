//! The products and the softmax of attention.
//!
//! Two of the four pipes of a Zen 5 core multiply; the softmax works on all four. So the exponentials
//! of one tile of keys stand between the products of the next. Scores are held for one tile only,
//! since they become weights without waiting for the largest of all: any number near it will do.
//!
//! Products alone take 86 % of the multiplying units' time in a plain loop over tiles and 93 % so.
//! Loading a tile's sums row by row while the last one's are stored gained another 1 % at most, and was
//! left out; so did, each less than 0.3 %, asking for the next values ahead, and instructions that round
//! weights to bf16 or scale by a power of two in place of two or three others.

use std::{
    arch::x86_64::{
        __m512, _CMP_GT_OQ, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512,
        _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_div_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_max_ps, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_sub_ps,
        _mm512_ternarylogic_epi32,
    },
    f64::consts::LN_2,
    ops::Range,
    sync::atomic::{Ordering, compiler_fence},
};

use super::{
    Columns, Head, KEYS, LANES, Pair, ROWS, VECTORS,
    registers::{load, load_pairs, pairs, store, store_bits},
};

/// Pairs of keys in a tile.
const PAIRS: usize = ROWS >> 1;
/// Pairs of dimensions that are multiplied between two exponentials.
const BETWEEN: usize = 2;
/// Pairs of dimensions that are multiplied while a pair of keys gets its weights.
const WOVEN: usize = 2 * VECTORS * BETWEEN;
/// How far a score may rise above what was the largest: weights up to 2 to this power are as exact as
/// those up to 1.
const RISE_MAX: f32 = 16.0;

/// Weights are at least 2 to this power: normal numbers, and nothing beside the largest, about 1.
const EXP2_MIN: f32 = -126.0;
/// Adding `1.5 · 2¹⁹` rounds to the nearest 16th and leaves the 16ths in the low bits.
const ROUND: f32 = 786_432.0;
/// Bits of [`ROUND`]'s sums that tell the 16th.
const STEP_BITS: u32 = LANES.ilog2();
/// `2^(i / 16)`.
static STEPS: [f32; LANES] = steps(1.0);
/// The derivatives of `2ˣ` there.
static SLOPES: [f32; LANES] = steps(LN_2);

type Sums = [[__m512; VECTORS]; ROWS];

/// `factor · 2^(i / 16)`, and a little more: a tangent stays below the curve by up to 2.3e-4 of it,
/// half of which is added.
#[expect(clippy::cast_possible_truncation, reason = "rounded to float32")]
const fn steps(factor: f64) -> [f32; LANES] {
    /// The 16th root of 2.
    const ROOT: f64 = 1.044_273_782_427_413_8;
    const HALF_STEP: f64 = LN_2 / 32.0;
    let mut out = [0.0; LANES];
    let mut power = factor * (1.0 + HALF_STEP * HALF_STEP / 4.0);
    let mut i = 0;
    while i < LANES {
        out[i] = power as f32;
        power *= ROOT;
        i += 1;
    }
    out
}

/// The running softmax of a tile's queries.
struct Softmax {
    /// The negative of a score near the largest so far, added to all.
    offset: Columns<f32>,
    /// The sum of weights.
    sum: Columns<f32>,
}

/// See [`Head::attend`].
pub(super) fn attend(head: &mut Head) {
    #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
    // SAFETY: `Head::begin` checked that this machine has them.
    unsafe {
        attend_avx512(head);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn attend_avx512(head: &mut Head) {
    let zeros = [[0.0; LANES]; VECTORS];
    let mut softmax = Softmax { offset: zeros, sum: zeros };
    head.sums.fill(zeros);
    let tiles = head.count.div_ceil(ROWS);
    // Tiles before this one are in the sums.
    let mut added = 0;
    for tile in 0..tiles {
        // The tile before, if any, gets its weights meanwhile.
        let waiting = tile.checked_sub(added + 1).map(|place| place * PAIRS..(place + 1) * PAIRS);
        let largest = scores(head, tile, &mut softmax, waiting.unwrap_or(0..0));
        let is_first = tile == 0;
        let rises = is_first || is_above(&largest, RISE_MAX);
        if rises || tile - added == KEYS.div_euclid(ROWS) {
            add_values(head, added..tile);
            added = tile;
        }
        if rises {
            raise(head, &mut softmax, largest, is_first);
        }
    }
    if tiles > 0 {
        let count = head.count - (tiles - 1) * ROWS;
        head.scores[count..].fill([[f32::NEG_INFINITY; LANES]; VECTORS]);
        let weights = &mut head.weights[(tiles - 1 - added) * PAIRS..][..PAIRS];
        for (weights, scores) in weights.iter_mut().zip(head.scores.as_chunks().0) {
            weigh(weights, scores, &mut softmax);
        }
        add_values(head, added..tiles);
    }
    divide(&mut head.sums, &softmax.sum);
}

/// The scores of a tile of keys, `q · k + offset`, and their largest. While they are summed up, the
/// scores of the tile before become weights, in `waiting`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn scores(
    head: &mut Head,
    tile: usize,
    softmax: &mut Softmax,
    waiting: Range<usize>,
) -> [__m512; VECTORS] {
    let (half, queries) = (head.queries.len(), &head.queries);
    let keys = &head.keys[tile * half..][..half];
    let [offset0, offset1, offset2] = &softmax.offset;
    let mut sums = [[load(offset0), load(offset1), load(offset2)]; ROWS];

    let mut waiting = head.weights[waiting].iter_mut().zip(head.scores.as_chunks().0);
    let products = keys.as_chunks::<WOVEN>().0.iter().zip(queries.as_chunks::<WOVEN>().0);
    let mut done = 0;
    for ((keys, queries), (weights, scores)) in products.zip(waiting.by_ref()) {
        weigh_between(weights, scores, softmax, &mut sums, keys, queries);
        done += WOVEN;
    }
    // More dimensions than that, or keys of a narrow head.
    for (keys, queries) in keys[done..].iter().zip(&queries[done..]) {
        add_product(&mut sums, keys, queries);
    }
    for (weights, scores) in waiting {
        weigh(weights, scores, softmax);
    }

    let mut largest = sums[0];
    for (scores, sums) in head.scores.iter_mut().zip(&sums) {
        for i in 0..VECTORS {
            largest[i] = _mm512_max_ps(sums[i], largest[i]);
            store(&mut scores[i], sums[i]);
        }
    }
    largest
}

/// [`weigh`] between the products of keys and queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn weigh_between(
    weights: &mut Columns<Pair>,
    scores: &[Columns<f32>; 2],
    softmax: &mut Softmax,
    sums: &mut Sums,
    keys: &[[Pair; ROWS]; WOVEN],
    queries: &[Columns<Pair>; WOVEN],
) {
    let mut first = [0.0; LANES];
    for i in 0..VECTORS {
        for j in 2 * i * BETWEEN..(2 * i + 1) * BETWEEN {
            add_product(sums, &keys[j], &queries[j]);
        }
        store(&mut first, exp2(load(&scores[0][i])));
        // The compiler would take both exponentials at once, for which registers do not suffice.
        compiler_fence(Ordering::SeqCst);
        for j in (2 * i + 1) * BETWEEN..(2 * i + 2) * BETWEEN {
            add_product(sums, &keys[j], &queries[j]);
        }
        let second = exp2(load(&scores[1][i]));
        store_weights(&mut weights[i], [load(&first), second], &mut softmax.sum[i]);
        compiler_fence(Ordering::SeqCst);
    }
}

/// The weights of two keys with these scores; the sum of weights grows by them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn weigh(weights: &mut Columns<Pair>, scores: &[Columns<f32>; 2], softmax: &mut Softmax) {
    for i in 0..VECTORS {
        let pair = [exp2(load(&scores[0][i])), exp2(load(&scores[1][i]))];
        store_weights(&mut weights[i], pair, &mut softmax.sum[i]);
    }
}

/// `sums[dim][query] += v · weights` for some tiles of keys.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add_values(head: &mut Head, keys: Range<usize>) {
    let pairs = head.count.next_multiple_of(ROWS) >> 1;
    let weights = &head.weights[..keys.len() * PAIRS];
    let tiles = head.values.chunks_exact(pairs);
    for (stored, values) in head.sums.as_chunks_mut::<ROWS>().0.iter_mut().zip(tiles) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for (sums, stored) in sums.iter_mut().zip(&*stored) {
            for i in 0..VECTORS {
                sums[i] = load(&stored[i]);
            }
        }
        for (values, weights) in values[keys.start * PAIRS..].iter().zip(weights) {
            add_product(&mut sums, values, weights);
        }
        for (stored, sums) in stored.iter_mut().zip(&sums) {
            for i in 0..VECTORS {
                store(&mut stored[i], sums[i]);
            }
        }
    }
}

/// Lowers the offset by the largest of the last scores, and what was computed with the old one.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn raise(head: &mut Head, softmax: &mut Softmax, largest: [__m512; VECTORS], is_first: bool) {
    let zero = _mm512_setzero_ps();
    for (i, largest) in largest.into_iter().enumerate() {
        // The first scores also lower what they are compared with.
        let rise = if is_first { largest } else { _mm512_max_ps(largest, zero) };
        let scale = exp2(_mm512_sub_ps(zero, rise));
        let scores = head.scores.iter_mut().map(|scores| &mut scores[i]);
        for scores in scores.chain([&mut softmax.offset[i]]) {
            let lower = _mm512_sub_ps(load(scores), rise);
            store(scores, lower);
        }
        if is_first {
            continue;
        }
        let sums = head.sums.iter_mut().map(|sums| &mut sums[i]);
        for sums in sums.chain([&mut softmax.sum[i]]) {
            let less = _mm512_mul_ps(load(sums), scale);
            store(sums, less);
        }
    }
}

/// Whether any number is larger than `limit`; NaN is not.
#[inline]
#[target_feature(enable = "avx512f")]
fn is_above(x: &[__m512; VECTORS], limit: f32) -> bool {
    let limit = _mm512_set1_ps(limit);
    x.iter().fold(0, |any, x| any | _mm512_cmp_ps_mask::<_CMP_GT_OQ>(*x, limit)) != 0
}

#[inline]
#[target_feature(enable = "avx512f")]
fn divide(sums: &mut [Columns<f32>], divisors: &Columns<f32>) {
    let mut factors = [_mm512_setzero_ps(); VECTORS];
    for (factor, divisor) in factors.iter_mut().zip(divisors) {
        *factor = _mm512_div_ps(_mm512_set1_ps(1.0), load(divisor));
    }
    for sums in sums {
        for (sums, factor) in sums.iter_mut().zip(&factors) {
            let quotient = _mm512_mul_ps(load(sums), *factor);
            store(sums, quotient);
        }
    }
}

/// `sums[row][column] += a[row] · b[column]`, where a pair's product is the sum of two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add_product(sums: &mut Sums, a: &[Pair; ROWS], b: &Columns<Pair>) {
    let b = [load_pairs(&b[0]), load_pairs(&b[1]), load_pairs(&b[2])];
    for row in 0..ROWS {
        let a = pairs(_mm512_set1_epi32(a[row].cast_signed()));
        for i in 0..VECTORS {
            sums[row][i] = _mm512_dpbf16_ps(sums[row][i], a, b[i]);
        }
    }
}

/// `2ˣ` of at least 2⁻¹²⁶; NaN for NaN. The largest relative error, 1.2e-4, is a sixteenth of bf16's.
///
/// A tangent costs one multiplication, a polynomial without a table four, which the products then
/// lack.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn exp2(x: __m512) -> __m512 {
    // The second operand is the result where either is NaN.
    let x = _mm512_max_ps(_mm512_set1_ps(EXP2_MIN), x);
    let shifted = _mm512_add_ps(x, _mm512_set1_ps(ROUND));
    let rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND)));
    let bits = _mm512_castps_si512(shifted);
    let (step, slope) = (load(&STEPS), load(&SLOPES));
    // Permutations look at the low bits only, which tell the 16th.
    let (step, slope) = (_mm512_permutexvar_ps(bits, step), _mm512_permutexvar_ps(bits, slope));
    let fraction = _mm512_fmadd_ps(slope, rest, step);
    let power = _mm512_slli_epi32::<{ 23 - STEP_BITS }>(bits);
    let power = _mm512_and_si512(power, _mm512_set1_epi32(0xff80_0000_u32.cast_signed()));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(fraction), power))
}

/// Stores two keys' weights in pairs, rounded to the nearest bf16, ties up, and adds them to `sum`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn store_weights(out: &mut [Pair; LANES], [first, second]: [__m512; 2], sum: &mut [f32; LANES]) {
    /// Bits of the mask from the third operand's choice: `mask ? second : first`.
    const SELECT: i32 = 0xca;
    let more = _mm512_add_ps(load(sum), _mm512_add_ps(first, second));
    store(sum, more);
    let half = _mm512_set1_epi32(0x8000);
    let first = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(first), half));
    let second = _mm512_add_epi32(_mm512_castps_si512(second), half);
    let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    store_bits(out, _mm512_ternarylogic_epi32::<SELECT>(mask, second, first));
}
