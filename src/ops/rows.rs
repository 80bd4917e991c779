//! The normalisations for float32 in host memory: each reads its input once.

use candle_core::{D, Result, Tensor};
use pulp::{Simd, WithSimd};

use super::{
    buffers,
    cpu::Floats,
    simd::{
        Arch,
        blocks::{Finish, Rows},
        lanes::{self, Lanewise},
        math,
        prefetch::into_first_level,
        tiles::{Grid, Tile, par_rows, par_tiles},
    },
};

/// How many rows ahead a part of one is asked for: the processor does not foresee rows that are read
/// in parts.
const AHEAD: usize = 4;
/// Pixels whose channels one piece of work covers.
const PIXELS: usize = 512;

/// Numbers that scale (and shift) the rows of `[b, n, dim]`: one row for all, one a batch entry or
/// one a token.
pub(super) struct Modulation {
    scale: Tensor,
    shift: Option<Tensor>,
    /// Rows of `x` that share one row here.
    rows: usize,
}

impl Modulation {
    /// `None` where the shapes are not `[1, 1, dim]`, `[b, 1, dim]` or `[b, n, dim]`.
    ///
    /// # Errors
    /// A failure to copy.
    pub(super) fn new(x: &Tensor, scale: &Tensor, shift: Option<&Tensor>) -> Result<Option<Self>> {
        let Ok((b, n, dim)) = x.dims3() else { return Ok(None) };
        if shift.is_some_and(|shift| shift.dims() != scale.dims()) {
            return Ok(None);
        }
        let rows = match scale.dims() {
            dims if dims == [b, n, dim] => 1,
            dims if dims == [b, 1, dim] => n,
            dims if dims == [1, 1, dim] => b * n,
            _ => return Ok(None),
        };
        let shift = shift.map(Tensor::contiguous).transpose()?;
        Ok(Some(Self { scale: scale.contiguous()?, shift, rows }))
    }
}

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let weight = weight.contiguous()?;
    let weight = Floats::new(&weight);
    let weight = weight.contiguous()?;
    by_rows(x, |_, out, x| Arch::new().dispatch(RmsRow { x, out, weight, eps }))
}

pub(super) fn layer_norm(x: &Tensor, modulation: Option<&Modulation>, eps: f64) -> Result<Tensor> {
    let Some(modulation) = modulation else {
        return by_rows(x, |_, out, x| {
            Arch::new().dispatch(LayerRow { x, out, modulation: None, eps });
        });
    };
    let (Some(shift), dim) = (&modulation.shift, x.dim(D::Minus1)?) else {
        candle_core::bail!("a modulated layer norm without a shift");
    };
    let (scale, shift) = (Floats::new(&modulation.scale), Floats::new(shift));
    let (scale, shift) = (scale.contiguous()?, shift.contiguous()?);
    by_rows(x, |row, out, x| {
        let start = row.checked_div(modulation.rows).unwrap_or(0) * dim;
        let modulation = Some((&scale[start..start + dim], &shift[start..start + dim]));
        Arch::new().dispatch(LayerRow { x, out, modulation, eps });
    })
}

/// A run of rows that are modulated alike.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModulatedRun<'a> {
    /// Where it ends.
    pub(super) end: usize,
    pub(super) scale: &'a [f32],
    pub(super) shift: &'a [f32],
}

/// The rows of [`layer_norm`], each computed when it is asked for.
pub(super) struct NormedRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) width: usize,
    /// One after the other up to the last row.
    pub(super) runs: Vec<ModulatedRun<'a>>,
    pub(super) eps: f64,
}

impl Rows for NormedRows<'_> {
    fn count(&self) -> usize {
        self.x.len().checked_div(self.width).unwrap_or(0)
    }

    fn row<'a>(&'a self, i: usize, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let x = &self.x[i * self.width..][..self.width];
        scratch.resize(self.width, 0.0);
        let run = self.runs.iter().find(|run| i < run.end);
        let modulation = run.map(|run| (run.scale, run.shift));
        Arch::new().dispatch(LayerRow { x, out: scratch, modulation, eps: self.eps });
        scratch
    }
}

/// [`gated_add`] of a product before it leaves the first-level cache.
pub(super) struct AddGated<'a> {
    pub(super) arch: Arch,
    pub(super) residual: &'a [f32],
    /// Numbers of a row.
    pub(super) width: usize,
    /// Where a run of rows ends, and its gate.
    pub(super) gates: Vec<(usize, &'a [f32])>,
}

impl Finish for AddGated<'_> {
    fn apply(&self, row: usize, first: usize, out: &mut [f32]) {
        let later = (row + AHEAD) * self.width + first;
        if let Some(later) = self.residual.get(later..later + out.len()) {
            into_first_level(later);
        }
        let residual = &self.residual[row * self.width + first..][..out.len()];
        let Some((_, gate)) = self.gates.iter().find(|(end, _)| row < *end) else { return };
        let gate = &gate[first..][..out.len()];
        self.arch.dispatch(GatedInPlace { residual, gate, x: out });
    }
}

pub(super) fn gated_add(residual: &Tensor, x: &Tensor, gate: &Modulation) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let residual = residual.contiguous()?;
    let (residual, scale) = (Floats::new(&residual), Floats::new(&gate.scale));
    let (residual, scale) = (residual.contiguous()?, scale.contiguous()?);
    by_rows(x, |row, out, x| {
        let residual = &residual[row * dim..][..dim];
        let start = row.checked_div(gate.rows).unwrap_or(0) * dim;
        Arch::new().dispatch(GatedRow { residual, x, gate: &scale[start..start + dim], out });
    })
}

/// Runs `work(row, out, x)` on every row of the last axis.
fn by_rows(x: &Tensor, work: impl Fn(usize, &mut [f32], &[f32]) + Sync + Send) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let shape = x.shape().clone();
    let mut out = buffers::of_len(shape.elem_count());
    let x = x.contiguous()?;
    let floats = Floats::new(&x);
    let input = floats.contiguous()?;
    par_rows(&mut out, dim, |row, out| work(row, out, &input[row * dim..][..dim]));
    drop(floats);
    Tensor::from_vec(out, shape, x.device())
}

struct RmsRow<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
    weight: &'a [f32],
    eps: f64,
}

impl WithSimd for RmsRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let squares = lanes::sum(simd, self.x, Square);
        let factor = inverse_root(squares, self.x.len(), self.eps);
        lanes::zip(simd, self.out, [self.x, self.weight], Scale { factor });
    }
}

struct LayerRow<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
    modulation: Option<(&'a [f32], &'a [f32])>,
    eps: f64,
}

impl WithSimd for LayerRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mean = mean(lanes::sum(simd, self.x, Same), self.x.len());
        // Whole registers only: lanes after the last element would count as −mean.
        let (whole, rest) = self.x.split_at(self.x.len() - self.x.len() % S::F32_LANES);
        let squares = lanes::sum(simd, whole, CentredSquare { mean });
        let squares = rest.iter().fold(squares, |sum, x| sum + (x - mean) * (x - mean));
        let factor = inverse_root(squares, self.x.len(), self.eps);
        let norm = Normalise { mean, factor };
        match self.modulation {
            None => lanes::zip(simd, self.out, [self.x], norm),
            Some((scale, shift)) => {
                lanes::zip(simd, self.out, [self.x, scale, shift], Modulate { norm });
            }
        }
    }
}

struct GatedRow<'a> {
    residual: &'a [f32],
    x: &'a [f32],
    gate: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for GatedRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::zip(simd, self.out, [self.x, self.gate, self.residual], MulAdd);
    }
}

struct GatedInPlace<'a> {
    residual: &'a [f32],
    gate: &'a [f32],
    x: &'a mut [f32],
}

impl WithSimd for GatedInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::update(simd, self.x, [self.gate, self.residual], MulAdd);
    }
}

/// `x`.
#[derive(Clone, Copy)]
struct Same;
/// `x²`.
#[derive(Clone, Copy)]
struct Square;
/// `(x − mean)²`.
#[derive(Clone, Copy)]
struct CentredSquare {
    mean: f32,
}
/// `x · factor · weight`.
#[derive(Clone, Copy)]
struct Scale {
    factor: f32,
}
/// `(x − mean) · factor`.
#[derive(Clone, Copy)]
struct Normalise {
    mean: f32,
    factor: f32,
}
/// `norm(x) · (1 + scale) + shift`.
#[derive(Clone, Copy)]
struct Modulate {
    norm: Normalise,
}
/// `x · y + z`.
#[derive(Clone, Copy)]
struct MulAdd;
/// `sum + x²`.
#[derive(Clone, Copy)]
struct AddSquare;
/// `x · norm · gamma`, and `silu` of that.
#[derive(Clone, Copy)]
struct ScaleSilu {
    gamma: f32,
}

impl Lanewise<1> for Same {
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, [x]: [S::f32s; 1]) -> S::f32s {
        x
    }
}

impl Lanewise<1> for Square {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        simd.mul_f32s(x, x)
    }
}

impl Lanewise<1> for CentredSquare {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        let x = simd.sub_f32s(x, simd.splat_f32s(self.mean));
        simd.mul_f32s(x, x)
    }
}

impl Lanewise<2> for Scale {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x, weight]: [S::f32s; 2]) -> S::f32s {
        simd.mul_f32s(simd.mul_f32s(x, simd.splat_f32s(self.factor)), weight)
    }
}

impl Lanewise<1> for Normalise {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        let x = simd.sub_f32s(x, simd.splat_f32s(self.mean));
        simd.mul_f32s(x, simd.splat_f32s(self.factor))
    }
}

impl Lanewise<3> for Modulate {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x, scale, shift]: [S::f32s; 3]) -> S::f32s {
        let scale = simd.add_f32s(simd.splat_f32s(1.0), scale);
        simd.mul_add_e_f32s(self.norm.apply(simd, [x]), scale, shift)
    }
}

impl Lanewise<3> for MulAdd {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x, y, z]: [S::f32s; 3]) -> S::f32s {
        simd.mul_add_e_f32s(x, y, z)
    }
}

impl Lanewise<2> for AddSquare {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [sum, x]: [S::f32s; 2]) -> S::f32s {
        simd.mul_add_e_f32s(x, x, sum)
    }
}

impl Lanewise<2> for ScaleSilu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x, norm]: [S::f32s; 2]) -> S::f32s {
        let y = simd.mul_f32s(simd.mul_f32s(x, norm), simd.splat_f32s(self.gamma));
        simd.mul_f32s(y, math::sigmoid(simd, y))
    }
}

#[expect(clippy::cast_precision_loss, reason = "lengths of rows are small")]
fn mean(sum: f32, len: usize) -> f32 {
    sum / len as f32
}

#[expect(clippy::cast_possible_truncation, reason = "the factor is applied in float32")]
fn inverse_root(squares: f32, len: usize, eps: f64) -> f32 {
    (1.0 / (f64::from(mean(squares, len)) + eps).sqrt()) as f32
}

/// [`super::channel_rms_norm()`], and [`super::silu()`] after it if `silu`.
pub(super) fn channel_rms_norm(x: &Tensor, gamma: &Tensor, silu: bool) -> Result<Tensor> {
    let (_, channels, h, w) = x.dims4()?;
    let shape = x.shape().clone();
    let mut out = buffers::of_len(shape.elem_count());
    let (x, gamma) = (x.contiguous()?, gamma.contiguous()?);
    let (x_floats, gamma) = (Floats::new(&x), Floats::new(&gamma));
    let (input, gamma) = (x_floats.contiguous()?, gamma.contiguous()?);
    #[expect(clippy::cast_precision_loss, reason = "a number of channels is small")]
    let root = (channels as f32).sqrt();
    let gamma: Vec<f32> = gamma.iter().map(|gamma| gamma * root).collect();
    let grid = Grid { rows: channels, cols: h * w, tile_rows: channels.max(1), tile_cols: PIXELS };
    par_tiles(&mut out, grid, Vec::new, |norms, tile| {
        let plane = channels * h * w;
        let x = &input[tile.batch * plane..][..plane];
        Arch::new().dispatch(Channels { x, gamma: &gamma, width: h * w, tile, norms, silu });
    });
    drop(x_floats);
    Tensor::from_vec(out, shape, x.device())
}

struct Channels<'a, 't> {
    /// One picture: `[channel][pixel]`.
    x: &'a [f32],
    gamma: &'a [f32],
    width: usize,
    tile: Tile<'t>,
    norms: &'a mut Vec<f32>,
    silu: bool,
}

impl WithSimd for Channels<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let cols = self.tile.cols.clone();
        let x = |channel: usize| &self.x[channel * self.width..][cols.clone()];
        self.norms.clear();
        self.norms.resize(cols.len(), 0.0);
        for channel in 0..self.gamma.len() {
            lanes::update(simd, self.norms, [x(channel)], AddSquare);
        }
        for norm in self.norms.iter_mut() {
            // Not `max`, which would hide NaN.
            let root = norm.sqrt();
            *norm = 1.0 / if root < 1e-12 { 1e-12 } else { root };
        }
        for (channel, gamma) in self.gamma.iter().enumerate() {
            let inputs = [x(channel), self.norms.as_slice()];
            let out = self.tile.row(channel);
            if self.silu {
                lanes::zip(simd, out, inputs, ScaleSilu { gamma: *gamma });
            } else {
                lanes::zip(simd, out, inputs, Scale { factor: *gamma });
            }
        }
    }
}
