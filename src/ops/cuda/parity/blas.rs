//! Rows rounded to fp8, and products by cuBLASLt, against their definitions.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    Suite,
    products::{e4m3, stored},
    rounded,
};
use crate::ops::{
    self,
    cuda::{
        self, Activations, Epilogue, Format, StoredMatrix,
        blas::{linear_float8, linear_widened},
    },
};

/// Rows, depth, outputs.
const CASES: &[[usize; 3]] = &[[1, 64, 48], [33, 256, 192], [70, 512, 64], [130, 3072, 32]];

/// Rows and their length: each kernel's shortest and longest.
const ROWS: &[[usize; 2]] = &[[1, 8], [33, 256], [9, 3072], [5, 6152], [3, 12_288], [2, 12_296]];

pub(super) fn check(suite: &mut Suite) {
    for sizes in ROWS {
        rows(suite, *sizes);
    }
    for sizes in CASES {
        for format in [Format::Q8_0, Format::F8E4M3] {
            widened_product(suite, format, *sizes);
        }
        for gelu_tanh in [false, true] {
            plain_product(suite, *sizes, gelu_tanh);
            float8_product(suite, *sizes, gelu_tanh);
        }
    }
}

/// The numbers that rows in fp8 stand for, in float32 on the CPU.
fn widened((bytes, scales): (Tensor, Tensor)) -> Result<Tensor> {
    let dims = bytes.dims2()?;
    let bytes = bytes.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
    let numbers: Vec<f32> = bytes.into_iter().map(e4m3).collect();
    let scales = scales.to_device(&Device::Cpu)?.reshape((dims.0, 1))?;
    Tensor::from_vec(numbers, dims, &Device::Cpu)?.broadcast_mul(&scales)
}

/// Numbers of which some rows are large, one has an outlier and one is zero.
fn uneven(suite: &mut Suite, rows: usize, depth: usize) -> Result<Tensor> {
    let x = suite.random(&[rows, depth]);
    let factors: Vec<f32> = (0..rows).map(|row| [1.0, 300.0, 0.0, 0.004][row % 4]).collect();
    let x = x.broadcast_mul(&Tensor::from_vec(factors, (rows, 1), &Device::Cpu)?)?;
    let spikes = (0..depth).map(|i| if i == 3 { 40.0_f32 } else { 1.0 }).collect::<Vec<_>>();
    x.broadcast_mul(&Tensor::from_vec(spikes, (1, depth), &Device::Cpu)?)?
        .to_dtype(DType::BF16)?
        .to_dtype(DType::F32)
}

fn rows(suite: &mut Suite, [rows, depth]: [usize; 2]) {
    let case = format!("[{rows}, {depth}]");
    let x = match uneven(suite, rows, depth) {
        Ok(x) => x,
        Err(error) => return suite.judge("fp8 rows", &case, Err(error), vec![]),
    };
    let of = |x: &Tensor| match x.dtype() {
        DType::F64 => Ok(x.clone()),
        _ => widened(ops::float8_rows(x)?),
    };
    let plain = cuda::not_emulated(|| of(&x.to_dtype(DType::BF16)?));
    suite.compare_to("fp8 rows", case.clone(), ([&x], &[]), |[x]| of(x), plain);
    // They are the same bytes, where a number is NaN too.
    let mut numbers = x.flatten_all().and_then(|x| x.to_vec1::<f32>()).unwrap_or_default();
    if let Some([x, y]) = numbers.first_chunk_mut() {
        [*x, *y] = [f32::NAN, -f32::NAN];
    }
    let x = match Tensor::from_vec(numbers, (rows, depth), &Device::Cpu) {
        Ok(x) => x,
        Err(error) => return suite.judge("fp8 rows, bytes", &case, Err(error), vec![]),
    };
    let bytes =
        |x: &Tensor| -> Result<Tensor> { Ok(ops::float8_rows(&x.to_dtype(DType::BF16)?)?.0) };
    let wide = |x: Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let plain = cuda::not_emulated(|| wide(bytes(&x)?)).map(|plain| (plain.clone(), plain));
    let on_device = |order| suite.on_kernels(order, || bytes(&x.to_device(&suite.device)?));
    let kernels = suite.orders.iter().map(|order| wide(on_device(*order)?)).collect();
    suite.judge("fp8 rows, bytes", &case, plain, kernels);
}

/// A product whose weights are widened first, with bias and GELU, in parts where the library does it.
fn widened_product(suite: &mut Suite, format: Format, [rows, depth, outs]: [usize; 3]) {
    let case = format!("{format:?}, {rows} rows, {depth} to {outs}");
    let [x, numbers] = [[rows, depth], [outs, depth]].map(|dims| suite.random(&dims));
    let bias = suite.random(&[outs]);
    let (matrix, widened) = match stored(&numbers, format, &suite.device) {
        Ok(both) => both,
        Err(error) => return suite.judge("widened product", &case, Err(error), vec![]),
    };
    let inputs = [&x, &widened, &bias];
    let plain = in_steps(inputs, true);
    suite.compare_to(
        "widened product",
        case,
        (inputs, &[]),
        |inputs| {
            let [x, widened, bias] = inputs;
            match (x.dtype(), x.device().is_cuda()) {
                (DType::F64, _) => defined(inputs, true),
                (_, false) => in_steps([x, widened, bias], true),
                (_, true) => {
                    let epilogue = Epilogue { bias: Some(bias), gelu_tanh: true };
                    match linear_widened(x, &matrix, epilogue, 1)? {
                        Some(y) => Ok(y),
                        None => bail!("cuBLASLt does not do it"),
                    }
                }
            }
        },
        plain,
    );
}

/// The product by its definition, in the type of `x`.
fn defined([x, weight, bias]: [&Tensor; 3], gelu_tanh: bool) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?.broadcast_add(bias)?;
    if gelu_tanh { y.gelu() } else { Ok(y) }
}

/// The product with the product, the sum and the activation rounded to bf16.
fn in_steps([x, weight, bias]: [&Tensor; 3], gelu_tanh: bool) -> Result<Tensor> {
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let y = rounded::linear(&wide(x)?, &wide(weight)?, &wide(bias)?)?;
    if gelu_tanh { rounded::rounded(&y.gelu()?) } else { Ok(y) }
}

fn plain_product(suite: &mut Suite, [rows, depth, outs]: [usize; 3], gelu_tanh: bool) {
    let [x, weight] = [[rows, depth], [outs, depth]].map(|dims| suite.random(&dims));
    let weight = (weight / 8.0).unwrap_or_else(|_| x.clone());
    let bias = suite.random(&[outs]);
    let case = format!("{rows} rows, {depth} to {outs}, GELU {gelu_tanh}");
    let inputs = [&x, &weight, &bias];
    let plain = in_steps(inputs, gelu_tanh);
    suite.compare_to(
        "bf16 product",
        case,
        (inputs, &[]),
        |inputs| {
            let [x, weight, bias] = inputs;
            match (x.dtype(), x.device().is_cuda()) {
                (DType::F64, _) => defined(inputs, gelu_tanh),
                (_, false) => in_steps(inputs, gelu_tanh),
                (_, true) => {
                    match cuda::blas_linear(x, weight, Epilogue { bias: Some(bias), gelu_tanh })? {
                        Some(y) => Ok(y),
                        None => bail!("cuBLASLt does not do it"),
                    }
                }
            }
        },
        plain,
    );
}

fn float8_product(suite: &mut Suite, [rows, depth, outs]: [usize; 3], gelu_tanh: bool) {
    let case = format!("{rows} rows, {depth} to {outs}, GELU {gelu_tanh}");
    let (x, bias) = (suite.random(&[rows, depth]), suite.random(&[outs]));
    let bytes: Vec<u8> = match suite.random(&[outs * depth]).to_vec1::<f32>() {
        Ok(numbers) => numbers.into_iter().map(ops::float8::e4m3).collect(),
        Err(error) => return suite.judge("fp8 product", &case, Err(error), vec![]),
    };
    const SCALE: f32 = 0.125;
    let numbers: Vec<f32> = bytes.iter().map(|byte| e4m3(*byte) * SCALE).collect();
    let weight = Tensor::from_vec(numbers, (outs, depth), &Device::Cpu);
    let Ok(weight) = weight else { return };
    let inputs = [&x, &weight, &bias];
    // Rows in fp8, and then the definition.
    let composed = |[x, weight, bias]: [&Tensor; 3]| {
        let x = widened(ops::float8_rows(x)?)?;
        in_steps([&x, weight, bias], gelu_tanh)
    };
    let plain = cuda::not_emulated(|| composed([&x.to_dtype(DType::BF16)?, &weight, &bias]));
    suite.compare_to(
        "fp8 product",
        case,
        (inputs, &[]),
        |inputs| {
            let [x, _, bias] = inputs;
            // Few rows are not worth rounding.
            let by_library = rows >= 32 && cuda::multiplies_float8(x.device());
            match x.dtype() {
                DType::F64 => return defined(inputs, gelu_tanh),
                _ if !by_library => return composed(inputs),
                _ => {}
            }
            let stored = Tensor::from_slice(&bytes, bytes.len(), x.device())?;
            let scale = f64::from(SCALE);
            let matrix = StoredMatrix::new(stored, Format::F8E4M3, (outs, depth), scale)?;
            let matrix = matrix.with_float8_products()?;
            let epilogue = Epilogue { bias: Some(bias), gelu_tanh };
            match linear_float8(&Activations::new(x), &matrix, epilogue)? {
                Some(y) => Ok(y),
                None => bail!("cuBLASLt does not do it"),
            }
        },
        plain,
    );
}
