//! Products that are fused with the norm before them or with what follows: the same numbers, bit
//! for bit, as the operations one after the other.

use candle_core::{DType, Device, Result, Tensor};
use pentimento::ops::{self, LinearWeight, ModulatedTokens, PackedLinear};

const WIDTH: usize = 512;
const EPS: f64 = 1e-6;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// Their bits, so that NaN is NaN.
fn bits(x: &Tensor) -> (Vec<usize>, Vec<u32>) {
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    (x.dims().to_vec(), values.iter().map(|x| x.to_bits()).collect())
}

type Make = fn(&Tensor) -> Result<LinearWeight>;

fn layer(make: Make, out: usize, with_bias: bool) -> PackedLinear {
    let bias = with_bias.then(|| random(&[out]));
    PackedLinear::new(make(&random(&[out, WIDTH])).unwrap(), bias).unwrap()
}

fn plain(weight: &Tensor) -> Result<LinearWeight> {
    Ok(LinearWeight::Dense(weight.clone()))
}

/// Layers of one kind, and of several kinds together.
fn layers() -> Vec<[PackedLinear; 3]> {
    let [q8_0, q4_k, plain]: [Make; 3] = [LinearWeight::q8_0, LinearWeight::q4_k, plain];
    [[q8_0; 3], [q4_k; 3], [plain; 3], [q8_0, q4_k, q8_0], [q4_k, plain, q8_0]]
        .map(|[a, b, c]| [layer(a, 96, true), layer(b, 40, false), layer(c, WIDTH, true)])
        .into()
}

/// Scale, shift and gate of as many tokens as each number says.
fn modulation(tokens: &[usize]) -> Vec<(usize, [Tensor; 3])> {
    let tensors = || [(); 3].map(|()| random(&[1, 1, WIDTH]));
    tokens.iter().map(|tokens| (*tokens, tensors())).collect()
}

fn runs(modulation: &[(usize, [Tensor; 3])]) -> Vec<ModulatedTokens<'_>> {
    modulation
        .iter()
        .map(|(tokens, [scale, shift, gate])| ModulatedTokens {
            tokens: *tokens,
            scale,
            shift,
            gate,
        })
        .collect()
}

const TOKENS: [&[usize]; 6] = [&[1], &[2], &[7], &[3, 4], &[250], &[130, 120]];

#[test]
fn a_norm_and_its_products_are_fused_without_a_change() {
    for tokens in TOKENS {
        let modulation = modulation(tokens);
        let runs = runs(&modulation);
        let x = random(&[1, tokens.iter().sum(), WIDTH]);
        let normed = ops::modulated_layer_norm_each(&x, &runs, EPS).unwrap();
        for [a, b, c] in &layers() {
            let fused = ops::modulated_linear_each([a, b, c], &x, &runs, EPS).unwrap();
            for (linear, fused) in [a, b, c].into_iter().zip(&fused) {
                let y = linear.forward(&normed).unwrap();
                assert_eq!(bits(fused), bits(&y), "{tokens:?}");
                let activated = ops::modulated_linear_gelu(linear, &x, &runs, EPS).unwrap();
                assert_eq!(bits(&activated), bits(&ops::gelu_tanh(&y).unwrap()), "{tokens:?}");
            }
        }
    }
}

#[test]
fn a_product_and_its_gate_are_fused_without_a_change() {
    for tokens in TOKENS {
        let modulation = modulation(tokens);
        let runs = runs(&modulation);
        let dims = [1, tokens.iter().sum(), WIDTH];
        let (x, residual) = (random(&dims), random(&dims));
        for [_, _, linear] in &layers() {
            let fused = ops::linear_gated_add(linear, &x, &residual, &runs).unwrap();
            let added = linear.forward(&x).unwrap();
            let apart = ops::gated_add_each(&residual, &added, &runs).unwrap();
            assert_eq!(bits(&fused), bits(&apart), "{tokens:?}");
        }
    }
}

/// Views, and what the kernels are not made for: several at once, and other types.
#[test]
fn other_tensors_give_what_the_parts_give() {
    let modulation = modulation(&[5, 4]);
    let runs = runs(&modulation);
    let [linear] = [layer(LinearWeight::q8_0, WIDTH, true)];
    let view = random(&[1, 20, WIDTH]).narrow(1, 7, 9).unwrap();
    let strided = random(&[1, WIDTH, 9]).transpose(1, 2).unwrap();
    for x in [view, strided, random(&[2, 9, WIDTH])] {
        let normed = ops::modulated_layer_norm_each(&x, &runs, EPS).unwrap();
        let y = linear.forward(&normed).unwrap();
        let [fused] = ops::modulated_linear_each([&linear], &x, &runs, EPS).unwrap();
        assert_eq!(bits(&fused), bits(&y));
        let fused = ops::linear_gated_add(&linear, &x, &x, &runs).unwrap();
        let apart = ops::gated_add_each(&x, &linear.forward(&x).unwrap(), &runs).unwrap();
        assert_eq!(bits(&fused), bits(&apart));
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    let modulation = modulation(&[3]);
    let runs = runs(&modulation);
    let linear = layer(LinearWeight::q8_0, WIDTH, true);
    let odd = Tensor::new(f32::NAN, &Device::Cpu).unwrap().reshape((1, 1, 1)).unwrap();
    let row = Tensor::cat(&[&odd, &random(&[1, 1, WIDTH - 1])], 2).unwrap();
    let x = Tensor::cat(&[&random(&[1, 1, WIDTH]), &row, &random(&[1, 1, WIDTH])], 1).unwrap();
    let [y] = ops::modulated_linear_each([&linear], &x, &runs, EPS).unwrap();
    let y: Vec<Vec<f32>> = y.squeeze(0).unwrap().to_vec2().unwrap();
    assert!(y[1].iter().all(|y| y.is_nan()), "{:?}", y[1]);
    assert!(y[0].iter().chain(&y[2]).all(|y| y.is_finite()));
}

#[test]
fn modulation_of_other_tokens_is_refused() {
    let linear = layer(LinearWeight::q8_0, WIDTH, true);
    let x = random(&[1, 7, WIDTH]);
    for tokens in [&[][..], &[6], &[3, 5]] {
        let modulation = modulation(tokens);
        let runs = runs(&modulation);
        for error in [
            ops::modulated_linear_each([&linear], &x, &runs, EPS).err().map(|e| e.to_string()),
            ops::modulated_linear_gelu(&linear, &x, &runs, EPS).err().map(|e| e.to_string()),
            ops::linear_gated_add(&linear, &x, &x, &runs).err().map(|e| e.to_string()),
        ] {
            let error = error.unwrap();
            assert!(error.contains("tokens for 7"), "{error}");
        }
    }
    let modulation = modulation(&[7]);
    let runs = runs(&modulation);
    assert!(ops::linear_gated_add(&linear, &x, &random(&[1, 7, 40]), &runs).is_err());
    let narrow = random(&[1, 7, WIDTH / 2]);
    assert!(ops::modulated_linear_each([&linear], &narrow, &runs, EPS).is_err());
    let double = x.to_dtype(DType::F64).unwrap();
    assert!(ops::modulated_linear_each([&linear], &double, &runs, EPS).is_err());
}
