//! Attention of two streams in bf16: norms and rotation happen while a head's queries and keys are
//! packed, and nothing is stored in between.

use std::cell::RefCell;

use candle_core::{Result, Tensor};

use super::{Heads, dense_rows};
use crate::ops::{
    buffers,
    cpu::{Floats, is_fast},
    joint::{JointOutput, JointShape, JointStream},
    simd::{
        bf16::{Head, Preparation, QUERIES},
        prefetch::into_first_level,
        tiles::{self, Grid, Tile, par_tiles},
    },
};

/// How many tokens ahead a head's row is asked for: rows are so far apart that the processor does not
/// foresee them.
const AHEAD: usize = 12;
/// The fewest queries of a piece of work: each piece packs the keys and values it reads.
const PIECE_QUERIES_MIN: usize = 8 * QUERIES;

thread_local! {
    /// A head's buffers, kept for the next head and the next block.
    static HEAD: RefCell<Head> = RefCell::default();
}

/// [`joint_attention`](crate::ops::joint_attention()) in bf16; `None` where this machine or these
/// tensors are not made for it. The shapes fit.
pub(in crate::ops) fn attention(
    text: &JointStream<'_>,
    image: &JointStream<'_>,
    shape: JointShape<'_>,
) -> Result<Option<JointOutput>> {
    let (b, _, h, d) = text.key.dims4()?;
    let fast = [text, image].iter().all(|stream| {
        is_fast(&[stream.key, stream.value, stream.cos, stream.sin])
            && is_fast(&[stream.norm_query, stream.norm_key])
            && stream.query.is_none_or(|query| is_fast(&[query]))
    });
    if !fast || !Head::supports(d) {
        return Ok(None);
    }
    let rows = |stream: &JointStream<'_>| stream.query.map_or(Ok(0), |query| query.dim(1));
    let (text_rows, image_rows) = (rows(text)?, rows(image)?);
    let n = text_rows + image_rows;
    let (text_parts, image_parts) = (Parts::of(text)?, Parts::of(image)?);
    let (text_floats, image_floats) = (text_parts.floats(), image_parts.floats());
    let inputs = Inputs {
        streams: [
            Stream::new(&text_parts, &text_floats, text_rows)?,
            Stream::new(&image_parts, &image_floats, image_rows)?,
        ],
        shape,
        head_dim: d,
    };
    let mut out = buffers::of_len(b * n * h * d);
    let pieces = tiles::tasks().div_ceil((b * h).max(1));
    let tile_rows = n.div_ceil(pieces).max(PIECE_QUERIES_MIN);
    let grid = Grid { rows: n, cols: h * d, tile_rows, tile_cols: d };
    par_tiles(
        &mut out,
        grid,
        || (),
        |(), tile| {
            HEAD.with_borrow_mut(|head| inputs.piece(head, tile));
        },
    );
    drop((text_floats, image_floats));
    let out = Tensor::from_vec(out, (b, n, h, d), text.key.device())?;
    let part = |start: usize, stream: &JointStream<'_>, rows: usize| {
        stream.query.map(|_| out.narrow(1, start, rows)).transpose()
    };
    Ok(Some(JointOutput {
        text: part(0, text, text_rows)?,
        image: part(text_rows, image, image_rows)?,
    }))
}

/// A stream's tensors as they are read: rows and small tables dense.
struct Parts {
    query: Option<Tensor>,
    /// Keys and values.
    seen: [Tensor; 2],
    /// The norms of queries and keys, cosines, sines.
    tables: [Tensor; 4],
}

/// [`Parts`], borrowed as slices.
struct PartsFloats<'a> {
    query: Option<Floats<'a>>,
    seen: [Floats<'a>; 2],
    tables: [Floats<'a>; 4],
}

impl Parts {
    fn of(stream: &JointStream<'_>) -> Result<Self> {
        Ok(Self {
            query: stream.query.map(dense_rows).transpose()?,
            seen: [dense_rows(stream.key)?, dense_rows(stream.value)?],
            tables: [
                stream.norm_query.contiguous()?,
                stream.norm_key.contiguous()?,
                stream.cos.contiguous()?,
                stream.sin.contiguous()?,
            ],
        })
    }

    fn floats(&self) -> PartsFloats<'_> {
        PartsFloats {
            query: self.query.as_ref().map(Floats::new),
            seen: self.seen.each_ref().map(Floats::new),
            tables: self.tables.each_ref().map(Floats::new),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Stream<'a> {
    query: Option<Heads<'a>>,
    key: Heads<'a>,
    value: Heads<'a>,
    norm_query: &'a [f32],
    norm_key: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    /// Tokens that have queries.
    rows: usize,
    tokens: usize,
}

impl<'a> Stream<'a> {
    fn new(parts: &Parts, floats: &'a PartsFloats<'a>, rows: usize) -> Result<Self> {
        let query = parts.query.as_ref().zip(floats.query.as_ref());
        let [norm_query, norm_key, cos, sin] = &floats.tables;
        Ok(Self {
            query: query.map(|(query, floats)| Heads::new(query, floats)).transpose()?,
            key: Heads::new(&parts.seen[0], &floats.seen[0])?,
            value: Heads::new(&parts.seen[1], &floats.seen[1])?,
            norm_query: norm_query.contiguous()?,
            norm_key: norm_key.contiguous()?,
            cos: cos.contiguous()?,
            sin: sin.contiguous()?,
            rows,
            tokens: parts.seen[0].dim(1)?,
        })
    }

    /// Cosines and sines of a token.
    fn turn(&self, token: usize, half: usize) -> [&'a [f32]; 2] {
        [&self.cos[token * half..][..half], &self.sin[token * half..][..half]]
    }
}

struct Inputs<'a> {
    /// Text, then the picture.
    streams: [Stream<'a>; 2],
    shape: JointShape<'a>,
    head_dim: usize,
}

impl Inputs<'_> {
    /// A run of queries of one head.
    fn piece(&self, head: &mut Head, mut tile: Tile<'_>) {
        let place = (tile.batch, tile.cols.start.checked_div(self.head_dim).unwrap_or(0));
        self.pack_keys_and_values(head, place);
        for first in (0..tile.rows.len()).step_by(QUERIES) {
            let count = QUERIES.min(tile.rows.len() - first);
            for lane in 0..count {
                let row = tile.rows.start + first + lane;
                let later = Some(row + AHEAD).filter(|row| *row < tile.rows.end);
                if let Some((_, _, x)) = later.and_then(|row| self.query(place, row)) {
                    into_first_level(x);
                }
                self.pack_query(head, place, (lane, row));
            }
            head.attend();
            for lane in 0..count {
                head.store(lane, tile.row(first + lane));
            }
        }
    }

    fn pack_keys_and_values(&self, head: &mut Head, (batch, index): (usize, usize)) {
        let [text, image] = &self.streams;
        let shown = self.shape.text_lengths.map_or(text.tokens, |lengths| lengths[batch]);
        let count = shown + image.tokens;
        // The stream of key `i`, and its token there.
        let place = |i: usize| if i < shown { (text, i) } else { (image, i - shown) };
        head.begin(count, self.head_dim);
        for i in 0..count {
            if i + AHEAD < count {
                let (stream, token) = place(i + AHEAD);
                into_first_level(stream.key.row(batch, token, index));
            }
            let (stream, token) = place(i);
            let how = self.preparation(stream.norm_key, 1.0);
            let turn = stream.turn(token, self.head_dim >> 1);
            head.set_key(i, stream.key.row(batch, token, index), turn, how);
        }
        for pair in 0..count.div_ceil(2) {
            let value = |i: usize| {
                let (stream, token) = place(i);
                stream.value.row(batch, token, index)
            };
            for i in (2 * pair + AHEAD..count).take(2) {
                into_first_level(value(i));
            }
            let second = (2 * pair + 1 < count).then(|| value(2 * pair + 1));
            head.set_values(pair, value(2 * pair), second);
        }
    }

    fn pack_query(
        &self,
        head: &mut Head,
        (batch, index): (usize, usize),
        (lane, row): (usize, usize),
    ) {
        let Some((stream, token, x)) = self.query((batch, index), row) else { return };
        let factor = self.shape.scale * std::f32::consts::LOG2_E;
        let how = self.preparation(stream.norm_query, factor);
        let turn = stream.turn(token, self.head_dim >> 1);
        head.set_query(lane, x, turn, how);
    }

    /// The query of row `row`: its stream, its token there and its numbers.
    fn query(
        &self,
        (batch, index): (usize, usize),
        row: usize,
    ) -> Option<(&Stream<'_>, usize, &[f32])> {
        let [text, image] = &self.streams;
        let (stream, token) = if row < text.rows { (text, row) } else { (image, row - text.rows) };
        Some((stream, token, stream.query.as_ref()?.row(batch, token, index)))
    }

    #[expect(clippy::cast_possible_truncation, reason = "added in float32")]
    fn preparation<'a>(&self, weight: &'a [f32], factor: f32) -> Preparation<'a> {
        Preparation { weight, eps: self.shape.eps as f32, factor }
    }
}

#[cfg(test)]
mod tests;
