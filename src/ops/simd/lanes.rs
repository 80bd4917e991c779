//! Functions of corresponding elements of several slices, register by register.

use pulp::Simd;

/// A function of `N` numbers, on registers. (A trait and not a closure: closures are not always
/// inlined, and then registers are passed through memory.)
pub(crate) trait Lanewise<const N: usize>: Copy + Send + Sync {
    fn apply<S: Simd>(self, simd: S, x: [S::f32s; N]) -> S::f32s;
}

/// `out[i] = f(x[0][i], x[1][i], ..)`; all slices have the length of `out`.
#[inline(always)]
pub(crate) fn zip<S: Simd, const N: usize>(
    simd: S,
    out: &mut [f32],
    x: [&[f32]; N],
    f: impl Lanewise<N>,
) {
    let zero = simd.splat_f32s(0.0);
    let whole = out.len() - out.len() % S::F32_LANES;
    let (out, out_rest) = out.split_at_mut(whole);
    for (i, out) in S::as_mut_simd_f32s(out).0.iter_mut().enumerate() {
        let mut args = [zero; N];
        for n in 0..N {
            args[n] = S::as_simd_f32s(&x[n][..whole]).0[i];
        }
        *out = f.apply(simd, args);
    }
    if !out_rest.is_empty() {
        let mut args = [zero; N];
        for n in 0..N {
            args[n] = simd.partial_load_f32s(&x[n][whole..]);
        }
        simd.partial_store_f32s(out_rest, f.apply(simd, args));
    }
}

/// `x[i] = f(x[i])`.
#[inline(always)]
pub(crate) fn map<S: Simd>(simd: S, x: &mut [f32], f: impl Lanewise<1>) {
    let (x, rest) = S::as_mut_simd_f32s(x);
    for x in x {
        *x = f.apply(simd, [*x]);
    }
    if !rest.is_empty() {
        let last = f.apply(simd, [simd.partial_load_f32s(rest)]);
        simd.partial_store_f32s(rest, last);
    }
}

/// `out[i] = f(out[i], x[0][i], ..)` of `N` numbers; all slices have the length of `out`.
#[inline(always)]
pub(crate) fn update<S: Simd, const M: usize, const N: usize>(
    simd: S,
    out: &mut [f32],
    x: [&[f32]; M],
    f: impl Lanewise<N>,
) {
    const { assert!(N == M + 1, "the output and the other numbers") };
    let zero = simd.splat_f32s(0.0);
    let whole = out.len() - out.len() % S::F32_LANES;
    let (out, out_rest) = out.split_at_mut(whole);
    for (i, out) in S::as_mut_simd_f32s(out).0.iter_mut().enumerate() {
        let mut args = [zero; N];
        args[0] = *out;
        for m in 0..M {
            args[1 + m] = S::as_simd_f32s(&x[m][..whole]).0[i];
        }
        *out = f.apply(simd, args);
    }
    if !out_rest.is_empty() {
        let mut args = [zero; N];
        args[0] = simd.partial_load_f32s(out_rest);
        for m in 0..M {
            args[1 + m] = simd.partial_load_f32s(&x[m][whole..]);
        }
        simd.partial_store_f32s(out_rest, f.apply(simd, args));
    }
}

/// `Σ f(x[i])`; `f(0)` must be 0 unless `x` fills whole registers.
#[inline(always)]
pub(crate) fn sum<S: Simd>(simd: S, x: &[f32], f: impl Lanewise<1>) -> f32 {
    let (whole, rest) = S::as_simd_f32s(x);
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (fours, left) = pulp::as_arrays::<4, _>(whole);
    for four in fours {
        for i in 0..4 {
            sums[i] = simd.add_f32s(sums[i], f.apply(simd, [four[i]]));
        }
    }
    for x in left {
        sums[0] = simd.add_f32s(sums[0], f.apply(simd, [*x]));
    }
    if !rest.is_empty() {
        let rest = f.apply(simd, [simd.partial_load_f32s(rest)]);
        sums[1] = simd.add_f32s(sums[1], rest);
    }
    let pairs = [simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3])];
    simd.reduce_sum_f32s(simd.add_f32s(pairs[0], pairs[1]))
}
