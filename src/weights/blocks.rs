//! Blocks of four-bit indices into a fixed table, IQ4_NL and IQ4_XS, which candle does not have.

use half::f16;

/// What an index of four bits stands for, before its block's scale.
const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Numbers of a block of IQ4_NL and of Q8_0, and of a part of IQ4_XS.
const PART: usize = 32;
const HALF: usize = PART >> 1;
/// Bytes of a block of IQ4_NL: scale, indices.
const NL_BYTES: usize = 2 + HALF;
/// Bytes of a block of IQ4_XS: scale, high bits and low bits of the parts' scales, indices.
const XS_BYTES: usize = 2 + 2 + 4 + XS_PARTS * HALF;
const XS_PARTS: usize = 8;
const Q8_0_BYTES: usize = 2 + PART;

/// The numbers of IQ4_NL blocks.
pub(super) fn widen_iq4_nl(blocks: &[u8]) -> Vec<f32> {
    let blocks = blocks.chunks_exact(NL_BYTES);
    blocks.flat_map(|block| widened(scale(block).to_f32(), &block[2..])).collect()
}

/// The numbers of IQ4_XS blocks.
pub(super) fn widen_iq4_xs(blocks: &[u8]) -> Vec<f32> {
    let blocks = blocks.chunks_exact(XS_BYTES);
    blocks.flat_map(|block| xs_parts(block).flat_map(|(d, part)| widened(d, part))).collect()
}

/// IQ4_NL as Q8_0: the table's values are whole numbers, so nothing is lost.
pub(super) fn q8_0_from_iq4_nl(blocks: &[u8]) -> Vec<u8> {
    let blocks = blocks.chunks_exact(NL_BYTES);
    let mut out = Vec::with_capacity(blocks.len() * Q8_0_BYTES);
    for block in blocks {
        push_q8_0(scale(block), &block[2..], &mut out);
    }
    out
}

/// IQ4_XS as Q8_0: each part's scale is rounded to f16, a relative 2⁻¹¹ at most; `None` where one
/// is beyond f16.
pub(super) fn q8_0_from_iq4_xs(blocks: &[u8]) -> Option<Vec<u8>> {
    let blocks = blocks.chunks_exact(XS_BYTES);
    let mut out = Vec::with_capacity(blocks.len() * XS_PARTS * Q8_0_BYTES);
    for block in blocks {
        for (d, part) in xs_parts(block) {
            let rounded = f16::from_f32(d);
            if d.is_finite() && rounded.is_infinite() {
                return None;
            }
            push_q8_0(rounded, part, &mut out);
        }
    }
    Some(out)
}

fn scale(block: &[u8]) -> f16 {
    f16::from_le_bytes([block[0], block[1]])
}

/// Scale and indices of each part of an IQ4_XS block.
fn xs_parts(block: &[u8]) -> impl Iterator<Item = (f32, &[u8])> {
    let d = scale(block).to_f32();
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (low, indices) = block[4..].split_at(4);
    indices.chunks_exact(HALF).enumerate().map(move |(part, indices)| {
        let low = low[part >> 1] >> (4 * (part & 1)) & 0x0f;
        let high = (high >> (2 * part) & 0x03) << 4;
        let scale = f32::from(u16::from(low) | high) - 32.0;
        (d * scale, indices)
    })
}

/// Low halves of the bytes first, then their high halves.
fn values(indices: &[u8]) -> impl Iterator<Item = i8> {
    let low = indices.iter().map(|byte| VALUES[usize::from(byte & 0x0f)]);
    low.chain(indices.iter().map(|byte| VALUES[usize::from(byte >> 4)]))
}

fn widened(d: f32, indices: &[u8]) -> impl Iterator<Item = f32> {
    values(indices).map(move |value| d * f32::from(value))
}

fn push_q8_0(d: f16, indices: &[u8], out: &mut Vec<u8>) {
    out.extend(d.to_le_bytes());
    out.extend(values(indices).map(i8::cast_unsigned));
}
