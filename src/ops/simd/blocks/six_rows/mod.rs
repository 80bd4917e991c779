//! Tiles of six rows with AVX-512 VNNI, in assembly where a compiler falls short: weights of four and five
//! bits, and formats with a scale for each half of a block.
//!
//! **Pairs: two products by one multiplication.** With neighbours `x, x'` and their weights `y, y'`,
//! `x y + x' y' = (x' + y)(x + y') − x x' − y y'` (S. Winograd, 1968). The products `x x'` belong to a
//! row and `y y'` to an output, so that each is summed once; what is left for every row and output is
//! one multiplication and two additions. The units that multiply are the narrow place and two others
//! add, but four additions for two multiplications would keep all four busy for as long. So the first
//! [`PLAIN_ROWS`] rows of a tile are multiplied as usual, and the others in pairs.
//!
//! Sums must fit a byte: weights are centered, `y = q − 8` (or `q − 16`), and activations rounded to
//! ±120 (±112) instead of ±127. The instruction multiplies unsigned by signed bytes, `x' + y + 128` by
//! `x + y'`. Bytes wrap, so that both weights can be kept as `u = y + 128` where `x` of the paired rows
//! is kept with its sign bit turned.

#[macro_use]
mod assembly;

use std::{
    arch::{
        asm,
        x86_64::{
            _mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_ps, _mm512_setzero_si512,
            _mm512_sub_epi8, _mm512_sub_epi32, _mm512_xor_si512,
        },
    },
    mem::offset_of,
    ptr,
};

use half::f16;

use super::{
    PanelRows, TILE_ROWS, Unpacked,
    activations::{BLOCKS, PLAIN_ROWS, RowBlock, Sums, SuperSums, TileBlocks},
    format::{BlockFormat, FewBits, PanelBlock},
    unpack,
    x86::{add_rows, halves, replace, subtract_mins, wide, with_instructions},
};

// The rows that the assembly below multiplies in pairs.
const _: () = assert!(PLAIN_ROWS == 3 && TILE_ROWS == 6);

with_instructions! {
    /// [`unpack::unpack`] with centered weights, and what their pairs need.
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c" unpack_centered_512(
        format: BlockFormat, bits: FewBits, block: PanelBlock<'_>, out: &mut [Unpacked]
    ) {
        unpack::unpack(format, block, out, |x| wide(x), |x| replace(x));
        out.iter_mut().for_each(|out| center_512(bits.above_center(), out));
        if format.has_super_blocks() {
            stored_mins(block, out);
        }
    }
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx512f,avx512bw,avx512vnni" add_paired_tile_512<M>(
        panel: &[Unpacked], x: TileBlocks<'_, TILE_ROWS>, out: &mut PanelRows<TILE_ROWS>
    ) {
        paired_tile_512::<M>(panel, x, out);
    }
    /// Adds the product of a tile of rows with a panel of outputs whose half blocks have scales.
    "avx512f,avx512bw,avx512vnni" add_half_scaled_tile_512(
        panel: &[Unpacked], x: TileBlocks<'_, TILE_ROWS>, out: &mut PanelRows<TILE_ROWS>
    ) {
        half_scaled_tile_512(panel, x, out);
    }
    /// [`add_paired_tile_512`] of super-blocks.
    "avx512f,avx512bw,avx512vnni" add_super_tile_512(
        panel: &[Unpacked], x: TileBlocks<'_, TILE_ROWS>, out: &mut PanelRows<TILE_ROWS>
    ) {
        super_tile_512(panel, x, out);
    }
}

/// Makes weights `by` less, and sums up the products of neighbours.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn center_512(by: u8, out: &mut Unpacked) {
    let (by, sign) = (_mm512_set1_epi8(by.cast_signed()), _mm512_set1_epi8(i8::MIN));
    let mut products = [_mm512_setzero_si512(); 2];
    for pair in out.weights.as_chunks_mut::<2>().0 {
        let ([a, b], [c, d]) = (halves(&pair[0]), halves(&pair[1]));
        let first = [_mm512_sub_epi8(a, by), _mm512_sub_epi8(b, by)];
        let second = [_mm512_sub_epi8(c, by), _mm512_sub_epi8(d, by)];
        for half in 0..2 {
            let signed = _mm512_xor_si512(second[half], sign);
            products[half] = _mm512_dpbusd_epi32(products[half], first[half], signed);
        }
        *pair = [bytemuck::cast(first), bytemuck::cast(second)];
    }
    let zero = _mm512_setzero_si512();
    let [first, second] = products;
    out.starts = bytemuck::cast([_mm512_sub_epi32(zero, first), _mm512_sub_epi32(zero, second)]);
}

/// The minimums of a super-block as they are stored, and what they are multiplied with.
#[inline(always)]
fn stored_mins(block: PanelBlock<'_>, out: &mut [Unpacked]) {
    if let Some(first) = out.first_mut() {
        *first.min_factor() = block.halves[1].map(|dmin| f16::from_le_bytes(dmin).to_f32());
    }
    // Four minimums in the bytes of a word: those of the leading blocks, and those of the others.
    for (i, out) in out.iter_mut().take(BLOCKS.div_euclid(2)).enumerate() {
        for (output, mins) in out.stored_mins.iter_mut().enumerate() {
            let word = |i: usize| u32::from_le_bytes(block.words[i][output]);
            let four = match i {
                0 | 1 => word(1) & 0x3f3f_3f3f,
                _ => word(2) >> 4 & 0x0f0f_0f0f | word(1) >> 2 & 0x3030_3030,
            };
            let two = four >> (16 * (i & 1));
            *mins = bytemuck::cast((two & 0xff) | (two << 8 & 0x00ff_0000));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn paired_tile_512<const M: usize>(
    panel: &[Unpacked],
    x: TileBlocks<'_, TILE_ROWS>,
    out: &mut PanelRows<TILE_ROWS>,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
    for (panel, (x, parts)) in panel.iter().zip(x.blocks.iter().zip(x.sums)) {
        #[expect(unsafe_code, reason = "assembly")]
        // SAFETY: it reads both structs, at the offsets of their fields, and writes registers.
        unsafe {
            add_block!(panel, x, sums);
        }
        subtract_mins::<TILE_ROWS, M>(&mut sums, panel, parts);
    }
    add_rows(out, sums);
}

/// Minimums of six bits are multiplied with the sums of eight blocks as integers, which needs the
/// units that multiply for five instructions instead of eight.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn super_tile_512(
    panel: &[Unpacked],
    x: TileBlocks<'_, TILE_ROWS>,
    out: &mut PanelRows<TILE_ROWS>,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
    // One loop over all blocks, which the compiler does not unroll eight times over.
    for (i, (block, x_block)) in panel.iter().zip(x.blocks).enumerate() {
        #[expect(unsafe_code, reason = "assembly")]
        // SAFETY: it reads both structs, at the offsets of their fields, and writes registers.
        unsafe {
            add_block!(block, x_block, sums);
        }
        if i % BLOCKS < BLOCKS - 1 {
            continue;
        }
        let (blocks, parts) = (&panel[i + 1 - BLOCKS..=i], &x.super_sums[i.div_euclid(BLOCKS)]);
        #[expect(unsafe_code, reason = "assembly")]
        // SAFETY: as above; of the slice's eight blocks it reads the leading four.
        unsafe {
            subtract_super_mins!(blocks, parts, sums);
        }
    }
    add_rows(out, sums);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn half_scaled_tile_512(
    panel: &[Unpacked],
    x: TileBlocks<'_, TILE_ROWS>,
    out: &mut PanelRows<TILE_ROWS>,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
    for (panel, (x, parts)) in panel.iter().zip(x.blocks.iter().zip(x.sums)) {
        #[expect(unsafe_code, reason = "assembly")]
        // SAFETY: it reads the three structs, at the offsets of their fields, and writes registers.
        unsafe {
            add_halves!(panel, x, parts, sums);
        }
    }
    add_rows(out, sums);
}
