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
    let bits: [u32; PANEL] = bits.map(u32::from_le_bytes);
    for (shift, out) in (0..32).step_by(4).zip(out) {
        for (out, bits) in out.iter_mut().zip(bits) {
            // Four neighbouring bits, one into each byte.
            let spread = (bits >> shift & 15).wrapping_mul(0x0020_4081) & 0x0101_0101;
            *out = (u32::from_le_bytes(*out) | spread << 4).to_le_bytes();
        }
        out.as_flattened_mut().iter_mut().for_each(|x| *x = f(*x));
    }
}

/// Scales and minimums of six bits, in twelve bytes for each output.
#[inline(always)]
fn six_bits(block: PanelBlock<'_>, [d, dmin]: [&[f32; PANEL]; 2], out: &mut [Unpacked]) {
    let [first, second, rest] = [&block.words[0], &block.words[1], &block.words[2]];
    let (lower, upper) = out.split_at_mut(4);
    for (i, (lower, upper)) in lower.iter_mut().zip(upper).enumerate() {
        for output in 0..PANEL {
            let (first, second, rest) = (first[output][i], second[output][i], rest[output][i]);
            let (d, dmin) = (d[output], dmin[output]);
            // The upper four's two highest bits are the lower four's spare ones.
            lower.scales[0][output] = d * f32::from(first & 63);
            lower.mins[0][output] = dmin * f32::from(second & 63);
            upper.scales[0][output] = d * f32::from(rest & 15 | first >> 6 << 4);
            upper.mins[0][output] = dmin * f32::from(rest >> 4 | second >> 6 << 4);
        }
    }
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

/// Scales are multiplied in, with the sign turned so that the result fits a byte: `w = −d · −(s · q)`.
#[inline(always)]
fn q3_k(block: PanelBlock<'_>, d: &[f32; PANEL], out: &mut [Unpacked]) {
    let (masks, rest) = block.words.split_at(FOURS);
    let (low, packed) = rest.split_at(2 * FOURS);
    let d = d.map(|d| -d);
    // `[group of four][output]`: the scale of each of 16 groups, plus 32.
    let mut scales = [[[0_u8; 4]; PANEL]; 4];
    for output in 0..PANEL {
        for byte in 0..4 {
            let two = packed[2][output][byte];
            for (i, scales) in scales.iter_mut().enumerate() {
                let four = packed[i & 1][output][byte] >> (4 * (i >> 1)) & 15;
                scales[output][byte] = four | (two >> (2 * i) & 3) << 4;
            }
        }
    }
    for (i, out) in out.iter_mut().enumerate() {
        let (half, shift) = (i >> 2, 2 * (i & 3));
        let low = &low[half * FOURS..][..FOURS];
        for (four, (weights, (low, mask))) in
            out.weights.iter_mut().zip(low.iter().zip(masks)).enumerate()
        {
            map(weights, low, |x| x >> shift & 3);
            // A bit that is not set takes four away.
            merge(weights, mask, |x, bits| x.wrapping_add(bits >> i << 2 & 4).wrapping_sub(4));
            let (scales, byte) = (&scales[i >> 1], 2 * (i & 1) + (four >> 2));
            for (weights, scales) in weights.iter_mut().zip(scales) {
                let scale = scales[byte].wrapping_sub(32);
                *weights = weights.map(|q| 128_u8.wrapping_sub(q.wrapping_mul(scale)));
            }
        }
        out.scales[0] = d;
    }
}

/// Scales are multiplied in: at most `15 · 3`.
#[inline(always)]
fn q2_k(block: PanelBlock<'_>, [d, dmin]: [&[f32; PANEL]; 2], out: &mut [Unpacked]) {
    let (scales, low) = block.words.split_at(4);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, shift) = (i >> 2, 2 * (i & 3));
        let low = &low[half * FOURS..][..FOURS];
        for (four, (weights, low)) in out.weights.iter_mut().zip(low).enumerate() {
            map(weights, low, |x| x >> shift & 3);
            let (scales, byte) = (&scales[i >> 1], 2 * (i & 1) + (four >> 2));
            for (weights, scales) in weights.iter_mut().zip(scales) {
                let scale = scales[byte] & 15;
                *weights = weights.map(|q| q.wrapping_mul(scale) | 128);
            }
        }
        out.scales[0] = *d;
        for (group, mins) in out.mins.iter_mut().enumerate() {
            let (scales, byte) = (&scales[i >> 1], 2 * (i & 1) + group);
            for (min, (scale, dmin)) in mins.iter_mut().zip(scales.iter().zip(dmin)) {
                *min = dmin * f32::from(scale[byte] >> 4);
            }
        }
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
