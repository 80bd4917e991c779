//! Products by cuBLASLt, which adds the bias and applies GELU within the product, and multiplies numbers
//! of eight bits as they are.
//!
//! Nothing here has run on a GPU yet. So the first product on a device is one whose result is known: where
//! it is wrong, or the library is missing something, cuBLASLt is not used on that device and the other
//! kernels are. Sizes that it has no algorithm for go the same way.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Result, Tensor};

/// Whether plain products use cuBLASLt where it was found right.
static ON: AtomicBool = AtomicBool::new(true);
/// Whether products with fp8 weights round their activations to fp8 as well.
static FLOAT8: AtomicBool = AtomicBool::new(false);

/// Lets products with bf16 weights on a GPU use cuBLASLt; on at the start.
pub fn use_blas_lt(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// Lets products of many rows with fp8 weights on Hopper round their activations to fp8, with a scale for
/// each row. Off at the start: it is faster, and the numbers are others than those of bf16 activations.
pub fn use_float8_products(on: bool) {
    FLOAT8.store(on, Ordering::Relaxed);
}

/// What a product ends with.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Epilogue<'a> {
    /// `[outs]` in bf16.
    pub(in crate::ops) bias: Option<&'a Tensor>,
    /// GELU with the hyperbolic tangent, of the sum with the bias.
    pub(in crate::ops) gelu_tanh: bool,
}

/// Weights `[outs, depth]` for a product.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is no library to call"))]
pub(super) enum Matrix<'a> {
    /// In bf16.
    Bf16(&'a Tensor),
    /// Bytes of e4m3, outputs and depth, and the scale of all of them.
    Float8(&'a Tensor, (usize, usize), f64),
}

/// `x · weightᵀ` with what follows it: `x: [.., depth]` and `weight: [outs, depth]` in bf16 →
/// `[.., outs]`; `None` where cuBLASLt does not do it.
pub(in crate::ops) fn linear(
    x: &Tensor,
    weight: &Tensor,
    epilogue: Epilogue<'_>,
) -> Result<Option<Tensor>> {
    if !super::takes(&[x, weight]) {
        return Ok(None);
    }
    // The library reads a matrix for few rows at half the speed of memory.
    if !epilogue.gelu_tanh
        && let Some(y) = super::linear::few_by_plain(x, weight, epilogue.bias)?
    {
        return Ok(Some(y));
    }
    if !ON.load(Ordering::Relaxed) {
        return Ok(None);
    }
    product(x, Matrix::Bf16(weight), epilogue)
}

/// [`linear`] with the bytes of fp8 weights, `[outs · depth]`, where that is wanted.
pub(super) fn linear_float8(
    x: &Tensor,
    (bytes, dims, scale): (&Tensor, (usize, usize), f64),
    epilogue: Epilogue<'_>,
) -> Result<Option<Tensor>> {
    if !FLOAT8.load(Ordering::Relaxed) || !super::takes(&[x]) {
        return Ok(None);
    }
    product(x, Matrix::Float8(bytes, dims, scale), epilogue)
}

#[cfg(not(feature = "cuda"))]
#[expect(clippy::unnecessary_wraps, reason = "fails in a build with the library")]
fn product(_x: &Tensor, _matrix: Matrix<'_>, _epilogue: Epilogue<'_>) -> Result<Option<Tensor>> {
    Ok(None)
}

#[cfg(feature = "cuda")]
use device::product;

#[cfg(feature = "cuda")]
mod device {
    use std::{
        collections::HashMap,
        sync::{Arc, Mutex, PoisonError},
    };

    use candle_core::{CudaDevice, D, DType, Device, Error, Result, Tensor, bail, cuda::DeviceId};

    use super::{
        super::{
            blas_lt::{Inputs, Library, Scales},
            ffi::{Output, address, capability},
            linear::float8_rows,
            rows::aligned,
        },
        Epilogue, Matrix,
    };
    use crate::ops::float8::e4m3;

    /// What is known of a device: nothing yet, or whether each kind of product came out right.
    static KNOWN: Mutex<Option<HashMap<(DeviceId, bool), Option<Arc<Library>>>>> = Mutex::new(None);

    /// Sizes of products in fp8 are multiples of this, and addresses of all.
    const ALIGNMENT: usize = 16;
    /// Rows from which fp8 pays: below, reading the weights takes the time.
    const FLOAT8_ROWS: usize = 32;

    pub(super) fn product(
        x: &Tensor,
        matrix: Matrix<'_>,
        epilogue: Epilogue<'_>,
    ) -> Result<Option<Tensor>> {
        let Device::Cuda(device) = x.device() else { return Ok(None) };
        if !fits(x, matrix, epilogue)? {
            return Ok(None);
        }
        match library(device, matrix)? {
            Some(library) => multiply(&library, x, matrix, epilogue),
            None => Ok(None),
        }
    }

    fn dims(matrix: Matrix<'_>) -> Result<(usize, usize)> {
        match matrix {
            Matrix::Bf16(weight) => weight.dims2(),
            Matrix::Float8(_, dims, _) => Ok(dims),
        }
    }

    fn fits(x: &Tensor, matrix: Matrix<'_>, epilogue: Epilogue<'_>) -> Result<bool> {
        let (outs, depth) = dims(matrix)?;
        if x.dim(D::Minus1)? != depth || epilogue.bias.is_some_and(|bias| bias.dims() != [outs]) {
            bail!("linear: {:?} does not fit a matrix [{outs}, {depth}]", x.dims());
        }
        let rows = x.elem_count().checked_div(depth).unwrap_or(0);
        let bias_fits = epilogue.bias.is_none_or(|bias| super::super::takes(&[bias]));
        let multiple = match matrix {
            Matrix::Bf16(_) => 8, // 16 bytes
            Matrix::Float8(..) => ALIGNMENT,
        };
        let wide = depth.is_multiple_of(multiple) && outs.is_multiple_of(multiple);
        let many = matches!(matrix, Matrix::Bf16(_)) || rows >= FLOAT8_ROWS;
        Ok(bias_fits && wide && many && rows > 0 && outs > 0)
    }

    /// The library, where this kind of product came out right on the device.
    fn library(device: &CudaDevice, matrix: Matrix<'_>) -> Result<Option<Arc<Library>>> {
        let float8 = matches!(matrix, Matrix::Float8(..));
        let key = (device.id(), float8);
        let lock = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get_or_insert_default().get(&key) {
            return Ok(known.clone());
        }
        // Rows with a scale each are Hopper's.
        let found = if float8 && capability(device)? != (9, 0) {
            Err(Error::msg("fp8 with a scale for each row needs compute capability 9.0"))
        } else {
            Library::open(device).and_then(|library| {
                check(&library, device, float8)?;
                Ok(library)
            })
        };
        let found = match found {
            Ok(library) => Some(Arc::new(library)),
            Err(error) => {
                tracing::warn!(%error, float8, "cuBLASLt is not used; other kernels are");
                None
            }
        };
        lock().get_or_insert_default().insert(key, found.clone());
        Ok(found)
    }

    fn multiply(
        library: &Library,
        x: &Tensor,
        matrix: Matrix<'_>,
        epilogue: Epilogue<'_>,
    ) -> Result<Option<Tensor>> {
        let (outs, depth) = dims(matrix)?;
        let x = aligned(x)?;
        let rows = x.elem_count().checked_div(depth).unwrap_or(0);
        let mut result = x.dims().to_vec();
        if let Some(last) = result.last_mut() {
            *last = outs;
        }
        let bias = epilogue.bias.map(Tensor::contiguous).transpose()?;
        let out = Output::new(x.device(), &result, DType::BF16)?;
        // Kept alive until the product is queued.
        let (left, right, scales);
        match matrix {
            Matrix::Bf16(weight) => {
                (left, right, scales) = (weight.contiguous()?, x, None);
            }
            Matrix::Float8(bytes, _, scale) => {
                let Some((quantized, row_scales)) = float8_rows(&x)? else { return Ok(None) };
                let ones = Tensor::ones(outs, DType::F32, x.device())?;
                let of_outs = (ones * scale)?;
                (left, right, scales) = (bytes.clone(), quantized, Some([of_outs, row_scales]));
            }
        }
        let inputs = Inputs {
            weight: address(&left)?,
            x: address(&right)?,
            bias: bias.as_ref().map(address).transpose()?,
            out: out.address(),
            scales: match &scales {
                Some([of_outs, of_rows]) => {
                    Some(Scales { weight: address(of_outs)?, x: address(of_rows)? })
                }
                None => None,
            },
            gelu_tanh: epilogue.gelu_tanh,
            sizes: [rows, depth, outs],
        };
        let addresses = [Some(inputs.weight), Some(inputs.x), inputs.bias, Some(inputs.out)];
        let is_aligned = |at: &u64| at.is_multiple_of(ALIGNMENT as u64);
        if !addresses.iter().flatten().all(is_aligned) || !library.multiply(&inputs)? {
            return Ok(None);
        }
        out.into_tensor().map(Some)
    }

    /// A product whose result is known, with bias and GELU and without.
    fn check(library: &Library, device: &CudaDevice, float8: bool) -> Result<()> {
        const SIZES: [usize; 3] = [48, 64, 80];
        let [rows, depth, outs] = SIZES;
        let device = Device::Cuda(device.clone());
        /// Sixteenths up to one half in size: exact in e4m3 with a scale of 1 for the largest.
        fn numbers(dims: [usize; 2], step: usize) -> Result<Tensor> {
            let count = dims[0] * dims[1];
            let number = |i: usize| u8::try_from(i * step % 17).map_or(0.0, f32::from) / 16.0 - 0.5;
            Tensor::from_vec((0..count).map(number).collect::<Vec<f32>>(), &dims, &Device::Cpu)
        }
        let (x, weight) = (numbers([rows, depth], 7)?, numbers([outs, depth], 5)?);
        let bias = numbers([1, outs], 3)?.flatten_all()?;
        let near = |x: &Tensor| x.to_dtype(DType::BF16)?.to_device(&device);
        let (x_near, weight_near, bias_near) = (near(&x)?, near(&weight)?, near(&bias)?);
        let bytes = weight.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = bytes.into_iter().map(e4m3).collect();
        let bytes = Tensor::from_vec(bytes, outs * depth, &device)?;
        let matrix = match float8 {
            true => Matrix::Float8(&bytes, (outs, depth), 1.0),
            false => Matrix::Bf16(&weight_near),
        };
        for (bias_near, gelu_tanh) in
            [(None, false), (Some(&bias_near), false), (Some(&bias_near), true)]
        {
            let mut expected = x.matmul(&weight.t()?)?;
            if bias_near.is_some() {
                expected = expected.broadcast_add(&bias)?;
            }
            if gelu_tanh {
                expected = expected.gelu()?;
            }
            let epilogue = Epilogue { bias: bias_near, gelu_tanh };
            let Some(found) = multiply(library, &x_near, matrix, epilogue)? else {
                bail!("cuBLASLt has no algorithm for a product of {SIZES:?}");
            };
            let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let largest = |x: &Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
            let (error, size) = (largest(&(&found - &expected)?)?, largest(&expected)?);
            // Rounding to bf16, and that of activations to fp8.
            let tolerance = if float8 { 1.0 / 16.0 } else { 1.0 / 100.0 };
            // Written so that NaN is wrong.
            let right = error <= tolerance * size;
            if !right {
                bail!("cuBLASLt is off by {error} of {size} (GELU {gelu_tanh}, fp8 {float8})");
            }
        }
        Ok(())
    }
}
