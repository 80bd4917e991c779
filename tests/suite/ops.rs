//! The vectorised operations against their plain versions: tensors in float64 and tensors that
//! record gradients take the plain way, so that one call gives the exact numbers, one the plain
//! float32 ones and one those to be tested.

use candle_core::{
    DType, Device, Module, Tensor, Var,
    quantized::{GgmlDType, QMatMul, QTensor},
};
use pentimento::ops::{self, Conv2dShape, LinearWeight, Mask, PackedConv2d, PackedLinear, Padding};

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn exact(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

fn plain(x: &Tensor) -> Tensor {
    Var::from_tensor(x).unwrap().as_tensor().clone()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference; infinite where NaN.
fn error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.dims(), expected.dims());
    let pairs = values(actual).into_iter().zip(values(expected));
    pairs.map(|(a, e)| (a - e).abs()).fold(0.0, |max, x| {
        if x <= max {
            max
        } else if x.is_nan() {
            f64::INFINITY
        } else {
            x
        }
    })
}

/// The rule: the error against float64 is at most twice that of the plain float32 version, and a
/// few units in the last place.
#[track_caller]
fn check<const N: usize>(
    name: &str,
    inputs: [&Tensor; N],
    f: impl Fn([&Tensor; N]) -> Tensor + Sync,
) {
    let with = |change: fn(&Tensor) -> Tensor| {
        let changed = inputs.map(change);
        f(changed.each_ref())
    };
    let expected = with(exact);
    let largest = values(&expected).iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    let fast = f(inputs);
    let (error_plain, error_fast) = (error(&with(plain), &expected), error(&fast, &expected));
    let limit = 2.0 * error_plain + 4e-7 * largest + 4.0 * f64::from(f32::MIN_POSITIVE);
    assert!(
        error_fast <= limit,
        "{name}: error {error_fast:e}, plain {error_plain:e}, limit {limit:e}"
    );
    let in_pool = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| f(inputs))
    };
    assert_eq!(values(&fast), values(&in_pool(1)), "{name}: one thread gives other numbers");
    assert_eq!(values(&fast), values(&in_pool(3)), "{name}: three threads give other numbers");
}

/// The same numbers behind other strides: every second element of each axis of a larger tensor.
fn strided(x: &Tensor) -> Tensor {
    let last = x.rank() - 1;
    let wide = Tensor::cat(&[x, x, x], last).unwrap();
    let len = x.dim(last).unwrap();
    let middle = wide.narrow(last, len, len).unwrap();
    if last == 0 {
        middle
    } else {
        middle.transpose(0, last).unwrap().contiguous().unwrap().transpose(0, last).unwrap()
    }
}

#[test]
fn norms_follow_the_rule() {
    for dims in
        [[1, 1, 1], [1, 3, 5], [2, 7, 16], [2, 5, 48], [3, 2, 129], [1, 33, 3072], [0, 4, 8]]
    {
        let [b, n, dim] = dims;
        let name = format!("{dims:?}");
        let x = random(&dims).affine(3.0, 0.7).unwrap();
        let weight = random(&[dim]);
        check(&name, [&x, &weight], |[x, w]| ops::rms_norm(x, w, 1e-6).unwrap());
        check(&name, [&strided(&x), &weight], |[x, w]| ops::rms_norm(x, w, 1e-6).unwrap());
        check(&name, [&x], |[x]| ops::layer_norm(x, 1e-6).unwrap());
        for rows in [1, n] {
            let (scale, shift) = (random(&[b, rows, dim]), random(&[b, rows, dim]));
            let inputs = [&x, &scale, &shift];
            check(&name, inputs, |[x, a, b]| ops::modulated_layer_norm(x, a, b, 1e-6).unwrap());
            let strided = [&strided(&x), &strided(&scale), &shift];
            check(&name, strided, |[x, a, b]| ops::modulated_layer_norm(x, a, b, 1e-6).unwrap());
            check(&name, inputs, |[x, gate, _]| ops::gated_add(x, x, gate).unwrap());
        }
    }
}

#[test]
fn channel_norms_follow_the_rule() {
    for dims in [[1, 1, 1, 1], [2, 3, 5, 7], [1, 96, 20, 30], [2, 17, 1, 1030], [1, 4, 0, 3]] {
        let (x, gamma) = (random(&dims), random(&dims[1..2]));
        let name = format!("{dims:?}");
        check(&name, [&x, &gamma], |[x, g]| ops::channel_rms_norm(x, g).unwrap());
        check(&name, [&x, &gamma], |[x, g]| ops::channel_rms_norm_silu(x, g).unwrap());
        check(&name, [&strided(&x), &gamma], |[x, g]| ops::channel_rms_norm(x, g).unwrap());
    }
    let zeros = Tensor::zeros((1, 8, 3, 3), DType::F32, &Device::Cpu).unwrap();
    check("zeros", [&zeros, &random(&[8])], |[x, g]| ops::channel_rms_norm(x, g).unwrap());
}

#[test]
fn activations_follow_the_rule() {
    for dims in [vec![1], vec![7], vec![2, 33], vec![3, 1, 5461], vec![0]] {
        let (x, y) = (random(&dims).affine(4.0, 0.0).unwrap(), random(&dims));
        let name = format!("{dims:?}");
        check(&name, [&x], |[x]| ops::gelu_tanh(x).unwrap());
        check(&name, [&x], |[x]| ops::gelu_erf(x).unwrap());
        check(&name, [&x], |[x]| ops::silu(x).unwrap());
        check(&name, [&x, &y], |[x, y]| ops::swiglu(x, y).unwrap());
        check(&name, [&strided(&x), &y], |[x, y]| ops::swiglu(x, y).unwrap());
    }
    assert!(ops::swiglu(&random(&[3]), &random(&[4])).is_err());
}

#[test]
fn rotations_follow_the_rule() {
    for [b, n, h, d] in [[1, 1, 1, 2], [2, 3, 2, 10], [1, 50, 3, 16], [2, 5, 24, 128], [1, 0, 2, 8]]
    {
        let x = random(&[b, n, h, d]);
        let half = d.div_euclid(2);
        let (cos, sin) = (random(&[n, half]), random(&[n, half]));
        let name = format!("{b} {n} {h} {d}");
        for x in [&x, &strided(&x)] {
            check(&name, [x, &cos, &sin], |[x, c, s]| ops::rotate_pairs(x, c, s).unwrap());
            check(&name, [x, &cos, &sin], |[x, c, s]| ops::rotate_halves(x, c, s).unwrap());
        }
    }
    let (x, angles) = (random(&[1, 4, 1, 8]), random(&[5, 4]));
    assert!(ops::rotate_pairs(&x, &angles, &angles).is_err());
    assert!(ops::rotate_halves(&x, &angles, &angles).is_err());
}

#[test]
fn attention_follows_the_rule() {
    // [b, n, m, h, h_kv, d]
    let cases = [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 700, 14, 2, 128],
        [2, 5, 9, 4, 4, 7],
        [1, 60, 60, 3, 3, 16],
        [2, 100, 131, 2, 1, 32],
        [1, 49, 200, 2, 2, 64],
        [1, 300, 300, 2, 1, 80],
        [1, 150, 150, 1, 1, 128],
        [1, 17, 40, 8, 1, 20],
        [2, 0, 5, 2, 2, 8],
    ];
    for case in cases {
        let [b, n, m, h, h_kv, d] = case;
        let [q, k, v] = [random(&[b, n, h, d]), random(&[b, m, h_kv, d]), random(&[b, m, h_kv, d])];
        let ends = [0, n.div_euclid(4), n.div_euclid(3), n.div_euclid(3), n];
        let mut masks = vec![
            Mask::None,
            Mask::Causal { offset: 0 },
            Mask::Causal { offset: m.saturating_sub(n) },
        ];
        if n == m {
            masks.push(Mask::Segments(&ends));
        }
        for mask in masks {
            let name = format!("{case:?} {mask:?}");
            check(&name, [&q, &k, &v], |[q, k, v]| ops::attention(q, k, v, 0.3, mask).unwrap());
            let inputs = [&strided(&q), &strided(&k), &strided(&v)];
            check(&name, inputs, |[q, k, v]| ops::attention(q, k, v, -0.3, mask).unwrap());
        }
    }
}

#[test]
fn attention_keeps_large_scores_finite() {
    let big = |shape: &[usize]| random(shape).affine(300.0, 0.0).unwrap();
    for n in [1, 100] {
        let inputs = [&big(&[1, n, 2, 64]), &big(&[1, 200, 2, 64]), &random(&[1, 200, 2, 64])];
        check("large scores", inputs, |[q, k, v]| {
            ops::attention(q, k, v, 1.0, Mask::None).unwrap()
        });
    }
}

/// Puts `value` at one place.
fn with_value(x: &Tensor, place: usize, value: f32) -> Tensor {
    let mut numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    numbers[place] = value;
    Tensor::from_vec(numbers, x.shape(), x.device()).unwrap()
}

#[test]
fn attention_shows_nan() {
    for n in [1, 50] {
        let (q, k) = (random(&[1, n, 1, 16]), random(&[1, 300, 1, 16]));
        let v = random(&[1, 300, 1, 16]);
        for (place, value) in
            [(0, f32::NAN), (200 * 16 + 3, f32::NAN), (200 * 16 + 3, f32::INFINITY)]
        {
            let in_keys =
                ops::attention(&q, &with_value(&k, place, value), &v, 1.0, Mask::None).unwrap();
            let finite = values(&in_keys).iter().filter(|x| x.is_finite()).count();
            // An infinite key is the one that wins or loses against all others, by its sign.
            assert!(value.is_infinite() || finite == 0, "{n} {place}: {finite} finite");
            let in_values =
                ops::attention(&q, &k, &with_value(&v, place, value), 1.0, Mask::None).unwrap();
            let column = place % 16;
            assert!(values(&in_values).iter().skip(column).step_by(16).all(|x| !x.is_finite()));
        }
        let out = ops::attention(&with_value(&q, 5, f32::NAN), &k, &v, 1.0, Mask::None).unwrap();
        assert!(values(&out)[..16].iter().all(|x| x.is_nan()));
        assert!(values(&out)[16..].iter().all(|x| x.is_finite()));
    }
}

#[test]
fn attention_never_stores_the_scores() {
    const TOKENS: usize = 40_000;
    let x = random(&[1, TOKENS, 1, 16]);
    let y = ops::attention(&x, &x, &x, 0.25, Mask::None).unwrap();
    assert!(values(&y).iter().all(|x| x.is_finite()));
    if let Some(peak) = pentimento::memory::peak_resident_bytes() {
        let scores = 4 * TOKENS * TOKENS;
        assert!(peak < u64::try_from(scores).unwrap() / 2, "{peak} bytes");
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let x = |n: usize, h: usize, d: usize| random(&[1, n, h, d]);
    let attend =
        |q: &Tensor, k: &Tensor, v: &Tensor, mask| ops::attention(q, k, v, 1.0, mask).is_err();
    assert!(attend(&x(4, 3, 8), &x(4, 2, 8), &x(4, 2, 8), Mask::None));
    assert!(attend(&x(4, 2, 8), &x(4, 2, 6), &x(4, 2, 6), Mask::None));
    assert!(attend(&x(4, 2, 8), &x(4, 2, 8), &x(5, 2, 8), Mask::None));
    assert!(attend(&x(4, 2, 8), &x(0, 2, 8), &x(0, 2, 8), Mask::None));
    for starts in [&[0, 3][..], &[1, 4], &[0, 3, 2, 4], &[]] {
        assert!(
            attend(&x(4, 2, 8), &x(4, 2, 8), &x(4, 2, 8), Mask::Segments(starts)),
            "{starts:?}"
        );
    }
}

#[test]
fn linear_layers_follow_the_rule() {
    for [rows, width, out] in [
        [1, 1, 1],
        [1, 96, 200],
        [3, 48, 288],
        [50, 48, 48],
        [400, 20, 49],
        [25, 700, 97],
        [0, 8, 8],
        [9, 192, 144],
        [1000, 64, 130],
    ] {
        let (x, weight, bias) = (random(&[rows, width]), random(&[out, width]), random(&[out]));
        let name = format!("{rows} {width} {out}");
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let kept = weight.to_dtype(dtype).unwrap();
            let layer =
                PackedLinear::new(LinearWeight::Dense(kept.clone()), Some(bias.clone())).unwrap();
            let reference =
                PackedLinear::new(LinearWeight::Dense(exact(&kept)), Some(exact(&bias))).unwrap();
            for x in [&x, &strided(&x)] {
                check(&name, [x], |[x]| match x.dtype() {
                    DType::F64 => reference.forward(x).unwrap(),
                    _ => layer.forward(x).unwrap(),
                });
            }
        }
    }
    let layer = PackedLinear::new(LinearWeight::Dense(random(&[4, 6])), None).unwrap();
    assert_eq!(layer.forward(&random(&[2, 3, 6])).unwrap().dims(), [2, 3, 4]);
    assert!(layer.forward(&random(&[2, 5])).is_err());
}

/// A block of 32 activations is rounded to 8 bits, as is a block of weights: half a step of its
/// largest magnitude each.
#[test]
fn quantized_layers_stay_within_their_rounding() {
    for [rows, width, out] in [[1, 32, 1], [1, 256, 70], [7, 96, 33], [400, 64, 40]] {
        let (x, weight, bias) = (random(&[rows, width]), random(&[out, width]), random(&[out]));
        let layer =
            PackedLinear::new(LinearWeight::q8_0(&weight).unwrap(), Some(bias.clone())).unwrap();
        let y = layer.forward(&x).unwrap();
        let expected = x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let width = f64::from(u32::try_from(width).unwrap());
        // Magnitudes of about 3: a step is 3 / 127, its rounding error spreads over ±half of that.
        let limit = 6.0 * width.sqrt() * 2.0 * 3.0 / 127.0 / 12.0_f64.sqrt();
        assert!(
            error(&y, &expected) < limit,
            "{rows} {width} {out}: {} of {limit}",
            error(&y, &expected)
        );
    }
    let odd = LinearWeight::q8_0(&random(&[4, 33])).unwrap();
    assert!(
        matches!(odd, LinearWeight::Dense(_)),
        "rows that are no whole number of blocks stay plain"
    );
}

#[test]
fn several_matrices_at_once_give_what_each_gives() {
    let weights = [96, 40, 7].map(|out| random(&[out, 512]));
    for make in
        [LinearWeight::q4_k, LinearWeight::q8_0, |x: &Tensor| Ok(LinearWeight::Dense(x.clone()))]
    {
        let [a, b, c] = weights.each_ref().map(|weight| {
            let bias = (weight.dim(0).unwrap() != 40).then(|| random(&weight.dims()[..1]));
            PackedLinear::new(make(weight).unwrap(), bias).unwrap()
        });
        for rows in [1, 3] {
            let x = random(&[1, rows, 512]);
            let together = ops::forward_each([&a, &b, &c], &x).unwrap();
            for (y, linear) in together.iter().zip([&a, &b, &c]) {
                let alone = linear.forward(&x).unwrap();
                assert_eq!(y.dims(), alone.dims());
                assert_eq!(values(y), values(&alone), "{rows} rows");
            }
        }
    }
}

/// Large matrices are quantized in several pieces, and views wherever they lie.
#[test]
fn every_row_of_a_large_matrix_is_quantized() {
    let weight = random(&[1100, 512]);
    let view = random(&[1300, 512]).narrow(0, 200, 1100).unwrap();
    for weight in [weight, view] {
        for make in [LinearWeight::q8_0, LinearWeight::q4_k] {
            let LinearWeight::Quantized(kept) = make(&weight).unwrap() else { panic!("plain") };
            let wide = kept.dequantize(&Device::Cpu).unwrap();
            let error = error(&wide, &weight); // of rows in other places, about 7
            assert!(error <= 0.5, "{error}");
        }
    }
}

/// The rule for Q4_K: the error against exact activations is at most twice that of candle's product
/// with the same bytes, which rounds activations in blocks of 256.
#[test]
fn q4_k_layers_follow_the_rule() {
    for [rows, width, out] in
        [[1, 256, 70], [1, 2048, 96], [3, 512, 33], [7, 256, 40], [400, 768, 65]]
    {
        let (x, weight, bias) = (random(&[rows, width]), random(&[out, width]), random(&[out]));
        let plain = QTensor::quantize(&weight, GgmlDType::Q4K).unwrap();
        let LinearWeight::Quantized(kept) = LinearWeight::q4_k(&weight).unwrap() else {
            panic!("a matrix of whole super-blocks is quantized")
        };
        assert_eq!(kept.dtype(), GgmlDType::Q4K);
        assert_eq!(kept.data().unwrap(), plain.data().unwrap(), "the bytes are not candle's");
        let numbers = exact(&kept.dequantize(&Device::Cpu).unwrap());
        let expected = exact(&x).matmul(&numbers.t().unwrap()).unwrap();
        let expected = expected.broadcast_add(&exact(&bias)).unwrap();
        let layer = PackedLinear::new(LinearWeight::Quantized(kept), Some(bias.clone())).unwrap();
        let plain = QMatMul::from_qtensor(plain).unwrap();
        let plain = plain.forward(&x).unwrap().broadcast_add(&bias).unwrap();
        let y = layer.forward(&x).unwrap();
        let (ours, theirs) = (error(&y, &expected), error(&plain, &expected));
        assert!(ours <= 2.0 * theirs, "{rows} {width} {out}: error {ours}, plain {theirs}");
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let again = pool.install(|| layer.forward(&x)).unwrap();
            assert_eq!(values(&y), values(&again), "{threads} threads give other numbers");
        }
        // Where gradients are recorded, the matrix is used as it was quantized.
        let recorded = layer.forward(Var::from_tensor(&x).unwrap().as_tensor()).unwrap();
        assert!(error(&recorded, &expected) < 1e-3, "{rows} {width} {out} with gradients");
    }
    let odd = LinearWeight::q4_k(&random(&[4, 96])).unwrap();
    assert!(
        matches!(odd, LinearWeight::Quantized(odd) if odd.dtype() == GgmlDType::Q8_0),
        "rows that are no whole number of super-blocks become Q8_0"
    );
}

#[test]
fn convolutions_follow_the_rule() {
    let uneven = Padding { top: 0, bottom: 1, left: 0, right: 1 };
    let cases = [
        ([1, 1, 1, 1], [1, 1, 1, 1], 1, Padding::default()),
        ([2, 3, 9, 11], [5, 3, 3, 3], 1, Padding::all(1)),
        ([1, 16, 24, 32], [20, 16, 3, 3], 1, Padding::all(1)),
        ([1, 4, 11, 8], [9, 4, 3, 3], 2, uneven),
        ([2, 20, 13, 17], [17, 20, 1, 1], 1, Padding::default()),
        ([1, 2, 3, 1500], [3, 2, 3, 3], 1, Padding::all(1)),
    ];
    for (dims, kernel, stride, padding) in cases {
        let (x, weight, bias) = (random(&dims), random(&kernel), random(&kernel[..1]));
        let shape = Conv2dShape { stride, padding };
        let name = format!("{dims:?} {kernel:?} {shape:?}");
        let layer = PackedConv2d::new(&weight, Some(&bias), shape).unwrap();
        let reference = PackedConv2d::new(&exact(&weight), Some(&exact(&bias)), shape).unwrap();
        for x in [&x, &strided(&x)] {
            check(&name, [x], |[x]| match x.dtype() {
                DType::F64 => reference.forward(x).unwrap(),
                _ => layer.forward(x).unwrap(),
            });
        }
    }
}

#[test]
fn convolutions_refuse_what_does_not_fit() {
    let shape = Conv2dShape { stride: 1, padding: Padding::default() };
    let layer = PackedConv2d::new(&random(&[2, 3, 3, 3]), None, shape).unwrap();
    assert!(layer.forward(&random(&[1, 4, 8, 8])).is_err());
    assert!(layer.forward(&random(&[1, 3, 2, 8])).is_err());
    assert!(PackedConv2d::new(&random(&[2, 3, 3, 3]), Some(&random(&[3])), shape).is_err());
    let still = Conv2dShape { stride: 0, ..shape };
    assert!(PackedConv2d::new(&random(&[2, 3, 3, 3]), None, still).is_err());
}

#[test]
fn enlarging_repeats_each_pixel() {
    for dims in [[1, 1, 1, 1], [2, 3, 5, 7], [1, 8, 16, 33]] {
        let x = random(&dims);
        for x in [&x, &strided(&x)] {
            let y = ops::upsample_nearest_2x(x).unwrap();
            assert_eq!(values(&y), values(&ops::upsample_nearest_2x(&exact(x)).unwrap()));
        }
    }
}

#[test]
fn timesteps_become_sinusoids_in_the_order_that_is_asked_for() {
    let shape = ops::Sinusoids {
        width: 4,
        flip_sin_to_cos: false,
        downscale_freq_shift: 1.0,
        scale: 2.0,
        max_period: 100.0,
    };
    let times = Tensor::new(&[0.0_f32, 0.5], &Device::Cpu).unwrap();
    let embedding =
        |shape, times: &Tensor, dtype| ops::timestep_embedding(times, shape, dtype).unwrap();
    // Frequencies 1 and 1/100: angles 1 and 0.01.
    let (one, small) = (1.0_f64, 0.01_f64);
    let expected = [0.0, 0.0, 1.0, 1.0, one.sin(), small.sin(), one.cos(), small.cos()];
    let found = embedding(shape, &times, DType::F32);
    assert_eq!(found.dims(), [2, 4]);
    for (found, expected) in values(&found).iter().zip(expected) {
        assert!((found - expected).abs() < 1e-7, "{found} {expected}");
    }
    let flipped = ops::Sinusoids { flip_sin_to_cos: true, ..shape };
    let expected = [1.0, 1.0, 0.0, 0.0, one.cos(), small.cos(), one.sin(), small.sin()];
    for (found, expected) in values(&embedding(flipped, &times, DType::F32)).iter().zip(expected) {
        assert!((found - expected).abs() < 1e-7, "{found} {expected}");
    }
    let wide = embedding(shape, &times.to_dtype(DType::F64).unwrap(), DType::F64);
    assert!(
        (wide.get(1).unwrap().get(0).unwrap().to_scalar::<f64>().unwrap() - one.sin()).abs()
            < 1e-15
    );
    assert!(
        ops::timestep_embedding(&times, ops::Sinusoids { width: 3, ..shape }, DType::F32).is_err()
    );
    assert!(ops::pack_patches(&random(&[1, 1, 3, 2])).is_err());
    assert!(ops::unpack_patches(&random(&[1, 4, 6]), (2, 2)).is_err());
}

#[test]
fn nan_stays_visible() {
    let x = with_value(&random(&[1, 4, 2, 8]), 11, f32::NAN);
    let rows = x.reshape((8, 8)).unwrap();
    let all_nan = |y: &Tensor, row: usize| values(y)[row * 8..][..8].iter().all(|x| x.is_nan());
    assert!(all_nan(&ops::rms_norm(&rows, &random(&[8]), 1e-6).unwrap(), 1));
    assert!(all_nan(&ops::layer_norm(&rows, 1e-6).unwrap(), 1));
    let picture = ops::channel_rms_norm(&x, &random(&[4])).unwrap();
    assert_eq!(values(&picture).iter().filter(|x| x.is_nan()).count(), 4);
    let shape = Conv2dShape { stride: 1, padding: Padding::all(1) };
    let conv = PackedConv2d::new(&random(&[3, 4, 3, 3]), None, shape).unwrap();
    assert!(values(&conv.forward(&x).unwrap()).iter().any(|x| x.is_nan()));
    let layer = PackedLinear::new(LinearWeight::Dense(random(&[8, 8])), None).unwrap();
    assert!(all_nan(&layer.forward(&rows).unwrap(), 1));
    for f in [ops::gelu_tanh, ops::gelu_erf, ops::silu] {
        assert_eq!(values(&f(&x).unwrap()).iter().filter(|x| x.is_nan()).count(), 1);
    }
}
