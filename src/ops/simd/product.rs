//! The product of a tile of rows with a panel of columns, held in registers: what linear layers,
//! convolutions and attention are made of.
//!
//! `a` is packed as `[k][ROWS]` and broadcast, `b` as `[k][VECTORS · lanes]` and loaded.

use pulp::{Arch, Simd, WithSimd, as_arrays};

/// Registers across in a full tile.
pub(crate) const VECTORS: usize = 3;

/// Sums of a tile: `sums[row][vector]`.
pub(crate) type Sums<S, const ROWS: usize, const VECTORS: usize> =
    [[<S as Simd>::f32s; VECTORS]; ROWS];

/// The shape of the full register tile of an instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TileShape {
    /// Rows of a full tile.
    pub(crate) rows: usize,
    /// Columns of one register.
    pub(crate) lanes: usize,
}

impl TileShape {
    pub(crate) fn of(arch: Arch) -> Self {
        struct Ask;
        impl WithSimd for Ask {
            type Output = TileShape;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> TileShape {
                TileShape { rows: rows_of::<S>(), lanes: S::F32_LANES }
            }
        }
        arch.dispatch(Ask)
    }

    /// Columns of a full tile.
    pub(crate) fn columns(self) -> usize {
        VECTORS * self.lanes
    }

    /// Registers that `columns` columns need, at most a full tile's.
    pub(crate) fn vectors(self, columns: usize) -> usize {
        columns.div_ceil(self.lanes).min(VECTORS)
    }
}

/// 8 × 3 sums fit into 32 registers, 4 × 3 into 16.
pub(crate) const fn rows_of<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 8 } else { 4 }
}

/// `Σₖ a[k][row] · b[k][column]`.
#[inline(always)]
pub(crate) fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
) -> Sums<S, ROWS, VECTORS> {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    let (a, _) = as_arrays::<ROWS, _>(a);
    let (b, _) = as_arrays::<VECTORS, _>(S::as_simd_f32s(b).0);
    for (a, b) in a.iter().zip(b) {
        step(simd, &mut sums, a, b);
    }
    sums
}

/// Like [`tile`], but row `k = plane · taps.len() + tap` of `b` starts at
/// `start + plane · plane_len + taps[tap]`.
#[inline(always)]
pub(crate) fn tapped_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[f32],
    (b, plane_len): (&[f32], usize),
    taps: &[usize],
    start: usize,
) -> Sums<S, ROWS, VECTORS> {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    let (a, _) = as_arrays::<ROWS, _>(a);
    let mut start = start;
    for a in a.chunks_exact(taps.len()) {
        let b = &b[start..];
        for (a, tap) in a.iter().zip(taps) {
            let b = &b[*tap..][..VECTORS * S::F32_LANES];
            let (b, _) = as_arrays::<VECTORS, _>(S::as_simd_f32s(b).0);
            step(simd, &mut sums, a, &b[0]);
        }
        start += plane_len;
    }
    sums
}

#[inline(always)]
fn step<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    sums: &mut Sums<S, ROWS, VECTORS>,
    a: &[f32; ROWS],
    b: &[S::f32s; VECTORS],
) {
    for (sums, a) in sums.iter_mut().zip(a) {
        let a = simd.splat_f32s(*a);
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = simd.mul_add_e_f32s(a, *b, *sum);
        }
    }
}

/// What happens to one row of an output when a tile's sums are ready. (A trait and not a closure:
/// closures are not always inlined, and then registers are passed through memory.)
pub(crate) trait Update<S: Simd>: Copy {
    /// The new value of the `i`-th register of the row.
    fn apply(self, simd: S, i: usize, sum: S::f32s, old: S::f32s) -> S::f32s;
}

/// `sum`.
#[derive(Clone, Copy)]
pub(crate) struct Store;
/// `old + sum`.
#[derive(Clone, Copy)]
pub(crate) struct Add;
/// `old · factor + sum`, with a factor for each column.
#[derive(Clone, Copy)]
pub(crate) struct Rescale<S: Simd, const V: usize>(pub(crate) [S::f32s; V]);
/// `old / sum`.
#[derive(Clone, Copy)]
pub(crate) struct Divide;

impl<S: Simd> Update<S> for Store {
    #[inline(always)]
    fn apply(self, _: S, _: usize, sum: S::f32s, _: S::f32s) -> S::f32s {
        sum
    }
}

impl<S: Simd> Update<S> for Add {
    #[inline(always)]
    fn apply(self, simd: S, _: usize, sum: S::f32s, old: S::f32s) -> S::f32s {
        simd.add_f32s(old, sum)
    }
}

impl<S: Simd, const V: usize> Update<S> for Rescale<S, V> {
    #[inline(always)]
    fn apply(self, simd: S, i: usize, sum: S::f32s, old: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(old, self.0[i], sum)
    }
}

impl<S: Simd> Update<S> for Divide {
    #[inline(always)]
    fn apply(self, simd: S, _: usize, sum: S::f32s, old: S::f32s) -> S::f32s {
        simd.div_f32s(old, sum)
    }
}

/// Updates the first `out.len()` columns of one row.
#[inline(always)]
pub(crate) fn update_row<S: Simd, const VECTORS: usize>(
    simd: S,
    sums: [S::f32s; VECTORS],
    out: &mut [f32],
    update: impl Update<S>,
) {
    if let Some(whole) = S::as_mut_simd_f32s(out).0.first_chunk_mut::<VECTORS>() {
        for i in 0..VECTORS {
            whole[i] = update.apply(simd, i, sums[i], whole[i]);
        }
        return;
    }
    for (i, out) in out.chunks_mut(S::F32_LANES).enumerate().take(VECTORS) {
        let old = simd.partial_load_f32s(out);
        simd.partial_store_f32s(out, update.apply(simd, i, sums[i], old));
    }
}

/// Packs `rows` rows (row `i` is `row(i)`) as `[k][tile_rows]`; rows that are not there are zeros.
pub(crate) fn pack_rows<'a>(
    out: &mut Vec<f32>,
    width: usize,
    tile_rows: usize,
    rows: usize,
    row: impl Fn(usize) -> &'a [f32],
) {
    out.clear();
    out.resize(width * tile_rows, 0.0);
    for i in 0..rows.min(tile_rows) {
        for (out, x) in out.chunks_exact_mut(tile_rows).zip(row(i)) {
            out[i] = *x;
        }
    }
}
