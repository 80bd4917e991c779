//! Products with stored weights against their definitions.

use std::sync::Arc;

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};

use super::{Suite, joined, rounded};
use crate::ops::cuda::{Format, StoredMatrix};

/// Rows, depth, outputs.
const CASES: &[[usize; 3]] =
    &[[1, 256, 70], [3, 512, 33], [8, 768, 16], [9, 256, 40], [150, 512, 190], [70, 512, 192]];

pub(super) fn check(suite: &mut Suite) {
    for format in Format::ALL {
        for sizes in CASES {
            product(suite, format, *sizes);
        }
        widened_rows(suite, format);
    }
    joined::check(suite);
    few_rows(suite);
    row_by_each(suite);
}

/// Few rows of kinds and sizes that the kernels for these take apart: shares of blocks that are no whole
/// tiles, a tile's depth shared by several warps, more blocks than outputs, odd numbers of pieces.
fn few_rows(suite: &mut Suite) {
    const SIZES: &[[usize; 3]] = &[
        [1, 256, 2],
        [1, 512, 33],
        [1, 1024, 250],
        [3, 1280, 49],
        [4, 512, 120],
        [5, 768, 35],
        [8, 1024, 64],
        [1, 4864, 26],
        [2, 9472, 19],
        [1, 9216, 40],
    ];
    for format in Format::ALL {
        for [rows, depth, outs] in SIZES.iter().copied() {
            product(suite, format, [rows, depth, outs]);
        }
        for [rows, depth, outs] in [[1, 1024, 50], [3, 512, 35], [7, 512, 33]] {
            let x = suite.random(&[rows, depth]);
            product_of(suite, format, spread(&x), [rows, depth, outs]);
            not_finite(suite, format, [rows, depth, outs]);
        }
    }
}

/// One row by each of some matrices, as by each alone.
fn row_by_each(suite: &mut Suite) {
    use crate::ops::{PackedLinear, forward_each};
    const DEPTH: usize = 512;
    let cases = [
        [(Format::Q4K, 200), (Format::Q4K, 33), (Format::Q6K, 48)],
        [(Format::Q8_0, 70), (Format::Q6K, 1), (Format::Q4K, 5)],
        [(Format::Q4K, 90), (Format::Q4K, 90), (Format::Q4K, 90)],
    ];
    for case in cases {
        let x = suite.random(&[1, DEPTH]);
        let parts: Vec<_> = case
            .iter()
            .map(|(format, outs)| {
                let (numbers, bias) = (suite.random(&[*outs, DEPTH]), suite.random(&[*outs]));
                // The second has none.
                let bias = if outs % 2 == 1 { None } else { Some(bias) };
                let (matrix, widened) = stored(&numbers, *format, &suite.device)?;
                Result::Ok((matrix, widened, bias))
            })
            .collect();
        let name = format!("{case:?} of depth {DEPTH}");
        let parts = match parts.into_iter().collect::<Result<Vec<_>>>() {
            Ok(parts) => parts,
            Err(error) => return suite.judge("linear by each", &name, Err(error), vec![Ok(x)]),
        };
        let joined = |wide: bool| {
            let each = parts.iter().map(|(_, widened, bias)| {
                let bias = match bias {
                    Some(bias) => bias.clone(),
                    None => Tensor::zeros(widened.dim(0)?, DType::F32, &Device::Cpu)?,
                };
                if !wide {
                    return rounded::linear(&x, widened, &bias);
                }
                let wide = |x: &Tensor| x.to_dtype(DType::F64);
                wide(&x)?.matmul(&wide(widened)?.t()?)?.broadcast_add(&wide(&bias)?)
            });
            Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 1)
        };
        let kernel = |order: &u32| {
            suite.on_kernels(*order, || {
                let on_device = |x: &Tensor| x.to_dtype(DType::BF16)?.to_device(&suite.device);
                let linears = parts.iter().map(|(matrix, _, bias)| {
                    let bias = bias.as_ref().map(on_device).transpose()?;
                    Ok(PackedLinear::stored(matrix.clone(), bias))
                });
                let linears = linears.collect::<Result<Vec<_>>>()?;
                let [a, b, c] = linears.as_slice() else { candle_core::bail!("not three") };
                let before = super::super::launches();
                let each = forward_each([a, b, c], &on_device(&x)?)?;
                // Other threads may start kernels too.
                if super::super::launches() == before {
                    candle_core::bail!("no kernel");
                }
                Tensor::cat(&each, 1)
            })
        };
        let kernels = suite.orders.iter().map(kernel).collect();
        let expected = joined(true).and_then(|exact| Ok((exact, joined(false)?)));
        suite.judge("linear by each", &name, expected, kernels);
    }
}

/// Rows with outliers, small numbers beside large ones, and groups of zeros.
fn spread(x: &Tensor) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let numbers = x.flatten_all()?.to_vec1::<f32>()?.into_iter().enumerate();
    let scaled = numbers.map(|(i, x)| match i % 131 {
        7 => x * 3000.0,
        30..=65 => x * 1e-3,
        66..=130 if (i >> 5) % 5 == 0 => 0.0,
        _ => x,
    });
    let scaled: Vec<f32> = scaled.collect();
    Tensor::from_vec(scaled, dims, x.device())?.to_dtype(DType::BF16)?.to_dtype(DType::F32)
}

/// A number that is not finite in a row makes this row's results so, and no others.
fn not_finite(suite: &mut Suite, format: Format, [rows, depth, outs]: [usize; 3]) {
    let (x, numbers) = (suite.random(&[rows, depth]), suite.random(&[outs, depth]));
    for (bad, at) in [(f32::NAN, 3), (f32::INFINITY, depth - 1), (f32::NEG_INFINITY, 300)] {
        let case =
            format!("{format:?}, {bad} in one of {rows} rows, depth {depth}, {outs} outputs");
        let found = (|| {
            let (matrix, _) = stored(&numbers, format, &suite.device)?;
            let mut with = x.flatten_all()?.to_vec1::<f32>()?;
            with[(rows - 1) * depth + at] = bad;
            let with = Tensor::from_vec(with, (rows, depth), &Device::Cpu)?;
            Ok((matrix, with))
        })();
        let (matrix, with) = match found {
            Ok(found) => found,
            Err(error) => return suite.judge("linear", &case, Err(error), vec![Ok(x)]),
        };
        // One where all are as they must be.
        let kernel = |order: &u32| {
            let input = with.to_dtype(DType::BF16)?.to_device(&suite.device)?;
            let y = suite.on_kernels(*order, || matrix.forward(&input, None))?;
            let Some(y) = y else { candle_core::bail!("no kernel") };
            let y = y.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
            let last = (rows - 1) * outs;
            let right = y.to_vec1::<f32>()?.iter().enumerate().all(|(i, y)| {
                // A weight of zero times a number that is not finite may be left out or not.
                if i >= last { !y.is_finite() || *y == 0.0 } else { y.is_finite() }
            });
            Tensor::from_slice(&[f32::from(u8::from(right))], 1, &Device::Cpu)
        };
        let kernels = suite.orders.iter().map(kernel).collect();
        let one = Tensor::ones(1, DType::F32, &Device::Cpu);
        suite.judge("linear", &case, one.map(|one| (one.clone(), one)), kernels);
    }
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

/// Rows of a matrix in bf16, all and some.
fn widened_rows(suite: &mut Suite, format: Format) {
    const DIMS: [usize; 2] = [37, 768];
    if format == Format::Bf16 {
        return;
    }
    let numbers = suite.random(&DIMS);
    for outs in [0..37, 5..36] {
        let case = format!("{format:?}, rows {outs:?} of {DIMS:?}");
        let found = stored(&numbers, format, &suite.device);
        let (matrix, widened) = match found {
            Ok(both) => both,
            Err(error) => return suite.judge("widen", &case, Err(error), vec![]),
        };
        let scale = if format == Format::F8E4M3 { SCALE } else { 1.0 };
        let expected = widened.narrow(0, outs.start, outs.len());
        let expected = expected.and_then(|x| {
            let x = (x / scale)?;
            Ok((x.clone(), rounded::rounded(&x)?))
        });
        let kernel =
            |order: &u32| match suite.on_kernels(*order, || matrix.widened(outs.clone()))? {
                Some(wide) => Ok(wide),
                None => candle_core::bail!("no kernel"),
            };
        let kernels: Vec<_> = suite.orders.iter().map(kernel).collect();
        suite.judge("widen", &case, expected, kernels);
    }
}

fn product(suite: &mut Suite, format: Format, sizes: [usize; 3]) {
    let x = suite.random(&sizes[..2]);
    product_of(suite, format, Ok(x), sizes);
}

fn product_of(
    suite: &mut Suite,
    format: Format,
    x: Result<Tensor>,
    [rows, depth, outs]: [usize; 3],
) {
    let (numbers, bias) = (suite.random(&[outs, depth]), suite.random(&[outs]));
    let case = format!("{format:?}, {rows} rows, depth {depth}, {outs} outputs");
    let x = match x {
        Ok(x) => x,
        Err(error) => return suite.judge("linear", &case, Err(error), vec![Ok(bias)]),
    };
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
