//! Attention over tiles whose products are those of bf16 numbers with float32 sums, on processors
//! with AVX-512 BF16. Softmax and sums are float32.
//!
//! The instruction multiplies pairs of neighbours and adds both products, so that keys and queries
//! are packed in pairs along the head, weights and values in pairs of keys. Registers hold queries
//! across and keys (or the head's dimensions) down, so that the running maximum and sum are plain
//! vectors.

/// Two numbers as bf16, the first in the low half.
pub(crate) type Pair = u32;

/// Numbers in a register.
const LANES: usize = 16;
/// Registers across in a tile.
const VECTORS: usize = 3;
/// Keys, or dimensions of the head, in a register tile: 8 × 3 sums fit into 32 registers.
const ROWS: usize = 8;
/// Keys whose scores are held at a time.
const KEYS: usize = 128;
/// Queries of a tile.
pub(crate) const QUERIES: usize = VECTORS * LANES;

/// A row of a tile: a number, or a pair, for each query.
type Columns<T> = [[T; LANES]; VECTORS];

/// How the rows of a stream's queries or keys become what is multiplied: normalised by their root
/// mean square, weighted, and neighbouring pairs rotated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Preparation<'a> {
    /// The norm's weight, `[dim]`.
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    /// What all numbers are multiplied with.
    pub(crate) factor: f32,
}

/// Keys and values of one head, and what is computed from them; reused from head to head.
#[derive(Debug, Default)]
pub(crate) struct Head {
    /// `[tile of keys][pair of dims][key]`.
    keys: Vec<[Pair; ROWS]>,
    /// `[tile of dims][pair of keys][dim]`.
    values: Vec<[Pair; ROWS]>,
    /// `[pair of dims][query]`.
    queries: Vec<Columns<Pair>>,
    /// `[key][query]`, the block's.
    scores: Vec<Columns<f32>>,
    /// `[pair of keys][query]`, the block's.
    weights: Vec<Columns<Pair>>,
    /// `[dim][query]`.
    sums: Vec<Columns<f32>>,
    row: Vec<Pair>,
    count: usize,
}

impl Head {
    /// Whether heads of this width can be attended to on this machine.
    pub(crate) fn supports(dim: usize) -> bool {
        dim > 0 && dim.is_multiple_of(ROWS) && is_supported()
    }

    /// Makes room for `count` keys and values of a head of `dim`, which [`Self::supports`] allows.
    pub(crate) fn begin(&mut self, count: usize, dim: usize) {
        assert!(Self::supports(dim), "a head of {dim} on a machine that cannot");
        let padded = count.next_multiple_of(ROWS);
        let half = dim >> 1;
        self.count = count;
        self.row.resize(half, 0);
        self.keys.resize(padded.div_euclid(ROWS) * half, [0; ROWS]);
        self.values.resize(dim.div_euclid(ROWS) * (padded >> 1), [0; ROWS]);
        // Values that are not there have the weight 0, but what was left there may be NaN.
        for tile in self.values.chunks_exact_mut((padded >> 1).max(1)) {
            tile[count >> 1..].fill([0; ROWS]);
        }
        self.queries.resize(half, [[0; LANES]; VECTORS]);
        self.scores.resize(KEYS, [[0.0; LANES]; VECTORS]);
        self.weights.resize(KEYS >> 1, [[0; LANES]; VECTORS]);
        self.sums.resize(dim, [[0.0; LANES]; VECTORS]);
    }

    /// Packs key `i`, with the cosines and sines of its angles, `[dim / 2]`.
    pub(crate) fn set_key(&mut self, i: usize, x: &[f32], turn: [&[f32]; 2], how: Preparation<'_>) {
        prepare(x, turn, how, &mut self.row);
        let tile = &mut self.keys[i.div_euclid(ROWS) * self.row.len()..][..self.row.len()];
        tile.iter_mut().zip(&self.row).for_each(|(packed, pair)| packed[i % ROWS] = *pair);
    }

    /// Packs the values `2 · pair` and, where it is there, `2 · pair + 1`.
    pub(crate) fn set_values(&mut self, pair: usize, first: &[f32], second: Option<&[f32]>) {
        let pairs = self.count.next_multiple_of(ROWS) >> 1;
        // What stands for a neighbour that is not there gets no weight.
        pack_values(first, second.unwrap_or(first), &mut self.values[pair..], pairs);
    }

    /// Packs the query of lane `lane`, of [`QUERIES`].
    pub(crate) fn set_query(
        &mut self,
        lane: usize,
        x: &[f32],
        turn: [&[f32]; 2],
        how: Preparation<'_>,
    ) {
        prepare(x, turn, how, &mut self.row);
        let (vector, lane) = (lane.div_euclid(LANES), lane % LANES);
        let queries = self.queries.iter_mut().zip(&self.row);
        queries.for_each(|(packed, pair)| packed[vector][lane] = *pair);
    }

    /// Attends from the packed queries to all keys. Scores are `q · k` and the weights `2^score`,
    /// so that the queries' factor holds the scale and log₂ e.
    pub(crate) fn attend(&mut self) {
        attend(self);
    }

    /// The attended values of lane `lane`.
    pub(crate) fn store(&self, lane: usize, out: &mut [f32]) {
        let (vector, lane) = (lane.div_euclid(LANES), lane % LANES);
        out.iter_mut().zip(&self.sums).for_each(|(out, sums)| *out = sums[vector][lane]);
    }
}

/// Both numbers rounded to the nearest bf16, ties to even.
#[inline(always)]
fn pair_of(first: f32, second: f32) -> Pair {
    rounded(first) >> 16 | (rounded(second) & 0xffff_0000)
}

/// The bits of `x`; the upper half is `x` rounded to bf16. NaN stays NaN.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { up }
}

#[cfg(target_arch = "x86_64")]
fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn is_supported() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use x86::{attend, pack_values, prepare};

#[cfg(not(target_arch = "x86_64"))]
fn prepare(_: &[f32], _: [&[f32]; 2], _: Preparation<'_>, _: &mut [Pair]) {
    unreachable!("a head is packed only where the instructions are");
}

#[cfg(not(target_arch = "x86_64"))]
fn pack_values(_: &[f32], _: &[f32], _: &mut [[Pair; ROWS]], _: usize) {
    unreachable!("a head is packed only where the instructions are");
}

#[cfg(not(target_arch = "x86_64"))]
fn attend(_: &mut Head) {
    unreachable!("a head is packed only where the instructions are");
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256bh, __m256i, __m512, __m512bh, __m512i, _mm512_add_epi32, _mm512_add_ps,
        _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh,
        _mm512_div_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_max_ps, _mm512_mul_ps, _mm512_or_si512, _mm512_permutex2var_ps,
        _mm512_reduce_add_ps, _mm512_set_epi32, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps,
        _mm512_storeu_si512, _mm512_sub_ps, _mm512_ternarylogic_epi32,
    };

    use super::{Columns, Head, KEYS, LANES, Pair, Preparation, ROWS, VECTORS, pair_of};

    /// `1.5 · 2²³`: adding it rounds to the nearest integer and leaves that integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// Weights are at least 2 to this power: normal numbers, and nothing beside the largest, 1.
    const EXP2_MIN: f32 = -126.0;
    /// Coefficients of `2ˣ` on ±½, the highest power first; largest relative error 2.6e-6, a
    /// thousandth of bf16's.
    const EXP2: [f32; 5] = [0.009_570_102, 0.055_917_86, 0.240_247_44, 0.693_121_8, 0.999_999_3];

    type Sums = [[__m512; VECTORS]; ROWS];

    /// See [`Preparation`]; `out` has half as many pairs as `x` has numbers.
    pub(super) fn prepare(x: &[f32], turn: [&[f32]; 2], how: Preparation<'_>, out: &mut [Pair]) {
        #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
        // SAFETY: `Head::begin` makes room for pairs only where `is_supported`, and this is called
        // with that room only.
        unsafe {
            prepare_avx512(x, turn, how, out);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[expect(clippy::cast_precision_loss, reason = "the width of a head is small")]
    fn prepare_avx512(x: &[f32], [cos, sin]: [&[f32]; 2], how: Preparation<'_>, out: &mut [Pair]) {
        let (registers, rest) = x.as_chunks::<LANES>();
        let mut squares = [_mm512_setzero_ps(); 4];
        for x in registers.chunks(4) {
            for (sum, x) in squares.iter_mut().zip(x) {
                *sum = _mm512_fmadd_ps(load(x), load(x), *sum);
            }
        }
        let squares = [0, 1, 2, 3].map(|i| _mm512_reduce_add_ps(squares[i])).iter().sum::<f32>()
            + rest.iter().map(|x| x * x).sum::<f32>();
        let factor = how.factor / (squares / x.len() as f32 + how.eps).sqrt();

        let factors = _mm512_set1_ps(factor);
        let scaled = |x, weight| _mm512_mul_ps(_mm512_mul_ps(load(x), factors), load(weight));
        let (outs, outs_rest) = out.as_chunks_mut::<LANES>();
        let turns = cos.as_chunks::<LANES>().0.iter().zip(sin.as_chunks::<LANES>().0);
        let numbers = registers.as_chunks::<2>().0.iter();
        let numbers = numbers.zip(how.weight.as_chunks::<LANES>().0.as_chunks::<2>().0);
        for ((out, (x, weight)), (cos, sin)) in outs.iter_mut().zip(numbers).zip(turns) {
            let (low, high) = (scaled(&x[0], &weight[0]), scaled(&x[1], &weight[1]));
            let (even, odd) = deinterleaved(low, high);
            let (cos, sin) = (load(cos), load(sin));
            let first = _mm512_fmsub_ps(even, cos, _mm512_mul_ps(odd, sin));
            let second = _mm512_fmadd_ps(even, sin, _mm512_mul_ps(odd, cos));
            store_bits(out, rounded_pairs(first, second));
        }
        let done = x.len() - 2 * outs_rest.len();
        let (x, weight) = (x[done..].as_chunks::<2>().0, how.weight[done..].as_chunks::<2>().0);
        let turns = cos[done >> 1..].iter().zip(&sin[done >> 1..]);
        for ((out, (x, weight)), (cos, sin)) in
            outs_rest.iter_mut().zip(x.iter().zip(weight)).zip(turns)
        {
            let (x0, x1) = (x[0] * factor * weight[0], x[1] * factor * weight[1]);
            *out = pair_of(x0 * cos - x1 * sin, x0 * sin + x1 * cos);
        }
    }

    /// Packs two tokens' values in pairs: `tiles[tile · stride][dim]`.
    pub(super) fn pack_values(
        first: &[f32],
        second: &[f32],
        tiles: &mut [[Pair; ROWS]],
        stride: usize,
    ) {
        #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
        // SAFETY: `Head::begin` makes room for pairs only where `is_supported`, and this is called
        // with that room only.
        unsafe {
            pack_values_avx512(first, second, tiles, stride);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pack_values_avx512(
        first: &[f32],
        second: &[f32],
        tiles: &mut [[Pair; ROWS]],
        stride: usize,
    ) {
        let (firsts, first_rest) = first.as_chunks::<LANES>();
        let (seconds, second_rest) = second.as_chunks::<LANES>();
        let mut place = 0;
        for (first, second) in firsts.iter().zip(seconds) {
            let mut packed = [0; LANES];
            store_bits(&mut packed, rounded_pairs(load(first), load(second)));
            for half in packed.as_chunks::<ROWS>().0 {
                tiles[place] = *half;
                place += stride;
            }
        }
        if !first_rest.is_empty() {
            let numbers = first_rest.iter().zip(second_rest);
            tiles[place].iter_mut().zip(numbers).for_each(|(out, (a, b))| *out = pair_of(*a, *b));
        }
    }

    /// The numbers at even places of both registers, and those at odd places.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn deinterleaved(low: __m512, high: __m512) -> (__m512, __m512) {
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        (_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high))
    }

    /// Pairs of corresponding numbers, rounded to the nearest bf16; NaN stays NaN.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn rounded_pairs(first: __m512, second: __m512) -> __m512i {
        let widened = |x: __m512| _mm512_cvtepu16_epi32(halves(_mm512_cvtneps_pbh(x)));
        _mm512_or_si512(widened(first), _mm512_slli_epi32::<16>(widened(second)))
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
        let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS];
        let mut sum = [_mm512_setzero_ps(); VECTORS];
        head.sums.fill([[0.0; LANES]; VECTORS]);
        for first in (0..head.count).step_by(KEYS) {
            let count = KEYS.min(head.count - first);
            let old = max;
            scores(head, first, count, &mut max);
            let mut rescale = old;
            for i in 0..VECTORS {
                rescale[i] = exp2(_mm512_sub_ps(old[i], max[i]));
                sum[i] = _mm512_mul_ps(sum[i], rescale[i]);
            }
            weights(head, count, &max, &mut sum);
            add_values(head, first, count, &rescale);
        }
        for sums in &mut head.sums {
            for (sums, sum) in sums.iter_mut().zip(&sum) {
                store(sums, _mm512_div_ps(load(sums), *sum));
            }
        }
    }

    /// `scores[key][query]` for `count` keys from `first` on; `max` becomes the largest so far.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn scores(head: &mut Head, first: usize, count: usize, max: &mut [__m512; VECTORS]) {
        let half = head.queries.len();
        let tiles = head.keys[first.div_euclid(ROWS) * half..].chunks_exact(half);
        let blocks = head.scores[..count.next_multiple_of(ROWS)].as_chunks_mut::<ROWS>().0;
        for (i, (scores, keys)) in blocks.iter_mut().zip(tiles).enumerate() {
            let mut sums = tile(keys, &head.queries);
            for sums in sums.iter_mut().skip(count - i * ROWS) {
                *sums = [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS];
            }
            for (scores, sums) in scores.iter_mut().zip(&sums) {
                for i in 0..VECTORS {
                    max[i] = _mm512_max_ps(sums[i], max[i]);
                    store(&mut scores[i], sums[i]);
                }
            }
        }
    }

    /// The weights of the block's keys relative to `max`; `sum` grows by them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn weights(
        head: &mut Head,
        count: usize,
        max: &[__m512; VECTORS],
        sum: &mut [__m512; VECTORS],
    ) {
        let scores = head.scores[..count.next_multiple_of(ROWS)].as_chunks::<2>().0;
        for (weights, scores) in head.weights.iter_mut().zip(scores) {
            for i in 0..VECTORS {
                let first = exp2(_mm512_sub_ps(load(&scores[0][i]), max[i]));
                let second = exp2(_mm512_sub_ps(load(&scores[1][i]), max[i]));
                sum[i] = _mm512_add_ps(sum[i], _mm512_add_ps(first, second));
                store_pairs(&mut weights[i], first, second);
            }
        }
    }

    /// `sums[dim][query] = sums · rescale + v · weights`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn add_values(head: &mut Head, first: usize, count: usize, rescale: &[__m512; VECTORS]) {
        let pairs = head.count.next_multiple_of(ROWS) >> 1;
        let weights = &head.weights[..count.next_multiple_of(ROWS) >> 1];
        let tiles = head.values.chunks_exact(pairs);
        for (sums, values) in head.sums.as_chunks_mut::<ROWS>().0.iter_mut().zip(tiles) {
            let added = tile(&values[first >> 1..][..weights.len()], weights);
            for (sums, added) in sums.iter_mut().zip(&added) {
                for i in 0..VECTORS {
                    let sum = _mm512_fmadd_ps(load(&sums[i]), rescale[i], added[i]);
                    store(&mut sums[i], sum);
                }
            }
        }
    }

    /// `Σ a[pair][row] · b[pair][column]`, where a pair's product is the sum of two.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn tile(a: &[[Pair; ROWS]], b: &[Columns<Pair>]) -> Sums {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for (a, b) in a.iter().zip(b) {
            let b = [load_pairs(&b[0]), load_pairs(&b[1]), load_pairs(&b[2])];
            for row in 0..ROWS {
                let a = pairs(_mm512_set1_epi32(a[row].cast_signed()));
                for i in 0..VECTORS {
                    sums[row][i] = _mm512_dpbf16_ps(sums[row][i], a, b[i]);
                }
            }
        }
        sums
    }

    /// `2ˣ` for `x` of at most 0, at least 2⁻¹²⁶; NaN for NaN.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn exp2(x: __m512) -> __m512 {
        // The second operand is the result where either is NaN.
        let x = _mm512_max_ps(_mm512_set1_ps(EXP2_MIN), x);
        let shifted = _mm512_add_ps(x, _mm512_set1_ps(ROUND));
        let rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND)));
        let mut poly = _mm512_set1_ps(EXP2[0]);
        for c in &EXP2[1..] {
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(*c));
        }
        let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(poly), power))
    }

    /// Rounds numbers that are not negative to the nearest bf16, ties up.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn store_pairs(out: &mut [Pair; LANES], first: __m512, second: __m512) {
        /// Bits of the mask from the third operand's choice: `mask ? second : first`.
        const SELECT: i32 = 0xca;
        let half = _mm512_set1_epi32(0x8000);
        let first = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(first), half));
        let second = _mm512_add_epi32(_mm512_castps_si512(second), half);
        let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        store_bits(out, _mm512_ternarylogic_epi32::<SELECT>(mask, second, first));
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store_bits(out: &mut [Pair; LANES], pairs: __m512i) {
        #[expect(unsafe_code, reason = "an unaligned store")]
        // SAFETY: the array has room for the 64 bytes that are written.
        unsafe {
            _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(x: &[f32; LANES]) -> __m512 {
        #[expect(unsafe_code, reason = "an unaligned load")]
        // SAFETY: the array holds the 64 bytes that are read.
        unsafe {
            _mm512_loadu_ps(x.as_ptr())
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(out: &mut [f32; LANES], x: __m512) {
        #[expect(unsafe_code, reason = "an unaligned store")]
        // SAFETY: the array has room for the 64 bytes that are written.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), x);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_pairs(x: &[Pair; LANES]) -> __m512bh {
        #[expect(unsafe_code, reason = "an unaligned load")]
        // SAFETY: the array holds the 64 bytes that are read.
        pairs(unsafe { _mm512_loadu_si512(x.as_ptr().cast()) })
    }

    /// The same register, seen as integers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn halves(x: __m256bh) -> __m256i {
        #[expect(unsafe_code, reason = "there is no safe cast between the two types")]
        // SAFETY: both are 32 bytes without any bit pattern that is not allowed.
        unsafe {
            std::mem::transmute(x)
        }
    }

    /// The same register, seen as pairs of bf16.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pairs(x: __m512i) -> __m512bh {
        #[expect(unsafe_code, reason = "there is no safe cast between the two types")]
        // SAFETY: both are 64 bytes without any bit pattern that is not allowed.
        unsafe {
            std::mem::transmute(x)
        }
    }
}
