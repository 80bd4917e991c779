//! Products with weights as they are stored: `kernels/linear.cu`.

use std::{ops::Range, sync::Arc};

use candle_core::{
    D, DType, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};

use super::{
    blas::{self, Epilogue},
    few::{self, FEW_ROWS, Weights},
    ffi::{Output, address, blocks_address, launch},
    float8::Activations,
    launch::{Args, Launch},
    takes,
};

const THREADS: usize = 256;
/// Rows and columns of a tile, and its shared memory.
const TILE: usize = 128;
const TILE_DEPTH: usize = 64;
pub(super) const PRODUCT_SHARED_BYTES: usize = 4 * TILE * TILE_DEPTH * 2;

/// The formats that the kernels widen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 32 numbers of 8 bits and a scale.
    Q8_0,
    /// 256 numbers of 4 bits.
    Q4K,
    /// 256 numbers of 5 bits.
    Q5K,
    /// 256 numbers of 6 bits.
    Q6K,
    /// Floats of 8 bits with 4 for the exponent, and one scale for the matrix.
    F8E4M3,
    /// bf16.
    Bf16,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K, Self::F8E4M3, Self::Bf16];

    /// The format of ggml's type.
    #[must_use]
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::Q8_0 => Some(Self::Q8_0),
            GgmlDType::Q4K => Some(Self::Q4K),
            GgmlDType::Q5K => Some(Self::Q5K),
            GgmlDType::Q6K => Some(Self::Q6K),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::F8E4M3 => "f8_e4m3",
            Self::Bf16 => "bf16",
        }
    }

    /// Numbers and bytes of a block.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::F8E4M3 => (8, 8),
            Self::Bf16 => (8, 16),
        }
    }
}

/// A weight matrix `[outs, depth]` in its blocks, where kernels run.
#[derive(Debug, Clone)]
pub struct StoredMatrix {
    blocks: Blocks,
    format: Format,
    outs: usize,
    depth: usize,
    scale: f64,
    /// The scale once for each output, where activations are rounded to fp8 as well.
    float8: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Blocks {
    /// `[outs · bytes of a row]` as bytes.
    Bytes(Tensor),
    Quantized(Arc<QTensor>),
    /// `[outs, depth]` in bf16.
    Plain(Tensor),
}

impl Blocks {
    fn plain(&self) -> Option<&Tensor> {
        match self {
            Self::Plain(matrix) => Some(matrix),
            Self::Bytes(_) | Self::Quantized(_) => None,
        }
    }

    fn bytes(&self) -> Option<&Tensor> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Plain(_) | Self::Quantized(_) => None,
        }
    }
}

impl StoredMatrix {
    /// The matrix as it is kept, or `None` where no kernel reads its type or runs where it lies.
    ///
    /// # Errors
    /// A tensor that is no matrix.
    pub fn quantized(matrix: &Arc<QTensor>) -> Result<Option<Self>> {
        let near = super::runs_on(&matrix.device());
        let Some(format) = Format::of(matrix.dtype()).filter(|_| near) else { return Ok(None) };
        let (outs, depth) = matrix.shape().dims2()?;
        let blocks = Blocks::Quantized(Arc::clone(matrix));
        Ok(Some(Self { blocks, format, outs, depth, scale: 1.0, float8: None }))
    }

    /// `bytes: [outs · bytes of a row]`; `scale` multiplies every weight.
    ///
    /// # Errors
    /// Another number of bytes, or rows that are no whole number of blocks.
    pub fn new(
        bytes: Tensor,
        format: Format,
        (outs, depth): (usize, usize),
        scale: f64,
    ) -> Result<Self> {
        let (numbers, block_bytes) = format.block();
        let expected = outs * depth.checked_div(numbers).unwrap_or(0) * block_bytes;
        if !depth.is_multiple_of(numbers)
            || bytes.dims() != [expected]
            || bytes.dtype() != DType::U8
        {
            let (dims, dtype) = (bytes.dims(), bytes.dtype());
            bail!("a matrix [{outs}, {depth}] of {format:?} does not have {dims:?} of {dtype:?}");
        }
        Ok(Self { blocks: Blocks::Bytes(bytes), format, outs, depth, scale, float8: None })
    }

    /// A matrix of plain numbers as it is; `None` for others than bf16 in one piece, and where kernels do not
    /// run.
    pub(in crate::ops) fn plain(matrix: &Tensor) -> Option<Self> {
        let (outs, depth) = matrix.dims2().ok()?;
        let fits = takes(&[matrix]) && matrix.is_contiguous();
        let (blocks, format) = (Blocks::Plain(matrix.clone()), Format::Bf16);
        let whole = fits && depth.is_multiple_of(format.block().0);
        whole.then_some(Self { blocks, format, outs, depth, scale: 1.0, float8: None })
    }

    /// These matrices one below the other, in memory of their own; `None` where they do not lie alike: in type,
    /// depth, or what multiplies them.
    ///
    /// # Errors
    /// A failure of the device.
    pub(in crate::ops) fn joined(parts: &[&Self]) -> Result<Option<Self>> {
        let Some((first, others)) = parts.split_first() else { return Ok(None) };
        let alike = |other: &&Self| {
            (other.format, other.depth) == (first.format, first.depth)
                && other.scale.to_bits() == first.scale.to_bits()
                && other.float8.is_some() == first.float8.is_some()
        };
        // Each begins at a multiple of 16 bytes.
        let whole = |part: &&Self| (part.outs * part.row_bytes()).is_multiple_of(16);
        if !others.iter().all(alike) || !parts.iter().all(whole) {
            return Ok(None);
        }
        let tensors = |of: fn(&Blocks) -> Option<&Tensor>| -> Option<Vec<&Tensor>> {
            parts.iter().map(|part| of(&part.blocks)).collect()
        };
        let blocks = if let Some(plain) = tensors(Blocks::plain) {
            Blocks::Plain(Tensor::cat(&plain, 0)?) // (outs of all, depth)
        } else if let Some(bytes) = tensors(Blocks::bytes) {
            Blocks::Bytes(Tensor::cat(&bytes, 0)?) // (bytes of all)
        } else if let Some(bytes) = Self::joined_blocks(parts)? {
            Blocks::Bytes(bytes)
        } else {
            return Ok(None);
        };
        let scales: Option<Vec<&Tensor>> = parts.iter().map(|part| part.float8.as_ref()).collect();
        let float8 = scales.map(|scales| Tensor::cat(&scales, 0)).transpose()?; // (outs of all)
        let outs = parts.iter().map(|part| part.outs).sum();
        Ok(Some(Self { blocks, outs, float8, ..(*first).clone() }))
    }

    /// The bytes of quantized matrices, `[bytes of all]`; `None` where one is kept in another way.
    fn joined_blocks(parts: &[&Self]) -> Result<Option<Tensor>> {
        let quantized = parts.iter().map(|part| match &part.blocks {
            Blocks::Quantized(matrix) => Some((matrix, part.outs * part.row_bytes())),
            Blocks::Bytes(_) | Blocks::Plain(_) => None,
        });
        let Some(quantized) = quantized.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let Some((first, _)) = quantized.first() else { return Ok(None) };
        let all = quantized.iter().map(|(_, bytes)| bytes).sum();
        let mut joined = Output::new(&first.device(), &[all], DType::U8)?;
        let mut at = 0;
        for (matrix, bytes) in quantized {
            joined.copy_blocks(at, matrix, bytes)?;
            at += bytes;
        }
        joined.into_tensor().map(Some)
    }

    /// `[outs, depth]` in bf16, where that is how it is kept.
    pub(in crate::ops) fn as_plain(&self) -> Option<&Tensor> {
        self.blocks.plain()
    }

    /// Rows `outs` of the matrix where they lie; `None` for blocks that are not this crate's.
    ///
    /// # Errors
    /// Rows beyond the matrix.
    pub(in crate::ops) fn rows(&self, outs: Range<usize>) -> Result<Option<Self>> {
        let (start, bytes) = (outs.start, self.row_bytes());
        let blocks = match &self.blocks {
            Blocks::Plain(matrix) => Blocks::Plain(matrix.narrow(0, start, outs.len())?),
            Blocks::Bytes(all) => {
                Blocks::Bytes(all.narrow(0, start * bytes, outs.len() * bytes)?)
            }
            Blocks::Quantized(_) => return Ok(None),
        };
        let float8 = self.float8.as_ref().map(|scales| scales.narrow(0, start, outs.len()));
        let float8 = float8.transpose()?;
        Ok(Some(Self { blocks, outs: outs.len(), float8, ..self.clone() }))
    }

    fn row_bytes(&self) -> usize {
        let (numbers, bytes) = self.format.block();
        self.depth.div_euclid(numbers) * bytes
    }

    /// The type it is stored in.
    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// What every weight is multiplied with.
    pub(super) fn scale(&self) -> f64 {
        self.scale
    }

    /// `[outs, depth]`.
    #[must_use]
    pub fn dims(&self) -> (usize, usize) {
        (self.outs, self.depth)
    }

    /// The same, so that products of many rows round their activations to fp8, with a scale for each row,
    /// and multiply numbers of eight bits, where the device does that
    /// ([`multiplies_float8`](super::multiplies_float8)). It is faster, and the numbers are others than
    /// those of bf16 activations. Nothing changes for other formats.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn with_float8_products(self) -> Result<Self> {
        let Blocks::Bytes(bytes) = &self.blocks else { return Ok(self) };
        if self.format != Format::F8E4M3 {
            return Ok(self);
        }
        #[expect(clippy::cast_possible_truncation, reason = "a scale is a float32 in its file")]
        let scales = vec![self.scale as f32; self.outs];
        let float8 = Some(Tensor::from_vec(scales, self.outs, bytes.device())?);
        Ok(Self { float8, ..self })
    }

    /// The bytes of fp8 weights, `[outs · depth]`, and the scale of each output, where activations are
    /// to be rounded to fp8 as well.
    pub(super) fn float8(&self) -> Option<(&Tensor, &Tensor)> {
        self.blocks.bytes().zip(self.float8.as_ref())
    }

    /// Whether a product is to widen the matrix first. bf16 lies as the library reads it.
    pub(super) fn is_widened(&self) -> bool {
        self.format != Format::Bf16
    }

    /// Rows `outs` of the matrix in bf16, `[outs, depth]`, without the matrix's scale; `None` where no
    /// kernel fits.
    ///
    /// # Errors
    /// Rows beyond the matrix, or a failure of the device.
    pub fn widened(&self, outs: Range<usize>) -> Result<Option<Tensor>> {
        if outs.start > outs.end || outs.end > self.outs {
            bail!("rows {outs:?} of a matrix of {}", self.outs);
        }
        let device = match &self.blocks {
            Blocks::Bytes(bytes) | Blocks::Plain(bytes) => bytes.device().clone(),
            Blocks::Quantized(matrix) => matrix.device(),
        };
        if !self.is_widened() || outs.is_empty() || self.depth == 0 || !super::runs_on(&device) {
            return Ok(None);
        }
        let out = Output::new(&device, &[outs.len(), self.depth], DType::BF16)?;
        let chunks = (outs.len() * self.depth) >> 3;
        let mut args = Args::default();
        // An offset fits: memory is addressed with it.
        args.address(self.weights()?.address + (outs.start * self.row_bytes()) as u64);
        args.address(out.address()).count(chunks);
        let kernel = format!("widen_{}", self.format.name());
        let grid = [chunks.div_ceil(THREADS), 1, 1];
        launch(&device, &Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args })?;
        out.into_tensor().map(Some)
    }

    /// The product by cuBLASLt: of plain numbers, of numbers of eight bits where that is wanted, of the widened matrix for
    /// rows that are not few. `None` where the library does not do it.
    pub(in crate::ops) fn on_blas(
        &self,
        x: &Activations<'_>,
        epilogue: Epilogue<'_>,
    ) -> Result<Option<Tensor>> {
        if let Some(plain) = self.blocks.plain() {
            return blas::linear(x.tensor(), plain, epilogue);
        }
        if x.tensor().elem_count() <= FEW_ROWS * self.depth {
            return Ok(None);
        }
        match blas::linear_float8(x, self, epilogue)? {
            Some(y) => Ok(Some(y)),
            None => blas::linear_widened(x.tensor(), self, epilogue, blas::SCRATCH_BYTES),
        }
    }

    pub(super) fn weights(&self) -> Result<Weights> {
        let Self { format, outs, depth, scale, .. } = *self;
        let (address, is_constant) = match &self.blocks {
            Blocks::Bytes(bytes) | Blocks::Plain(bytes) => (address(bytes)?, false),
            // Candle quantizes on the CPU and copies what it reads.
            Blocks::Quantized(matrix) => (blocks_address(matrix)?, true),
        };
        Ok(Weights { address, format, outs, depth, scale, is_constant })
    }

    /// `x · weightᵀ + bias`: `[.., depth]` → `[.., outs]` in bf16, or `None` where no kernel fits.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        match self.on_blas(&Activations::new(x), Epilogue { bias, gelu_tanh: false })? {
            Some(y) => Ok(Some(y)),
            None => self.by_kernel(x, bias),
        }
    }

    /// [`Self::forward`] by the kernels that widen the weights within the product.
    pub(in crate::ops) fn by_kernel(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        if x.dim(D::Minus1)? != self.depth || bias.is_some_and(|bias| bias.dims() != [self.outs]) {
            bail!("linear: {:?} does not fit a matrix [{}, {}]", x.dims(), self.outs, self.depth);
        }
        if !takes(&[x]) || !bias.is_none_or(|bias| takes(&[bias])) || x.elem_count() == 0 {
            return Ok(None);
        }
        let x = super::tensors::aligned(x)?;
        let rows = x.elem_count().checked_div(self.depth).unwrap_or(0);
        if rows <= FEW_ROWS
            && let Some(y) = few::product(&x, &self.weights()?, bias)?
        {
            return Ok(Some(y));
        }
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.outs;
        }
        let out = Output::new(x.device(), &dims, DType::BF16)?;
        let bias = bias.map(Tensor::contiguous).transpose()?;
        let mut args = Args::default();
        args.tensor(Some(&x))?.address(self.weights()?.address).tensor(bias.as_ref())?;
        args.address(out.address()).counts([rows, self.depth, self.outs]).number(self.scale);
        let name = self.format.name();
        let start = if rows <= FEW_ROWS {
            Launch {
                kernel: format!("linear_few_{name}"),
                grid: [self.outs.div_ceil(THREADS >> 5), 1, 1],
                threads: THREADS,
                shared_bytes: 0,
                args,
            }
        } else {
            Launch {
                kernel: format!("linear_many_{name}"),
                grid: [rows.div_ceil(TILE), self.outs.div_ceil(TILE), 1],
                threads: THREADS,
                shared_bytes: PRODUCT_SHARED_BYTES,
                args,
            }
        };
        launch(x.device(), &start)?;
        out.into_tensor().map(Some)
    }
}

/// [`StoredMatrix::forward`] of one row by each of two or three matrices with their biases, by one kernel;
/// `None` where it does not fit them.
pub(in crate::ops) fn row_by_each(
    x: &Tensor,
    matrices: &[(&StoredMatrix, Option<&Tensor>)],
) -> Result<Option<Vec<Tensor>>> {
    let depth = x.elem_count();
    let fits = |(matrix, bias): &(&StoredMatrix, Option<&Tensor>)| {
        matrix.depth == depth
            && bias.is_none_or(|bias| takes(&[bias]) && bias.dims() == [matrix.outs])
    };
    if !takes(&[x]) || x.dims().last() != Some(&depth) || !matrices.iter().all(fits) {
        return Ok(None);
    }
    let matrices = matrices.iter().map(|(matrix, bias)| Ok((matrix.weights()?, *bias)));
    few::product_each(&super::tensors::aligned(x)?, &matrices.collect::<Result<Vec<_>>>()?)
}

/// The product of few rows with `weight: [outs, depth]` in bf16, or `None` where no kernel fits.
pub(super) fn few_by_plain(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (outs, depth) = weight.dims2()?;
    let fits = takes(&[x, weight])
        && bias.is_none_or(|bias| takes(&[bias]) && bias.dims() == [outs])
        && x.dims().last() == Some(&depth)
        && x.elem_count() <= FEW_ROWS * depth
        && x.elem_count() > 0
        && weight.is_contiguous();
    if !fits {
        return Ok(None);
    }
    let (address, format) = (address(weight)?, Format::Bf16);
    let weights = Weights { address, format, outs, depth, scale: 1.0, is_constant: false };
    few::product(&super::tensors::aligned(x)?, &weights, bias)
}
