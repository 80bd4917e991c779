//! Products with stored weights and convolutions against their definitions.

use std::sync::Arc;

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};

use super::{Suite, rounded};
use crate::ops::{
    Conv2dShape, PackedConv2d, Padding,
    cuda::{Format, StoredMatrix},
};

/// Rows, depth, outputs.
const CASES: &[[usize; 3]] =
    &[[1, 256, 70], [3, 512, 33], [8, 768, 16], [9, 256, 40], [150, 512, 190]];

pub(super) fn check(suite: &mut Suite) {
    for format in Format::ALL {
        for sizes in CASES {
            product(suite, format, *sizes);
        }
    }
    convolutions(suite);
}

/// A matrix in `format` from `numbers: [outs, depth]`, and the numbers that it holds.
pub(super) fn stored(
    numbers: &Tensor,
    format: Format,
    device: &Device,
) -> Result<(StoredMatrix, Tensor)> {
    let dims = numbers.dims2()?;
    let quantized = |dtype| {
        let matrix = QTensor::quantize(numbers, dtype)?;
        let bytes = matrix.data()?.into_owned();
        Result::Ok((bytes, matrix.dequantize(&Device::Cpu)?))
    };
    let (bytes, widened) = match format {
        Format::Q8_0 => quantized(GgmlDType::Q8_0)?,
        Format::Q4K => quantized(GgmlDType::Q4K)?,
        Format::Q5K => quantized(GgmlDType::Q5K)?,
        Format::Q6K => quantized(GgmlDType::Q6K)?,
        Format::F8E4M3 => {
            let numbers = numbers.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = numbers.iter().map(|x| some_byte(*x)).collect();
            let floats: Vec<f32> = bytes.iter().map(|byte| e4m3(*byte)).collect();
            (bytes, (Tensor::from_vec(floats, dims, &Device::Cpu)? * SCALE)?)
        }
        Format::Bf16 => {
            let narrow = numbers.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<half::bf16>()?;
            let bytes = narrow.iter().flat_map(|x| x.to_le_bytes()).collect();
            (bytes, numbers.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)
        }
    };
    let len = bytes.len();
    let bytes = Tensor::from_vec(bytes, len, device)?;
    let scale = if format == Format::F8E4M3 { SCALE } else { 1.0 };
    Ok((StoredMatrix::new(bytes, format, dims, scale)?, widened))
}

/// The scale of fp8 weights: a power of two, so that the widened weights are exact.
const SCALE: f64 = 0.25;

/// A byte of the number's own, but no NaN.
fn some_byte(x: f32) -> u8 {
    let [_, byte, high, _] = x.to_le_bytes();
    let byte = byte ^ high;
    if byte & 0x7f == 0x7f { 0 } else { byte }
}

/// What a byte of fp8 e4m3 says: three bits after the point, an exponent with a bias of 7, and
/// subnormals below it.
pub(super) fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
    let size = match exponent {
        0 => fraction * 2.0_f32.powi(-6),
        _ => (1.0 + fraction) * 2.0_f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

fn product(suite: &mut Suite, format: Format, [rows, depth, outs]: [usize; 3]) {
    let (x, numbers, bias) =
        (suite.random(&[rows, depth]), suite.random(&[outs, depth]), suite.random(&[outs]));
    let case = format!("{format:?}, {rows} rows, depth {depth}, {outs} outputs");
    let (matrix, widened) = match stored(&numbers, format, &suite.device) {
        Ok(both) => both,
        Err(error) => return suite.judge("linear", &case, Err(error), vec![Ok(x)]),
    };
    let plain = rounded::linear(&x, &widened, &bias);
    let multiply = |[x, widened, bias]: [&Tensor; 3]| {
        let kernel = if x.dtype() == DType::BF16 { matrix.forward(x, Some(bias))? } else { None };
        match kernel {
            Some(y) => Ok(y),
            None => x.matmul(&widened.t()?)?.broadcast_add(bias),
        }
    };
    suite.compare_to("linear", case, ([&x, &widened, &bias], &[]), multiply, plain);
    let quantized = [(Format::Q8_0, GgmlDType::Q8_0), (Format::Q4K, GgmlDType::Q4K)];
    if let Some((_, dtype)) = quantized.iter().find(|(of, _)| *of == format) {
        layer(suite, [&x, &numbers, &bias], *dtype);
    }
}

/// The layer that models use, with blocks that lie where candle keeps them.
fn layer(suite: &mut Suite, [x, numbers, bias]: [&Tensor; 3], dtype: GgmlDType) {
    use crate::ops::{LinearWeight, PackedLinear};
    let case = format!("{dtype:?} layer, x {:?}", x.dims());
    let found = (|| {
        let matrix = QTensor::quantize(numbers, dtype)?;
        let widened = matrix.dequantize(&Device::Cpu)?;
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        let exact = wide(x)?.matmul(&wide(&widened)?.t()?)?.broadcast_add(&wide(bias)?)?;
        let data = matrix.data()?.into_owned();
        let storage = QStorage::from_data(data.into(), &suite.device, dtype)?;
        let matrix = Arc::new(QTensor::new(storage, numbers.dims())?);
        Ok(((exact, rounded::linear(x, &widened, bias)?), matrix))
    })();
    let (expected, matrix) = match found {
        Ok((expected, matrix)) => (expected, matrix),
        Err(error) => return suite.judge("linear layer", &case, Err(error), vec![Ok(x.clone())]),
    };
    let on_device = |x: &Tensor| x.to_dtype(DType::BF16)?.to_device(&suite.device);
    let kernel = |order: u32| {
        suite.on_kernels(order, || {
            let weight = LinearWeight::Quantized(Arc::clone(&matrix));
            PackedLinear::new(weight, Some(on_device(bias)?))?.forward(&on_device(x)?)
        })
    };
    let kernels: Vec<_> = suite.orders.iter().map(|order| kernel(*order)).collect();
    suite.judge("linear layer", &case, Ok(expected), kernels);
}

fn convolutions(suite: &mut Suite) {
    let same = |kernel: usize| Conv2dShape { stride: 1, padding: Padding::all(kernel >> 1) };
    let halving =
        Conv2dShape { stride: 2, padding: Padding { top: 0, bottom: 1, left: 0, right: 1 } };
    let cases = [
        ([1, 3, 5, 7], 4, 3, same(3)),
        ([2, 70, 9, 13], 130, 3, same(3)),
        ([1, 33, 12, 12], 20, 1, same(1)),
        ([1, 16, 11, 10], 16, 3, halving),
    ];
    for (dims, outs, kernel, shape) in cases {
        let x = suite.random(&dims);
        let weight = suite.random(&[outs, dims[1], kernel, kernel]);
        let bias = suite.random(&[outs]);
        let case = format!("{dims:?} to {outs}, {kernel} × {kernel}, stride {}", shape.stride);
        suite.compare("convolution", case, ([&x, &weight, &bias], &[]), |[x, weight, bias]| {
            PackedConv2d::new(weight, Some(bias), shape)?.forward(x)
        });
    }
}
