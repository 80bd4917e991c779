//! The operations of `rows` on the tokens of several streams, which are modulated in runs: one start for all runs of
//! all streams, on the rows where they lie, so that nothing is taken apart and joined.

use candle_core::{DType, Result, Tensor};

use super::{
    ffi::{Output, address},
    rows::{RowArgs, RowPiece, has_rows},
    takes,
    tensors::aligned,
};
use crate::ops::{GatedTokens, ModulatedTokens};

/// [`crate::ops::modulated_layer_norm_streams`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn layer_norm_streams(
    streams: &[(&Tensor, &[ModulatedTokens<'_>])],
    eps: f64,
) -> Result<Option<Vec<Tensor>>> {
    let fit = streams.iter().all(|(x, runs)| fits(&[x], runs, |run| vec![run.scale, run.shift]));
    let Some(width) = width(streams.iter().map(|(x, _)| *x)).filter(|_| fit) else {
        return Ok(None);
    };
    let each = streams.iter().map(|(x, runs)| {
        let x = aligned(x)?;
        let out = Output::new(x.device(), x.dims(), DType::BF16)?;
        let pieces = pieces(&x, runs)?;
        Ok((x, out, pieces))
    });
    let each = each.collect::<Result<Vec<_>>>()?;
    let mut all = Vec::new();
    for ((x, out, pieces), (_, runs)) in each.iter().zip(streams) {
        for piece in pieces {
            let run = &runs[piece.run];
            all.push(RowPiece {
                x: address(x)? + piece.offset,
                out: out.address() + piece.offset,
                rows: piece.rows,
                scale: Some(run.scale),
                shift: Some(run.shift),
                shared: piece.rows,
                ..RowPiece::default()
            });
        }
    }
    if let Some((x, ..)) = each.first() {
        RowArgs { width, eps, weight: None }.by_row("layer_norm", x.device(), &all)?;
    }
    each.into_iter().map(|(_, out, _)| out.into_tensor()).collect::<Result<_>>().map(Some)
}

/// [`crate::ops::gated_add_streams`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn gated_add_streams(
    streams: &[GatedTokens<'_>],
) -> Result<Option<Vec<Tensor>>> {
    let Some((width, each)) = Gated::all(streams)? else { return Ok(None) };
    let mut all = Vec::new();
    for (gated, stream) in each.iter().zip(streams) {
        for piece in &gated.pieces {
            let out = gated.sum.address() + piece.offset;
            all.push(RowPiece { out, ..gated.piece(piece, stream)? });
        }
    }
    if let Some(Gated { x, .. }) = each.first() {
        RowArgs { width, ..RowArgs::default() }.flat("gated_add", x.device(), &all)?;
    }
    each.into_iter().map(|gated| gated.sum.into_tensor()).collect::<Result<_>>().map(Some)
}

/// [`crate::ops::gated_add_norm_streams`], or `None` where there is no kernel for the types and sizes.
pub(in crate::ops) fn gated_add_norm_streams(
    streams: &[(GatedTokens<'_>, &[ModulatedTokens<'_>])],
    eps: f64,
) -> Result<Option<Vec<(Tensor, Tensor)>>> {
    let alike = |(gated, next): &(GatedTokens<'_>, &[ModulatedTokens<'_>])| {
        gated.runs.len() == next.len()
            && gated.runs.iter().zip(*next).all(|(run, next)| run.tokens == next.tokens)
            && fits(&[gated.x], next, |run| vec![run.scale, run.shift])
    };
    if !streams.iter().all(alike) {
        return Ok(None);
    }
    let gated: Vec<GatedTokens<'_>> = streams.iter().map(|(gated, _)| *gated).collect();
    let Some((width, each)) = Gated::all(&gated)? else { return Ok(None) };
    let outs = each.iter().map(|of| Output::new(of.x.device(), of.x.dims(), DType::BF16));
    let outs = outs.collect::<Result<Vec<_>>>()?;
    let mut all = Vec::new();
    for ((gated, out), (stream, next)) in each.iter().zip(&outs).zip(streams) {
        for piece in &gated.pieces {
            let next = &next[piece.run];
            all.push(RowPiece {
                out: out.address() + piece.offset,
                sum: gated.sum.address() + piece.offset,
                scale: Some(next.scale),
                shift: Some(next.shift),
                ..gated.piece(piece, stream)?
            });
        }
    }
    if let Some(Gated { x, .. }) = each.first() {
        RowArgs { width, eps, weight: None }.by_row("layer_norm", x.device(), &all)?;
    }
    let both = each.into_iter().zip(outs);
    let both = both.map(|(gated, out)| Ok((gated.sum.into_tensor()?, out.into_tensor()?)));
    both.collect::<Result<_>>().map(Some)
}

/// A stream to which something is added, and room for the sum.
struct Gated {
    residual: Tensor,
    x: Tensor,
    sum: Output,
    pieces: Vec<Piece>,
}

impl Gated {
    /// The streams and their width, or `None` where there is no kernel for them.
    fn all(streams: &[GatedTokens<'_>]) -> Result<Option<(usize, Vec<Self>)>> {
        let fit = |of: &GatedTokens<'_>| fits(&[of.residual, of.x], of.runs, |run| vec![run.gate]);
        let Some(width) = width(streams.iter().map(|of| of.x)) else { return Ok(None) };
        if !streams.iter().all(fit) {
            return Ok(None);
        }
        let each = streams.iter().map(|GatedTokens { residual, x, runs }| {
            let (residual, x) = (aligned(residual)?, aligned(x)?);
            let sum = Output::new(x.device(), x.dims(), DType::BF16)?;
            let pieces = pieces(&x, runs)?;
            Ok(Self { residual, x, sum, pieces })
        });
        Ok(Some((width, each.collect::<Result<_>>()?)))
    }

    /// What a kernel reads of a piece.
    fn piece<'a>(&self, piece: &Piece, stream: &GatedTokens<'a>) -> Result<RowPiece<'a>> {
        Ok(RowPiece {
            x: address(&self.x)? + piece.offset,
            residual: address(&self.residual)? + piece.offset,
            rows: piece.rows,
            gate: Some(stream.runs[piece.run].gate),
            shared: piece.rows,
            ..RowPiece::default()
        })
    }
}

/// The width of all streams; `None` where they differ.
fn width<'a>(streams: impl IntoIterator<Item = &'a Tensor>) -> Option<usize> {
    let mut widths = streams.into_iter().map(|x| x.dims().last().copied());
    let first = widths.next()??;
    widths.all(|width| width == Some(first)).then_some(first)
}

/// Whether the runs make up the tokens of all `tensors: [b, n, dim]`, and kernels read their modulation,
/// `[1, 1, dim]` each.
fn fits<'a>(
    tensors: &[&Tensor],
    runs: &'a [ModulatedTokens<'a>],
    modulation: impl Fn(&'a ModulatedTokens<'a>) -> Vec<&'a Tensor>,
) -> bool {
    let Some(Ok((b, n, dim))) = tensors.first().map(|x| x.dims3()) else { return false };
    let is_read = |x: &&Tensor| x.dims() == [1, 1, dim] && x.is_contiguous() && takes(&[x]);
    runs.iter().map(|run| run.tokens).sum::<usize>() == n
        && tensors.iter().all(|x| x.dims() == [b, n, dim] && has_rows(x))
        && takes(tensors)
        && runs.iter().all(|run| modulation(run).iter().all(is_read))
}

/// Rows of a run that lie side by side.
struct Piece {
    run: usize,
    rows: usize,
    /// Where they begin, in bytes of bf16.
    offset: u64,
}

/// A run's tokens of each entry of `x: [b, n, dim]`, which has no gaps; of one run all at once.
fn pieces(x: &Tensor, runs: &[ModulatedTokens<'_>]) -> Result<Vec<Piece>> {
    let (b, n, dim) = x.dims3()?;
    if runs.len() == 1 {
        return Ok(vec![Piece { run: 0, rows: b * n, offset: 0 }]);
    }
    let mut all = Vec::with_capacity(b * runs.len());
    for entry in 0..b {
        let mut start = 0;
        for (run, ModulatedTokens { tokens, .. }) in runs.iter().enumerate() {
            let before = (entry * n + start) * dim * DType::BF16.size_in_bytes();
            // A run without tokens has no rows.
            if *tokens > 0 {
                all.push(Piece { run, rows: *tokens, offset: before as u64 });
            }
            start += tokens;
        }
    }
    Ok(all)
}
