//! A tile's product with a block in assembly.
//!
//! A compiler moves the rows apart, so that the units that add stand idle, and then runs out of
//! registers: all 32 are in use. 0 to 11 count (two for each row), 12 to 23 sum up in float32
//! (likewise), 24 to 27 hold weights, 28 to 31 activations. Rows are named by their number and their
//! first registers.

/// Assembly that may use all registers, and leaves the sums in theirs.
#[rustfmt::skip]
macro_rules! with_sums {
    ($sums:ident, {$($code:tt)*}, {$($operands:tt)*}) => {
        asm!(
            $($code)*
            $($operands)*
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

/// Loads the weights of neighbours, of both halves of a panel.
#[rustfmt::skip]
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
#[rustfmt::skip]
macro_rules! values {
    ($row:literal, $pair:literal) => {
        concat!(
            "vpbroadcastd zmm28, dword ptr [{x} + 32*", $row, " + 8*", $pair, "]\n",
            "vpbroadcastd zmm29, dword ptr [{x} + 32*", $row, " + 8*", $pair, " + 4]\n",
        )
    };
}

/// Multiplies both neighbours of a row.
#[rustfmt::skip]
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
#[rustfmt::skip]
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
#[rustfmt::skip]
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
#[rustfmt::skip]
macro_rules! plain_start {
    ($row:literal: $c0:literal $c1:literal) => {
        concat!(
            "vpbroadcastd zmm", $c0, ", dword ptr [{x} + {starts} + 4*", $row, "]\n",
            "vmovdqa64 zmm", $c1, ", zmm", $c0, "\n",
        )
    };
}

/// What the counts of a paired row start from.
#[rustfmt::skip]
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
#[rustfmt::skip]
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

/// [`scaled`] for all rows; the scales are so many bytes behind the first.
#[rustfmt::skip]
macro_rules! all_scaled {
    ($at:literal) => {
        concat!(
            "vmovaps zmm24, zmmword ptr [{panel} + {scales} + ", $at, "]\n",
            "vmovaps zmm25, zmmword ptr [{panel} + {scales} + ", $at, " + 64]\n",
            scaled!(0: 0 1, 12 13), scaled!(1: 2 3, 14 15), scaled!(2: 4 5, 16 17),
            scaled!(3: 6 7, 18 19), scaled!(4: 8 9, 20 21), scaled!(5: 10 11, 22 23),
        )
    };
}

/// Adds a tile's product with a block, but for minimums.
#[rustfmt::skip]
macro_rules! add_block {
    ($panel:ident, $x:ident, $sums:ident) => {
        with_sums!($sums, {
            concat!(plain_start!(0: 0 1), plain_start!(1: 2 3), plain_start!(2: 4 5)),
            concat!(paired_start!(3: 6 7), paired_start!(4: 8 9), paired_start!(5: 10 11)),
            concat!(multiplied!(0), multiplied!(1), multiplied!(2), multiplied!(3), all_scaled!(0)),
        }, {
            panel = in(reg) ptr::from_ref($panel),
            x = in(reg) ptr::from_ref($x),
            output_starts = const offset_of!(Unpacked, starts),
            scales = const offset_of!(Unpacked, scales),
            starts = const offset_of!(RowBlock<TILE_ROWS>, starts),
            exponents = const offset_of!(RowBlock<TILE_ROWS>, exponents),
        })
    };
}

/// Subtracts a row's products with the minimums of a super-block, which are in 24 to 31.
#[rustfmt::skip]
macro_rules! minus_mins {
    ($row:literal: $c0:literal $c1:literal $t:literal, $s0:literal $s1:literal) => {
        concat!(
            "vpbroadcastd zmm", $t, ", dword ptr [{x} + 16*", $row, "]\n",
            "vpmaddwd zmm", $c0, ", zmm24, zmm", $t, "\n",
            "vpmaddwd zmm", $c1, ", zmm25, zmm", $t, "\n",
            "vpbroadcastd zmm", $t, ", dword ptr [{x} + 16*", $row, " + 4]\n",
            "vpdpwssd zmm", $c0, ", zmm26, zmm", $t, "\n",
            "vpdpwssd zmm", $c1, ", zmm27, zmm", $t, "\n",
            "vpbroadcastd zmm", $t, ", dword ptr [{x} + 16*", $row, " + 8]\n",
            "vpdpwssd zmm", $c0, ", zmm28, zmm", $t, "\n",
            "vpdpwssd zmm", $c1, ", zmm29, zmm", $t, "\n",
            "vpbroadcastd zmm", $t, ", dword ptr [{x} + 16*", $row, " + 12]\n",
            "vpdpwssd zmm", $c0, ", zmm30, zmm", $t, "\n",
            "vpdpwssd zmm", $c1, ", zmm31, zmm", $t, "\n",
            "vpbroadcastd zmm", $t, ", dword ptr [{x} + {exponents} + 4*", $row, "]\n",
            "vcvtdq2ps zmm", $c0, ", zmm", $c0, "\n",
            "vcvtdq2ps zmm", $c1, ", zmm", $c1, "\n",
            "vpaddd zmm", $c0, ", zmm", $t, ", zmm", $c0, "\n",
            "vpaddd zmm", $c1, ", zmm", $t, ", zmm", $c1, "\n",
            "vfnmadd231ps zmm", $s0, ", zmm", $c0, ", zmmword ptr [{panel} + {factors}]\n",
            "vfnmadd231ps zmm", $s1, ", zmm", $c1, ", zmmword ptr [{panel} + {factors} + 64]\n",
        )
    };
}

/// Subtracts a tile's product with the minimums of a super-block.
#[rustfmt::skip]
macro_rules! subtract_super_mins {
    ($blocks:ident, $x:ident, $sums:ident) => {
        with_sums!($sums, {
            "vmovdqa64 zmm24, zmmword ptr [{panel} + {mins}]",
            "vmovdqa64 zmm25, zmmword ptr [{panel} + {mins} + 64]",
            "vmovdqa64 zmm26, zmmword ptr [{panel} + {mins} + {block}]",
            "vmovdqa64 zmm27, zmmword ptr [{panel} + {mins} + {block} + 64]",
            "vmovdqa64 zmm28, zmmword ptr [{panel} + {mins} + 2*{block}]",
            "vmovdqa64 zmm29, zmmword ptr [{panel} + {mins} + 2*{block} + 64]",
            "vmovdqa64 zmm30, zmmword ptr [{panel} + {mins} + 3*{block}]",
            "vmovdqa64 zmm31, zmmword ptr [{panel} + {mins} + 3*{block} + 64]",
            concat!(minus_mins!(0: 0 1 2, 12 13), minus_mins!(1: 3 4 5, 14 15)),
            concat!(minus_mins!(2: 6 7 8, 16 17), minus_mins!(3: 9 10 11, 18 19)),
            concat!(minus_mins!(4: 0 1 2, 20 21), minus_mins!(5: 3 4 5, 22 23)),
        }, {
            panel = in(reg) $blocks.as_ptr(),
            x = in(reg) ptr::from_ref($x),
            mins = const offset_of!(Unpacked, stored_mins),
            factors = const Unpacked::MIN_FACTOR,
            block = const size_of::<Unpacked>(),
            exponents = const offset_of!(SuperSums<TILE_ROWS>, exponents),
        })
    };
}

/// What the counts of a row's first half start from: all but the second half's.
#[rustfmt::skip]
macro_rules! first_half_start {
    ($row:literal: $c0:literal $c1:literal) => {
        concat!(
            "vpbroadcastd zmm", $c0, ", dword ptr [{x} + {starts} + 4*", $row, "]\n",
            "vpsubd zmm", $c0, ", zmm", $c0, ", dword ptr [{parts} + {second} + 4*", $row, "]{{1to16}}\n",
            "vmovdqa64 zmm", $c1, ", zmm", $c0, "\n",
        )
    };
}

/// What the counts of a row's second half start from.
#[rustfmt::skip]
macro_rules! second_half_start {
    ($row:literal: $c0:literal $c1:literal) => {
        concat!(
            "vpbroadcastd zmm", $c0, ", dword ptr [{parts} + {second} + 4*", $row, "]\n",
            "vmovdqa64 zmm", $c1, ", zmm", $c0, "\n",
        )
    };
}

/// All rows as they are.
#[rustfmt::skip]
macro_rules! all_plain {
    ($pair:literal) => {
        concat!(
            weights!($pair),
            plain!(0: 0 1, $pair), plain!(1: 2 3, $pair), plain!(2: 4 5, $pair),
            plain!(3: 6 7, $pair), plain!(4: 8 9, $pair), plain!(5: 10 11, $pair),
        )
    };
}

/// Adds a tile's product with a block whose halves have scales of their own.
#[rustfmt::skip]
macro_rules! add_halves {
    ($panel:ident, $x:ident, $parts:ident, $sums:ident) => {
        with_sums!($sums, {
            concat!(first_half_start!(0: 0 1), first_half_start!(1: 2 3), first_half_start!(2: 4 5)),
            concat!(first_half_start!(3: 6 7), first_half_start!(4: 8 9), first_half_start!(5: 10 11)),
            concat!(all_plain!(0), all_plain!(1), all_scaled!(0)),
            concat!(second_half_start!(0: 0 1), second_half_start!(1: 2 3), second_half_start!(2: 4 5)),
            concat!(second_half_start!(3: 6 7), second_half_start!(4: 8 9), second_half_start!(5: 10 11)),
            concat!(all_plain!(2), all_plain!(3), all_scaled!(128)),
        }, {
            panel = in(reg) ptr::from_ref($panel),
            x = in(reg) ptr::from_ref($x),
            parts = in(reg) ptr::from_ref($parts),
            scales = const offset_of!(Unpacked, scales),
            starts = const offset_of!(RowBlock<TILE_ROWS>, starts),
            exponents = const offset_of!(RowBlock<TILE_ROWS>, exponents),
            second = const offset_of!(Sums<TILE_ROWS>, second_starts),
        })
    };
}
