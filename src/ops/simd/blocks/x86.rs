//! The steps of a product on x86: rounding rows and unpacking weights, and the product of a tile with
//! AVX-512 VNNI.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm_sad_epu8, _mm_set1_epi8, _mm_setzero_si128,
    _mm_xor_si128, _mm256_cvtph_ps, _mm256_loadu_si256, _mm256_shuffle_epi8, _mm256_storeu_si256,
    _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_cvtps_epi32,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_max_epu32, _mm512_mul_ps, _mm512_reduce_max_epu32, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_shuffle_i32x4, _mm512_sub_epi32, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::{
    BLOCK, DEPTH, FOURS, HALF, PANEL, PanelRows, Unpacked,
    activations::{PlainSteps, Rounded, Row, RowBlock, Steps, Sums},
    format::{BlockFormat, PanelBlock, Word},
    unpack::{self, Halves},
};

/// Outputs of one 512-bit register of 32-bit sums.
const LANES: usize = PANEL.div_euclid(2);
/// Outputs of one 256-bit register.
pub(super) const HALF_LANES: usize = PANEL.div_euclid(4);
pub(super) const HALF_FOURS: usize = FOURS.div_euclid(2);

/// Defines safe functions that run `$body` with instructions that not every processor has.
macro_rules! with_instructions {
    ($($(#[$doc:meta])* $features:literal $name:ident$(<$($c:ident),*>)?
        ($($arg:ident: $type:ty),*) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$doc])*
        pub(super) fn $name$(<$(const $c: usize),*>)?($($arg: $type),*) $(-> $result)? {
            #[target_feature(enable = $features)]
            fn inner$(<$(const $c: usize),*>)?($($arg: $type),*) $(-> $result)? $body
            #[expect(unsafe_code, reason = "needs instructions that not every processor has")]
            // SAFETY: a matrix is multiplied with instructions that `Instructions::available` has
            // found on this machine, and those are the ones that `inner` is built with.
            unsafe {
                inner$(::<$($c),*>)?($($arg),*)
            }
        }
    )*};
}

pub(super) use with_instructions;

with_instructions! {
    /// [`Row::quantize`] in wide registers.
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" quantize_row_512<R>(row: &mut Row<'_, R>) -> f32 {
        row.quantize(Steps512)
    }
    /// [`Row::quantize`] in wide registers.
    "avx2,fma" quantize_row_256<R>(row: &mut Row<'_, R>) -> f32 {
        row.quantize(PlainSteps)
    }
    /// [`unpack::unpack`] in wide registers.
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c" unpack_512(
        format: BlockFormat, block: PanelBlock<'_>, out: &mut [Unpacked]
    ) {
        unpack::unpack(format, block, out, |x| wide(x), |x| replace(x));
    }
    /// [`unpack::unpack`] in wide registers.
    "avx2,fma,f16c" unpack_256(
        format: BlockFormat, block: PanelBlock<'_>, out: &mut [Unpacked]
    ) {
        unpack::unpack(format, block, out, |x| wide(x), |x| replace(x));
    }
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx512f,avx512bw,avx512vnni" add_tile_512<R, G, M>(
        panel: &[Unpacked], x: (&[RowBlock<R>], &[Sums<R>]), out: &mut PanelRows<R>
    ) {
        tile_512::<_, R, G, M>(panel, panel, x, out);
    }
    /// [`add_tile_512`] of Q8_0 blocks as they are kept, whose scales were [widened](widen_q8_0_512).
    "avx512f,avx512bw,avx512vnni" add_q8_0_tile_512<R>(
        stored: &[u8], scales: &[Unpacked], x: (&[RowBlock<R>], &[Sums<R>]), out: &mut PanelRows<R>
    ) {
        let blocks: &[StoredQ8_0] = bytemuck::cast_slice(stored);
        tile_512::<_, R, 1, 0>(blocks, scales, x, out);
    }
    /// Unpacks the scales of a Q8_0 block only.
    "avx512f,f16c" widen_q8_0_512(block: PanelBlock<'_>, out: &mut Unpacked) {
        out.scales[0] = wide(&block.halves[0]);
    }
    /// Adds the product of one row with a panel of Q8_0 blocks as they are kept: a token reads each
    /// weight once, so that unpacking it first would not pay.
    "avx512f,avx512bw,avx512vnni,f16c" add_q8_0_row_512(
        panel: &[u8], x: &[RowBlock<1>], out: &mut PanelRows<1>
    ) {
        // In the same order as for many rows, so that a row gives the same numbers alone.
        let chunks = panel.chunks(DEPTH * PANEL * BlockFormat::Q8_0.bytes()).zip(x.chunks(DEPTH));
        for (panel, x) in chunks {
            q8_0_row_512(panel, x, out);
        }
    }
}

/// The steps with AVX-512, which only [`quantize_row_512`] takes.
#[derive(Clone, Copy)]
struct Steps512;

#[expect(unsafe_code, reason = "needs instructions that not every processor has")]
impl Steps for Steps512 {
    #[inline(always)]
    fn largest(self, x: &[f32; BLOCK]) -> u32 {
        // SAFETY: the only caller is built with these instructions.
        unsafe { largest_512(x) }
    }

    #[inline(always)]
    fn all_largest(self, x: &[f32], largest: &mut [f32]) -> u32 {
        // SAFETY: as above.
        unsafe { all_largest_512(x, largest) }
    }

    #[inline(always)]
    fn round(self, x: &[f32; BLOCK], factor: f32) -> Rounded {
        // SAFETY: as above.
        unsafe { round_512(x, factor) }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn largest_512(x: &[f32; BLOCK]) -> u32 {
    _mm512_reduce_max_epu32(magnitudes_512(x))
}

/// The bits of magnitudes, the larger of both halves.
#[inline]
#[target_feature(enable = "avx512f")]
fn magnitudes_512(x: &[f32; BLOCK]) -> __m512i {
    let [first, second]: &[[f32; HALF]; 2] = bytemuck::cast_ref(x);
    let bits = |x: &[f32; HALF]| {
        // SAFETY: the array holds the 64 bytes that are read.
        #[expect(unsafe_code, reason = "an unaligned load")]
        let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        _mm512_and_si512(x, _mm512_set1_epi32(i32::MAX))
    };
    _mm512_max_epu32(bits(first), bits(second))
}

/// [`magnitudes_512`] of two blocks, folded in half: theirs in turn.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_512(a: &[f32; BLOCK], b: &[f32; BLOCK]) -> __m512i {
    let (a, b) = (magnitudes_512(a), magnitudes_512(b));
    _mm512_max_epu32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// Sixteen blocks at a time: what is left of each is folded together with its neighbour's.
#[inline]
#[target_feature(enable = "avx512f")]
fn all_largest_512(x: &[f32], largest: &mut [f32]) -> u32 {
    /// Lanes 0 and 2 of both registers, and lanes 1 and 3.
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let (sixteens, rest) = x.as_chunks::<BLOCK>().0.as_chunks::<LANES>();
    let (outs, outs_rest) = largest.as_chunks_mut::<LANES>();
    let mut all = _mm512_set1_epi32(0);
    for (blocks, out) in sixteens.iter().zip(outs) {
        // Not with `map`: what it calls is not inlined, and registers then pass through memory.
        let mut fours = [all; 4];
        for (four, blocks) in fours.iter_mut().zip(blocks.as_chunks::<4>().0) {
            let (a, b) = (pair_512(&blocks[0], &blocks[1]), pair_512(&blocks[2], &blocks[3]));
            *four = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        }
        let fold = |a, b| {
            let (even, odd) =
                (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<ODD>(a, b));
            _mm512_max_epu32(even, odd)
        };
        let found = fold(fold(fours[0], fours[1]), fold(fours[2], fours[3]));
        all = _mm512_max_epu32(all, found);
        *out = bytemuck::cast(found);
    }
    let mut all = _mm512_reduce_max_epu32(all);
    for (x, out) in rest.iter().zip(outs_rest) {
        let bits = largest_512(x);
        *out = f32::from_bits(bits);
        all = bits.max(all);
    }
    all
}

/// Rounds to the nearest, as the processor is set up to.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn round_512(x: &[f32; BLOCK], factor: f32) -> Rounded {
    let factor = _mm512_set1_ps(factor);
    let round = |x: &[f32; HALF]| -> ([i8; HALF], i32) {
        #[expect(unsafe_code, reason = "an unaligned load")]
        // SAFETY: the array holds the 16 numbers that are read.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
        // Sums are there for unsigned bytes.
        let unsigned = _mm_xor_si128(bytes, _mm_set1_epi8(i8::MIN));
        let sums: [i32; 4] = bytemuck::cast(_mm_sad_epu8(unsigned, _mm_setzero_si128()));
        (bytemuck::cast(bytes), sums[0] + sums[2] - 128 * 16)
    };
    let [first, second] = bytemuck::cast_ref::<_, [[f32; HALF]; 2]>(x);
    let ((first, first_sum), (second, second_sum)) = (round(first), round(second));
    (bytemuck::cast([first, second]), [first_sum, second_sum])
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn wide(halves: &Halves) -> [f32; PANEL] {
    let mut wide = [[0.0_f32; HALF_LANES]; 4];
    for (wide, halves) in wide.iter_mut().zip(halves.as_chunks::<HALF_LANES>().0) {
        *wide = bytemuck::cast(_mm256_cvtph_ps(bytemuck::cast(*halves)));
    }
    bytemuck::cast(wide)
}

/// Replaces each byte `i < 16` by `TABLE[i]`; the length is a multiple of 32.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn replace(indices: &mut [u8]) {
    let table: [[u8; 16]; 2] = [unpack::TABLE; 2];
    for indices in indices.as_chunks_mut::<32>().0 {
        #[expect(unsafe_code, reason = "unaligned loads and a store")]
        // SAFETY: each array holds the 32 bytes that are read or written.
        unsafe {
            let table = _mm256_loadu_si256(table.as_ptr().cast());
            let found = _mm256_shuffle_epi8(table, _mm256_loadu_si256(indices.as_ptr().cast()));
            _mm256_storeu_si256(indices.as_mut_ptr().cast(), found);
        }
    }
}

/// Where the bytes of a block's weights are.
trait Weights {
    fn weights(&self) -> &[[Word; PANEL]; FOURS];
}

impl Weights for Unpacked {
    #[inline(always)]
    fn weights(&self) -> &[[Word; PANEL]; FOURS] {
        &self.weights
    }
}

/// A Q8_0 block of each output of a panel: its bytes are what the kernel multiplies.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct StoredQ8_0 {
    halves: Halves,
    weights: [[Word; PANEL]; FOURS],
}

impl Weights for StoredQ8_0 {
    #[inline(always)]
    fn weights(&self) -> &[[Word; PANEL]; FOURS] {
        &self.weights
    }
}

/// Scales and minimums are those of `panel`, the weights those of `weights`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
fn tile_512<W: Weights, const R: usize, const G: usize, const M: usize>(
    weights: &[W],
    panel: &[Unpacked],
    x: (&[RowBlock<R>], &[Sums<R>]),
    out: &mut PanelRows<R>,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let blocks = weights.iter().zip(panel);
    for ((stored, panel), (x, parts)) in blocks.zip(x.0.iter().zip(x.1)) {
        for group in 0..G {
            let mut counts = [[_mm512_set1_epi32(0); 2]; R];
            for row in 0..R {
                let all = _mm512_set1_epi32(x.starts[row]);
                let start = match (G, group) {
                    (1, _) => all,
                    (_, 0) => _mm512_sub_epi32(all, _mm512_set1_epi32(parts.second_starts[row])),
                    _ => _mm512_set1_epi32(parts.second_starts[row]),
                };
                counts[row] = [start; 2];
            }
            for four in 0..const { FOURS.div_euclid(G) } {
                let four = group * HALF_FOURS + four;
                let weights = halves(&stored.weights()[four]);
                for row in 0..R {
                    let x = _mm512_set1_epi32(word(x.values[row][four]));
                    counts[row][0] = _mm512_dpbusd_epi32(counts[row][0], weights[0], x);
                    counts[row][1] = _mm512_dpbusd_epi32(counts[row][1], weights[1], x);
                }
            }
            let scales = half_numbers(&panel.scales[group]);
            for row in 0..R {
                let exponent = _mm512_set1_epi32(x.exponents[row]);
                for half in 0..2 {
                    let count = _mm512_castps_si512(_mm512_cvtepi32_ps(counts[row][half]));
                    let count = _mm512_castsi512_ps(_mm512_add_epi32(count, exponent));
                    sums[row][half] = _mm512_fmadd_ps(count, scales[half], sums[row][half]);
                }
            }
        }
        subtract_mins::<R, M>(&mut sums, panel, parts);
    }
    add_rows(out, sums);
}

/// Subtracts a block's minimums times the sums of their activations.
#[inline]
#[target_feature(enable = "avx512f")]
#[expect(clippy::needless_range_loop, reason = "only indices are unrolled into registers")]
pub(super) fn subtract_mins<const R: usize, const M: usize>(
    sums: &mut [[__m512; 2]; R],
    panel: &Unpacked,
    parts: &Sums<R>,
) {
    for group in 0..M {
        let mins = half_numbers(&panel.mins[group]);
        for row in 0..R {
            let sum = _mm512_set1_ps(sum_of::<R, M>(parts, row, group));
            for half in 0..2 {
                sums[row][half] = _mm512_fnmadd_ps(mins[half], sum, sums[row][half]);
            }
        }
    }
}

/// How far ahead of its use a weight is asked for where each is used once.
const AHEAD_BYTES: usize = 8192;

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
fn q8_0_row_512(panel: &[u8], x: &[RowBlock<1>], out: &mut PanelRows<1>) {
    let mut sums = [_mm512_setzero_ps(); 2];
    for (bytes, x) in panel.chunks_exact(PANEL * BlockFormat::Q8_0.bytes()).zip(x) {
        for line in bytes.chunks(64) {
            let ahead = line.as_ptr().wrapping_byte_add(AHEAD_BYTES).cast::<i8>();
            _mm_prefetch::<_MM_HINT_T0>(ahead);
        }
        let block = PanelBlock::new(BlockFormat::Q8_0, bytes);
        let mut counts = [_mm512_set1_epi32(x.starts[0]); 2];
        for (weights, x) in block.words.iter().zip(&x.values[0]) {
            let (weights, x) = (halves(weights), _mm512_set1_epi32(word(*x)));
            counts[0] = _mm512_dpbusd_epi32(counts[0], weights[0], x);
            counts[1] = _mm512_dpbusd_epi32(counts[1], weights[1], x);
        }
        let exponent = _mm512_set1_epi32(x.exponents[0]);
        let scales = wide_halves(&block.halves[0]);
        for half in 0..2 {
            let count = _mm512_castps_si512(_mm512_cvtepi32_ps(counts[half]));
            let count = _mm512_castsi512_ps(_mm512_add_epi32(count, exponent));
            sums[half] = _mm512_fmadd_ps(count, scales[half], sums[half]);
        }
    }
    add(&mut out[0], sums);
}

/// The sum of the activations that have minimum `group` of `M` in common.
#[inline(always)]
pub(super) fn sum_of<const R: usize, const M: usize>(
    sums: &Sums<R>,
    row: usize,
    group: usize,
) -> f32 {
    match (M, group) {
        (1, _) => sums.all[row],
        (_, 0) => sums.all[row] - sums.second[row],
        _ => sums.second[row],
    }
}

#[inline(always)]
pub(super) fn word(four: [i8; 4]) -> i32 {
    i32::from_le_bytes(four.map(i8::cast_unsigned))
}

/// Four neighbours of each output of a panel: those of its first 16 outputs, and of the others.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn halves(weights: &[Word; PANEL]) -> [__m512i; 2] {
    let start = weights.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 64 bytes that are read.
    unsafe {
        [_mm512_loadu_si512(start.cast()), _mm512_loadu_si512(start.add(LANES).cast())]
    }
}

/// Adds the sums of a tile of rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add_rows<const R: usize>(out: &mut PanelRows<R>, sums: [[__m512; 2]; R]) {
    for (out, sums) in out.iter_mut().zip(sums) {
        add(out, sums);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add(out: &mut [f32; PANEL], sums: [__m512; 2]) {
    let old = half_numbers(out);
    let new = [_mm512_add_ps(old[0], sums[0]), _mm512_add_ps(old[1], sums[1])];
    *out = bytemuck::cast(new);
}

/// Numbers of 16 bits, one for each output of a panel: those of its first 16 outputs, and of the others.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn wide_halves(numbers: &Halves) -> [__m512; 2] {
    let start = numbers.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 16 numbers of 2 bytes that are read.
    let (low, high) =
        unsafe { (_mm256_loadu_si256(start.cast()), _mm256_loadu_si256(start.add(LANES).cast())) };
    [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn half_numbers(numbers: &[f32; PANEL]) -> [__m512; 2] {
    let start = numbers.as_ptr();
    #[expect(unsafe_code, reason = "unaligned loads")]
    // SAFETY: the array holds the two times 16 numbers that are read.
    unsafe {
        [_mm512_loadu_ps(start), _mm512_loadu_ps(start.add(LANES))]
    }
}
