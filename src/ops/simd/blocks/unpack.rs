//! Blocks of every format as bytes with one scale, and minimums where a format has them.
//!
//! A weight is `scale · (u − 128) − min`. The compiler also builds these for wider registers, in
//! [`super::x86`].

use half::f16;

use super::{
    FOURS, PANEL, Unpacked,
    format::{BlockFormat, PanelBlock, Word},
};

/// What an index of four bits stands for in IQ4_NL and IQ4_XS, plus 128.
pub(super) const TABLE: [u8; 16] =
    [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// Numbers of 16 bits, one for each output.
pub(super) type Halves = [[u8; 2]; PANEL];
type Fours = [[Word; PANEL]; FOURS];
const HALF_FOURS: usize = FOURS.div_euclid(2);
const EACH_BYTE: u32 = 0x0101_0101;

/// The weights of one block of each output of a panel. `wide` widens numbers of 16 bits, and
/// `table` replaces each byte `i` by `TABLE[i]`.
#[inline(always)]
pub(super) fn unpack(
    format: BlockFormat,
    block: PanelBlock<'_>,
    out: &mut [Unpacked],
    wide: impl Fn(&Halves) -> [f32; PANEL],
    table: impl Fn(&mut [u8]),
) {
    let d = wide(&block.halves[0]);
    let second = block.halves.get(1).map_or([0.0; PANEL], wide);
    match format {
        BlockFormat::Q8_0 => {
            out[0].weights.as_flattened_mut().copy_from_slice(block.words.as_flattened());
            out[0].scales[0] = d;
        }
        BlockFormat::Q4_0 => {
            nibbles(block.words, &mut out[0].weights, |q| q + 120);
            out[0].scales[0] = d;
        }
        BlockFormat::Iq4Nl => {
            nibbles(block.words, &mut out[0].weights, |q| q);
            table(bytes(&mut out[0].weights));
            out[0].scales[0] = d;
        }
        BlockFormat::Q4_1 => {
            nibbles(block.words, &mut out[0].weights, |q| q | 128);
            out[0].scales[0] = d;
            out[0].mins[0] = second.map(|min| -min);
        }
        BlockFormat::Q5_0 => {
            nibbles(&block.words[1..], &mut out[0].weights, |q| q);
            fifth_bits(&block.words[0], &mut out[0].weights, |q| q + 112);
            out[0].scales[0] = d;
        }
        BlockFormat::Q5_1 => {
            nibbles(&block.words[1..], &mut out[0].weights, |q| q);
            fifth_bits(&block.words[0], &mut out[0].weights, |q| q | 128);
            out[0].scales[0] = d;
            out[0].mins[0] = second.map(|min| -min);
        }
        BlockFormat::Q4K => q4_k(block, [&d, &second], out),
        BlockFormat::Q5K => q5_k(block, [&d, &second], out),
        BlockFormat::Q6K => q6_k(block, &d, out),
        BlockFormat::Q3K => q3_k(block, &d, out),
        BlockFormat::Q2K => q2_k(block, [&d, &second], out),
        BlockFormat::Iq4Xs => {
            for (nibbles_of, out) in block.words[1..].chunks_exact(HALF_FOURS).zip(&mut *out) {
                nibbles(nibbles_of, &mut out.weights, |q| q);
                table(bytes(&mut out.weights));
            }
            iq4_xs_scales(block, &d, out);
        }
    }
}

fn bytes(weights: &mut Fours) -> &mut [u8] {
    weights.as_flattened_mut().as_flattened_mut()
}

/// `to = f(from)`, byte by byte.
#[inline(always)]
fn map(to: &mut [Word; PANEL], from: &[Word; PANEL], f: impl Fn(u8) -> u8) {
    let to = to.as_flattened_mut().iter_mut();
    to.zip(from.as_flattened()).for_each(|(to, from)| *to = f(*from));
}

/// `to = f(to, from)`, byte by byte.
#[inline(always)]
fn merge(to: &mut [Word; PANEL], from: &[Word; PANEL], f: impl Fn(u8, u8) -> u8) {
    let to = to.as_flattened_mut().iter_mut();
    to.zip(from.as_flattened()).for_each(|(to, from)| *to = f(*to, *from));
}

pub(super) fn wide(halves: &Halves) -> [f32; PANEL] {
    halves.map(|half| f16::from_le_bytes(half).to_f32())
}

/// 32 weights of 16 bytes: low nibbles are the first half's.
#[inline(always)]
fn nibbles(words: &[[Word; PANEL]], out: &mut Fours, f: impl Fn(u8) -> u8) {
    let (low, high) = out.split_at_mut(HALF_FOURS);
    for ((low, high), words) in low.iter_mut().zip(high).zip(words) {
        map(low, words, |x| f(x & 15));
        map(high, words, |x| f(x >> 4));
    }
}

/// Adds the fifth bits of 32 weights, one bit after the other in `bits`; then `f`.
#[inline(always)]
fn fifth_bits(bits: &[Word; PANEL], out: &mut Fours, f: impl Fn(u8) -> u8) {
    for (shift, out) in (0..32).step_by(4).zip(out) {
        let mut spread = [[0; 4]; PANEL];
        for (spread, bits) in spread.iter_mut().zip(bits) {
            // Four neighbouring bits, one into each byte.
            let four = u32::from_le_bytes(*bits) >> shift & 15;
            *spread = (four.wrapping_mul(0x0020_4081) & EACH_BYTE).to_le_bytes();
        }
        merge(out, &spread, |x, bit| f(x | bit << 4));
    }
}

/// Scales and minimums of six bits, in twelve bytes for each output.
#[inline(always)]
fn six_bits(block: PanelBlock<'_>, [d, dmin]: [&[f32; PANEL]; 2], out: &mut [Unpacked]) {
    let words = |i: usize| block.words[i].map(u32::from_le_bytes);
    let [first, second, rest] = [words(0), words(1), words(2)];
    let (lower, upper) = out.split_at_mut(4);
    for (shift, (lower, upper)) in (0..32).step_by(8).zip(lower.iter_mut().zip(upper)) {
        for output in 0..PANEL {
            let byte = |words: &[u32; PANEL]| words[output] >> shift;
            let (first, second, rest) = (byte(&first), byte(&second), byte(&rest));
            let (d, dmin) = (d[output], dmin[output]);
            // The upper four's two highest bits are the lower four's spare ones.
            lower.scales[0][output] = d * small(first & 63);
            lower.mins[0][output] = dmin * small(second & 63);
            upper.scales[0][output] = d * small(rest & 15 | first >> 2 & 48);
            upper.mins[0][output] = dmin * small(rest >> 4 & 15 | second >> 2 & 48);
        }
    }
}

/// A number of a few bits.
#[inline(always)]
#[expect(clippy::cast_precision_loss, clippy::cast_possible_wrap, reason = "exact")]
fn small(bits: u32) -> f32 {
    // As a signed number, since all processors convert those in registers.
    bits as i32 as f32
}

#[inline(always)]
fn q4_k(block: PanelBlock<'_>, factors: [&[f32; PANEL]; 2], out: &mut [Unpacked]) {
    let pairs = out.as_chunks_mut::<2>().0.iter_mut();
    for ([low, high], words) in pairs.zip(block.words[3..].chunks_exact(FOURS)) {
        for (four, words) in words.iter().enumerate() {
            map(&mut low.weights[four], words, |x| x & 15 | 128);
            map(&mut high.weights[four], words, |x| x >> 4 | 128);
        }
    }
    six_bits(block, factors, out);
}

#[inline(always)]
fn q5_k(block: PanelBlock<'_>, factors: [&[f32; PANEL]; 2], out: &mut [Unpacked]) {
    let (fifth, rest) = block.words[3..].split_at(FOURS);
    let pairs = out.as_chunks_mut::<2>().0.iter_mut();
    for (pair, ([low, high], words)) in pairs.zip(rest.chunks_exact(FOURS)).enumerate() {
        for (four, (words, fifth)) in words.iter().zip(fifth).enumerate() {
            map(&mut low.weights[four], words, |x| x & 15 | 128);
            merge(&mut low.weights[four], fifth, |x, bits| x | (bits >> (2 * pair) & 1) << 4);
            map(&mut high.weights[four], words, |x| x >> 4 | 128);
            merge(&mut high.weights[four], fifth, |x, bits| x | (bits >> (2 * pair + 1) & 1) << 4);
        }
    }
    six_bits(block, factors, out);
}

#[inline(always)]
fn q6_k(block: PanelBlock<'_>, d: &[f32; PANEL], out: &mut [Unpacked]) {
    let (low, rest) = block.words.split_at(4 * FOURS);
    let (high, scales) = rest.split_at(2 * FOURS);
    for (i, out) in out.iter_mut().enumerate() {
        // Half a block is four times 32 weights: two lots of low nibbles, then of high ones.
        let (half, quarter) = (i >> 2, i & 3);
        let low = &low[(2 * half + (quarter & 1)) * FOURS..][..FOURS];
        let high = &high[half * FOURS..][..FOURS];
        for ((weights, low), high) in out.weights.iter_mut().zip(low).zip(high) {
            map(weights, low, |x| x >> (4 * (quarter >> 1)) & 15);
            merge(weights, high, |x, bits| (x | (bits >> (2 * quarter) & 3) << 4) + 96);
        }
        for (group, out) in out.scales.iter_mut().enumerate() {
            let (scales, byte) = (&scales[i >> 1], 2 * (i & 1) + group);
            for (out, (scale, d)) in out.iter_mut().zip(scales.iter().zip(d)) {
                *out = d * f32::from(scale[byte].cast_signed());
            }
        }
    }
}

/// Four bytes at a time.
#[inline(always)]
fn map_words(words: &mut [Word; PANEL], f: impl Fn(usize, u32) -> u32) {
    for (output, word) in words.iter_mut().enumerate() {
        *word = f(output, u32::from_le_bytes(*word)).to_le_bytes();
    }
}

/// Scales are multiplied in, with the sign turned so that the result fits a byte: `w = −d · −(s · q)`.
///
/// With `s + 32` and `q + 4` as they are stored, `128 − s · q = (q + 4)(−s) + 4 (s + 32)`, or where
/// `s` is positive `(3 − q) s + 128 − 3 s`; so four bytes are multiplied at once without a carry.
#[inline(always)]
fn q3_k(block: PanelBlock<'_>, d: &[f32; PANEL], out: &mut [Unpacked]) {
    let (masks, rest) = block.words.split_at(FOURS);
    let (low, packed) = rest.split_at(2 * FOURS);
    let packed = [&packed[0], &packed[1], &packed[2]].map(|words| words.map(u32::from_le_bytes));
    let d = d.map(|d| -d);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, shift) = (i >> 2, 2 * (i & 3));
        let low = &low[half * FOURS..][..FOURS];
        for (weights, (low, mask)) in out.weights.iter_mut().zip(low.iter().zip(masks)) {
            map(weights, low, |x| x >> shift & 3);
            merge(weights, mask, |x, bits| x | (bits >> i & 1) << 2);
        }
        for (group, weights) in out.weights.chunks_exact_mut(HALF_FOURS).enumerate() {
            // The scale's place: of 16 bytes in four words, low and high halves of bits apart.
            let (word, byte) = (i >> 1, 8 * (2 * (i & 1) + group));
            let mut factors = [[0_u32; PANEL]; 3];
            for output in 0..PANEL {
                let four = packed[word & 1][output] >> (byte + 4 * (word >> 1)) & 15;
                let stored = four | (packed[2][output] >> (byte + 2 * word) & 3) << 4;
                let is_positive = u32::from(stored > 32);
                factors[0][output] = is_positive * 7 * EACH_BYTE;
                factors[1][output] = stored.abs_diff(32);
                let base = if stored > 32 { 224 - 3 * stored } else { 4 * stored };
                factors[2][output] = base * EACH_BYTE;
            }
            let [flips, scales, bases] = &factors;
            for weights in weights {
                map_words(weights, |i, q| ((q ^ flips[i]) * scales[i]).wrapping_add(bases[i]));
            }
        }
        out.scales[0] = d;
    }
}

/// Scales are multiplied in: at most `15 · 3`.
#[inline(always)]
fn q2_k(block: PanelBlock<'_>, [d, dmin]: [&[f32; PANEL]; 2], out: &mut [Unpacked]) {
    let (packed, low) = block.words.split_at(4);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, shift) = (i >> 2, 2 * (i & 3));
        let low = &low[half * FOURS..][..FOURS];
        for (weights, low) in out.weights.iter_mut().zip(low) {
            map(weights, low, |x| x >> shift & 3);
        }
        let packed = &packed[i >> 1];
        let groups = out.weights.chunks_exact_mut(HALF_FOURS).zip(&mut out.mins);
        for (group, (weights, mins)) in groups.enumerate() {
            let byte = 2 * (i & 1) + group;
            let mut scales = [[0; 4]; PANEL];
            for (scales, packed) in scales.iter_mut().zip(packed) {
                *scales = [packed[byte] & 15; 4];
            }
            // Byte by byte over all outputs: so the compiler finds the registers' direction.
            for weights in weights {
                merge(weights, &scales, |q, scale| q.wrapping_mul(scale) | 128);
            }
            for (min, (packed, dmin)) in mins.iter_mut().zip(packed.iter().zip(dmin)) {
                *min = dmin * f32::from(packed[byte] >> 4);
            }
        }
        out.scales[0] = *d;
    }
}

#[inline(always)]
fn iq4_xs_scales(block: PanelBlock<'_>, d: &[f32; PANEL], out: &mut [Unpacked]) {
    let high = block.halves[1].map(u16::from_le_bytes);
    let low = &block.words[0];
    for (i, out) in out.iter_mut().enumerate() {
        for output in 0..PANEL {
            let low = u16::from(low[output][i >> 1] >> (4 * (i & 1)) & 15);
            let scale = low | (high[output] >> (2 * i) & 3) << 4;
            out.scales[0][output] = d[output] * (f32::from(scale) - 32.0);
        }
    }
}
