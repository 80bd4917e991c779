//! Attention with grouped queries against its definition.

use candle_core::Tensor;

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
    [2, 30, 30, 3, 1, 16],
    [1, 1, 70, 4, 2, 32],
];

pub(super) fn check(suite: &mut Suite) {
    for sizes in CASES {
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
