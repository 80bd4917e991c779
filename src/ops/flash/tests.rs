//! Every instruction set and both ways through the tiles, against a computation in float64.

use std::{cell::RefCell, f64::consts::TAU};

use candle_core::Device;
use rand_mt::Mt64;

use super::*;
use crate::ops::simd::all_archs;

struct Case {
    b: usize,
    n: usize,
    m: usize,
    h: usize,
    h_kv: usize,
    d: usize,
}

thread_local! {
    /// A test has a thread of its own, and so the same numbers in every run.
    static UNIFORM: RefCell<Mt64> = RefCell::new(Mt64::new(1));
}

/// Normal numbers, `spread` wide.
#[expect(clippy::cast_possible_truncation, reason = "numbers of float32 from wider ones")]
pub(super) fn random(shape: &[usize], spread: f32) -> Tensor {
    // Above 0 and up to 1.
    let uniform = || {
        UNIFORM.with_borrow_mut(|of| f64::from((of.next_u64() >> 32) as u32) + 1.0)
            / 4_294_967_296.0
    };
    let number = |_| ((-2.0 * uniform().ln()).sqrt() * (TAU * uniform()).cos()) as f32 * spread;
    let numbers: Vec<f32> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let x: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    x.into_iter().map(f64::from).collect()
}

fn sees(mask: Mask<'_>, i: usize, j: usize) -> bool {
    match mask {
        Mask::None => true,
        Mask::Causal { offset } => j <= i + offset,
        Mask::Segments(starts) => {
            starts.partition_point(|s| *s <= i) == starts.partition_point(|s| *s <= j)
        }
    }
}

fn exact(case: &Case, [q, k, v]: &[Tensor; 3], scale: f32, mask: Mask<'_>) -> Vec<f64> {
    let Case { b, n, m, h, h_kv, d } = *case;
    let [q, k, v] = [values(q), values(k), values(v)];
    let mut out = Vec::with_capacity(b * n * h * d);
    for place in 0..b * n * h {
        let (batch, i, head) = (place.div_euclid(n * h), place.div_euclid(h) % n, place % h);
        let head_kv = head.div_euclid(h.div_euclid(h_kv));
        let q = &q[place * d..][..d];
        let at = |j: usize| ((batch * m + j) * h_kv + head_kv) * d;
        let seen: Vec<usize> = (0..m).filter(|j| sees(mask, i, *j)).collect();
        let score = |j: &usize| {
            q.iter().zip(&k[at(*j)..]).map(|(a, b)| a * b).sum::<f64>() * f64::from(scale)
        };
        let scores: Vec<f64> = seen.iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend(
            (0..d).map(|x| {
                seen.iter().zip(&weights).map(|(j, w)| w * v[at(*j) + x]).sum::<f64>() / sum
            }),
        );
    }
    out
}

#[test]
fn every_instruction_set_attends() {
    let case = |b, n, m, h, h_kv, d| Case { b, n, m, h, h_kv, d };
    let cases = [
        case(1, 1, 1, 1, 1, 1),
        case(2, 1, 300, 4, 2, 16),
        case(1, 3, 130, 2, 1, 129),
        case(1, 9, 9, 1, 1, 16),
        case(2, 50, 131, 2, 2, 80),
        case(1, 33, 260, 6, 2, 32),
        case(1, 200, 200, 1, 1, 5),
        case(1, 70, 70, 2, 1, 128),
    ];
    for arch in all_archs() {
        for case in &cases {
            let kv = [case.b, case.m, case.h_kv, case.d];
            let q = [case.b, case.n, case.h, case.d];
            let inputs = [q, kv, kv].map(|shape| random(&shape, 1.0));
            let ends =
                [0, case.n.div_euclid(3), case.n.div_euclid(3), case.n.div_euclid(2), case.n];
            let mut masks = vec![
                Mask::None,
                Mask::Causal { offset: 0 },
                Mask::Causal { offset: case.m.saturating_sub(case.n) },
            ];
            if case.n == case.m {
                masks.push(Mask::Segments(&ends));
            }
            for mask in masks {
                for scale in [0.3, -0.2] {
                    check(case, &inputs, Softmax { scale, mask, arch });
                }
            }
        }
    }
}

fn check(case: &Case, inputs: &[Tensor; 3], softmax: Softmax<'_>) {
    let [q, k, v] = inputs;
    let y = with_arch(q, k, v, softmax).unwrap();
    let exact = exact(case, inputs, softmax.scale, softmax.mask);
    let errors = values(&y).into_iter().zip(exact).map(|(a, b)| (a - b).abs());
    let worst = errors.max_by(f64::total_cmp).unwrap(); // NaN is the largest
    assert!(worst < 1e-5, "{softmax:?} n {} m {} d {}: {worst:e}", case.n, case.m, case.d);
}
