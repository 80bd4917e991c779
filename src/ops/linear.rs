//! Products with a weight matrix, in the type the matrix is kept in.
//!
//! On the CPU a matrix is packed for the registers once, in its own type; bf16, f16 and fp8 are
//! widened panel by panel inside the product, and blocks are unpacked there, never as a whole.

use std::{borrow::Cow, sync::Arc};

use candle_core::{
    DType, Device, Module, Result, Tensor, bail,
    quantized::{GgmlDType, QMatMul, QStorage, QTensor},
};
use rayon::prelude::*;

use super::{
    activation, buffers,
    cpu::Floats,
    cuda::{self, Activations, Epilogue, StoredMatrix},
    matrix::PackedMatrix,
    quantize,
    simd::{
        Arch,
        blocks::{BlockFormat, PackedBlocks},
    },
    source::{Kept, MatrixBytes, Numbers},
    tensors,
};

/// Weights that one piece of work quantizes.
const QUANTIZED_CHUNK: usize = 1 << 18;

/// A weight matrix `[out, in]` as it is kept in memory.
#[derive(Debug, Clone)]
pub enum LinearWeight {
    /// Plain numbers: f32, bf16 or f16; widened to the activations' type when used.
    Dense(Tensor),
    /// Blocks of quantized numbers.
    Quantized(Arc<QTensor>),
    /// Blocks of quantized numbers in host memory, laid out for products.
    Blocks(Arc<PackedBlocks>),
    /// Plain numbers in host memory, laid out for products.
    Packed(Arc<PackedMatrix>),
}

impl LinearWeight {
    /// `weight: [out, in]` in blocks of `dtype`; rows must be a multiple of the block.
    ///
    /// # Errors
    /// Other rows, or a failure of the device.
    pub fn quantized(weight: &Tensor, dtype: GgmlDType) -> Result<Self> {
        Ok(Self::Quantized(Arc::new(quantized(weight, dtype)?)))
    }

    /// A file's matrix laid out for the CPU, from its bytes and without a copy in between; `None` for
    /// blocks that are not to stay as they are stored.
    ///
    /// # Errors
    /// A failure to quantize.
    pub fn of_file(matrix: &MatrixBytes<'_>, kept: Kept) -> Result<Option<Self>> {
        let ([_, width], numbers) = (matrix.dims(), matrix.numbers());
        let whole = |dtype: GgmlDType| width.is_multiple_of(dtype.block_size());
        let blocks = match (kept, numbers) {
            (Kept::Stored | Kept::Q8_0 | Kept::Q4K, Numbers::Blocks(format)) => {
                PackedBlocks::from_rows((format, matrix.dims()), |rows| matrix.rows(rows))
            }
            (_, Numbers::Blocks(_)) => None,
            (Kept::Q4K, _) if whole(GgmlDType::Q4K) => quantize::by_panel(matrix, GgmlDType::Q4K)?,
            (Kept::Q8_0 | Kept::Q4K, _) if whole(GgmlDType::Q8_0) => {
                quantize::by_panel(matrix, GgmlDType::Q8_0)?
            }
            _ => {
                let packed = PackedMatrix::of_file(matrix, kept, Arch::new());
                return Ok(packed.map(|weight| Self::Packed(Arc::new(weight))));
            }
        };
        Ok(blocks.map(|weight| Self::Blocks(Arc::new(weight))))
    }

    /// The rows `indices: [n]` of the matrix, `[n, width]`.
    ///
    /// # Errors
    /// An index beyond the matrix, or a failure of the device.
    pub fn rows(&self, indices: &Tensor) -> Result<Tensor> {
        let pick = |(out, width), row: &dyn Fn(usize) -> Vec<f32>| {
            let indices: Vec<u32> = indices.to_vec1()?;
            let mut rows = Vec::with_capacity(indices.len() * width);
            for index in indices.iter().filter_map(|index| usize::try_from(*index).ok()) {
                if index >= out {
                    bail!("row {index} of a matrix of {out} rows");
                }
                rows.extend(row(index));
            }
            Tensor::from_vec(rows, (indices.len(), width), &Device::Cpu)
        };
        match self {
            Self::Dense(matrix) => tensors::take_rows(matrix, indices), // (n, width)
            Self::Quantized(matrix) => matrix.embedding(indices),       // (n, width)
            Self::Blocks(matrix) => pick(matrix.dims(), &|row| matrix.row(row)),
            Self::Packed(matrix) => pick(matrix.dims(), &|row| matrix.row(row)),
        }
    }

    /// The matrix for kernels that read it as it is stored; `None` where none does.
    pub(super) fn stored_matrix(&self) -> Option<StoredMatrix> {
        match self {
            Self::Dense(matrix) => StoredMatrix::plain(matrix),
            Self::Quantized(matrix) => StoredMatrix::quantized(matrix).ok().flatten(),
            Self::Blocks(_) | Self::Packed(_) => None,
        }
    }

    /// `weight` quantized to Q8_0, where its rows are a multiple of the block; plain otherwise.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn q8_0(weight: &Tensor) -> Result<Self> {
        if !weight.dim(1)?.is_multiple_of(GgmlDType::Q8_0.block_size()) {
            return Ok(Self::Dense(weight.clone()));
        }
        Ok(Self::Quantized(Arc::new(quantized(weight, GgmlDType::Q8_0)?)))
    }

    /// `weight` quantized to Q4_K, where its rows are a multiple of the super-block of 256; as
    /// [`Self::q8_0`] otherwise.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn q4_k(weight: &Tensor) -> Result<Self> {
        if !weight.dim(1)?.is_multiple_of(GgmlDType::Q4K.block_size()) {
            return Self::q8_0(weight);
        }
        Ok(Self::Quantized(Arc::new(quantized(weight, GgmlDType::Q4K)?)))
    }
}

/// `weight: [out, in]` in blocks of `dtype`; rows are a multiple of the block.
fn quantized(weight: &Tensor, dtype: GgmlDType) -> Result<QTensor> {
    let (dims, device) = (weight.dims2()?, weight.device().clone());
    let weight = weight.to_device(&Device::Cpu)?;
    if dims.1 == 0 {
        return QTensor::quantize(&weight.to_dtype(DType::F32)?.to_device(&device)?, dtype);
    }
    // Candle quantizes on one thread.
    let rows = QUANTIZED_CHUNK.div_ceil(dims.1);
    let starts: Vec<usize> = (0..dims.0).step_by(rows).collect();
    let chunks = starts.into_par_iter().map(|start| {
        // It also quantizes a tensor's storage from its start, wherever the tensor lies in it.
        let chunk = weight.narrow(0, start, rows.min(dims.0 - start))?;
        // Widened piece by piece: the whole in float32 would be the most that loading takes.
        let chunk = chunk.to_dtype(DType::F32)?.force_contiguous()?;
        quantize::require_finite(Floats::new(&chunk).contiguous()?)?;
        QTensor::quantize(&chunk, dtype)?.data().map(Cow::into_owned)
    });
    let bytes = chunks.collect::<Result<Vec<Vec<u8>>>>()?.concat();
    QTensor::new(QStorage::from_data(bytes.into(), &device, dtype)?, dims)
}

/// A linear layer's weights, laid out once for the device they run on.
#[derive(Debug, Clone)]
pub struct PackedLinear {
    weight: Kernel,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Kernel {
    Packed(Arc<PackedMatrix>),
    Blocks(Arc<PackedBlocks>),
    /// With candle's own form of it, where there is one, for types that the kernel does not take.
    Stored(StoredMatrix, Option<Arc<QTensor>>),
    Dense(Tensor),
    Quantized(QMatMul),
}

impl PackedLinear {
    /// `weight: [out, in]`, `bias: [out]`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn new(weight: LinearWeight, bias: Option<Tensor>) -> Result<Self> {
        let weight = match weight {
            LinearWeight::Dense(weight) if PackedMatrix::supports(&weight) => {
                Kernel::Packed(Arc::new(PackedMatrix::new(&weight, Arch::new())?))
            }
            LinearWeight::Dense(weight) => Kernel::Dense(weight),
            LinearWeight::Blocks(weight) => Kernel::Blocks(weight),
            LinearWeight::Packed(weight) => Kernel::Packed(weight),
            LinearWeight::Quantized(weight) => {
                if let Some(stored) = StoredMatrix::quantized(&weight)? {
                    Kernel::Stored(stored, Some(weight))
                } else if let Some(kernel) = packed(&weight)? {
                    kernel
                } else if weight.device().is_cpu() {
                    Kernel::Quantized(QMatMul::from_arc(weight)?)
                } else {
                    // Candle's product on a GPU rounds activations to blocks with half scales, which
                    // overflow on outliers.
                    let plain = weight.dequantize(&weight.device())?;
                    Kernel::Dense(plain.to_dtype(DType::BF16)?)
                }
            }
        };
        Ok(Self { weight, bias })
    }

    /// Whether the weights are kept in fewer bits than float32.
    #[must_use]
    pub fn is_narrow(&self) -> bool {
        match &self.weight {
            Kernel::Packed(weight) => weight.is_narrow(),
            Kernel::Dense(weight) => weight.dtype().size_in_bytes() < size_of::<f32>(),
            Kernel::Blocks(_) | Kernel::Stored(..) | Kernel::Quantized(_) => true,
        }
    }

    /// The matrix, where it is kept in blocks in host memory, and its bias.
    pub(super) fn blocks(&self) -> Option<(&PackedBlocks, Option<&Tensor>)> {
        match &self.weight {
            Kernel::Blocks(weight) => Some((weight, self.bias.as_ref())),
            _ => None,
        }
    }

    /// The matrix and the bias for kernels that read it as it is stored; `None` where none does.
    pub(super) fn stored_matrix(&self) -> Option<(StoredMatrix, Option<&Tensor>)> {
        let matrix = match &self.weight {
            Kernel::Stored(matrix, _) => matrix.clone(),
            Kernel::Dense(matrix) => StoredMatrix::plain(matrix)?,
            Kernel::Packed(_) | Kernel::Blocks(_) | Kernel::Quantized(_) => return None,
        };
        Some((matrix, self.bias.as_ref()))
    }

    /// From a matrix that is multiplied where it lies, by activations in bf16; `bias: [out]`.
    #[must_use]
    pub fn stored(weight: StoredMatrix, bias: Option<Tensor>) -> Self {
        Self { weight: Kernel::Stored(weight, None), bias }
    }

    /// Matrices that multiply the same rows as one, `[sum of out, in]`, and each of them as rows of that, so that they
    /// take no more memory; `None` where they do not lie on a GPU, or not alike.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn joined<const N: usize>(parts: [&Self; N]) -> Result<Option<(Self, [Self; N])>> {
        let matrices = parts.iter().map(|part| part.stored_matrix());
        let Some(matrices) = matrices.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let biases: Vec<&Tensor> = matrices.iter().filter_map(|(_, bias)| *bias).collect();
        let stored: Vec<&StoredMatrix> = matrices.iter().map(|(matrix, _)| matrix).collect();
        let alike = biases.is_empty() || biases.len() == N;
        let near =
            parts.iter().all(|part| part.bias.as_ref().is_none_or(|bias| cuda::takes(&[bias])));
        let matrix = if alike && near { StoredMatrix::joined(&stored)? } else { None };
        let Some(matrix) = matrix else { return Ok(None) };
        let bias = match biases.as_slice() {
            [] => None,
            biases => Some(Tensor::cat(biases, 0)?), // (sum of out)
        };
        let mut start = 0;
        let rows = stored.iter().map(|part| {
            let outs = start..start + part.dims().0;
            start = outs.end;
            let bias = bias.as_ref().map(|bias| bias.narrow(0, outs.start, outs.len()));
            let rows = matrix.rows(outs)?.map(|rows| Kernel::Stored(rows, None));
            Ok(rows.zip(Some(bias.transpose()?)).map(|(weight, bias)| Self { weight, bias }))
        });
        let rows = rows.collect::<Result<Option<Vec<Self>>>>()?;
        let rows = rows.and_then(|rows| rows.try_into().ok());
        Ok(rows.map(|rows| (Self { weight: Kernel::Stored(matrix, None), bias }, rows)))
    }

    /// `x · weightᵀ + bias`: `[.., in]` → `[.., out]`.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.multiply(&Activations::new(x))
    }

    fn multiply(&self, activations: &Activations<'_>) -> Result<Tensor> {
        if let Some(y) = self.on_blas(activations, false)? {
            return Ok(y);
        }
        let x = activations.tensor();
        let y = match &self.weight {
            Kernel::Packed(weight) if is_host(x) => {
                return by_rows(x, self.bias.as_ref(), weight.dims(), |x, bias, y| {
                    weight.multiply(x, bias, y);
                });
            }
            Kernel::Blocks(weight) if is_host(x) => {
                return by_rows(x, self.bias.as_ref(), weight.dims(), |x, bias, y| {
                    weight.multiply(x, bias, y);
                });
            }
            Kernel::Stored(weight, blocks) => {
                // Plain numbers that cuBLASLt does not multiply: cuBLAS does.
                if let Some(plain) = weight.as_plain().filter(|plain| plain.device().is_cuda()) {
                    dense(x, plain)?
                } else {
                    match (weight.by_kernel(x, self.bias.as_ref())?, blocks) {
                        (Some(y), _) => return Ok(y),
                        (None, Some(blocks)) => dense(x, &blocks.dequantize(x.device())?)?,
                        (None, None) => {
                            bail!("linear: no kernel for {:?} {:?}", x.dtype(), x.dims())
                        }
                    }
                }
            }
            Kernel::Packed(weight) => dense(x, &weight.unpacked()?)?,
            Kernel::Blocks(weight) => {
                dense(x, &dequantized(weight.dims(), |row| weight.row(row))?)?
            }
            Kernel::Dense(weight) => dense(x, weight)?,
            Kernel::Quantized(weight) => weight.forward(&x.contiguous()?)?,
        };
        match &self.bias {
            Some(bias) => tensors::add(&y, bias),
            None => Ok(y),
        }
    }

    /// [`Self::forward`] and [`gelu_tanh`](super::gelu_tanh()) after it.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_gelu_tanh(&self, x: &Tensor) -> Result<Tensor> {
        match self.on_blas(&Activations::new(x), true)? {
            Some(y) => Ok(y),
            None => activation::gelu_tanh_owned(self.forward(x)?),
        }
    }

    /// The product by cuBLASLt, with bias and GELU within it; `None` where it does not do it.
    fn on_blas(&self, x: &Activations<'_>, gelu_tanh: bool) -> Result<Option<Tensor>> {
        let epilogue = Epilogue { bias: self.bias.as_ref(), gelu_tanh };
        match &self.weight {
            Kernel::Dense(weight) => cuda::blas_linear(x.tensor(), weight, epilogue),
            Kernel::Stored(weight, _) => weight.on_blas(x, epilogue),
            Kernel::Packed(_) | Kernel::Blocks(_) | Kernel::Quantized(_) => Ok(None),
        }
    }
}

/// [`PackedLinear::forward`] of one `x` by each of `linears`: the same numbers, with less done for each
/// matrix where that is possible, as for one row of activations, or for rows that are rounded to fp8.
///
/// # Errors
/// As [`PackedLinear::forward`].
pub fn forward_each<const N: usize>(
    linears: [&PackedLinear; N],
    x: &Tensor,
) -> Result<[Tensor; N]> {
    #[cfg(target_arch = "x86_64")]
    if let Some(results) = row_by_each(&linears, x)? {
        return Ok(results);
    }
    let stored = linears.iter().map(|linear| match &linear.weight {
        Kernel::Stored(matrix, _) => Some((matrix, linear.bias.as_ref())),
        _ => None,
    });
    let by_one_kernel = match stored.collect::<Option<Vec<_>>>() {
        Some(stored) => cuda::row_by_each(x, &stored)?,
        None => None,
    };
    let results: Vec<Tensor> = match by_one_kernel {
        Some(results) => results,
        None => {
            let activations = Activations::new(x);
            let results = linears.iter().map(|linear| linear.multiply(&activations));
            results.collect::<Result<_>>()?
        }
    };
    let Ok(results) = <[Tensor; N]>::try_from(results) else {
        bail!("linear: a result is missing")
    };
    Ok(results)
}

/// [`forward_each`] of one row; `None` where it does not apply.
#[cfg(target_arch = "x86_64")]
fn row_by_each<const N: usize>(
    linears: &[&PackedLinear; N],
    x: &Tensor,
) -> Result<Option<[Tensor; N]>> {
    let (width, mut dims) = (x.elem_count(), x.dims().to_vec());
    let matrix = |linear: &&PackedLinear| match &linear.weight {
        Kernel::Blocks(matrix) if matrix.shares_rows() && matrix.dims().1 == width => {
            Some(Arc::clone(matrix))
        }
        _ => None,
    };
    let matrices: Option<Vec<_>> = linears.iter().map(matrix).collect();
    let fits = is_host(x) && x.dtype() == DType::F32 && dims.last() == Some(&width);
    let Some(matrices) = matrices.filter(|_| fits) else { return Ok(None) };
    let x = x.contiguous()?;
    let values = Floats::new(&x);
    let biases = linears.iter().zip(&matrices);
    let biases = biases.map(|(linear, matrix)| wide_bias(linear.bias.as_ref(), matrix.dims().0));
    let biases: Vec<Option<Tensor>> = biases.collect::<Result<_>>()?;
    let biases: Vec<Option<Floats<'_>>> =
        biases.iter().map(|bias| bias.as_ref().map(Floats::new)).collect();
    let mut outs: Vec<Vec<f32>> =
        matrices.iter().map(|matrix| buffers::of_len(matrix.dims().0)).collect();
    let mut products = Vec::with_capacity(N);
    for ((matrix, bias), out) in matrices.iter().zip(&biases).zip(&mut outs) {
        let bias = bias.as_ref().map(Floats::contiguous).transpose()?;
        products.push((&**matrix, bias, out.as_mut_slice()));
    }
    PackedBlocks::multiply_row_by_each(values.contiguous()?, products);
    let results = outs.into_iter().map(|out| {
        if let Some(last) = dims.last_mut() {
            *last = out.len();
        }
        Tensor::from_vec(out, dims.clone(), &Device::Cpu)
    });
    let results: Vec<Tensor> = results.collect::<Result<_>>()?;
    Ok(results.try_into().ok())
}

/// The matrix laid out for this machine's registers, where it is made of blocks.
fn packed(weight: &QTensor) -> Result<Option<Kernel>> {
    if !weight.device().is_cpu() {
        return Ok(None);
    }
    let (out, width) = weight.shape().dims2()?;
    let Some(format) = BlockFormat::of(weight.dtype()) else { return Ok(None) };
    let packed = PackedBlocks::new(format, &weight.data()?, [out, width]);
    Ok(packed.map(|weight| Kernel::Blocks(Arc::new(weight))))
}

impl BlockFormat {
    /// The format of candle's blocks; `None` for types that are no blocks of a file.
    #[must_use]
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        Some(match dtype {
            GgmlDType::Q8_0 => Self::Q8_0,
            GgmlDType::Q6K => Self::Q6K,
            GgmlDType::Q5K => Self::Q5K,
            GgmlDType::Q5_0 => Self::Q5_0,
            GgmlDType::Q5_1 => Self::Q5_1,
            GgmlDType::Q4K => Self::Q4K,
            GgmlDType::Q4_0 => Self::Q4_0,
            GgmlDType::Q4_1 => Self::Q4_1,
            GgmlDType::Q3K => Self::Q3K,
            GgmlDType::Q2K => Self::Q2K,
            _ => return None,
        })
    }
}

/// The numbers of a matrix, row by row.
fn dequantized(dims: (usize, usize), row: impl Fn(usize) -> Vec<f32>) -> Result<Tensor> {
    Tensor::from_vec((0..dims.0).flat_map(row).collect::<Vec<f32>>(), dims, &Device::Cpu)
}

/// Whether `x` may be computed with in float32: other types of half the size are widened.
fn is_host(x: &Tensor) -> bool {
    let narrow = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    narrow && x.device().is_cpu() && !x.track_op()
}

/// A bias of `out` numbers in float32, one after the other.
pub(super) fn wide_bias(bias: Option<&Tensor>, out: usize) -> Result<Option<Tensor>> {
    let Some(bias) = bias else { return Ok(None) };
    if bias.dims() != [out] {
        bail!("linear: the bias does not have the output's width {out}");
    }
    bias.to_dtype(DType::F32)?.contiguous().map(Some)
}

/// Checks shapes and runs `multiply(x, bias, y)` on slices.
fn by_rows(
    x: &Tensor,
    bias: Option<&Tensor>,
    (out, width): (usize, usize),
    multiply: impl FnOnce(&[f32], Option<&[f32]>, &mut [f32]),
) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let Some(last) = dims.last_mut().filter(|last| **last == width) else {
        bail!("linear: {:?} does not end in the width {width}", x.dims());
    };
    *last = out;
    let bias = wide_bias(bias, out)?;
    let bias = bias.as_ref().map(Floats::new);
    let bias = bias.as_ref().map(Floats::contiguous).transpose()?;
    let mut y = buffers::of_len(dims.iter().product());
    let wide = x.to_dtype(DType::F32)?.contiguous()?;
    multiply(Floats::new(&wide).contiguous()?, bias, &mut y);
    Tensor::from_vec(y, dims, x.device())?.to_dtype(x.dtype())
}

fn dense(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let weight = weight.to_dtype(x.dtype())?;
    let (out, width) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    let rows = x.elem_count().checked_div(width).unwrap_or(0);
    let y = x.reshape((rows, width))?.matmul(&weight.t()?)?; // (rows, out)
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    y.reshape(dims) // (.., out)
}
