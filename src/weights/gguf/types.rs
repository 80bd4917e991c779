//! The number types of GGUF files: their ids, names and block sizes.

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use crate::weights::stored::StoredType;

/// A type whose numbers are quantized in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockType {
    id: u32,
    name: &'static str,
    /// Numbers in a block.
    pub(crate) numbers: usize,
    /// Bytes of a block.
    pub(crate) bytes: usize,
}

const fn blocks(id: u32, name: &'static str, numbers: usize, bytes: usize) -> BlockType {
    BlockType { id, name, numbers, bytes }
}

/// Every type of blocks that ggml defines; sizes as in `GGML_QUANT_SIZES` of gguf-py 0.19.
const BLOCK_TYPES: &[BlockType] = &[
    blocks(2, "Q4_0", 32, 18),
    blocks(3, "Q4_1", 32, 20),
    blocks(6, "Q5_0", 32, 22),
    blocks(7, "Q5_1", 32, 24),
    blocks(8, "Q8_0", 32, 34),
    blocks(9, "Q8_1", 32, 40),
    blocks(10, "Q2_K", 256, 84),
    blocks(11, "Q3_K", 256, 110),
    blocks(12, "Q4_K", 256, 144),
    blocks(13, "Q5_K", 256, 176),
    blocks(14, "Q6_K", 256, 210),
    blocks(15, "Q8_K", 256, 292),
    blocks(16, "IQ2_XXS", 256, 66),
    blocks(17, "IQ2_XS", 256, 74),
    blocks(18, "IQ3_XXS", 256, 98),
    blocks(19, "IQ1_S", 256, 50),
    IQ4_NL,
    blocks(21, "IQ3_S", 256, 110),
    blocks(22, "IQ2_S", 256, 82),
    IQ4_XS,
    blocks(29, "IQ1_M", 256, 56),
    blocks(34, "TQ1_0", 256, 54),
    blocks(35, "TQ2_0", 256, 66),
    blocks(39, "MXFP4", 32, 17),
    blocks(40, "NVFP4", 64, 36),
    blocks(41, "Q1_0", 128, 18),
];
/// 32 numbers: a scale and indices into a fixed table of 16.
pub(crate) const IQ4_NL: BlockType = blocks(20, "IQ4_NL", 32, 18);
/// 256 numbers: as [`IQ4_NL`], with a finer scale for every 32.
pub(crate) const IQ4_XS: BlockType = blocks(23, "IQ4_XS", 256, 136);

/// The types of blocks that candle computes with.
const COMPUTED: &[(&str, GgmlDType)] = &[
    ("Q4_0", GgmlDType::Q4_0),
    ("Q4_1", GgmlDType::Q4_1),
    ("Q5_0", GgmlDType::Q5_0),
    ("Q5_1", GgmlDType::Q5_1),
    ("Q8_0", GgmlDType::Q8_0),
    ("Q2_K", GgmlDType::Q2K),
    ("Q3_K", GgmlDType::Q3K),
    ("Q4_K", GgmlDType::Q4K),
    ("Q5_K", GgmlDType::Q5K),
    ("Q6_K", GgmlDType::Q6K),
];

/// The type with an id in GGUF files; `None` for one that is not known.
pub(crate) fn from_id(id: u32) -> Option<StoredType> {
    Some(StoredType::Plain(match id {
        0 => Dtype::F32,
        1 => Dtype::F16,
        24 => Dtype::I8,
        25 => Dtype::I16,
        26 => Dtype::I32,
        27 => Dtype::I64,
        28 => Dtype::F64,
        30 => Dtype::BF16,
        _ => return BLOCK_TYPES.iter().find(|kind| kind.id == id).copied().map(StoredType::Blocks),
    }))
}

/// The number of a type in GGUF files; `None` for one that they do not hold.
pub(crate) fn id_of(kind: StoredType) -> Option<u32> {
    let plain = [0, 1, 24, 25, 26, 27, 28, 30];
    match kind {
        StoredType::Blocks(kind) => Some(kind.id),
        plain_kind => plain.into_iter().find(|id| from_id(*id) == Some(plain_kind)),
    }
}

impl BlockType {
    /// As ggml writes it: `Q4_K`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The same type in candle, which computes with most of them.
    pub(crate) fn computed(self) -> Option<GgmlDType> {
        COMPUTED.iter().find(|(name, _)| *name == self.name).map(|(_, dtype)| *dtype)
    }

    /// Whether tensors of this type can be read.
    #[must_use]
    pub fn is_read(self) -> bool {
        self.computed().is_some() || self == IQ4_NL || self == IQ4_XS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_as_large_as_those_that_compute() {
        for (name, dtype) in COMPUTED {
            let kind = BLOCK_TYPES.iter().find(|kind| kind.name == *name).unwrap();
            assert_eq!(
                (kind.numbers, kind.bytes),
                (dtype.block_size(), dtype.type_size()),
                "{name}"
            );
        }
    }
}
