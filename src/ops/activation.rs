//! Element-wise activations.

use candle_core::{Result, Tensor, bail};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    buffers,
    cpu::{Floats, is_fast},
    cuda,
    simd::{
        Arch,
        blocks::Finish,
        lanes::{self, Lanewise},
        math,
        tiles::CHUNK,
    },
};

const SQRT_2_OVER_PI: f32 = 0.797_884_6;

/// GELU in its tanh approximation (`torch.nn.functional.gelu(x, approximate="tanh")`).
///
/// # Errors
/// A tensor of a type without this operation.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if is_fast(&[x]) {
        return map([x], GeluTanh);
    }
    match cuda::activate(x, None, cuda::Activation::GeluTanh)? {
        Some(y) => Ok(y),
        None => x.gelu(),
    }
}

/// [`gelu_tanh`] of a tensor that nobody else holds, computed where it lies on the CPU.
///
/// # Errors
/// A tensor of a type without this operation.
pub fn gelu_tanh_owned(x: Tensor) -> Result<Tensor> {
    if !is_fast(&[&x]) || !x.is_contiguous() {
        return gelu_tanh(&x);
    }
    buffers::in_place(&x, |x| {
        x.par_chunks_mut(CHUNK).for_each(|x| Arch::new().dispatch(MapInPlace { x, f: GeluTanh }));
    })?;
    Ok(x)
}

/// [`gelu_tanh`] of a product before it leaves the first-level cache.
pub(super) struct GeluInPlace(pub(super) Arch);

impl Finish for GeluInPlace {
    fn apply(&self, _: usize, _: usize, out: &mut [f32]) {
        self.0.dispatch(MapInPlace { x: out, f: GeluTanh });
    }
}

/// GELU with the error function.
///
/// # Errors
/// A tensor of a type without this operation.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    if is_fast(&[x]) {
        return map([x], GeluErf);
    }
    match cuda::activate(x, None, cuda::Activation::GeluErf)? {
        Some(y) => Ok(y),
        None => x.gelu_erf(),
    }
}

/// `x · sigmoid(x)`.
///
/// # Errors
/// A tensor of a type without this operation.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if is_fast(&[x]) {
        return map([x], Silu);
    }
    match cuda::activate(x, None, cuda::Activation::Silu)? {
        Some(y) => Ok(y),
        None => x.silu(),
    }
}

/// `silu(gate) · up`, the middle of a SwiGLU MLP. Shapes are equal.
///
/// # Errors
/// Unequal shapes.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("swiglu: shapes {:?} and {:?} differ", gate.dims(), up.dims());
    }
    if is_fast(&[gate, up]) {
        return map([gate, up], SwiGlu);
    }
    match cuda::activate(gate, Some(up), cuda::Activation::Silu)? {
        Some(y) => Ok(y),
        None => gate.silu()?.mul(up),
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct GeluErf;
#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct SwiGlu;

impl Lanewise<1> for GeluTanh {
    /// `x · (1 + tanh u) / 2 = x · sigmoid(2u)`, which does not cancel for negative `x`.
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        let square = simd.mul_f32s(x, x);
        let cubic = simd.splat_f32s(2.0 * SQRT_2_OVER_PI * 0.044_715);
        let factor = simd.mul_add_e_f32s(square, cubic, simd.splat_f32s(2.0 * SQRT_2_OVER_PI));
        simd.mul_f32s(x, math::sigmoid(simd, simd.mul_f32s(x, factor)))
    }
}

impl Lanewise<1> for GeluErf {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        simd.mul_f32s(x, math::normal_cdf(simd, x))
    }
}

impl Lanewise<1> for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [x]: [S::f32s; 1]) -> S::f32s {
        simd.mul_f32s(x, math::sigmoid(simd, x))
    }
}

impl Lanewise<2> for SwiGlu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, [gate, up]: [S::f32s; 2]) -> S::f32s {
        simd.mul_f32s(Silu.apply(simd, [gate]), up)
    }
}

fn map<const N: usize>(inputs: [&Tensor; N], f: impl Lanewise<N>) -> Result<Tensor> {
    let shape = inputs[0].shape().clone();
    let mut out = buffers::of_len(shape.elem_count());
    map_into(inputs, f, Arch::new(), &mut out)?;
    Tensor::from_vec(out, shape, inputs[0].device())
}

fn map_into<const N: usize>(
    inputs: [&Tensor; N],
    f: impl Lanewise<N>,
    arch: Arch,
    out: &mut [f32],
) -> Result<()> {
    let inputs: Vec<Tensor> = inputs.iter().map(|x| x.contiguous()).collect::<Result<_>>()?;
    let floats: Vec<Floats<'_>> = inputs.iter().map(Floats::new).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, floats) in slices.iter_mut().zip(&floats) {
        *slice = floats.contiguous()?;
    }
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        let x = slices.map(|x| &x[i * CHUNK..][..out.len()]);
        arch.dispatch(Map { x, out, f });
    });
    Ok(())
}

struct Map<'a, F, const N: usize> {
    x: [&'a [f32]; N],
    out: &'a mut [f32],
    f: F,
}

impl<F: Lanewise<N>, const N: usize> WithSimd for Map<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::zip(simd, self.out, self.x, self.f);
    }
}

struct MapInPlace<'a, F> {
    x: &'a mut [f32],
    f: F,
}

impl<F: Lanewise<1>> WithSimd for MapInPlace<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        lanes::map(simd, self.x, self.f);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::simd::all_archs;

    fn check(f: impl Lanewise<1>, exact: impl Fn(f64) -> f64) {
        let x: Vec<f32> = (-4000_i16..=4000).map(|i| f32::from(i) / 307.0).collect();
        let tensor = Tensor::from_slice(&x, x.len(), &Device::Cpu).unwrap();
        for arch in all_archs() {
            let mut y = vec![0.0; x.len()];
            map_into([&tensor], f, arch, &mut y).unwrap();
            let mut changed = x.clone();
            arch.dispatch(MapInPlace { x: &mut changed, f });
            assert_eq!(changed, y, "{arch:?}: in place");
            for (x, y) in x.iter().map(|x| f64::from(*x)).zip(y) {
                let error = (f64::from(y) - exact(x)).abs();
                assert!(
                    error <= 3e-7 * x.abs().max(1e-3),
                    "{arch:?} at {x}: {y}, expected {}",
                    exact(x)
                );
            }
        }
    }

    #[test]
    fn activations_follow_their_definitions() {
        check(Silu, |x| x / (1.0 + (-x).exp()));
        let c = (2.0 / std::f64::consts::PI).sqrt();
        check(GeluTanh, |x| 0.5 * x * (1.0 + (c * (x + 0.044_715 * x * x * x)).tanh()));
        check(GeluErf, |x| 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2.0_f64.sqrt())));
    }

    #[test]
    fn extremes_stay_what_they_are() {
        let x = [f32::NAN, f32::INFINITY, -1e30, 1e30, -100.0, 0.0, -0.0, 88.5, -88.5];
        let tensor = Tensor::from_slice(&x, x.len(), &Device::Cpu).unwrap();
        let apply = |arch, f: usize| {
            let mut y = vec![0.0; x.len()];
            match f {
                0 => map_into([&tensor], Silu, arch, &mut y).unwrap(),
                1 => map_into([&tensor], GeluTanh, arch, &mut y).unwrap(),
                _ => map_into([&tensor], GeluErf, arch, &mut y).unwrap(),
            }
            y
        };
        for arch in all_archs() {
            for f in 0..3 {
                let y = apply(arch, f);
                assert!(y[0].is_nan() && y[1] == f32::INFINITY, "{arch:?} {f}: {y:?}");
                assert!(
                    y[2].abs() < 1e-30 && y[4].abs() < 1e-30 && y[8].abs() < 1e-30,
                    "{arch:?} {f}: {y:?}"
                );
                assert!(
                    (y[3] / 1e30 - 1.0).abs() < 1e-6 && y[5].abs() == 0.0 && y[6].abs() == 0.0,
                    "{arch:?} {f}: {y:?}"
                );
                assert!((y[7] - 88.5).abs() < 1e-4, "{arch:?} {f}: {y:?}");
            }
        }
    }
}
