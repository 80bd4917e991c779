//! Joint attention: `kernels/joint_attention.cu`.

use candle_core::{DType, Result, Tensor};

use super::{
    attention::{self, HOPPER_ROWS, HOPPER_WIDTH, StreamArgs, shared_bytes},
    ffi::{Output, launch},
    launch::{Args, Launch, Rows},
};
use crate::ops::joint::{JointOutput, JointShape, JointStream};

/// Rows of queries that a block owns, also on a Hopper, and its threads.
const ROWS: usize = HOPPER_ROWS;
const THREADS: usize = 128;
/// Elements that one thread prepares.
const TOGETHER: usize = 8;

/// [`crate::ops::joint_attention`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn joint_attention(
    text: &JointStream<'_>,
    image: &JointStream<'_>,
    shape: JointShape<'_>,
) -> Result<Option<JointOutput>> {
    let (b, n_text, h, d) = text.key.dims4()?;
    let n_image = image.key.dim(1)?;
    let fits = [text, image].into_iter().all(fits);
    if !fits
        || !matches!(d, 16 | 32 | 64 | 128)
        || shape.scale <= 0.0
        || b * h * (n_text + n_image) == 0
    {
        return Ok(None);
    }
    let device = text.key.device();
    let prepared = prepared([text, image], shape)?;
    let tiles: usize = prepared.iter().map(|stream| stream.query_rows().div_ceil(ROWS)).sum();
    let lengths = shape.text_lengths.map(|lengths| lengths.on(device)).transpose()?;

    let mut args = Args::default();
    for stream in &prepared {
        stream.args().push(&mut args)?;
    }
    args.counts([h, 1]).tensor(lengths.as_ref())?.address(0);
    args.counts([0, 0, 1]).address(0).address(0).number(f64::from(shape.scale));
    let on_hopper = if d == HOPPER_WIDTH && super::hopper_is_used(device) {
        let keys = prepared.each_ref().map(|stream| stream.key.as_ref());
        let rows = [keys, prepared.each_ref().map(Prepared::values)];
        attention::on_hopper("attention_hopper_d128", rows, &args, [b, h, tiles * h * b])?
    } else {
        None
    };
    let start = match on_hopper {
        Some(start) => start,
        None => Launch {
            kernel: format!("attention_joint_d{d}"),
            grid: [tiles, h, b],
            threads: THREADS,
            shared_bytes: shared_bytes(ROWS, d),
            args,
        },
    };
    launch(device, &start)?;
    let [text, image] = prepared.map(Prepared::into_output);
    Ok(Some(JointOutput { text: text?, image: image? }))
}

/// Whether the kernel reads the stream's types.
fn fits(stream: &JointStream<'_>) -> bool {
    let norms = [stream.norm_query, stream.norm_key];
    let angles = [stream.cos, stream.sin];
    let rows = [stream.key, stream.value].into_iter().chain(stream.query);
    rows.into_iter().all(|x| super::takes(&[x]))
        && norms.iter().all(|x| matches!(x.dtype(), DType::BF16 | DType::F32))
        && stream.norm_query.dtype() == stream.norm_key.dtype()
        && angles.iter().all(|x| x.dtype() == DType::F32)
        && super::are_near(&norms)
        && super::are_near(&angles)
        && stream.query.is_none_or(|query| query.dims().iter().all(|n| *n > 0))
}

/// One stream with its keys normalised and rotated, and a place for its output.
struct Prepared {
    query: Option<Rows>,
    key: Option<Rows>,
    value: Rows,
    out: Option<Output>,
    norm_query: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: f64,
}

impl Prepared {
    /// But for its keys.
    fn new(stream: &JointStream<'_>, shape: JointShape<'_>) -> Result<Self> {
        let (cos, sin) = (stream.cos.contiguous()?, stream.sin.contiguous()?);
        let out = stream.query.map(|query| Output::new(query.device(), query.dims(), DType::BF16));
        Ok(Self {
            query: stream.query.map(Rows::new).transpose()?,
            key: None,
            value: Rows::new(stream.value)?,
            out: out.transpose()?,
            norm_query: stream.norm_query.contiguous()?,
            cos,
            sin,
            eps: shape.eps,
        })
    }

    fn query_rows(&self) -> usize {
        self.query.as_ref().map_or(0, |query| query.rows)
    }

    fn args(&self) -> StreamArgs<'_> {
        StreamArgs {
            query: self.query.as_ref(),
            key: self.key.as_ref(),
            value: &self.value,
            out: self.out.as_ref().map_or(0, Output::address),
            prepare: Some(Preparation {
                norm: &self.norm_query,
                cos: &self.cos,
                sin: &self.sin,
                eps: self.eps,
            }),
        }
    }

    /// The values, where there are any.
    fn values(&self) -> Option<&Rows> {
        (self.value.rows > 0).then_some(&self.value)
    }

    fn into_output(self) -> Result<Option<Tensor>> {
        self.out.map(Output::into_tensor).transpose()
    }
}

/// Norm and rotation of rows: `Preparation` in `kernels/rotary.cuh`.
pub(super) struct Preparation<'a> {
    pub(super) norm: &'a Tensor,
    pub(super) cos: &'a Tensor,
    pub(super) sin: &'a Tensor,
    pub(super) eps: f64,
}

impl Preparation<'_> {
    pub(super) fn push(&self, args: &mut Args) -> Result<()> {
        args.tensor(Some(self.norm))?.flag(self.norm.dtype() == DType::F32);
        args.tensor(Some(self.cos))?.tensor(Some(self.sin))?.number(self.eps);
        Ok(())
    }
}

/// Both streams, with their keys after norm and rotation, `[b, n, h, d]`.
fn prepared(streams: [&JointStream<'_>; 2], shape: JointShape<'_>) -> Result<[Prepared; 2]> {
    let [text, image] = streams.map(|stream| Prepared::new(stream, shape));
    let mut all = [text?, image?];
    let (b, _, h, d) = streams[0].key.dims4()?;
    let device = streams[0].key.device();
    let mut args = Args::default();
    let mut blocks = Vec::with_capacity(streams.len());
    let mut places = Vec::with_capacity(streams.len());
    let mut of_streams = Args::default();
    for (stream, prepared) in streams.iter().zip(&all) {
        let n = prepared.value.rows;
        let key = Rows::new(stream.key)?;
        let norm = stream.norm_key.contiguous()?;
        let out = (n > 0).then(|| Output::new(device, &[b, n, h, d], DType::BF16)).transpose()?;
        of_streams.tensor((n > 0).then_some(&key.tensor))?;
        of_streams.address(out.as_ref().map_or(0, Output::address));
        of_streams.counts([n, key.stride, key.batch_stride]);
        let Prepared { cos, sin, eps, .. } = prepared;
        Preparation { norm: &norm, cos, sin, eps: *eps }.push(&mut of_streams)?;
        blocks.push((n * h * d).div_ceil(TOGETHER * THREADS));
        places.push((out, key, norm));
    }
    args.counts([h, blocks[0]]).0.extend(&of_streams.0);
    let kernel = format!("prepare_keys_d{d}");
    let grid = [blocks.iter().sum(), 1, b];
    launch(device, &Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args })?;
    for (prepared, (out, ..)) in all.iter_mut().zip(places) {
        prepared.key = out.map(|out| Rows::new(&out.into_tensor()?)).transpose()?;
    }
    Ok(all)
}
