//! Attention with grouped queries, causal or in segments: `kernels/attention.cu`.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    ffi::{self, Output, launch},
    joint::Preparation,
    launch::{Args, Launch, Rows},
};
use crate::ops::Mask;

/// Rows that a block of four warps owns, rows of a block of one, and the keys of a tile.
const ROWS: usize = 64;
const SPLIT_ROWS: usize = 16;
const KEYS: usize = 64;
/// The width of the autoencoder's only head, of which shared memory holds fewer keys.
const WIDE: usize = 384;
const WIDE_KEYS: usize = 32;
const WARP: usize = 32;
/// Of Hopper's kernels: the width of heads, rows of queries that a block owns, keys of a tile, threads, and shared memory: the
/// queries, two tiles of keys and of values, and eight barriers.
pub(super) const HOPPER_WIDTH: usize = 128;
pub(super) const HOPPER_ROWS: usize = 128;
const HOPPER_KEYS: usize = 192;
const HOPPER_THREADS: usize = 384;
const HOPPER_SHARED_BYTES: usize =
    (HOPPER_ROWS + 4 * HOPPER_KEYS) * HOPPER_WIDTH * size_of::<half::bf16>()
        + size_of::<[u64; 8]>();
/// Hopper's kernel is as fast as several blocks of the others, so that one of so many multiprocessors is enough.
const BUSY: usize = 4;
/// Blocks that keep a large GPU busy.
const BLOCKS: usize = 512;

/// One `AttentionStream` of `kernels/attention.cuh`.
pub(super) struct StreamArgs<'a> {
    pub(super) query: Option<&'a Rows>,
    pub(super) key: Option<&'a Rows>,
    pub(super) value: &'a Rows,
    pub(super) out: u64,
    pub(super) prepare: Option<Preparation<'a>>,
}

/// A start of one of Hopper's kernels for `args`, an `AttentionArgs`, and so many tiles of queries. `rows` are the keys of
/// both streams and their values, with so many heads; `None` where the copy engine cannot read them as they lie.
pub(super) fn on_hopper(
    kernel: &str,
    rows: [[Option<&Rows>; 2]; 2],
    args: &Args,
    [batch, heads, tiles]: [usize; 3],
) -> Result<Option<Launch>> {
    let Some(device) = rows.iter().flatten().flatten().next().map(|rows| rows.tensor.device())
    else {
        return Ok(None);
    };
    let mut all = Args::default();
    for rows in rows.into_iter().flatten() {
        let tiles = rows.map(|rows| rows.tiles(HOPPER_KEYS, [batch, heads])).transpose()?;
        if tiles.is_some_and(|tiles| !tiles.fit()) {
            return Ok(None);
        }
        all.tiles(device, tiles.as_ref())?;
    }
    all.0.extend(&args.0);
    all.count(batch).aligned();
    Ok(Some(Launch {
        kernel: kernel.to_owned(),
        grid: [tiles.min(ffi::limits(device)?.multiprocessors), 1, 1],
        threads: HOPPER_THREADS,
        shared_bytes: HOPPER_SHARED_BYTES,
        args: all,
    }))
}

impl StreamArgs<'_> {
    pub(super) fn push(&self, args: &mut Args) -> Result<()> {
        let value = self.key.map(|_| self.value);
        for rows in [self.query, self.key, value] {
            args.tensor(rows.map(|rows| &rows.tensor))?;
        }
        args.address(self.out);
        for rows in [self.query, self.key] {
            args.counts(rows.map_or([0; 3], |rows| [rows.rows, rows.stride, rows.batch_stride]));
        }
        args.counts([self.value.stride, self.value.batch_stride]);
        match &self.prepare {
            Some(prepare) => prepare.push(args),
            None => {
                args.counts([0; 5]);
                Ok(())
            }
        }
    }
}

/// Numbers for a kernel, as 64-bit integers.
pub(super) fn counts(counts: &[usize], device: &Device) -> Result<Tensor> {
    let wide = counts.iter().map(|count| i64::try_from(*count).map_err(candle_core::Error::wrap));
    Tensor::from_vec(wide.collect::<Result<Vec<i64>>>()?, counts.len(), device)
}

/// [`crate::ops::attention`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f32,
    mask: Mask<'_>,
) -> Result<Option<Tensor>> {
    let (b, n, h, d) = q.dims4()?;
    let (_, m, h_kv, _) = k.dims4()?;
    if !super::takes(&[q, k, v])
        || !matches!(d, 16 | 32 | 64 | 80 | 128 | WIDE)
        || scale <= 0.0
        || b * n * h * m * h_kv == 0
    {
        return Ok(None);
    }
    let group = h.checked_div(h_kv).unwrap_or(1);
    let call = Call {
        query: Rows::new(q)?,
        key: Rows::new(k)?,
        value: Rows::new(v)?,
        sizes: Sizes { b, n, h, h_kv, group, d },
        scale,
        mask,
    };
    let pieces = match mask {
        Mask::Segments(starts) => {
            let pieces = pieces(starts, ROWS.checked_div(group).unwrap_or(1).max(1));
            if pieces.is_empty() {
                return Ok(None);
            }
            Some(pieces)
        }
        Mask::None | Mask::Causal { .. } => None,
    };
    if pieces.is_none()
        && let Some(out) = call.on_hopper()?
    {
        return Ok(Some(out));
    }
    let tiles = (n * group).div_ceil(SPLIT_ROWS);
    let splits = BLOCKS.checked_div(tiles * h_kv * b).unwrap_or(1).min(m.div_ceil(KEYS));
    if pieces.is_none() && splits > 1 && d != WIDE {
        return call.split(tiles, splits).map(Some);
    }
    call.whole(pieces.as_deref()).map(Some)
}

struct Sizes {
    b: usize,
    n: usize,
    h: usize,
    h_kv: usize,
    group: usize,
    d: usize,
}

struct Call<'a> {
    query: Rows,
    key: Rows,
    value: Rows,
    sizes: Sizes,
    scale: f32,
    mask: Mask<'a>,
}

/// Partial sums of a split launch: `(sums, maxima and denominators, splits)`.
type Partial<'a> = (&'a Output, &'a Output, usize);

impl Call<'_> {
    fn output(&self) -> Result<Output> {
        let Sizes { b, n, h, d, .. } = self.sizes;
        Output::new(self.query.tensor.device(), &[b, n, h, d], DType::BF16)
    }

    fn args(
        &self,
        out: u64,
        pieces: Option<&Tensor>,
        partial: Option<Partial<'_>>,
    ) -> Result<Args> {
        let mut args = Args::default();
        let stream = StreamArgs {
            query: Some(&self.query),
            key: Some(&self.key),
            value: &self.value,
            out,
            prepare: None,
        };
        stream.push(&mut args)?;
        let filled = args.0.len();
        args.0.resize(2 * filled, 0); // there is no second stream
        args.counts([self.sizes.h, self.sizes.group]).address(0).tensor(pieces)?;
        match self.mask {
            Mask::Causal { offset } => args.flag(true).count(offset),
            Mask::None | Mask::Segments(_) => args.flag(false).count(0),
        };
        match partial {
            Some((sums, stats, splits)) => {
                args.count(splits).address(sums.address()).address(stats.address())
            }
            None => args.count(1).address(0).address(0),
        };
        args.number(f64::from(self.scale));
        Ok(args)
    }

    /// Each block sees all keys of its rows.
    fn whole(&self, pieces: Option<&[usize]>) -> Result<Tensor> {
        let Sizes { b, n, h_kv, group, d, .. } = self.sizes;
        let device = self.query.tensor.device();
        let blocks = match pieces {
            Some(pieces) => pieces.len().div_ceil(PIECE),
            None => (n * group).div_ceil(ROWS),
        };
        let pieces = pieces.map(|pieces| counts(pieces, device)).transpose()?;
        let out = self.output()?;
        launch(
            device,
            &Launch {
                kernel: format!("attention_d{d}"),
                grid: [blocks, h_kv, b],
                threads: 4 * WARP,
                shared_bytes: shared_bytes(ROWS, d),
                args: self.args(out.address(), pieces.as_ref(), None)?,
            },
        )?;
        out.into_tensor()
    }

    /// As [`Self::whole`], by Hopper's kernel; `None` where it is not used, where it would leave most of the device idle, or
    /// cannot read keys and values as they lie.
    fn on_hopper(&self) -> Result<Option<Tensor>> {
        let Sizes { b, n, h_kv, group, d, .. } = self.sizes;
        let device = self.query.tensor.device();
        if d != HOPPER_WIDTH || !super::hopper_is_used(device) {
            return Ok(None);
        }
        let tiles = (n * group).div_ceil(HOPPER_ROWS) * h_kv * b;
        let multiprocessors = ffi::limits(device)?.multiprocessors;
        if BUSY * tiles < multiprocessors {
            return Ok(None);
        }
        let out = self.output()?;
        let args = self.args(out.address(), None, None)?;
        // There is no second stream.
        let rows = [[Some(&self.key), None], [Some(&self.value), None]];
        let start = on_hopper("attention_hopper_grouped_d128", rows, &args, [b, h_kv, tiles])?;
        let Some(start) = start else { return Ok(None) };
        launch(device, &start)?;
        out.into_tensor().map(Some)
    }

    /// The keys of a tile of rows are shared out to `splits` blocks.
    fn split(&self, tiles: usize, splits: usize) -> Result<Tensor> {
        let Sizes { b, n, h, h_kv, group, d } = self.sizes;
        let device = self.query.tensor.device();
        let sums = Output::new(device, &[splits, b, n, h, d], DType::F32)?;
        let stats = Output::new(device, &[splits, b, n, h, 2], DType::F32)?;
        launch(
            device,
            &Launch {
                kernel: format!("attention_split_d{d}"),
                grid: [tiles * splits, h_kv, b],
                threads: WARP,
                shared_bytes: shared_bytes(SPLIT_ROWS, d),
                args: self.args(0, None, Some((&sums, &stats, splits)))?,
            },
        )?;
        let out = self.output()?;
        let mut args = Args::default();
        args.address(sums.address()).address(stats.address()).address(out.address());
        args.counts([splits, b, n, h, group, d]).number(f64::from(self.scale));
        launch(
            device,
            &Launch {
                kernel: "attention_join".to_owned(),
                grid: [n * h, 1, b],
                threads: d.next_multiple_of(WARP),
                shared_bytes: 0,
                args,
            },
        )?;
        out.into_tensor()
    }
}

/// Shared memory of a block; rows take the room of 64 or 128 numbers, or of 384.
pub(super) fn shared_bytes(rows: usize, d: usize) -> usize {
    let (keys, room) =
        if d == WIDE { (WIDE_KEYS, WIDE) } else { (KEYS, d.next_power_of_two().max(64)) };
    (rows + 2 * keys) * room * DType::BF16.size_in_bytes()
}

/// Numbers of one `AttentionPiece`.
const PIECE: usize = 4;

/// Tiles of at most `rows` tokens, each within a segment: first and end of its queries and its keys.
fn pieces(starts: &[usize], rows: usize) -> Vec<usize> {
    let segments = starts.windows(2).map(|pair| (pair[0], pair[1]));
    segments
        .flat_map(|(first, end)| {
            let tiles = (first..end).step_by(rows);
            tiles.flat_map(move |at| [at, end.min(at + rows), first, end])
        })
        .collect()
}
