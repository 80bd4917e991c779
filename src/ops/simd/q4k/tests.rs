//! Every instruction set against a computation in float64, and the bytes against candle's.

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};

use super::*;

const SHAPES: [[usize; 3]; 6] =
    [[1, 256, 1], [1, 1536, 70], [2, 768, 33], [6, 256, 32], [13, 512, 20], [250, 768, 40]];

fn random(shape: [usize; 2]) -> Tensor {
    Tensor::randn(0.1_f32, 1.0, &shape, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// A matrix for each set of instructions, and its numbers as candle reads them.
fn packed(out: usize, width: usize) -> (Vec<PackedQ4K>, Vec<f32>) {
    let quantized = QTensor::quantize(&random([out, width]), GgmlDType::Q4K).unwrap();
    let bytes = quantized.data().unwrap();
    let all = Instructions::available();
    let packed = |i| PackedQ4K::with_instructions(&bytes, [out, width], i).unwrap();
    let numbers = values(&quantized.dequantize(&Device::Cpu).unwrap());
    (all.into_iter().map(packed).collect(), numbers)
}

fn product(packed: &PackedQ4K, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let (out, width) = packed.dims();
    let mut y = vec![f32::NAN; x.len().div_euclid(width) * out];
    packed.multiply(x, bias, &mut y);
    y
}

#[test]
fn a_packed_matrix_keeps_its_numbers() {
    let (packed, numbers) = packed(41, 512);
    let rows: Vec<f32> = (0..41).flat_map(|row| packed[0].row(row)).collect();
    assert_eq!(rows, numbers);
}

#[test]
fn the_product_is_that_of_the_quantized_activations() {
    for [rows, width, out] in SHAPES {
        let (packed, weight) = packed(out, width);
        let whole = |i: usize| f32::from(u8::try_from(i * 31 % 255).unwrap()) - 127.0;
        // The largest magnitude of every block is made 127, so that quantizing is exact.
        let x: Vec<f32> = (0..rows * width).map(whole).collect();
        let x: Vec<f32> = x.chunks(SUB_BLOCK).flat_map(|x| [&[127.0], &x[1..]].concat()).collect();
        let bias: Vec<f32> = values(&random([1, out]));
        for packed in &packed {
            let y = product(packed, &x, Some(&bias));
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i.div_euclid(out), i % out);
                let pairs = x[row * width..].iter().zip(&weight[column * width..][..width]);
                let products = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w));
                let (sum, size) = products.fold((0.0, 0.0), |(a, b), x| (a + x, b + x.abs()));
                let error = (f64::from(*y) - sum - f64::from(bias[column])).abs();
                let name = packed.instructions;
                assert!(error < 1e-6 * size, "{name:?} {rows}×{width}×{out} at {i}: {error}");
            }
        }
    }
}

/// The rule: the error against float32 activations is at most twice candle's, which rounds
/// activations in blocks of 256. Numbers do not depend on how many threads there are.
#[test]
fn rounding_follows_the_rule() {
    for [rows, width, out] in SHAPES {
        let quantized = QTensor::quantize(&random([out, width]), GgmlDType::Q4K).unwrap();
        let bytes = quantized.data().unwrap().into_owned();
        let x = random([rows, width]);
        let exact = quantized.dequantize(&Device::Cpu).unwrap().t().unwrap();
        let exact = values(&x.matmul(&exact).unwrap());
        let plain = candle_core::quantized::QMatMul::from_qtensor(quantized).unwrap();
        let plain = values(&candle_core::Module::forward(&plain, &x).unwrap());
        let error = |y: &[f32]| -> f32 {
            let squares = y.iter().zip(&exact).map(|(y, exact)| (y - exact) * (y - exact));
            squares.sum::<f32>().sqrt()
        };
        for instructions in Instructions::available() {
            let packed = PackedQ4K::with_instructions(&bytes, [out, width], instructions).unwrap();
            let y = product(&packed, &values(&x), None);
            let (ours, theirs) = (error(&y), error(&plain));
            let name = format!("{instructions:?} {rows}×{width}×{out}");
            assert!(ours <= 2.0 * theirs, "{name}: error {ours}, candle's {theirs}");
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let again = pool.install(|| product(&packed, &values(&x), None));
                assert_eq!(y, again, "{name} with {threads} threads");
            }
        }
    }
}

#[test]
fn nan_in_the_activations_stays() {
    let (packed, _) = packed(40, 512);
    for packed in &packed {
        let mut x = vec![1.0; 3 * 512];
        x[512 + 40] = f32::NAN;
        let y = product(packed, &x, None);
        assert!(y[40..80].iter().all(|y| y.is_nan()), "{y:?}");
        assert!(y[..40].iter().chain(&y[80..]).all(|y| y.is_finite()), "{y:?}");
        let one = product(packed, &x[512..1024], None);
        assert!(one.iter().all(|y| y.is_nan()), "{one:?}");
    }
}

#[test]
fn other_bytes_are_refused() {
    assert!(PackedQ4K::new(&[0; SUPER_BLOCK_BYTES], 1, 256).is_some());
    assert!(PackedQ4K::new(&[0; SUPER_BLOCK_BYTES], 1, 512).is_none());
    assert!(PackedQ4K::new(&[0; SUPER_BLOCK_BYTES], 1, 128).is_none());
    assert!(PackedQ4K::new(&[], 0, 256).is_none());
}
