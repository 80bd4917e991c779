//! What is done to whole tensors against its definition.

use candle_core::{DType, Result, Tensor};

use super::Suite;
use crate::ops::{self, Combination};

pub(super) fn check(suite: &mut Suite) {
    combinations(suite);
    rows(suite);
    sizes(suite);
    layouts(suite);
}

fn combinations(suite: &mut Suite) {
    let all =
        [Combination::Sum, Combination::Difference, Combination::Product, Combination::Quotient];
    let cases = [
        (vec![3, 37], vec![3, 37]),
        (vec![1, 16, 8, 8], vec![1, 16, 8, 8]),
        (vec![2, 5, 3, 7], vec![1, 5, 1, 1]),
        (vec![2, 5, 3, 7], vec![1, 1, 1, 7]),
        (vec![2, 5, 3, 7], vec![2, 1, 1, 1]),
        (vec![4, 9], vec![1, 1]),
        (vec![2, 5, 8], vec![8]),
        // Of more than one axis: candle's.
        (vec![2, 3, 4], vec![2, 3, 1]),
    ];
    for (a_dims, b_dims) in cases {
        let (a, b) = (suite.random(&a_dims), suite.random(&b_dims));
        for combination in all {
            for wide in [&[][..], &[0, 1]] {
                let case = format!("{combination:?} of {a_dims:?} and {b_dims:?}, wide {wide:?}");
                suite.compare("combine", case, ([&a, &b], wide), |[a, b]| {
                    ops::combine(a, b, combination)
                });
            }
        }
        // From numbers that lie apart.
        suite.compare("combine", format!("{a_dims:?} turned"), ([&a, &a], &[]), |[a, b]| {
            ops::add(&a.transpose(0, 1)?, &b.transpose(0, 1)?)
        });
        for wide in [&[][..], &[0]] {
            let case = format!("{a_dims:?}, wide {wide:?}");
            suite.compare("clamp", case, ([&a], wide), |[a]| ops::clamp(a, -0.5, 0.25));
        }
    }
    let nan = suite.random(&[11]).affine(f64::NAN, 0.0);
    let kept = nan.and_then(|nan| {
        let nan = nan.to_dtype(DType::BF16)?.to_device(&suite.device)?;
        let clamped = suite.on_kernels(0, || ops::clamp(&nan, -1.0, 1.0))?;
        let clamped: Vec<f32> = clamped.to_dtype(DType::F32)?.to_vec1()?;
        let all = clamped.iter().all(|x| x.is_nan());
        Tensor::from_slice(&[f32::from(u8::from(all))], 1, &candle_core::Device::Cpu)
    });
    let one = Tensor::ones(1, DType::F32, &candle_core::Device::Cpu);
    suite.judge("clamp", "NaN", one.map(|one| (one.clone(), one)), vec![kept]);
}

fn sizes(suite: &mut Suite) {
    for dims in [vec![1], vec![2, 3, 37], vec![9, 1024]] {
        let x = suite.random(&dims);
        for wide in [&[][..], &[0]] {
            let case = format!("{dims:?}, wide {wide:?}");
            suite.compare("sizes of rows", case, ([&x], wide), |[x]| match x.dtype() {
                // The definition, in the type of the others.
                DType::F64 => x.abs()?.sum(candle_core::D::Minus1)?.flatten_all(),
                _ => ops::row_sizes(x),
            });
        }
    }
}

/// Moved numbers are the same numbers.
fn rows(suite: &mut Suite) {
    for (dims, numbers) in
        [([9, 8], vec![8_u32, 0, 3, 3]), ([3, 40], vec![2]), ([5, 7], vec![4, 1])]
    {
        let x = suite.random(&dims);
        for wide in [&[][..], &[0]] {
            let case = format!("{numbers:?} of {dims:?}, wide {wide:?}");
            suite.compare("rows by number", case, ([&x], wide), |[x]| {
                let numbers = Tensor::new(numbers.as_slice(), x.device())?;
                ops::take_rows(x, &numbers)
            });
        }
    }
}

fn layouts(suite: &mut Suite) {
    type Apart = fn(&Tensor) -> Result<Tensor>;
    let ways: [(&str, Apart); 4] = [
        ("turned", |x| x.permute((3, 1, 0, 2))),
        ("a part", |x| x.narrow(1, 1, 2)?.narrow(3, 2, 3)),
        ("repeated", |x| x.narrow(2, 0, 1)?.broadcast_as((2, 3, 5, 6))),
        ("of six axes", |x| x.reshape((2, 3, 1, 4, 2, 3))?.permute((5, 0, 4, 2, 3, 1))),
    ];
    let x = suite.random(&[2, 3, 4, 6]);
    for (way, apart) in ways {
        for wide in [&[][..], &[0]] {
            let case = format!("{way}, wide {wide:?}");
            suite.compare("laid out", case, ([&x], wide), |[x]| ops::laid_out(&apart(x)?));
        }
    }
}
