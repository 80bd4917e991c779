//! What is done to whole tensors: `kernels/tensors.cu`.

use candle_core::{D, DType, Result, Tensor};

use super::{
    are_near,
    ffi::{Output, launch},
    launch::{Args, Launch},
};
use crate::ops::tensors::Combination;

const THREADS: usize = 256;
const WARP: usize = 32;
/// Numbers of a thread, and bytes of a piece of a row.
const TOGETHER: usize = 8;
const PIECE_BYTES: usize = 16;
/// Axes that a kernel lays out.
const RANK: usize = 6;

/// [`crate::ops::combine`], or `None` where there is no kernel for the types and shapes.
pub(in crate::ops) fn combine(
    a: &Tensor,
    b: &Tensor,
    combination: Combination,
) -> Result<Option<Tensor>> {
    let Some([inner, period]) = repetition(a.dims(), b.dims()) else { return Ok(None) };
    if !suits(a) || a.dtype() != b.dtype() || !are_near(&[b]) {
        return Ok(None);
    }
    let (a, b) = (aligned(a)?, aligned(b)?);
    let out = Output::new(a.device(), a.dims(), a.dtype())?;
    let mut args = Args::default();
    args.tensor(Some(&a))?.tensor(Some(&b))?.address(out.address());
    args.counts([a.elem_count(), inner, period, combination as usize])
        .flag(a.dtype() == DType::F32);
    start("combine", &a, a.elem_count().div_ceil(TOGETHER), args)?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::clamp`], or `None` where there is no kernel for the type.
pub(in crate::ops) fn clamp(x: &Tensor, [low, high]: [f64; 2]) -> Result<Option<Tensor>> {
    if !suits(x) {
        return Ok(None);
    }
    let x = aligned(x)?;
    let out = Output::new(x.device(), x.dims(), x.dtype())?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.address(out.address()).count(x.elem_count());
    args.number(low).number(high).flag(x.dtype() == DType::F32);
    start("clamp", &x, x.elem_count().div_ceil(TOGETHER), args)?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::take_rows`], or `None` where there is no kernel for the types and widths.
pub(in crate::ops) fn take_rows(x: &Tensor, numbers: &Tensor) -> Result<Option<Tensor>> {
    let (Ok((rows, width)), Ok(count)) = (x.dims2(), numbers.dims1()) else { return Ok(None) };
    let row_bytes = width * x.dtype().size_in_bytes();
    let fits = suits(x) && are_near(&[numbers]) && numbers.dtype() == DType::U32;
    if !fits || count == 0 || !row_bytes.is_multiple_of(PIECE_BYTES) {
        return Ok(None);
    }
    let (x, numbers) = (aligned(x)?, numbers.contiguous()?);
    let pieces = row_bytes.div_ceil(PIECE_BYTES);
    let out = Output::new(x.device(), &[count, width], x.dtype())?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.tensor(Some(&numbers))?.address(out.address());
    args.counts([rows, pieces, count]);
    start("take_rows", &x, count * pieces, args)?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::row_sizes`], or `None` where there is no kernel for the type.
pub(in crate::ops) fn row_sizes(x: &Tensor) -> Result<Option<Tensor>> {
    if !suits(x) || x.rank() == 0 {
        return Ok(None);
    }
    let x = aligned(x)?;
    let width = x.dim(D::Minus1)?;
    let rows = x.elem_count().checked_div(width).unwrap_or(0);
    let out = Output::new(x.device(), &[rows], DType::F32)?;
    let mut args = Args::default();
    args.tensor(Some(&x))?
        .address(out.address())
        .counts([rows, width])
        .flag(x.dtype() == DType::F32);
    start("row_sizes", &x, rows * WARP, args)?;
    out.into_tensor().map(Some)
}

/// [`crate::ops::laid_out`] of numbers that lie apart, or `None` where there is no kernel for the type and rank.
pub(in crate::ops) fn laid_out(x: &Tensor) -> Result<Option<Tensor>> {
    if !suits(x) || x.rank() > RANK {
        return Ok(None);
    }
    let out = Output::new(x.device(), x.dims(), x.dtype())?;
    let mut args = Args::default();
    args.tensor(Some(x))?.address(out.address());
    args.counts([x.elem_count(), x.dtype().size_in_bytes()]);
    let missing = RANK - x.rank();
    for (of, filling) in [(x.dims(), 1), (x.stride(), 0)] {
        (0..missing).for_each(|_| _ = args.count(filling));
        of.iter().for_each(|n| _ = args.count(*n));
    }
    start("lay_out", x, x.elem_count(), args)?;
    out.into_tensor().map(Some)
}

fn suits(x: &Tensor) -> bool {
    matches!(x.dtype(), DType::BF16 | DType::F32) && are_near(&[x]) && x.elem_count() > 0
}

/// `x` without gaps, starting at a multiple of 16 bytes.
pub(super) fn aligned(x: &Tensor) -> Result<Tensor> {
    let offset = x.layout().start_offset() * x.dtype().size_in_bytes();
    if x.is_contiguous() && offset.is_multiple_of(PIECE_BYTES) {
        return Ok(x.clone());
    }
    copied(x)
}

/// The numbers of `x` one after the other, in memory of their own.
pub(super) fn copied(x: &Tensor) -> Result<Tensor> {
    match laid_out(x)? {
        Some(copy) => Ok(copy),
        None => x.force_contiguous(),
    }
}

/// How numbers of a shape `b` repeat along `a`: each for so many numbers of `a`, and how many they are. `None` where
/// more than one axis is shared, but not all.
fn repetition(a: &[usize], b: &[usize]) -> Option<[usize; 2]> {
    let count: usize = a.iter().product();
    if a == b {
        return Some([1, count]);
    }
    // Axes that `b` lacks are the first.
    let missing = a.len().checked_sub(b.len())?;
    let b = [vec![1; missing].as_slice(), b].concat();
    let mut shared = a.iter().zip(&b).enumerate().filter(|(_, (_, b))| **b != 1);
    match (shared.next(), shared.next()) {
        (None, None) => Some([1, 1]),
        (Some((axis, (a_len, b_len))), None) if a_len == b_len => {
            Some([a[axis + 1..].iter().product(), *b_len])
        }
        _ => None,
    }
}

fn start(kernel: &str, x: &Tensor, threads: usize, args: Args) -> Result<()> {
    let grid = [threads.div_ceil(THREADS), 1, 1];
    let kernel = kernel.to_owned();
    launch(x.device(), &Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_repeat_along_one_axis_or_are_as_many() {
        for (a, b, expected) in [
            (&[2, 3, 4][..], &[2, 3, 4][..], Some([1, 24])),
            (&[2, 3, 4], &[1, 3, 1], Some([4, 3])),
            (&[2, 3, 4], &[1, 1, 4], Some([1, 4])),
            (&[2, 3, 4], &[2, 1, 1], Some([12, 2])),
            (&[2, 3, 4], &[1, 1, 1], Some([1, 1])),
            (&[2, 3, 4], &[2, 3, 1], None),
            (&[2, 3, 4], &[1, 2, 1], None),
            (&[2, 3, 4], &[4], Some([1, 4])),
            (&[2, 3, 4], &[3, 4], None),
            (&[4], &[1, 4], None),
            (&[1, 3], &[2, 3], None),
        ] {
            assert_eq!(repetition(a, b), expected, "{a:?} {b:?}");
        }
    }
}
