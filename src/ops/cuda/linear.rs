//! Products with weights as they are stored: `kernels/linear.cu`.

use std::sync::Arc;

use candle_core::{
    D, DType, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};

use super::{
    blas::{self, Epilogue},
    ffi::{Output, address, blocks_address, launch},
    launch::{Args, Launch},
    takes,
};

/// Rows for which the kernel that reads each weight once pays.
const FEW_ROWS: usize = 8;
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

    fn name(self) -> &'static str {
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
}

#[derive(Debug, Clone)]
enum Blocks {
    /// `[outs · bytes of a row]` as bytes.
    Bytes(Tensor),
    Quantized(Arc<QTensor>),
    /// `[outs, depth]` in bf16.
    Plain(Tensor),
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
        Ok(Some(Self { blocks, format, outs, depth, scale: 1.0 }))
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
        Ok(Self { blocks: Blocks::Bytes(bytes), format, outs, depth, scale })
    }

    /// A matrix of plain numbers as it is; `None` for others than bf16 in one piece, and where kernels do not
    /// run.
    pub(in crate::ops) fn plain(matrix: &Tensor) -> Option<Self> {
        let (outs, depth) = matrix.dims2().ok()?;
        let fits = takes(&[matrix]) && matrix.is_contiguous();
        let (blocks, format) = (Blocks::Plain(matrix.clone()), Format::Bf16);
        let whole = fits && depth.is_multiple_of(format.block().0);
        whole.then_some(Self { blocks, format, outs, depth, scale: 1.0 })
    }

    /// The type it is stored in.
    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// What every weight is multiplied with.
    pub(super) fn scale(&self) -> f64 {
        self.scale
    }

    /// The address of its first block.
    pub(super) fn address(&self) -> Result<u64> {
        match &self.blocks {
            Blocks::Bytes(bytes) | Blocks::Plain(bytes) => address(bytes),
            Blocks::Quantized(matrix) => blocks_address(matrix),
        }
    }

    /// `[outs, depth]`.
    #[must_use]
    pub fn dims(&self) -> (usize, usize) {
        (self.outs, self.depth)
    }

    /// The product by cuBLASLt, with activations rounded to fp8; `None` where that is not wanted or
    /// not possible.
    pub(in crate::ops) fn on_blas(
        &self,
        x: &Tensor,
        epilogue: Epilogue<'_>,
    ) -> Result<Option<Tensor>> {
        match (&self.blocks, self.format) {
            (Blocks::Bytes(bytes), Format::F8E4M3) => {
                blas::linear_float8(x, (bytes, (self.outs, self.depth), self.scale), epilogue)
            }
            _ => Ok(None),
        }
    }

    /// `x · weightᵀ + bias`: `[.., depth]` → `[.., outs]` in bf16, or `None` where no kernel fits.
    ///
    /// # Errors
    /// Another width, or a failure of the device.
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        if x.dim(D::Minus1)? != self.depth || bias.is_some_and(|bias| bias.dims() != [self.outs]) {
            bail!("linear: {:?} does not fit a matrix [{}, {}]", x.dims(), self.outs, self.depth);
        }
        if !takes(&[x]) || !bias.is_none_or(|bias| takes(&[bias])) || x.elem_count() == 0 {
            return Ok(None);
        }
        let x = super::rows::aligned(x)?;
        let rows = x.elem_count().checked_div(self.depth).unwrap_or(0);
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.outs;
        }
        let out = Output::new(x.device(), &dims, DType::BF16)?;
        let bias = bias.map(Tensor::contiguous).transpose()?;
        let mut args = Args::default();
        args.tensor(Some(&x))?.address(self.address()?).tensor(bias.as_ref())?;
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

/// [`crate::ops::float8_rows`], or `None` where there is no kernel for the type and width.
pub(in crate::ops) fn float8_rows(x: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
    const ROW_THREADS: usize = 128;
    let depth = x.dims().last().copied().unwrap_or(0);
    if !takes(&[x]) || x.elem_count() == 0 || !depth.is_multiple_of(8) {
        return Ok(None);
    }
    let x = super::rows::aligned(x)?;
    let rows = x.elem_count().checked_div(depth).unwrap_or(0);
    let bytes = Output::new(x.device(), &[rows, depth], DType::U8)?;
    let scales = Output::new(x.device(), &[rows], DType::F32)?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.address(bytes.address()).address(scales.address());
    args.counts([rows, depth]);
    launch(
        x.device(),
        &Launch {
            kernel: "float8_rows".to_owned(),
            grid: [rows, 1, 1],
            threads: ROW_THREADS,
            shared_bytes: (ROW_THREADS >> 5) * DType::F32.size_in_bytes(),
            args,
        },
    )?;
    Ok(Some((bytes.into_tensor()?, scales.into_tensor()?)))
}
