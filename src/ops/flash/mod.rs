//! Attention over tiles with a running softmax: the scores of one tile at a time, in registers and
//! the first-level cache.

pub(super) mod joint;
mod rows;
mod tiles;

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{
    attention::Mask,
    buffers,
    cpu::Floats,
    simd::{
        Arch,
        product::TileShape,
        tiles::{Grid, Tile, par_tiles, tasks},
    },
};

/// The fewest queries of a piece of work: each piece packs the keys and values it reads.
const PIECE_QUERIES_MIN: usize = 192;
/// Up to this many rows it does not pay to pack keys and values.
const FEW_ROWS: usize = 8;

/// [`super::attention::attention`] for float32 tensors in host memory whose shapes fit.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    mask: Mask<'_>,
) -> Result<Tensor> {
    with_arch(q, k, v, Softmax { scale, mask, arch: Arch::new() })
}

/// What is computed, and with which instructions.
#[derive(Debug, Clone, Copy)]
struct Softmax<'a> {
    scale: f32,
    mask: Mask<'a>,
    arch: Arch,
}

fn with_arch(q: &Tensor, k: &Tensor, v: &Tensor, softmax: Softmax<'_>) -> Result<Tensor> {
    let (b, n, h, d) = q.dims4()?;
    let h_kv = k.dim(2)?;
    let [q, k, v] = [dense_rows(q)?, dense_rows(k)?, dense_rows(v)?];
    let [q_floats, k_floats, v_floats] = [Floats::new(&q), Floats::new(&k), Floats::new(&v)];
    let inputs = Inputs {
        q: Heads::new(&q, &q_floats)?,
        k: Heads::new(&k, &k_floats)?,
        v: Heads::new(&v, &v_floats)?,
        group: h.checked_div(h_kv).unwrap_or(1),
        dim: d,
        keys: k.dim(1)?,
        scale: softmax.scale,
        shape: TileShape::of(softmax.arch),
    };
    let mut out = buffers::of_len(b * n * h * d);
    let pieces = tasks().div_ceil((b * h_kv).max(1));
    let tile_rows = n.div_ceil(pieces).max(PIECE_QUERIES_MIN);
    let grid = Grid { rows: n, cols: h * d, tile_rows, tile_cols: (inputs.group * d).max(1) };
    par_tiles(&mut out, grid, Scratch::default, |scratch, tile| {
        inputs.piece(softmax, scratch, tile);
    });
    drop((q_floats, k_floats, v_floats));
    Tensor::from_vec(out, (b, n, h, d), q.device())
}

/// The tensor itself where the last axis is dense, a copy otherwise.
fn dense_rows(x: &Tensor) -> Result<Tensor> {
    if x.stride()[3] == 1 { Ok(x.clone()) } else { x.contiguous() }
}

/// Rows of `dim` numbers at a batch, a token and a head.
#[derive(Debug, Clone, Copy)]
struct Heads<'a> {
    x: &'a [f32],
    strides: [usize; 3],
    dim: usize,
}

impl<'a> Heads<'a> {
    fn new(tensor: &Tensor, floats: &'a Floats<'_>) -> Result<Self> {
        let stride = tensor.stride();
        let strides = [stride[0], stride[1], stride[2]];
        let dim = tensor.dim(3)?;
        let x = if tensor.elem_count() == 0 { &[] } else { floats.strided()? };
        Ok(Self { x, strides, dim })
    }

    #[inline(always)]
    fn row(&self, batch: usize, token: usize, head: usize) -> &'a [f32] {
        let [b, n, h] = self.strides;
        &self.x[batch * b + token * n + head * h..][..self.dim]
    }
}

#[derive(Debug, Clone, Copy)]
struct Inputs<'a> {
    q: Heads<'a>,
    k: Heads<'a>,
    v: Heads<'a>,
    group: usize,
    dim: usize,
    keys: usize,
    scale: f32,
    shape: TileShape,
}

/// Queries of one tile that see the same run of keys (or a causal part of it).
#[derive(Debug, Clone)]
struct Span {
    batch: usize,
    head_kv: usize,
    /// Query tokens.
    queries: Range<usize>,
    /// Key tokens.
    keys: Range<usize>,
    /// For a causal mask: how many keys stand before the first query of all.
    causal: Option<usize>,
}

impl Span {
    /// One past the last key that query token `i` sees.
    #[inline(always)]
    fn keys_end(&self, i: usize) -> usize {
        match self.causal {
            Some(offset) => self.keys.end.min(i + offset + 1),
            None => self.keys.end,
        }
    }
}

/// Buffers of one thread, reused from tile to tile.
#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    scores: Vec<f32>,
    sums: Vec<f32>,
    state: Vec<f32>,
}

impl Inputs<'_> {
    /// All queries of one tile: those of a run of tokens and of the heads that share keys.
    fn piece(&self, softmax: Softmax<'_>, scratch: &mut Scratch, mut tile: Tile<'_>) {
        let width = self.group * self.dim;
        let head_kv = tile.cols.start.checked_div(width).unwrap_or(0);
        let span = |queries: Range<usize>, keys: Range<usize>, causal: Option<usize>| Span {
            batch: tile.batch,
            head_kv,
            queries,
            keys,
            causal,
        };
        let rows = tile.rows.clone();
        let spans: Vec<Span> = match softmax.mask {
            Mask::None => vec![span(rows, 0..self.keys, None)],
            Mask::Causal { offset } => {
                let seen = self.keys.min(rows.end + offset);
                vec![span(rows, 0..seen, Some(offset))]
            }
            Mask::Segments(starts) => starts
                .windows(2)
                .map(|pair| (rows.start.max(pair[0])..rows.end.min(pair[1]), pair[0]..pair[1]))
                .filter(|(queries, _)| !queries.is_empty())
                .map(|(queries, keys)| span(queries, keys, None))
                .collect(),
        };
        for span in spans {
            let (inputs, tile) = (self, &mut tile);
            if span.queries.len() * self.group <= FEW_ROWS {
                softmax.arch.dispatch(rows::Rows { inputs, span, scratch, tile });
            } else {
                softmax.arch.dispatch(tiles::Tiles { inputs, span, scratch, tile });
            }
        }
    }
}

#[cfg(test)]
mod tests;
