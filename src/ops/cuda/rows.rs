//! Norms, modulation, activations, rotation and the sampler's step: `kernels/rows.cu` and
//! `kernels/elementwise.cu`.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{
    are_near,
    ffi::{Output, address, launch},
    launch::{Args, Launch},
    takes,
    tensors::aligned,
};

/// Threads of a block that owns a row, and of one that owns chunks of elements.
const ROW_THREADS: usize = 128;
const THREADS: usize = 256;
/// Elements that one thread moves at once.
pub(super) const TOGETHER: usize = 8;
/// The widest row that shared memory holds, with the warps' sums beside it.
const WIDTH_MAX: usize = 12_000;
const WARP_SUMS: usize = 32;

/// Scale, shift or gate of the rows of `[b, n, dim]`: one row a batch entry or one a token.
struct Shared {
    tensor: Tensor,
    rows: usize,
}

impl Shared {
    fn new(x: &Tensor, shared: &Tensor) -> Result<Option<Self>> {
        let Ok((b, n, dim)) = x.dims3() else { return Ok(None) };
        let rows = match shared.dims() {
            dims if dims == [b, n, dim] => 1,
            [one, 1, last] if [*one, *last] == [b, dim] => n,
            // One row for the whole batch, as the modulation of a step is.
            [1, 1, last] if *last == dim => b * n,
            _ => return Ok(None),
        };
        Ok(Some(Self { tensor: shared.contiguous()?, rows }))
    }
}

/// Rows that are modulated alike: `RowPiece` of `kernels/rows.cu`.
#[derive(Default)]
pub(super) struct RowPiece<'a> {
    /// Addresses of `[rows, width]`.
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) rows: usize,
    /// One row for `shared` rows.
    pub(super) scale: Option<&'a Tensor>,
    pub(super) shift: Option<&'a Tensor>,
    pub(super) gate: Option<&'a Tensor>,
    pub(super) shared: usize,
    /// Addresses of `[rows, width]`, or 0.
    pub(super) residual: u64,
    pub(super) sum: u64,
}

/// Pieces that a kernel takes at once.
const PIECES_MAX: usize = 8;

/// `RowArgs` of `kernels/rows.cu`, but for its pieces.
#[derive(Default, Clone, Copy)]
pub(super) struct RowArgs<'a> {
    pub(super) width: usize,
    pub(super) weight: Option<&'a Tensor>,
    pub(super) eps: f64,
}

impl RowArgs<'_> {
    fn args(&self, pieces: &[RowPiece<'_>]) -> Result<Args> {
        let none = RowPiece::default();
        let mut args = Args::default();
        let wide = self.weight.is_some_and(|weight| weight.dtype() == DType::F32);
        args.count(self.width).tensor(self.weight)?.flag(wide).number(self.eps);
        for i in 0..PIECES_MAX {
            let piece = pieces.get(i).unwrap_or(&none);
            args.address(piece.x).address(piece.out).count(piece.rows);
            args.tensor(piece.scale)?.tensor(piece.shift)?.count(piece.shared.max(1));
            args.address(piece.residual).tensor(piece.gate)?.address(piece.sum);
        }
        Ok(args)
    }

    /// Starts a kernel whose blocks own a row each.
    pub(super) fn by_row(
        &self,
        kernel: &str,
        device: &Device,
        pieces: &[RowPiece<'_>],
    ) -> Result<()> {
        let shared_bytes = (self.width + WARP_SUMS) * DType::F32.size_in_bytes();
        self.start(device, pieces, |rows, args| Launch {
            kernel: kernel.to_owned(),
            grid: [rows, 1, 1],
            threads: ROW_THREADS,
            shared_bytes,
            args,
        })
    }

    /// Starts a kernel whose threads own [`TOGETHER`] elements each.
    pub(super) fn flat(
        &self,
        kernel: &str,
        device: &Device,
        pieces: &[RowPiece<'_>],
    ) -> Result<()> {
        self.start(device, pieces, |rows, args| {
            flat(kernel, (rows * self.width).div_ceil(TOGETHER * THREADS), args)
        })
    }

    /// Starts what `of` says of a number of rows and the arguments, for as many pieces at a time as a kernel takes.
    fn start(
        &self,
        device: &Device,
        pieces: &[RowPiece<'_>],
        of: impl Fn(usize, Args) -> Launch,
    ) -> Result<()> {
        for pieces in pieces.chunks(PIECES_MAX) {
            let rows = pieces.iter().map(|piece| piece.rows).sum();
            launch(device, &of(rows, self.args(pieces)?))?;
        }
        Ok(())
    }
}

/// Whether rows of `x` suit the kernels that keep a row in shared memory.
pub(super) fn has_rows(x: &Tensor) -> bool {
    let width = x.dims().last().copied().unwrap_or(0);
    x.elem_count() > 0 && width.is_multiple_of(TOGETHER) && width <= WIDTH_MAX
}

/// All rows of `x`, and their width.
fn whole<'a>(x: &Tensor, out: &Output) -> Result<(RowPiece<'a>, usize)> {
    let width = x.dim(D::Minus1)?;
    let rows = x.elem_count().checked_div(width).unwrap_or(0);
    let (x, out) = (address(x)?, out.address());
    Ok((RowPiece { x, out, rows, ..RowPiece::default() }, width))
}

/// [`crate::ops::rms_norm`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Option<Tensor>> {
    let fits = matches!(weight.dtype(), DType::BF16 | DType::F32)
        && x.dims().last().is_some_and(|dim| weight.dims() == [*dim]);
    if !takes(&[x]) || !are_near(&[weight]) || !fits || !has_rows(x) {
        return Ok(None);
    }
    let (x, weight) = (aligned(x)?, weight.contiguous()?);
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let (piece, width) = whole(&x, &out)?;
    let args = RowArgs { width, weight: Some(&weight), eps };
    args.by_row("rms_norm", x.device(), &[piece])?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::layer_norm`] with scale and shift if there are any, or `None` where there is no
/// kernel for the types and sizes.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    modulation: Option<[&Tensor; 2]>,
    eps: f64,
) -> Result<Option<Tensor>> {
    if !takes(&[x]) || !modulation.is_none_or(|modulation| takes(&modulation)) || !has_rows(x) {
        return Ok(None);
    }
    let x = aligned(x)?;
    let modulation = match modulation {
        None => None,
        Some([scale, shift]) if scale.dims() == shift.dims() => {
            let Some(scale) = Shared::new(&x, scale)? else { return Ok(None) };
            Some((scale, shift.contiguous()?))
        }
        Some(_) => return Ok(None),
    };
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let (piece, width) = whole(&x, &out)?;
    let piece = RowPiece {
        scale: modulation.as_ref().map(|(scale, _)| &scale.tensor),
        shift: modulation.as_ref().map(|(_, shift)| shift),
        shared: modulation.as_ref().map_or(1, |(scale, _)| scale.rows),
        ..piece
    };
    RowArgs { width, eps, weight: None }.by_row("layer_norm", x.device(), &[piece])?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::gated_add`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn gated_add(
    residual: &Tensor,
    x: &Tensor,
    gate: &Tensor,
) -> Result<Option<Tensor>> {
    if !takes(&[residual, x, gate]) || residual.dims() != x.dims() || !has_rows(x) {
        return Ok(None);
    }
    let (residual, x) = (aligned(residual)?, aligned(x)?);
    let Some(gate) = Shared::new(&x, gate)? else { return Ok(None) };
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let (piece, width) = whole(&x, &out)?;
    let piece = RowPiece {
        residual: address(&residual)?,
        gate: Some(&gate.tensor),
        shared: gate.rows,
        ..piece
    };
    RowArgs { width, ..RowArgs::default() }.flat("gated_add", x.device(), &[piece])?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::gated_add_norm`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn gated_add_norm(
    residual: &Tensor,
    x: &Tensor,
    gate: &Tensor,
    modulation: [&Tensor; 2],
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let [scale, shift] = modulation;
    let one_kind = scale.dims() == shift.dims() && scale.dims() == gate.dims();
    let same = residual.dims() == x.dims();
    if !takes(&[residual, x, gate, scale, shift]) || !one_kind || !same || !has_rows(x) {
        return Ok(None);
    }
    let (residual, x) = (aligned(residual)?, aligned(x)?);
    let Some(gate) = Shared::new(&x, gate)? else { return Ok(None) };
    let (scale, shift) = (scale.contiguous()?, shift.contiguous()?);
    let sum = Output::new(x.device(), x.dims(), DType::BF16)?;
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let (piece, width) = whole(&x, &out)?;
    let piece = RowPiece {
        scale: Some(&scale),
        shift: Some(&shift),
        gate: Some(&gate.tensor),
        shared: gate.rows,
        residual: address(&residual)?,
        sum: sum.address(),
        ..piece
    };
    RowArgs { width, eps, weight: None }.by_row("layer_norm", x.device(), &[piece])?;
    Ok(Some((sum.into_tensor()?, out.into_tensor()?)))
}

/// Which activation, as `kernels/elementwise.cu` numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Activation {
    GeluTanh = 1,
    GeluErf = 2,
    Silu = 3,
}

/// `activation(x)`, times `up` if there is one, or `None` where there is no kernel.
pub(in crate::ops) fn activate(
    x: &Tensor,
    up: Option<&Tensor>,
    activation: Activation,
) -> Result<Option<Tensor>> {
    if !takes(&[x]) || !up.is_none_or(|up| takes(&[up])) || x.elem_count() == 0 {
        return Ok(None);
    }
    /// Pieces that a thread moves.
    const PIECES: usize = 2;
    let (x, up) = (aligned(x)?, up.map(aligned).transpose()?);
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.tensor(up.as_ref())?.address(out.address());
    args.counts([x.elem_count(), activation as usize]);
    let blocks = x.elem_count().div_ceil(PIECES * TOGETHER * THREADS);
    launch(x.device(), &flat("activate", blocks, args))?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::rotate_pairs`] or, with `halves`, [`crate::ops::rotate_halves`]; `None` where there
/// is no kernel for the types and sizes.
pub(in crate::ops) fn rotate(
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    halves: bool,
) -> Result<Option<Tensor>> {
    let fits = matches!(cos.dtype(), DType::BF16 | DType::F32) && cos.dtype() == sin.dtype();
    if !takes(&[x]) || !are_near(&[cos, sin]) || !fits || x.elem_count() == 0 {
        return Ok(None);
    }
    let (_, n, h, d) = x.dims4()?;
    let (x, cos, sin) = (x.contiguous()?, cos.contiguous()?, sin.contiguous()?);
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.address(out.address()).tensor(Some(&cos))?.tensor(Some(&sin))?;
    args.flag(cos.dtype() == DType::F32).counts([x.elem_count(), n, h, d]).flag(halves);
    launch(x.device(), &flat("rotate", (x.elem_count() >> 1).div_ceil(THREADS), args))?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::channel_rms_norm`], with SiLU after it if `silu`; `None` where there is no kernel.
pub(in crate::ops) fn channel_rms_norm(
    x: &Tensor,
    gamma: &Tensor,
    silu: bool,
) -> Result<Option<Tensor>> {
    const PIXELS: usize = 32;
    let fits = matches!(gamma.dtype(), DType::BF16 | DType::F32)
        && x.rank() == 4
        && gamma.dims() == [x.dim(1)?];
    if !takes(&[x]) || !are_near(&[gamma]) || !fits || x.elem_count() == 0 {
        return Ok(None);
    }
    let (b, channels, h, w) = x.dims4()?;
    let (x, gamma) = (x.contiguous()?, gamma.contiguous()?);
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.tensor(Some(&gamma))?.flag(gamma.dtype() == DType::F32);
    args.address(out.address()).counts([channels, h * w]).flag(silu);
    launch(
        x.device(),
        &Launch {
            kernel: "channel_norm".to_owned(),
            grid: [(h * w).div_ceil(PIXELS), 1, b],
            threads: THREADS,
            shared_bytes: THREADS * DType::F32.size_in_bytes(),
            args,
        },
    )?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::guided_step`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn guided_step(
    latents: &Tensor,
    positive: &Tensor,
    negative: Option<(&Tensor, f64)>,
    step: f64,
) -> Result<Option<Tensor>> {
    const ROWS: usize = 4;
    let inputs = [latents, positive, negative.map_or(positive, |(negative, _)| negative)];
    let fits = inputs.iter().all(|x| x.dtype() == DType::F32 && x.dims() == latents.dims());
    if !are_near(&inputs) || !fits || latents.elem_count() == 0 || latents.rank() == 0 {
        return Ok(None);
    }
    let [latents, positive, other] = [0, 1, 2].map(|i| inputs[i].contiguous());
    let (latents, positive, other) = (latents?, positive?, other?);
    let width = latents.dim(D::Minus1)?;
    let rows = latents.elem_count().checked_div(width).unwrap_or(0);
    let out = Output::new(latents.device(), latents.dims(), DType::F32)?;
    let mut args = Args::default();
    args.tensor(Some(&latents))?.tensor(Some(&positive))?;
    args.tensor(negative.is_some().then_some(&other))?.address(out.address());
    args.counts([rows, width]).number(negative.map_or(1.0, |(_, scale)| scale)).number(step);
    launch(
        latents.device(),
        &Launch {
            kernel: "guided_step".to_owned(),
            grid: [rows.div_ceil(ROWS), 1, 1],
            threads: ROW_THREADS,
            shared_bytes: 0,
            args,
        },
    )?;
    out.into_tensor().map(Some)
}

/// A start of a kernel of so many blocks.
fn flat(kernel: &str, blocks: usize, args: Args) -> Launch {
    let kernel = kernel.to_owned();
    Launch { kernel, grid: [blocks, 1, 1], threads: THREADS, shared_bytes: 0, args }
}
