//! Exponentials and what follows from them, on a register of float32.

use pulp::Simd;

/// `1.5 · 2²³`: adding it rounds to the nearest integer and leaves that integer in the low bits.
const ROUND: f32 = 12_582_912.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has few bits, so that its product with an integer is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below this, `eˣ` is (nearly) under the smallest normal number.
const EXP_MIN: f32 = -87.0;
const EXP2_MIN: f32 = -125.0;
/// Above this, `eˣ` overflows in the way it is computed here.
const EXP_MAX: f32 = 88.37;

/// `if_true` where `mask` is set. Everything here must be inlined, or registers are passed through
/// memory; pulp's own selection of floats is not.
#[inline(always)]
pub(crate) fn select<S: Simd>(
    simd: S,
    mask: S::m32s,
    if_true: S::f32s,
    if_false: S::f32s,
) -> S::f32s {
    let bits = simd.select_u32s(
        mask,
        simd.transmute_u32s_f32s(if_true),
        simd.transmute_u32s_f32s(if_false),
    );
    simd.transmute_f32s_u32s(bits)
}

/// `eˣ`: relative error under 1e-7; 0 below −87, infinity above 88.3, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(LOG2_E), simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let rest = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2_HIGH), x);
    let rest = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2_LOW), rest);
    let mut poly = simd.splat_f32s(EXP[0]);
    for c in &EXP[1..] {
        poly = simd.mul_add_e_f32s(poly, rest, simd.splat_f32s(*c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let y = simd.add_u32s(simd.transmute_u32s_f32s(poly), power);
    let y = simd.transmute_f32s_u32s(y);
    // Comparisons with NaN are false, so that NaN stays.
    let y = select(simd, simd.less_than_f32s(x, simd.splat_f32s(EXP_MIN)), simd.splat_f32s(0.0), y);
    let over = simd.less_than_f32s(simd.splat_f32s(EXP_MAX), x);
    select(simd, over, simd.splat_f32s(f32::INFINITY), y)
}

/// Coefficients of `eˣ` on ±ln 2 / 2, the highest power first: the polynomial whose largest
/// relative error is smallest (3e-9).
const EXP: [f32; 7] =
    [0.001_381_461, 0.008_368_71, 0.041_668_39, 0.166_665_21, 0.499_999_94, 1.0, 1.0];

/// Coefficients of `2ˣ` on ±½, the highest power first; largest relative error 2e-9.
const EXP2: [f32; 7] = [
    0.000_153_533_6,
    0.001_339_887_5,
    0.009_618_437,
    0.055_503_324,
    0.240_226_48,
    std::f32::consts::LN_2,
    1.0,
];

/// `2ˣ` for `x` that is never above 0 by more than rounding: relative error under 1e-7; 0 below
/// −125, NaN for NaN.
#[inline(always)]
pub(crate) fn exp2_of_negative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let rest = simd.sub_f32s(x, n);
    let mut poly = simd.splat_f32s(EXP2[0]);
    for c in &EXP2[1..] {
        poly = simd.mul_add_e_f32s(poly, rest, simd.splat_f32s(*c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let y = simd.add_u32s(simd.transmute_u32s_f32s(poly), power);
    let under = simd.less_than_f32s(x, simd.splat_f32s(EXP2_MIN));
    select(simd, under, simd.splat_f32s(0.0), simd.transmute_f32s_u32s(y))
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let e = exp(simd, simd.mul_f32s(x, simd.splat_f32s(-1.0)));
    simd.div_f32s(one, simd.add_f32s(one, e))
}

/// The share of a normal distribution below `x`: relative error under 1e-6 for negative `x` down
/// to −9, absolute error under 2e-7 everywhere.
#[inline(always)]
pub(crate) fn normal_cdf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let far = simd.and_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(i32::MAX.unsigned_abs()));
    let far = simd.transmute_f32s_u32s(far);
    let u = simd.mul_add_e_f32s(far, simd.splat_f32s(0.25), one);
    let u = simd.div_f32s(one, u);
    let mut poly = simd.splat_f32s(TAIL[0]);
    for c in &TAIL[1..] {
        poly = simd.mul_add_e_f32s(poly, u, simd.splat_f32s(*c));
    }
    let half_square = simd.mul_f32s(simd.mul_f32s(x, simd.splat_f32s(-0.5)), x);
    let tail = simd.mul_f32s(exp(simd, half_square), poly);
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    select(simd, negative, tail, simd.sub_f32s(one, tail))
}

/// Coefficients of `Φ(−t) · exp(t² / 2)` as a polynomial in `1 / (1 + t / 4)` for `t` in 0..13, the
/// highest power first; largest relative error 1.1e-8.
const TAIL: [f32; 10] = [
    0.03501609,
    -0.20196992,
    0.40860814,
    -0.35163254,
    0.31964844,
    -0.028579818,
    0.12443344,
    0.09419599,
    0.10030584,
    -2.567163e-5,
];
