//! Attention with grouped queries against its definition.

use candle_core::{Result, Tensor};

use super::{Suite, rounded};
use crate::ops::{Mask, attention};

/// `b`, queries, keys, query heads, key heads, width of a head.
type Sizes = [usize; 6];

const CASES: &[Sizes] = &[
    [1, 1, 300, 14, 2, 128],
    [2, 1, 65, 7, 1, 64],
    [1, 3, 500, 8, 2, 128],
    [1, 90, 90, 4, 2, 128],
    [2, 70, 130, 2, 1, 64],
    [1, 200, 200, 2, 2, 80],
    [1, 700, 200, 3, 3, 128],
    // On a Hopper, more than one tile of rows and of keys, and rows of a token in two of them.
    [1, 250, 250, 14, 2, 128],
    [2, 400, 640, 3, 1, 128],
    [1, 520, 520, 2, 2, 128],
    [2, 30, 30, 3, 1, 16],
    [1, 1, 70, 4, 2, 32],
    [1, 70, 70, 1, 1, 384],
    [2, 33, 41, 2, 1, 384],
];

/// Of so many rows that Hopper's kernel of a prompt is used where a device has 132 multiprocessors; the
/// emulation has five, for which those above have enough.
const LARGE: &[Sizes] = &[[1, 400, 640, 14, 2, 128], [1, 700, 200, 28, 4, 128]];

pub(super) fn check(suite: &mut Suite) {
    for place in [Place::Query, Place::Key, Place::Value] {
        for n in [1, 70] {
            shows_nan(suite, place, n);
        }
    }
    let large = if suite.device.is_cpu() { &[] } else { LARGE };
    for sizes in CASES.iter().chain(large) {
        let [b, n, m, h, h_kv, d] = *sizes;
        let mut rows = |n: usize, h: usize| suite.random(&[b, n, h, d]);
        let (q, k, v) = (rows(n, h), rows(m, h_kv), rows(m, h_kv));
        let ends = [0, n.div_ceil(4), n.div_ceil(3), n.div_ceil(3), n];
        let mut masks = vec![Mask::None, Mask::Causal { offset: m.saturating_sub(n) }];
        if n == m {
            masks.push(Mask::Causal { offset: 0 });
            masks.push(Mask::Segments(&ends));
        }
        for mask in masks {
            let case = format!("b {b}, {n} of {m}, h {h} over {h_kv}, d {d}, {mask:?}");
            let plain = rounded::attention(&q, &k, &v, 0.1, mask);
            let attend = |[q, k, v]: [&Tensor; 3]| attention(q, k, v, 0.1, mask);
            suite.compare_to("attention", case, ([&q, &k, &v], &[]), attend, plain);
        }
    }
}

/// Where a number that is none is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The first row of the queries.
    Query,
    /// A key that all queries see.
    Key,
    /// The third column of a value that all queries see.
    Value,
}

/// What is not a number must be seen in the result, and nowhere else.
fn shows_nan(suite: &mut Suite, place: Place, n: usize) {
    const COLUMN: usize = 3;
    let (m, d) = (200, 64);
    let mut rows = |n: usize| suite.random(&[1, n, 1, d]);
    let (q, k, v) = (rows(n), rows(m), rows(m));
    let spoiled = |x: &Tensor, row: usize| -> Result<Tensor> {
        let mut numbers = x.flatten_all()?.to_vec1::<f32>()?;
        if let Some(number) = numbers.get_mut(row * d + COLUMN) {
            *number = f32::NAN;
        }
        Tensor::from_vec(numbers, x.shape(), x.device())
    };
    let (row_of_keys, one) = (150, 1.0_f64);
    let inputs = match place {
        Place::Query => spoiled(&q, 0).map(|q| [q, k, v]),
        Place::Key => spoiled(&k, row_of_keys).map(|k| [q, k, v]),
        Place::Value => spoiled(&v, row_of_keys).map(|v| [q, k, v]),
    };
    // One where the result must not be a number, zero elsewhere.
    let expected: Vec<f64> = (0..n * d)
        .map(|at| {
            let (row, column) = (at.checked_div(d), at.checked_rem(d));
            let spoiled = match place {
                Place::Query => row == Some(0),
                Place::Key => true,
                Place::Value => column == Some(COLUMN),
            };
            if spoiled { one } else { 0.0 }
        })
        .collect();
    let expected = Tensor::from_vec(expected, n * d, &candle_core::Device::Cpu);
    let kernel = |order: u32| -> Result<Tensor> {
        let inputs = inputs.as_ref().map_err(|error| candle_core::Error::msg(error.to_string()))?;
        let inputs = super::each(inputs.each_ref(), |_, x| {
            x.to_dtype(candle_core::DType::BF16)?.to_device(&suite.device)
        })?;
        let [q, k, v] = inputs.each_ref();
        let out = suite.on_kernels(order, || attention(q, k, v, 0.1, Mask::None))?;
        let out = super::values(&out)?;
        let marks: Vec<f64> = out.iter().map(|x| if x.is_nan() { one } else { 0.0 }).collect();
        Tensor::from_vec(marks, n * d, &candle_core::Device::Cpu)
    };
    let kernels: Vec<_> = suite.orders.iter().map(|order| kernel(*order)).collect();
    let case = format!("NaN in the {place:?}, {n} queries");
    let expected = expected.map(|expected| (expected.clone(), expected));
    suite.judge("attention", &case, expected, kernels);
}
