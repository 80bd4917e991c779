//! Products by cuBLASLt, which adds the bias and applies GELU within the product, and multiplies numbers
//! of eight bits as they are.
//!
//! The first product on a device is one whose result is known: where it is wrong, or the library is missing
//! something, cuBLASLt is not used on that device and the other kernels are. Sizes that it has no
//! algorithm for go the same way.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use candle_core::{Result, Tensor};

use super::{float8::Activations, linear::StoredMatrix};

/// Whether products use cuBLASLt where it was found right.
static ON: AtomicBool = AtomicBool::new(true);

/// Lets products of many rows on a GPU use cuBLASLt; on at the start.
pub fn use_blas_lt(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// Most bytes that a matrix takes in bf16 while it is multiplied; a larger one is widened in parts.
pub const SCRATCH_BYTES: usize = 96 << 20;

/// What a product ends with.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Epilogue<'a> {
    /// `[outs]` in bf16.
    pub(in crate::ops) bias: Option<&'a Tensor>,
    /// GELU with the hyperbolic tangent, of the sum with the bias.
    pub(in crate::ops) gelu_tanh: bool,
}

/// The operands of a product.
#[derive(Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is no library to call"))]
pub(super) enum Operands<'a> {
    /// Activations and weights in bf16.
    Bf16(&'a Tensor, &'a Tensor),
    /// Activations in bf16, and weights that are widened into so many bytes at a time.
    Widened(&'a Tensor, &'a StoredMatrix, usize),
    /// Both in fp8.
    Float8(&'a Activations<'a>, &'a StoredMatrix),
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
    product(Operands::Bf16(x, weight), epilogue)
}

/// [`linear`] with weights in blocks, which are widened to bf16 into at most `scratch` bytes at a time.
pub(super) fn linear_widened(
    x: &Tensor,
    matrix: &StoredMatrix,
    epilogue: Epilogue<'_>,
    scratch: usize,
) -> Result<Option<Tensor>> {
    if !ON.load(Ordering::Relaxed) || !super::takes(&[x]) || !matrix.is_widened() {
        return Ok(None);
    }
    product(Operands::Widened(x, matrix, scratch), epilogue)
}

/// [`linear`] with weights and activations in fp8, where the matrix is made for that.
pub(super) fn linear_float8(
    x: &Activations<'_>,
    matrix: &StoredMatrix,
    epilogue: Epilogue<'_>,
) -> Result<Option<Tensor>> {
    if !super::takes(&[x.tensor()]) || matrix.float8().is_none() {
        return Ok(None);
    }
    product(Operands::Float8(x, matrix), epilogue)
}

/// Outputs of a matrix `[outs, depth]` that are widened at a time: parts alike in size, each of at most
/// `scratch` bytes, that begin at multiples of 64.
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "nothing is widened"))]
fn parts([outs, depth]: [usize; 2], scratch: usize) -> impl Iterator<Item = Range<usize>> {
    const TOGETHER: usize = 64;
    const BF16_BYTES: usize = 2;
    let most = scratch.checked_div(BF16_BYTES * depth).unwrap_or(outs).max(TOGETHER);
    let count = outs.div_ceil(most - most.checked_rem(TOGETHER).unwrap_or(0)).max(1);
    let outs_each = outs.div_ceil(count).next_multiple_of(TOGETHER);
    (0..outs).step_by(outs_each.max(1)).map(move |start| start..(start + outs_each).min(outs))
}

#[cfg(not(feature = "cuda"))]
#[expect(clippy::unnecessary_wraps, reason = "fails in a build with the library")]
fn product(_operands: Operands<'_>, _epilogue: Epilogue<'_>) -> Result<Option<Tensor>> {
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
            float8::Activations,
            linear::{Format, StoredMatrix},
            tensors::aligned,
        },
        Epilogue, Operands,
    };
    use crate::ops::float8::e4m3;

    /// What is known of a device: nothing yet, or whether each kind of product came out right.
    static KNOWN: Mutex<Option<HashMap<Kind, Option<Arc<Library>>>>> = Mutex::new(None);

    /// A device, and whether products are in fp8.
    type Kind = (DeviceId, bool);

    /// Sizes of products in fp8 are multiples of this, and addresses of all.
    const ALIGNMENT: usize = 16;
    /// Rows from which fp8 pays: below, reading the weights takes the time.
    const FLOAT8_ROWS: usize = 32;

    pub(super) fn product(
        operands: Operands<'_>,
        epilogue: Epilogue<'_>,
    ) -> Result<Option<Tensor>> {
        let Device::Cuda(device) = operands.x().device() else { return Ok(None) };
        if !fits(operands, epilogue)? {
            return Ok(None);
        }
        match library(device, operands.are_float8())? {
            Some(library) => multiply(&library, operands, epilogue),
            None => Ok(None),
        }
    }

    impl<'a> Operands<'a> {
        fn x(&self) -> &'a Tensor {
            match self {
                Self::Bf16(x, _) | Self::Widened(x, ..) => x,
                Self::Float8(x, _) => x.tensor(),
            }
        }

        fn are_float8(&self) -> bool {
            matches!(self, Self::Float8(..))
        }

        /// Outputs and depth.
        fn dims(&self) -> Result<(usize, usize)> {
            match self {
                Self::Bf16(_, weight) => weight.dims2(),
                Self::Widened(_, matrix, _) | Self::Float8(_, matrix) => Ok(matrix.dims()),
            }
        }
    }

    fn fits(operands: Operands<'_>, epilogue: Epilogue<'_>) -> Result<bool> {
        let (x, (outs, depth)) = (operands.x(), operands.dims()?);
        if x.dim(D::Minus1)? != depth || epilogue.bias.is_some_and(|bias| bias.dims() != [outs]) {
            bail!("linear: {:?} does not fit a matrix [{outs}, {depth}]", x.dims());
        }
        let rows = x.elem_count().checked_div(depth).unwrap_or(0);
        let bias_fits = epilogue.bias.is_none_or(|bias| super::super::takes(&[bias]));
        // 16 bytes.
        let multiple = if operands.are_float8() { ALIGNMENT } else { 8 };
        let wide = depth.is_multiple_of(multiple) && outs.is_multiple_of(multiple);
        let many = !operands.are_float8() || rows >= FLOAT8_ROWS;
        Ok(bias_fits && wide && many && rows > 0 && outs > 0)
    }

    /// The library, where this kind of product came out right on the device.
    fn library(device: &CudaDevice, float8: bool) -> Result<Option<Arc<Library>>> {
        let key = (device.id(), float8);
        let lock = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |key| lock().get_or_insert_default().get(key).cloned();
        if let Some(known) = known(&key) {
            return Ok(known);
        }
        let opened = match known(&(device.id(), !float8)).flatten() {
            // One for both kinds: it has memory of its own.
            Some(library) => Ok(library),
            None => Library::open(device).map(Arc::new),
        };
        // Rows with a scale each are Hopper's.
        let found = if float8 && capability(device)? != super::super::FLOAT8_CAPABILITY {
            Err(Error::msg("fp8 with a scale for each row needs compute capability 9.0"))
        } else {
            opened.and_then(|library| check(&library, device, float8).map(|()| library))
        };
        let found = match found {
            Ok(library) => Some(library),
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
        operands: Operands<'_>,
        epilogue: Epilogue<'_>,
    ) -> Result<Option<Tensor>> {
        let (outs, depth) = operands.dims()?;
        let x = aligned(operands.x())?;
        let rows = x.elem_count().checked_div(depth).unwrap_or(0);
        let mut result = x.dims().to_vec();
        if let Some(last) = result.last_mut() {
            *last = outs;
        }
        let bias = epilogue.bias.map(Tensor::contiguous).transpose()?;
        let out = Output::new(x.device(), &result, DType::BF16)?;
        let whole = Inputs {
            weight: 0,
            x: address(&x)?,
            bias: bias.as_ref().map(address).transpose()?,
            out: out.address(),
            apart: outs,
            scales: None,
            scale: 1.0,
            gelu_tanh: epilogue.gelu_tanh,
            sizes: [rows, depth, outs],
        };
        let done = match operands {
            Operands::Bf16(_, weight) => {
                let weight = weight.contiguous()?;
                aligned_product(library, &Inputs { weight: address(&weight)?, ..whole })?
            }
            Operands::Float8(activations, matrix) => {
                let (rounded, float8) = (activations.rounded()?, matrix.float8());
                let (Some((rows, of_rows)), Some((weight, of_outs))) = (rounded, float8) else {
                    return Ok(None);
                };
                let scales = Scales { weight: address(of_outs)?, x: address(of_rows)? };
                let (weight, x, scales) = (address(weight)?, address(rows)?, Some(scales));
                aligned_product(library, &Inputs { weight, x, scales, ..whole })?
            }
            Operands::Widened(_, matrix, scratch) => by_parts(library, &whole, matrix, scratch)?,
        };
        if done { out.into_tensor().map(Some) } else { Ok(None) }
    }

    /// The product with `matrix`, part after part of the outputs. What a part was widened into is free for
    /// the next one: all is queued on one stream.
    fn by_parts(
        library: &Library,
        whole: &Inputs,
        matrix: &StoredMatrix,
        scratch: usize,
    ) -> Result<bool> {
        let [rows, depth, outs] = whole.sizes;
        #[expect(clippy::cast_possible_truncation, reason = "a scale is a float32 in its file")]
        let scale = matrix.scale() as f32;
        for part in super::parts([outs, depth], scratch) {
            let offset = (part.start * DType::BF16.size_in_bytes()) as u64;
            let sizes = [rows, depth, part.len()];
            let Some(weight) = matrix.widened(part)? else { return Ok(false) };
            let inputs = Inputs {
                weight: address(&weight)?,
                bias: whole.bias.map(|bias| bias + offset),
                out: whole.out + offset,
                scales: None,
                scale,
                sizes,
                ..*whole
            };
            if !aligned_product(library, &inputs)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Queues the product, where its addresses are such as it was asked for.
    fn aligned_product(library: &Library, inputs: &Inputs) -> Result<bool> {
        let addresses = [Some(inputs.weight), Some(inputs.x), inputs.bias, Some(inputs.out)];
        let is_aligned = |at: &u64| at.is_multiple_of(ALIGNMENT as u64);
        Ok(addresses.iter().flatten().all(is_aligned) && library.multiply(inputs)?)
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
        let stored = StoredMatrix::new(bytes, Format::F8E4M3, (outs, depth), 1.0)?;
        let stored = stored.with_float8_products()?;
        let activations = Activations::new(&x_near);
        let operands = match float8 {
            true => Operands::Float8(&activations, &stored),
            false => Operands::Bf16(&x_near, &weight_near),
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
            let Some(found) = multiply(library, operands, epilogue)? else {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_matrix_and_fit_the_scratch() {
        for ([outs, depth], scratch, count) in [
            ([3072, 3072], SCRATCH_BYTES, 1),
            ([12_288, 3072], SCRATCH_BYTES, 1),
            ([18_944, 3584], SCRATCH_BYTES, 2),
            ([152_064, 3584], SCRATCH_BYTES, 11),
            ([200, 256], 64 * 512, 4),
            // No part has fewer outputs than are copied together.
            ([200, 256], 1, 4),
            ([8, 0], 1, 1),
        ] {
            let found: Vec<_> = parts([outs, depth], scratch).collect();
            assert_eq!(found.len(), count, "{outs} outputs of {depth}");
            assert_eq!(found.first().map(|part| part.start), Some(0));
            assert_eq!(found.last().map(|part| part.end), Some(outs));
            assert!(found.windows(2).all(|pair| pair[0].end == pair[1].start));
            let most = found.iter().map(ExactSizeIterator::len).max().unwrap();
            assert!(most * depth * 2 <= scratch.max(64 * depth * 2), "{most} of {depth}");
        }
    }
}
