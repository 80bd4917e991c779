//! Two products by one multiplication, for weights of four and five bits.
//!
//! With neighbours `x, x'` and their weights `y, y'`,
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

use std::{
    arch::{
        asm,
        x86_64::{
            _mm512_dpbusd_epi32, _mm512_fnmadd_ps, _mm512_set1_epi8, _mm512_set1_ps,
            _mm512_setzero_ps, _mm512_setzero_si512, _mm512_sub_epi8, _mm512_sub_epi32,
            _mm512_xor_si512,
        },
    },
    mem::offset_of,
    ptr,
};

use super::{
    super::q4k::halves,
    PanelRows, TILE_ROWS, Unpacked,
    activations::{PLAIN_ROWS, RowBlock, Sums},
    format::{BlockFormat, PanelBlock},
    unpack,
    x86::{add, half_numbers, replace, wide, with_instructions},
};

// The rows that the assembly below multiplies in pairs.
const _: () = assert!(PLAIN_ROWS == 3 && TILE_ROWS == 6);

with_instructions! {
    /// [`unpack::unpack`] with centered weights, and what their pairs need.
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c" unpack_centered_512(
        format: BlockFormat, block: PanelBlock<'_>, out: &mut [Unpacked]
    ) {
        unpack::unpack(format, block, out, |x| wide(x), |x| replace(x));
        let center = format.center().unwrap_or(0);
        out.iter_mut().for_each(|out| center_512(format, center, out));
    }
    /// Adds the product of a tile of rows with a panel of outputs.
    "avx512f,avx512bw,avx512vnni" add_paired_tile_512<M>(
        panel: &[Unpacked],
        x: (&[RowBlock<TILE_ROWS>], &[Sums<TILE_ROWS>]),
        out: &mut PanelRows<TILE_ROWS>
    ) {
        paired_tile_512::<M>(panel, x, out);
    }
}

/// Turns `u = q + 128`, of formats with a minimum, into `q − center + 128`, and sums up the products
/// of neighbours.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn center_512(format: BlockFormat, center: u8, out: &mut Unpacked) {
    let has_min = format.groups().1 == 1;
    if has_min {
        let mins = out.mins[0].iter_mut().zip(&out.scales[0]);
        mins.for_each(|(min, scale)| *min -= f32::from(center) * scale);
    }
    let (by, sign) = (_mm512_set1_epi8(center.cast_signed()), _mm512_set1_epi8(i8::MIN));
    let mut products = [_mm512_setzero_si512(); 2];
    for pair in out.weights.as_chunks_mut::<2>().0 {
        if has_min {
            for weights in pair.iter_mut() {
                let [first, second] = halves(weights);
                let centered = [_mm512_sub_epi8(first, by), _mm512_sub_epi8(second, by)];
                *weights = bytemuck::cast(centered);
            }
        }
        let (first, second) = (halves(&pair[0]), halves(&pair[1]));
        for half in 0..2 {
            let signed = _mm512_xor_si512(second[half], sign);
            products[half] = _mm512_dpbusd_epi32(products[half], first[half], signed);
        }
    }
    let zero = _mm512_setzero_si512();
    let [first, second] = products;
    out.starts = bytemuck::cast([_mm512_sub_epi32(zero, first), _mm512_sub_epi32(zero, second)]);
}

// A tile's product with one block is written in assembly, because a compiler moves the rows apart and
// then runs out of registers. All 32 are in use: 0 to 11 count (two for each row), 12 to 23 sum up in
// float32 (likewise), 24 to 27 hold weights, 28 to 31 activations. Rows are named by their number and
// their first registers.

/// Loads the weights of neighbours, of both halves of a panel.
macro_rules! weights {
    ($pair:literal) => {
        concat!(
            "vmovdqa64 zmm24, zmmword ptr [{panel} + 256*", $pair, "]\n",
            "vmovdqa64 zmm25, zmmword ptr [{panel} + 256*", $pair, " + 64]\n",
            "vmovdqa64 zmm26, zmmword ptr [{panel} + 256*", $pair, " + 128]\n",
            "vmovdqa64 zmm27, zmmword ptr [{panel} + 256*", $pair, " + 192]\n",
        )
    };
}

/// Loads neighbours of a row.
macro_rules! values {
    ($row:literal, $pair:literal) => {
        concat!(
            "vpbroadcastd zmm28, dword ptr [{x} + 32*", $row, " + 8*", $pair, "]\n",
            "vpbroadcastd zmm29, dword ptr [{x} + 32*", $row, " + 8*", $pair, " + 4]\n",
        )
    };
}

/// Multiplies both neighbours of a row.
macro_rules! plain {
    ($row:literal: $c0:literal $c1:literal, $pair:literal) => {
        concat!(
            values!($row, $pair),
            "vpdpbusd zmm", $c0, ", zmm24, zmm28\n",
            "vpdpbusd zmm", $c1, ", zmm25, zmm28\n",
            "vpdpbusd zmm", $c0, ", zmm26, zmm29\n",
            "vpdpbusd zmm", $c1, ", zmm27, zmm29\n",
        )
    };
}

/// Multiplies the sums of neighbours of a row.
macro_rules! paired {
    ($row:literal: $c0:literal $c1:literal, $pair:literal) => {
        concat!(
            values!($row, $pair),
            "vpaddb zmm30, zmm24, zmm29\n",
            "vpaddb zmm31, zmm26, zmm28\n",
            "vpdpbusd zmm", $c0, ", zmm30, zmm31\n",
            "vpaddb zmm29, zmm25, zmm29\n",
            "vpaddb zmm28, zmm27, zmm28\n",
            "vpdpbusd zmm", $c1, ", zmm29, zmm28\n",
        )
    };
}

/// All rows, in an order that gives every unit work at any time.
macro_rules! multiplied {
    ($pair:literal) => {
        concat!(
            weights!($pair),
            plain!(0: 0 1, $pair), paired!(5: 10 11, $pair), plain!(1: 2 3, $pair),
            paired!(4: 8 9, $pair), plain!(2: 4 5, $pair), paired!(3: 6 7, $pair),
        )
    };
}

/// What the counts of a plain row start from.
macro_rules! plain_start {
    ($row:literal: $c0:literal $c1:literal) => {
        concat!(
            "vpbroadcastd zmm", $c0, ", dword ptr [{x} + {starts} + 4*", $row, "]\n",
            "vmovdqa64 zmm", $c1, ", zmm", $c0, "\n",
        )
    };
}

/// What the counts of a paired row start from.
macro_rules! paired_start {
    ($row:literal: $c0:literal $c1:literal) => {
        concat!(
            "vpbroadcastd zmm28, dword ptr [{x} + {starts} + 4*", $row, "]\n",
            "vpaddd zmm", $c0, ", zmm28, zmmword ptr [{panel} + {output_starts}]\n",
            "vpaddd zmm", $c1, ", zmm28, zmmword ptr [{panel} + {output_starts} + 64]\n",
        )
    };
}

/// Adds a row's counts, as float32 times its power of two and the scales, to its sums.
macro_rules! scaled {
    ($row:literal: $c0:literal $c1:literal, $s0:literal $s1:literal) => {
        concat!(
            "vpbroadcastd zmm28, dword ptr [{x} + {exponents} + 4*", $row, "]\n",
            "vcvtdq2ps zmm", $c0, ", zmm", $c0, "\n",
            "vcvtdq2ps zmm", $c1, ", zmm", $c1, "\n",
            "vpaddd zmm", $c0, ", zmm28, zmm", $c0, "\n",
            "vpaddd zmm", $c1, ", zmm28, zmm", $c1, "\n",
            "vfmadd231ps zmm", $s0, ", zmm24, zmm", $c0, "\n",
            "vfmadd231ps zmm", $s1, ", zmm25, zmm", $c1, "\n",
        )
    };
}

/// Adds a tile's product with a block, but for minimums.
macro_rules! add_block {
    ($panel:ident, $x:ident, $sums:ident) => {
        asm!(
            concat!(plain_start!(0: 0 1), plain_start!(1: 2 3), plain_start!(2: 4 5)),
            concat!(paired_start!(3: 6 7), paired_start!(4: 8 9), paired_start!(5: 10 11)),
            concat!(multiplied!(0), multiplied!(1), multiplied!(2), multiplied!(3)),
            "vmovaps zmm24, zmmword ptr [{panel} + {scales}]",
            "vmovaps zmm25, zmmword ptr [{panel} + {scales} + 64]",
            concat!(scaled!(0: 0 1, 12 13), scaled!(1: 2 3, 14 15), scaled!(2: 4 5, 16 17)),
            concat!(scaled!(3: 6 7, 18 19), scaled!(4: 8 9, 20 21), scaled!(5: 10 11, 22 23)),
            panel = in(reg) ptr::from_ref($panel),
            x = in(reg) ptr::from_ref($x),
            output_starts = const offset_of!(Unpacked, starts),
            scales = const offset_of!(Unpacked, scales),
            starts = const offset_of!(RowBlock<TILE_ROWS>, starts),
            exponents = const offset_of!(RowBlock<TILE_ROWS>, exponents),
            inout("zmm12") $sums[0][0], inout("zmm13") $sums[0][1],
            inout("zmm14") $sums[1][0], inout("zmm15") $sums[1][1],
            inout("zmm16") $sums[2][0], inout("zmm17") $sums[2][1],
            inout("zmm18") $sums[3][0], inout("zmm19") $sums[3][1],
            inout("zmm20") $sums[4][0], inout("zmm21") $sums[4][1],
            inout("zmm22") $sums[5][0], inout("zmm23") $sums[5][1],
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(readonly, nostack, preserves_flags),
        )
    };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn paired_tile_512<const M: usize>(
    panel: &[Unpacked],
    x: (&[RowBlock<TILE_ROWS>], &[Sums<TILE_ROWS>]),
    out: &mut PanelRows<TILE_ROWS>,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
    for (panel, (x, parts)) in panel.iter().zip(x.0.iter().zip(x.1)) {
        #[expect(unsafe_code, reason = "assembly")]
        // SAFETY: it reads both structs, at the offsets of their fields, and writes registers.
        unsafe {
            add_block!(panel, x, sums);
        }
        for group in 0..M {
            let mins = half_numbers(&panel.mins[group]);
            for row in 0..TILE_ROWS {
                let sum = _mm512_set1_ps(parts.all[row]);
                for half in 0..2 {
                    sums[row][half] = _mm512_fnmadd_ps(mins[half], sum, sums[row][half]);
                }
            }
        }
    }
    for row in 0..TILE_ROWS {
        add(&mut out[row], sums[row]);
    }
}
