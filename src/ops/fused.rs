//! Products together with the norm before them or with what is done to their results: rows are
//! rounded once for all matrices that multiply them, and results are finished before they leave the
//! first-level cache. The numbers are those of the operations one after the other.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    activation::{GeluInPlace, gelu_tanh_owned},
    buffers,
    cpu::{Floats, is_fast},
    cuda,
    linear::{PackedLinear, forward_each, wide_bias},
    norm::{gated_add, modulated_layer_norm},
    recycle,
    rows::{AddGated, ModulatedRun, NormedRows},
    simd::{
        Arch,
        blocks::{AsItIs, DenseRows, Finish, PackedBlocks, RoundedRows},
    },
};

/// A run of tokens that are modulated alike. Each tensor is `[1, 1, dim]`.
#[derive(Debug, Clone, Copy)]
pub struct ModulatedTokens<'a> {
    /// How many there are.
    pub tokens: usize,
    /// Scale after the norm, less 1.
    pub scale: &'a Tensor,
    /// Shift after the norm.
    pub shift: &'a Tensor,
    /// Factor of what is added in the end.
    pub gate: &'a Tensor,
}

/// Tokens, `[b, n, dim]`, and what is added to them.
#[derive(Debug, Clone, Copy)]
pub struct GatedTokens<'a> {
    /// `[b, n, dim]`.
    pub residual: &'a Tensor,
    /// What is added, times the runs' gates: `[b, n, dim]`.
    pub x: &'a Tensor,
    /// They have `n` tokens.
    pub runs: &'a [ModulatedTokens<'a>],
}

/// [`modulated_layer_norm`] of each run of tokens. `x: [b, n, dim]`; the runs have `n` tokens.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn modulated_layer_norm_each(
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
    eps: f64,
) -> Result<Tensor> {
    let [normed] = modulated_layer_norm_streams([(x, runs)], eps)?;
    Ok(normed)
}

/// [`modulated_layer_norm_each`] of several streams, with one start of a kernel on a GPU.
///
/// # Errors
/// As [`modulated_layer_norm_each`].
pub fn modulated_layer_norm_streams<const N: usize>(
    streams: [(&Tensor, &[ModulatedTokens<'_>]); N],
    eps: f64,
) -> Result<[Tensor; N]> {
    if let Some(all) = cuda::layer_norm_streams(&streams, eps)? {
        return exactly(all);
    }
    exactly_each(streams, |(x, runs)| {
        by_run([x], runs, |[x], run| modulated_layer_norm(x, run.scale, run.shift, eps))
    })
}

/// [`gated_add`] of each run of tokens. `residual, x: [b, n, dim]`; the runs have `n` tokens.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn gated_add_each(
    residual: &Tensor,
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
) -> Result<Tensor> {
    let [sum] = gated_add_streams([GatedTokens { residual, x, runs }])?;
    Ok(sum)
}

/// [`gated_add_each`] of several streams, with one start of a kernel on a GPU.
///
/// # Errors
/// As [`gated_add_each`].
pub fn gated_add_streams<const N: usize>(streams: [GatedTokens<'_>; N]) -> Result<[Tensor; N]> {
    if let Some(all) = cuda::gated_add_streams(&streams)? {
        return exactly(all);
    }
    exactly_each(streams, |GatedTokens { residual, x, runs }| {
        by_run([residual, x], runs, |[residual, x], run| gated_add(residual, x, run.gate))
    })
}

/// [`gated_add_norm`](super::gated_add_norm) of each run of tokens: `runs` have the gates, `next` the scales and shifts of the
/// norm. `residual, x: [b, n, dim]`; the runs have `n` tokens, each as many as the next one's.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn gated_add_norm_each(
    residual: &Tensor,
    x: &Tensor,
    [runs, next]: [&[ModulatedTokens<'_>]; 2],
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let [both] = gated_add_norm_streams([(GatedTokens { residual, x, runs }, next)], eps)?;
    Ok(both)
}

/// [`gated_add_norm_each`] of several streams, each with the scales and shifts of its norm, with one start of a
/// kernel on a GPU.
///
/// # Errors
/// As [`gated_add_norm_each`].
pub fn gated_add_norm_streams<const N: usize>(
    streams: [(GatedTokens<'_>, &[ModulatedTokens<'_>]); N],
    eps: f64,
) -> Result<[(Tensor, Tensor); N]> {
    if let Some(all) = cuda::gated_add_norm_streams(&streams, eps)? {
        return exactly(all);
    }
    exactly_each(streams, |(GatedTokens { residual, x, runs }, next)| {
        let sum = gated_add_each(residual, x, runs)?;
        let normed = modulated_layer_norm_each(&sum, next, eps)?;
        Ok((sum, normed))
    })
}

/// One result for each stream.
fn exactly<T, const N: usize>(all: Vec<T>) -> Result<[T; N]> {
    let found = all.len();
    all.try_into()
        .map_err(|_all: Vec<T>| candle_core::Error::msg(format!("{found} results of {N} streams")))
}

fn exactly_each<S, T, const N: usize>(
    streams: [S; N],
    of: impl FnMut(S) -> Result<T>,
) -> Result<[T; N]> {
    exactly(streams.into_iter().map(of).collect::<Result<_>>()?)
}

/// Applies `f` to the tokens of each run. `tensors: [b, n, dim]` each.
fn by_run<const N: usize>(
    tensors: [&Tensor; N],
    runs: &[ModulatedTokens<'_>],
    f: impl Fn([&Tensor; N], &ModulatedTokens<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    for tensor in tensors {
        check_runs(tensor.dims3()?.1, runs)?;
    }
    if let [run] = runs {
        return f(tensors, run);
    }
    let mut start = 0;
    let parts = runs.iter().map(|run| {
        let parts = tensors.iter().map(|x| x.narrow(1, start, run.tokens)?.contiguous());
        let parts: Vec<Tensor> = parts.collect::<Result<_>>()?;
        start += run.tokens;
        f(std::array::from_fn(|i| &parts[i]), run)
    });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1) // (b, n, dim)
}

fn check_runs(tokens: usize, runs: &[ModulatedTokens<'_>]) -> Result<()> {
    let sum: usize = runs.iter().map(|run| run.tokens).sum();
    if sum != tokens || runs.is_empty() {
        bail!("modulation of {sum} tokens for {tokens}");
    }
    Ok(())
}

/// [`PackedLinear::forward`] by each of `linears` of what [`modulated_layer_norm_each`] gives.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn modulated_linear_each<const N: usize>(
    linears: [&PackedLinear; N],
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
    eps: f64,
) -> Result<[Tensor; N]> {
    let Some((rows, matrices)) = rounded_norm(&linears, x, runs, eps)? else {
        let normed = modulated_layer_norm_each(x, runs, eps)?;
        let results = forward_each(linears, &normed)?;
        recycle(normed)?;
        return Ok(results);
    };
    let results = matrices.iter().map(|matrix| matrix.multiply(&rows, &AsItIs));
    let results: Vec<Tensor> = results.collect::<Result<_>>()?;
    let Ok(results) = <[Tensor; N]>::try_from(results) else {
        bail!("linear: a result is missing")
    };
    Ok(results)
}

/// GELU, in its tanh approximation, of what [`modulated_linear_each`] gives.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn modulated_linear_gelu(
    linear: &PackedLinear,
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
    eps: f64,
) -> Result<Tensor> {
    if let Some((rows, [matrix])) = rounded_norm(&[linear], x, runs, eps)? {
        return matrix.multiply(&rows, &GeluInPlace(Arch::new()));
    }
    let [y] = modulated_linear_each([linear], x, runs, eps)?;
    gelu_tanh_owned(y)
}

/// [`gated_add_each`] of `residual: [b, n, out]` and what `linear` makes of `x: [b, n, in]`.
///
/// # Errors
/// Shapes that do not fit, or a failure of the device.
pub fn linear_gated_add(
    linear: &PackedLinear,
    x: &Tensor,
    residual: &Tensor,
    runs: &[ModulatedTokens<'_>],
) -> Result<Tensor> {
    if let Some(y) = fused_gated_add(linear, x, residual, runs)? {
        return Ok(y);
    }
    let y = linear.forward(x)?;
    let sum = gated_add_each(residual, &y, runs)?;
    recycle(y)?;
    Ok(sum)
}

/// A matrix in blocks and its bias.
struct Matrix<'a> {
    blocks: &'a PackedBlocks,
    bias: Option<Tensor>,
}

impl<'a> Matrix<'a> {
    /// `None` where the matrix is kept in another way.
    fn of(linear: &'a PackedLinear) -> Result<Option<Self>> {
        let Some((blocks, bias)) = linear.blocks() else { return Ok(None) };
        Ok(Some(Self { blocks, bias: wide_bias(bias, blocks.dims().0)? }))
    }

    fn multiply(&self, rows: &RoundedRows, finish: &impl Finish) -> Result<Tensor> {
        let dims = (1, rows.count(), self.blocks.dims().0);
        let bias = self.bias.as_ref().map(Floats::new);
        let bias = bias.as_ref().map(Floats::contiguous).transpose()?;
        let mut y = buffers::of_len(dims.1 * dims.2);
        self.blocks.multiply_rounded(rows, bias, &mut y, finish);
        Tensor::from_vec(y, dims, &Device::Cpu)
    }
}

/// How many rows of `width` numbers `x: [1, n, width]` has; `None` where they cannot be fused with
/// a product, as a single one, for which there are other kernels.
fn rows_of(x: &Tensor, width: usize) -> Option<usize> {
    match x.dims() {
        [1, n, dim] if *n > 1 && *dim == width && is_fast(&[x]) => Some(*n),
        _ => None,
    }
}

/// The modulated rows in 8 bits, and the matrices; `None` where they cannot be fused.
fn rounded_norm<'a, const N: usize>(
    linears: &[&'a PackedLinear; N],
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
    eps: f64,
) -> Result<Option<(RoundedRows, [Matrix<'a>; N])>> {
    let matrices = linears.iter().map(|linear| Matrix::of(linear));
    let Some(matrices) = matrices.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
    let Some(width) = matrices.first().map(|matrix| matrix.blocks.dims().1) else {
        return Ok(None);
    };
    let Some(tokens) = rows_of(x, width) else { return Ok(None) };
    check_runs(tokens, runs)?;
    let fits = |x: &Tensor| x.dims() == [1, 1, width] && is_fast(&[x]);
    if !runs.iter().all(|run| fits(run.scale) && fits(run.shift)) {
        return Ok(None);
    }
    let modulation = runs.iter().map(|run| Ok([run.scale.contiguous()?, run.shift.contiguous()?]));
    let modulation: Vec<[Tensor; 2]> = modulation.collect::<Result<_>>()?;
    let modulation: Vec<[Floats<'_>; 2]> =
        modulation.iter().map(|tensors| tensors.each_ref().map(Floats::new)).collect();
    let mut end = 0;
    let modulated = runs.iter().zip(&modulation).map(|(run, [scale, shift])| {
        end += run.tokens;
        Ok(ModulatedRun { end, scale: scale.contiguous()?, shift: shift.contiguous()? })
    });
    let modulated: Vec<ModulatedRun<'_>> = modulated.collect::<Result<_>>()?;
    let x = x.contiguous()?;
    let x = Floats::new(&x);
    let rows = NormedRows { x: x.contiguous()?, width, runs: modulated, eps };
    let blocks: Vec<&PackedBlocks> = matrices.iter().map(|matrix| matrix.blocks).collect();
    let rounded = PackedBlocks::round(&blocks, &rows);
    Ok(rounded.zip(matrices.try_into().ok()))
}

fn fused_gated_add(
    linear: &PackedLinear,
    x: &Tensor,
    residual: &Tensor,
    runs: &[ModulatedTokens<'_>],
) -> Result<Option<Tensor>> {
    let Some(matrix) = Matrix::of(linear)? else { return Ok(None) };
    let (out, width) = matrix.blocks.dims();
    let Some(tokens) = rows_of(x, width) else { return Ok(None) };
    check_runs(tokens, runs)?;
    let gates_fit = runs.iter().all(|run| run.gate.dims() == [1, 1, out] && is_fast(&[run.gate]));
    if rows_of(residual, out) != Some(tokens) || !gates_fit {
        return Ok(None);
    }
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    let (x, residual) = (Floats::new(&x), Floats::new(&residual));
    let gates = runs.iter().map(|run| run.gate.contiguous()).collect::<Result<Vec<_>>>()?;
    let gates: Vec<Floats<'_>> = gates.iter().map(Floats::new).collect();
    let mut end = 0;
    let gates = runs.iter().zip(&gates).map(|(run, gate)| {
        end += run.tokens;
        Ok((end, gate.contiguous()?))
    });
    let gates = gates.collect::<Result<_>>()?;
    let (arch, residual) = (Arch::new(), residual.contiguous()?);
    let finish = AddGated { arch, residual, width: out, gates };
    let rows = DenseRows { x: x.contiguous()?, width };
    let Some(rows) = PackedBlocks::round(&[matrix.blocks], &rows) else { return Ok(None) };
    matrix.multiply(&rows, &finish).map(Some)
}
