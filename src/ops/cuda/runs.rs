//! The operations of `rows` on tokens that are modulated in runs: a launch for each run of each entry of a batch,
//! on the rows where they lie, so that nothing is taken apart and joined.

use candle_core::{DType, Result, Tensor};

use super::{
    ffi::Output,
    rows::{RowArgs, aligned, by_row, flat_rows, has_rows},
    takes,
};
use crate::ops::ModulatedTokens;

/// [`crate::ops::modulated_layer_norm_each`] of two runs and more, or `None` where there is no kernel for the
/// types and sizes.
pub(in crate::ops) fn layer_norm_each(
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
    eps: f64,
) -> Result<Option<Tensor>> {
    if !fits(&[x], runs, |run| vec![run.scale, run.shift]) {
        return Ok(None);
    }
    let x = aligned(x)?;
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    for piece in pieces(&x, runs)? {
        let run = &runs[piece.run];
        let args = RowArgs {
            scale: Some(run.scale),
            shift: Some(run.shift),
            shared: run.tokens,
            eps,
            ..RowArgs::default()
        };
        let x = piece.of(&x)?;
        by_row("layer_norm", &x, args.args(&x, out.address() + piece.offset)?)?;
    }
    out.into_tensor().map(Some)
}

/// [`crate::ops::gated_add_each`] of two runs and more, or `None` where there is no kernel for the types and
/// sizes.
pub(in crate::ops) fn gated_add_each(
    residual: &Tensor,
    x: &Tensor,
    runs: &[ModulatedTokens<'_>],
) -> Result<Option<Tensor>> {
    if !fits(&[residual, x], runs, |run| vec![run.gate]) {
        return Ok(None);
    }
    let (residual, x) = (aligned(residual)?, aligned(x)?);
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    for piece in pieces(&x, runs)? {
        let run = &runs[piece.run];
        let (residual, x) = (piece.of(&residual)?, piece.of(&x)?);
        let args = RowArgs {
            residual: Some(&residual),
            gate: Some(run.gate),
            shared: run.tokens,
            ..RowArgs::default()
        };
        flat_rows("gated_add", &x, args.args(&x, out.address() + piece.offset)?)?;
    }
    out.into_tensor().map(Some)
}

/// [`crate::ops::gated_add_norm_each`] of two runs and more, or `None` where there is no kernel for the types
/// and sizes.
pub(in crate::ops) fn gated_add_norm_each(
    residual: &Tensor,
    x: &Tensor,
    [runs, next]: [&[ModulatedTokens<'_>]; 2],
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let alike = runs.len() == next.len()
        && runs.iter().zip(next).all(|(run, next)| run.tokens == next.tokens);
    if !alike
        || !fits(&[residual, x], runs, |run| vec![run.gate])
        || !fits(&[x], next, |run| vec![run.scale, run.shift])
    {
        return Ok(None);
    }
    let (residual, x) = (aligned(residual)?, aligned(x)?);
    let sum = Output::new(x.device(), x.dims(), DType::BF16)?;
    let out = Output::new(x.device(), x.dims(), DType::BF16)?;
    for piece in pieces(&x, runs)? {
        let (run, next) = (&runs[piece.run], &next[piece.run]);
        let (residual, x) = (piece.of(&residual)?, piece.of(&x)?);
        let args = RowArgs {
            scale: Some(next.scale),
            shift: Some(next.shift),
            shared: run.tokens,
            residual: Some(&residual),
            gate: Some(run.gate),
            sum: sum.address() + piece.offset,
            weight: None,
            eps,
        };
        by_row("layer_norm", &x, args.args(&x, out.address() + piece.offset)?)?;
    }
    Ok(Some((sum.into_tensor()?, out.into_tensor()?)))
}

/// Whether there are several runs that make up the tokens of all `tensors: [b, n, dim]`, whose modulation,
/// `[1, 1, dim]` each, kernels read.
fn fits<'a>(
    tensors: &[&Tensor],
    runs: &'a [ModulatedTokens<'a>],
    modulation: impl Fn(&'a ModulatedTokens<'a>) -> Vec<&'a Tensor>,
) -> bool {
    let Some(Ok((b, n, dim))) = tensors.first().map(|x| x.dims3()) else { return false };
    let is_read = |x: &&Tensor| x.dims() == [1, 1, dim] && x.is_contiguous() && takes(&[x]);
    runs.len() > 1
        && runs.iter().map(|run| run.tokens).sum::<usize>() == n
        && tensors.iter().all(|x| x.dims() == [b, n, dim] && has_rows(x))
        && takes(tensors)
        && runs.iter().all(|run| modulation(run).iter().all(is_read))
}

/// A run of tokens of one entry: rows that lie side by side.
struct Piece {
    run: usize,
    entry: usize,
    start: usize,
    tokens: usize,
    /// Where the rows begin, in bytes of bf16.
    offset: u64,
}

impl Piece {
    /// Its rows of `x: [b, n, dim]`, which has no gaps: `[1, tokens, dim]`.
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        x.narrow(0, self.entry, 1)?.narrow(1, self.start, self.tokens)
    }
}

fn pieces(x: &Tensor, runs: &[ModulatedTokens<'_>]) -> Result<Vec<Piece>> {
    let (b, n, dim) = x.dims3()?;
    let mut all = Vec::with_capacity(b * runs.len());
    for entry in 0..b {
        let mut start = 0;
        for (run, ModulatedTokens { tokens, .. }) in runs.iter().enumerate() {
            let before = (entry * n + start) * dim * DType::BF16.size_in_bytes();
            // A run without tokens has nothing to start a kernel for.
            if *tokens > 0 {
                all.push(Piece { run, entry, start, tokens: *tokens, offset: before as u64 });
            }
            start += tokens;
        }
    }
    Ok(all)
}
