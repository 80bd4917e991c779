//! Disjoint rectangles of an output, written by several threads.

use std::{marker::PhantomData, ops::Range};

use rayon::prelude::*;

/// Pieces of work for each thread, so that none waits long for the last.
const TASKS_PER_THREAD: usize = 4;

/// How many pieces an operation's work is cut into.
pub(crate) fn tasks() -> usize {
    TASKS_PER_THREAD * rayon::current_num_threads()
}

/// Elements that one piece of work covers where each is read once.
pub(crate) const CHUNK: usize = 1 << 14;

/// Runs `work(row, out)` on each row of `out: [rows, width]`, in parallel.
pub(crate) fn par_rows(
    out: &mut [f32],
    width: usize,
    work: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    let rows = CHUNK.checked_div(width).unwrap_or(1).max(1);
    let pieces = out.par_chunks_mut((rows * width).max(1)).with_max_len(1).enumerate();
    pieces.for_each(|(piece, out)| {
        let out = out.chunks_exact_mut(width).enumerate();
        out.for_each(|(i, out)| work(piece * rows + i, out));
    });
}

/// How an output `[batch, rows, cols]` is cut into rectangles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) tile_rows: usize,
    pub(crate) tile_cols: usize,
}

/// One rectangle of the output. No other tile covers any of its elements.
pub(crate) struct Tile<'a> {
    pub(crate) batch: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
    /// The element at the first row and the first column.
    origin: *mut f32,
    stride: usize,
    output: PhantomData<&'a mut [f32]>,
}

impl Tile<'_> {
    /// The tile's part of its `i`-th row.
    #[inline]
    pub(crate) fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows.len(), "row {i} of {}", self.rows.len());
        #[expect(unsafe_code, reason = "tiles of one output are written by several threads")]
        // SAFETY: `par_tiles` checked that the output holds `batch · rows · cols` elements and cut
        // them into rectangles that share none, so that row `i`'s `cols.len()` elements are inside
        // the output and nobody else's; `&mut self` keeps a second slice of this tile away.
        unsafe {
            std::slice::from_raw_parts_mut(self.origin.add(i * self.stride), self.cols.len())
        }
    }
}

struct Base(*mut f32);

#[expect(unsafe_code, reason = "tiles of one output are written by several threads")]
// SAFETY: the pointer is only used to make tiles that share no element.
unsafe impl Sync for Base {}

/// Cuts `out` into tiles and runs `work` on each, in parallel, with a scratch of `init`.
///
/// # Panics
/// `out` is no multiple of `rows · cols`.
pub(crate) fn par_tiles<T: Send>(
    out: &mut [f32],
    grid: Grid,
    init: impl Fn() -> T + Sync + Send,
    work: impl Fn(&mut T, Tile<'_>) + Sync + Send,
) {
    let plane = grid.rows * grid.cols;
    if plane == 0 || out.is_empty() {
        return;
    }
    assert!(out.len().is_multiple_of(plane), "{} is no multiple of {plane}", out.len());
    let down = grid.rows.div_ceil(grid.tile_rows);
    let across = grid.cols.div_ceil(grid.tile_cols);
    let batches = out.len().checked_div(plane).unwrap_or(0);
    let base = Base(out.as_mut_ptr());
    let base = &base;
    (0..batches * down * across).into_par_iter().with_max_len(1).for_each_init(
        init,
        |scratch, i| {
            let (batch, place) = div_rem(i, down * across);
            let (row, col) = div_rem(place, across);
            let row = row * grid.tile_rows;
            let col = col * grid.tile_cols;
            let offset = batch * plane + row * grid.cols + col;
            let tile = Tile {
                batch,
                rows: row..grid.rows.min(row + grid.tile_rows),
                cols: col..grid.cols.min(col + grid.tile_cols),
                origin: base.0.wrapping_add(offset),
                stride: grid.cols,
                output: PhantomData,
            };
            work(scratch, tile);
        },
    );
}

#[expect(clippy::integer_division, reason = "a place in a grid")]
fn div_rem(i: usize, n: usize) -> (usize, usize) {
    (i / n, i % n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_element_once() {
        for (rows, cols, tile_rows, tile_cols) in
            [(1, 1, 1, 1), (5, 7, 2, 3), (4, 9, 4, 2), (3, 8, 9, 99)]
        {
            let mut out = vec![0.0; 3 * rows * cols];
            let grid = Grid { rows, cols, tile_rows, tile_cols };
            par_tiles(
                &mut out,
                grid,
                || (),
                |(), mut tile| {
                    for i in 0..tile.rows.len() {
                        tile.row(i).iter_mut().for_each(|x| *x += 1.0);
                    }
                },
            );
            assert!(out.iter().all(|x| (*x - 1.0).abs() < f32::EPSILON), "{grid:?}");
        }
    }

    #[test]
    fn every_row_is_worked_on_once() {
        for (rows, width) in [(1, 1), (7, 3), (3, CHUNK), (2, CHUNK + 1), (5, CHUNK.div_euclid(2))]
        {
            let mut out = vec![0.0; rows * width];
            par_rows(&mut out, width, |row, out| {
                assert_eq!(out.len(), width);
                out.iter_mut().for_each(|x| *x += f32::from(u8::try_from(row + 1).unwrap()));
            });
            for (row, out) in out.chunks_exact(width).enumerate() {
                let expected = f32::from(u8::try_from(row + 1).unwrap());
                assert!(out.iter().all(|x| (x - expected).abs() < f32::EPSILON), "{rows}×{width}");
            }
        }
    }

    #[test]
    fn an_empty_output_runs_nothing() {
        par_rows(&mut [], 0, |_, _| panic!("no row to work on"));
        let grid = Grid { rows: 0, cols: 4, tile_rows: 1, tile_cols: 1 };
        par_tiles(&mut [], grid, || (), |(), _| panic!("no tile to work on"));
    }
}
