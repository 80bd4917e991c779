//! The types that numbers are stored in, and how they become tensors.

use std::{borrow::Cow, fmt};

use candle_core::{
    DType, Device, Result as TensorResult, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
use safetensors::Dtype;

use super::{
    blocks,
    float8::Float8,
    gguf::{BlockType, IQ4_NL, IQ4_XS},
};
use crate::ops::{self, BlockFormat, Numbers};

/// Types that are read, as messages list them.
pub(super) const SUPPORTED: &str = "F32, F16, BF16, F8_E4M3, F8_E5M2, Q8_0, Q6_K, Q5_K, Q5_0, \
                                    Q5_1, Q4_K, Q4_0, Q4_1, Q3_K, Q2_K, IQ4_NL, IQ4_XS";

/// The type of a tensor in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// Plain numbers.
    Plain(Dtype),
    /// Numbers quantized in blocks.
    Blocks(BlockType),
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => f.pad(&format!("{dtype:?}")),
            Self::Blocks(kind) => f.pad(kind.name()),
        }
    }
}

impl StoredType {
    /// Numbers and bytes of a block; a plain number is a block of its own.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::Plain(dtype) => (1, dtype.bitsize().div_ceil(8)),
            Self::Blocks(kind) => (kind.numbers, kind.bytes),
        }
    }

    /// The type in which plain numbers are read; `None` for blocks.
    pub(super) fn plain_type(self) -> Option<DType> {
        match self {
            Self::Plain(dtype) => plain(dtype).or(Some(DType::BF16)),
            Self::Blocks(_) => None,
        }
    }

    /// Whether tensors of this type can be read.
    #[must_use]
    pub fn is_read(self) -> bool {
        match self {
            Self::Plain(dtype) => plain(dtype).is_some() || Float8::of(dtype).is_some(),
            Self::Blocks(kind) => kind.is_read(),
        }
    }

    /// The type in which a matrix of such numbers is multiplied without being widened first: its
    /// own, or for types of four bits with a fixed table Q8_0, which holds the same numbers.
    pub(crate) fn multiplied_as(self) -> Option<GgmlDType> {
        match self {
            Self::Plain(_) => None,
            Self::Blocks(IQ4_NL | IQ4_XS) => Some(GgmlDType::Q8_0),
            Self::Blocks(kind) => kind.computed(),
        }
    }
}

impl StoredType {
    /// The type of the numbers, times `scale`, as operations know it; `None` for types that the CPU
    /// does not multiply as they are stored.
    pub(super) fn numbers(self, scale: Option<f32>) -> Option<Numbers> {
        let float8 = |kind| Numbers::Float8(kind, scale.unwrap_or(1.0));
        Some(match self {
            Self::Blocks(IQ4_NL) => Numbers::Blocks(BlockFormat::Iq4Nl),
            Self::Blocks(IQ4_XS) => Numbers::Blocks(BlockFormat::Iq4Xs),
            Self::Blocks(kind) => Numbers::Blocks(BlockFormat::of(kind.computed()?)?),
            Self::Plain(Dtype::F8_E4M3) => float8(ops::Float8::E4M3),
            Self::Plain(Dtype::F8_E5M2) => float8(ops::Float8::E5M2),
            Self::Plain(Dtype::F32) => Numbers::F32,
            Self::Plain(Dtype::F16) => Numbers::F16,
            Self::Plain(Dtype::BF16) => Numbers::Bf16,
            Self::Plain(_) => return None,
        })
    }
}

fn plain(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Numbers as a plain tensor: floats in their own type, fp8 as bf16, or as f32 when a `scale`
/// multiplies it, blocks as f32. `None` for types that are not read.
///
/// # Errors
/// A failure of the device.
pub(super) fn decode(
    kind: StoredType,
    bytes: &[u8],
    scale: Option<f32>,
    shape: &[usize],
    device: &Device,
) -> TensorResult<Option<Tensor>> {
    let tensor = match kind {
        StoredType::Blocks(_) if bytes.is_empty() => Tensor::zeros(shape, DType::F32, device)?,
        StoredType::Plain(dtype) => match (plain(dtype), Float8::of(dtype), scale) {
            (Some(dtype), _, _) => Tensor::from_raw_buffer(bytes, dtype, shape, device)?,
            (None, Some(float8), None) => Tensor::from_vec(float8.exact(bytes), shape, device)?,
            (None, Some(float8), Some(scale)) => {
                Tensor::from_vec(float8.scaled(bytes, scale), shape, device)?
            }
            (None, None, _) => return Ok(None),
        },
        StoredType::Blocks(IQ4_NL) => Tensor::from_vec(blocks::widen_iq4_nl(bytes), shape, device)?,
        StoredType::Blocks(IQ4_XS) => Tensor::from_vec(blocks::widen_iq4_xs(bytes), shape, device)?,
        StoredType::Blocks(kind) => {
            let Some(dtype) = kind.computed() else { return Ok(None) };
            // One row: a reshaped tensor's own rows need not be whole blocks.
            let count: usize = shape.iter().product();
            let row = quantized(dtype, Cow::Borrowed(bytes), &[count], &Device::Cpu)?;
            row.dequantize(&Device::Cpu)?.reshape(shape)?.to_device(device)?
        }
    };
    Ok(Some(tensor))
}

/// The one number that a tensor holds, whatever plain type it is stored in; `None` for blocks, other
/// types, or more numbers than one.
#[expect(clippy::cast_precision_loss, reason = "whole numbers beyond 2⁵³ are rounded")]
pub(super) fn scalar(kind: StoredType, bytes: &[u8]) -> Option<f64> {
    let StoredType::Plain(dtype) = kind else { return None };
    Some(match (dtype, bytes) {
        (Dtype::F64, bytes) => f64::from_le_bytes(bytes.try_into().ok()?),
        (Dtype::F32, bytes) => f32::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::F16, bytes) => half::f16::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::BF16, bytes) => half::bf16::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::I64, bytes) => i64::from_le_bytes(bytes.try_into().ok()?) as f64,
        (Dtype::U64, bytes) => u64::from_le_bytes(bytes.try_into().ok()?) as f64,
        (Dtype::I32, bytes) => i32::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::U32, bytes) => u32::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::I16, bytes) => i16::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::U16, bytes) => u16::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::I8, bytes) => i8::from_le_bytes(bytes.try_into().ok()?).into(),
        (Dtype::U8, &[byte]) => byte.into(),
        (dtype, &[byte]) => Float8::of(dtype)?.exact(&[byte]).first()?.to_f64(),
        _ => return None,
    })
}

/// Blocks as they are multiplied; see [`StoredType::multiplied_as`]. `None` where a scale is
/// beyond what a block of Q8_0 holds.
pub(super) fn multiplied(kind: StoredType, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    match kind {
        StoredType::Blocks(IQ4_NL) => Some(Cow::Owned(blocks::q8_0_from_iq4_nl(bytes))),
        StoredType::Blocks(IQ4_XS) => blocks::q8_0_from_iq4_xs(bytes).map(Cow::Owned),
        _ => Some(Cow::Borrowed(bytes)),
    }
}

/// A quantized tensor of these blocks, of which there must be one.
///
/// # Errors
/// Rows that are not whole blocks, or a failure of the device.
pub(super) fn quantized(
    dtype: GgmlDType,
    bytes: Cow<'_, [u8]>,
    shape: &[usize],
    device: &Device,
) -> TensorResult<QTensor> {
    /// The widest number inside a block.
    const ALIGNMENT: usize = align_of::<f32>();
    // Candle looks at the blocks where they lie. In a file they are aligned; in the program's own
    // memory they need not be, and a copy is.
    let bytes = match bytes {
        Cow::Borrowed(odd) if odd.as_ptr().align_offset(ALIGNMENT) != 0 => Cow::Owned(odd.to_vec()),
        other => other,
    };
    QTensor::new(QStorage::from_data(bytes, device, dtype)?, shape)
}
