//! Attention in bf16 against the same attention in float32.

use candle_core::{Device, Tensor};

use super::{super::tests::random, *};
use crate::ops::{TextLengths, joint_attention};

/// Shapes of one case: batch, heads, width of a head; tokens and queries of text and picture.
struct Case {
    b: usize,
    h: usize,
    d: usize,
    tokens: [usize; 2],
    queries: [Option<usize>; 2],
}

/// Tensors of one stream.
struct Owned {
    query: Option<Tensor>,
    key: Tensor,
    value: Tensor,
    norms: [Tensor; 2],
    turn: [Tensor; 2],
}

impl Owned {
    fn new(case: &Case, stream: usize) -> Self {
        let Case { b, h, d, tokens, queries } = case;
        let n = tokens[stream];
        let angles = random(&[n, d.div_euclid(2)], 2.0);
        let norm = || (random(&[*d], 0.2) + 1.0).unwrap();
        Self {
            query: queries[stream].map(|n| random(&[*b, n, *h, *d], 3.0)),
            key: random(&[*b, n, *h, *d], 0.5),
            value: random(&[*b, n, *h, *d], 1.0),
            norms: [norm(), norm()],
            turn: [angles.cos().unwrap(), angles.sin().unwrap()],
        }
    }

    fn stream(&self) -> JointStream<'_> {
        JointStream {
            query: self.query.as_ref(),
            key: &self.key,
            value: &self.value,
            norm_query: &self.norms[0],
            norm_key: &self.norms[1],
            cos: &self.turn[0],
            sin: &self.turn[1],
        }
    }
}

/// Root mean square of the difference, relative to that of `exact`.
fn error(x: &Tensor, exact: &Tensor) -> f64 {
    let square = |x: Tensor| -> f64 {
        f64::from(x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap())
    };
    (square((x - exact).unwrap()) / square(exact.clone())).sqrt()
}

fn check(case: &Case, text_lengths: Option<&[usize]>) {
    // Twice that of rounding queries, keys, values and weights to 8 bits.
    let text_lengths = text_lengths.map(|lengths| TextLengths::new(lengths.to_vec()));
    let shape = JointShape { scale: 0.13, eps: 1e-6, text_lengths: text_lengths.as_ref() };
    check_within(case, shape, 6e-3);
}

fn check_within(case: &Case, shape: JointShape<'_>, limit: f64) {
    let [text, image] = [Owned::new(case, 0), Owned::new(case, 1)];
    let exact = joint_attention(&text.stream(), &image.stream(), shape).unwrap();
    let Some(fast) = attention(&text.stream(), &image.stream(), shape).unwrap() else {
        assert!(!Head::supports(case.d));
        return;
    };
    for (fast, exact) in [(fast.text, exact.text), (fast.image, exact.image)] {
        let (Some(fast), Some(exact)) = (&fast, &exact) else {
            assert!(fast.is_none() && exact.is_none());
            continue;
        };
        assert_eq!(fast.dims(), exact.dims());
        let error = error(fast, exact);
        assert!(error < limit, "{:?} of {} heads of {}: {error:e}", fast.dims(), case.h, case.d);
    }
}

#[test]
fn bf16_stays_near_float32() {
    let case = |b, h, d, tokens, queries| Case { b, h, d, tokens, queries };
    check(&case(1, 2, 128, [13, 150], [Some(13), Some(150)]), None);
    check(&case(1, 1, 16, [1, 1], [Some(1), Some(1)]), None);
    check(&case(1, 3, 64, [200, 57], [None, Some(40)]), None);
    check(&case(2, 2, 40, [9, 128], [Some(3), None]), None);
    check(&case(2, 2, 32, [11, 64], [Some(11), Some(64)]), Some(&[4, 11]));
    // As many queries as several pieces of work.
    check(&case(1, 1, 8, [900, 1100], [Some(900), Some(1100)]), None);
}

#[test]
fn scores_may_rise_far_above_the_first() {
    // Scores spread by about 12, so that the largest so far grows by factors of 2^16 and more, several
    // times. Rounding changes them by about 0.03, and weights as much.
    let case = Case { b: 1, h: 2, d: 64, tokens: [20, 700], queries: [Some(20), Some(100)] };
    let shape = JointShape { scale: 1.5, eps: 1e-6, text_lengths: None };
    check_within(&case, shape, 0.06);
    // Nor does a query that is not a number change the others.
    let [text, mut image] = [Owned::new(&case, 0), Owned::new(&case, 1)];
    let Some(exact) = attention(&text.stream(), &image.stream(), shape).unwrap() else { return };
    let query = image.query.take().unwrap();
    let mut numbers = query.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    numbers[..2 * 64].fill(f32::NAN);
    image.query = Some(Tensor::from_vec(numbers, query.shape(), &Device::Cpu).unwrap());
    let fast = attention(&text.stream(), &image.stream(), shape).unwrap().unwrap();
    let rows =
        |out: JointOutput| out.image.unwrap().reshape((100, 128)).unwrap().to_vec2().unwrap();
    let (exact, fast): (Vec<Vec<f32>>, Vec<Vec<f32>>) = (rows(exact), rows(fast));
    assert!(fast[0].iter().all(|x| x.is_nan()), "{:?}", fast[0]);
    for (fast, exact) in fast.iter().zip(&exact).skip(1) {
        for (fast, exact) in fast.iter().zip(exact) {
            // The offset, and with it the rounding of scores, may follow another query's rise.
            assert!((fast - exact).abs() < 1e-2, "{fast} {exact}");
        }
    }
}

#[test]
fn large_scores_and_nan_are_what_they_are_in_float32() {
    let case = Case { b: 1, h: 1, d: 16, tokens: [8, 140], queries: [Some(8), Some(20)] };
    let [text, mut image] = [Owned::new(&case, 0), Owned::new(&case, 1)];
    // Scores of hundreds: one key takes all the weight, and the others' is 0.
    let shape = JointShape { scale: 60.0, eps: 1e-6, text_lengths: None };
    let Some(fast) = attention(&text.stream(), &image.stream(), shape).unwrap() else { return };
    let fast = fast.image.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(fast.iter().all(|x| x.is_finite() && x.abs() < 10.0), "{fast:?}");

    let mut values = vec![1.0_f32; 140 * 16];
    values[77 * 16 + 3] = f32::NAN;
    image.value = Tensor::from_vec(values, (1, 140, 1, 16), &Device::Cpu).unwrap();
    let shape = JointShape { scale: 0.1, ..shape };
    let fast = attention(&text.stream(), &image.stream(), shape).unwrap().unwrap();
    let rows = fast.text.unwrap().reshape((8, 16)).unwrap().to_vec2::<f32>().unwrap();
    for row in rows {
        assert!(row[3].is_nan() && row[2].is_finite(), "{row:?}");
    }
    // What was left in the buffers does not reach the next head.
    let case = Case { tokens: [8, 77], ..case };
    check(&case, None);
}
