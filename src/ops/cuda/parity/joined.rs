//! Matrices that are multiplied as one, and each of them as rows of the one, against their definitions.

use std::sync::Arc;

use candle_core::{
    DType, Device, Result, Tensor, bail,
    quantized::{GgmlDType, QStorage, QTensor},
};

use super::{Suite, products::stored, rounded};
use crate::ops::{
    LinearWeight, PackedLinear,
    cuda::{Format, StoredMatrix},
};

const OUTS: [usize; 3] = [64, 16, 128];
const DEPTH: usize = 512;

/// How matrices are kept.
#[derive(Debug, Clone, Copy)]
enum Kept {
    Bytes(Format),
    /// As numbers of eight bits for activations of eight bits.
    Float8,
    Candle(GgmlDType, Format),
    Plain,
}

pub(super) fn check(suite: &mut Suite) {
    let bytes = Format::ALL.map(Kept::Bytes);
    let candle = [(GgmlDType::Q8_0, Format::Q8_0), (GgmlDType::Q6K, Format::Q6K)];
    let candle = candle.map(|(dtype, format)| Kept::Candle(dtype, format));
    for kept in bytes.into_iter().chain(candle).chain([Kept::Float8, Kept::Plain]) {
        // fp8 activations are another sum, with a check of its own.
        let rows: &[usize] = if matches!(kept, Kept::Float8) { &[3] } else { &[3, 150] };
        rows.iter().for_each(|rows| products(suite, kept, *rows));
    }
}

fn products(suite: &mut Suite, kept: Kept, rows: usize) {
    let x = suite.random(&[rows, DEPTH]);
    let numbers = OUTS.map(|outs| suite.random(&[outs, DEPTH]));
    let bias = suite.random(&[OUTS.iter().sum()]);
    let case = format!("{kept:?}, {rows} rows");
    let all = numbers.iter().map(|numbers| widened(kept, numbers)).collect::<Result<Vec<_>>>();
    let widened = match all.and_then(|all| Tensor::cat(&all, 0)) {
        Ok(widened) => widened,
        Err(error) => return suite.judge("linear joined", &case, Err(error), vec![Ok(x)]),
    };
    let device = suite.device.clone();
    for as_one in [true, false] {
        let multiply = |[x, widened, bias]: [&Tensor; 3]| {
            if x.dtype() != DType::BF16 {
                return x.matmul(&widened.t()?)?.broadcast_add(bias);
            }
            let mut start = 0;
            let each = numbers.iter().map(|numbers| {
                let outs = numbers.dim(0)?;
                let bias = bias.narrow(0, start, outs)?;
                start += outs;
                linear(kept, numbers, bias, &device)
            });
            let each = each.collect::<Result<Vec<_>>>()?;
            let [a, b, c] = each.as_slice() else { bail!("not three") };
            let Some((all, parts)) = PackedLinear::joined([a, b, c])? else {
                bail!("matrices are kept apart")
            };
            if as_one {
                return all.forward(x);
            }
            let parts = parts.iter().map(|part| part.forward(x));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)
        };
        let case = format!("{case}{}", if as_one { "" } else { ", each alone" });
        let plain = rounded::linear(&x, &widened, &bias);
        let inputs = [&x, &widened, &bias];
        suite.compare_to("linear joined", case, (inputs, &[]), multiply, plain);
    }
}

/// A layer, as models load it.
fn linear(kept: Kept, numbers: &Tensor, bias: Tensor, device: &Device) -> Result<PackedLinear> {
    let near = |format| Result::Ok(stored(numbers, format, device)?.0);
    Ok(match kept {
        Kept::Bytes(format) => PackedLinear::stored(near(format)?, Some(bias)),
        Kept::Float8 => {
            let matrix = near(Format::F8E4M3)?.with_float8_products()?;
            PackedLinear::stored(matrix, Some(bias))
        }
        Kept::Candle(dtype, _) => {
            let data = QTensor::quantize(numbers, dtype)?.data()?.into_owned();
            let storage = QStorage::from_data(data.into(), device, dtype)?;
            let matrix = Arc::new(QTensor::new(storage, numbers.dims())?);
            PackedLinear::new(LinearWeight::Quantized(matrix), Some(bias))?
        }
        Kept::Plain => {
            let plain = StoredMatrix::plain(&numbers.to_dtype(DType::BF16)?.to_device(device)?);
            let Some(plain) = plain else { bail!("bf16 is not read as it is") };
            PackedLinear::stored(plain, Some(bias))
        }
    })
}

/// The numbers that such a layer holds.
fn widened(kept: Kept, numbers: &Tensor) -> Result<Tensor> {
    let format = match kept {
        Kept::Bytes(format) | Kept::Candle(_, format) => format,
        Kept::Float8 => Format::F8E4M3,
        Kept::Plain => Format::Bf16,
    };
    Ok(stored(numbers, format, &Device::Cpu)?.1)
}
