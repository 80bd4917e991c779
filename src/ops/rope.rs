//! Rotary position embeddings.

use candle_core::{D, Result, Tensor, bail};
use pulp::{NullaryFnOnce, as_arrays, as_arrays_mut};

use super::{
    buffers,
    cpu::{Floats, is_fast},
    cuda,
    simd::{Arch, tiles::par_rows},
};

/// Rotates neighbouring pairs `(x₀, x₁), (x₂, x₃), …`.
///
/// # Shapes
/// `x: [b, n, h, d]`, `cos, sin: [n, d / 2]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rotate_pairs(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, n, h, d) = x.dims4()?;
    let half = check(x, cos, sin)?;
    if is_fast(&[x, cos, sin]) {
        return rotate(x, cos, sin, |turn| Arch::new().dispatch(Pairs(turn)));
    }
    if let Some(y) = cuda::rotate(x, [cos, sin], false)? {
        return Ok(y);
    }
    let pairs = x.reshape((b, n, h, half, 2))?; // (b, n, h, d / 2, pair)
    let (even, odd) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
    let (cos, sin) = (cos.reshape((1, n, 1, half))?, sin.reshape((1, n, 1, half))?);
    let rotated_even = (even.broadcast_mul(&cos)? - odd.broadcast_mul(&sin)?)?;
    let rotated_odd = (even.broadcast_mul(&sin)? + odd.broadcast_mul(&cos)?)?;
    Tensor::stack(&[rotated_even, rotated_odd], 4)?.reshape((b, n, h, d)) // (b, n, h, d)
}

/// Rotates `x[i]` with `x[i + d / 2]`.
///
/// # Shapes
/// `x: [b, n, h, d]`, `cos, sin: [n, d / 2]`.
///
/// # Errors
/// Shapes that do not fit.
pub fn rotate_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, n, _, _) = x.dims4()?;
    let half = check(x, cos, sin)?;
    if is_fast(&[x, cos, sin]) {
        return rotate(x, cos, sin, |turn| Arch::new().dispatch(Halves(turn)));
    }
    if let Some(y) = cuda::rotate(x, [cos, sin], true)? {
        return Ok(y);
    }
    let (first, second) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let (cos, sin) = (cos.reshape((1, n, 1, half))?, sin.reshape((1, n, 1, half))?);
    let a = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let b = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[a, b], D::Minus1)
}

/// Half the length of a head.
fn check(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<usize> {
    let (_, n, _, d) = x.dims4()?;
    let (rows, half) = cos.dims2()?;
    if sin.dims() != cos.dims() || rows != n || 2 * half != d {
        bail!("rotation: x {:?}, cos {:?}, sin {:?} do not fit", x.dims(), cos.dims(), sin.dims());
    }
    Ok(half)
}

/// Runs `turn` on each token: `[h, d]` with the token's `[d / 2]` cosines and sines.
fn rotate(
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    turn: impl Fn(Turn<'_>) + Sync + Send,
) -> Result<Tensor> {
    let (b, n, h, d) = x.dims4()?;
    let half = cos.dim(1)?;
    let mut out = buffers::of_len(b * n * h * d);
    let (x, cos, sin) = (x.contiguous()?, cos.contiguous()?, sin.contiguous()?);
    let [x_floats, cos, sin] = [Floats::new(&x), Floats::new(&cos), Floats::new(&sin)];
    let (input, cos, sin) = (x_floats.contiguous()?, cos.contiguous()?, sin.contiguous()?);
    let width = h * d;
    par_rows(&mut out, width, |row, out| {
        let token = row % n;
        let angles = token * half..(token + 1) * half;
        turn(Turn {
            x: &input[row * width..][..width],
            cos: &cos[angles.clone()],
            sin: &sin[angles],
            out,
        });
    });
    drop(x_floats);
    Tensor::from_vec(out, (b, n, h, d), x.device())
}

/// One token's heads.
struct Turn<'a> {
    x: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    out: &'a mut [f32],
}

struct Pairs<'a>(Turn<'a>);

impl NullaryFnOnce for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Turn { x, cos, sin, out } = self.0;
        let d = 2 * cos.len();
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let pairs = as_arrays::<2, _>(x).0.iter().zip(as_arrays_mut::<2, _>(out).0);
            for ((x, out), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                *out = [x[0] * cos - x[1] * sin, x[0] * sin + x[1] * cos];
            }
        }
    }
}

struct Halves<'a>(Turn<'a>);

impl NullaryFnOnce for Halves<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Turn { x, cos, sin, out } = self.0;
        let half = cos.len();
        for (x, out) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
            let (x0, x1) = x.split_at(half);
            let (out0, out1) = out.split_at_mut(half);
            let inputs = x0.iter().zip(x1).zip(cos.iter().zip(sin));
            for (((x0, x1), (cos, sin)), (out0, out1)) in inputs.zip(out0.iter_mut().zip(out1)) {
                *out0 = x0 * cos - x1 * sin;
                *out1 = x1 * cos + x0 * sin;
            }
        }
    }
}
