//! The types that numbers are written in.

use std::{fmt, str::FromStr};

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use crate::weights::{gguf, stored::StoredType};

/// A type that numbers are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WriteType {
    /// 32 bits.
    F32,
    /// 16 bits, up to 65504.
    F16,
    /// 16 bits, the upper half of an f32.
    Bf16,
    /// 8 bits, e4m3, with one scale for each matrix; safetensors only.
    Fp8,
    /// Blocks of 32: 8.5 bits a weight.
    Q8_0,
    /// Super-blocks of 256: 6.6 bits a weight.
    Q6K,
    /// Super-blocks of 256: 5.5 bits a weight.
    Q5K,
    /// Blocks of 32: 5.5 bits a weight.
    Q5_0,
    /// Blocks of 32: 6 bits a weight.
    Q5_1,
    /// Super-blocks of 256: 4.5 bits a weight.
    Q4K,
    /// Blocks of 32: 4.5 bits a weight.
    Q4_0,
    /// Blocks of 32: 5 bits a weight.
    Q4_1,
    /// Super-blocks of 256: 3.4 bits a weight.
    Q3K,
    /// Super-blocks of 256: 2.6 bits a weight.
    Q2K,
}

/// What the formats know of a type.
struct Facts {
    kind: WriteType,
    name: &'static str,
    /// Its number in GGUF files; `None` where GGUF has none.
    id: Option<u32>,
    /// What a file mostly of this type is in `general.file_type`.
    file_type: Option<u32>,
    /// What candle calls it, for types of blocks.
    blocks: Option<GgmlDType>,
}

/// Numbers as in `GGMLQuantizationType` and `LlamaFileType` of gguf-py 0.19; files of one K type
/// throughout are the small kind (`_S`) there.
const FACTS: &[Facts] = &[
    facts(WriteType::F32, "f32", Some((0, 0)), None),
    facts(WriteType::F16, "f16", Some((1, 1)), None),
    facts(WriteType::Bf16, "bf16", Some((30, 32)), None),
    facts(WriteType::Fp8, "fp8", None, None),
    facts(WriteType::Q8_0, "q8_0", Some((8, 7)), Some(GgmlDType::Q8_0)),
    facts(WriteType::Q6K, "q6_k", Some((14, 18)), Some(GgmlDType::Q6K)),
    facts(WriteType::Q5K, "q5_k", Some((13, 16)), Some(GgmlDType::Q5K)),
    facts(WriteType::Q5_0, "q5_0", Some((6, 8)), Some(GgmlDType::Q5_0)),
    facts(WriteType::Q5_1, "q5_1", Some((7, 9)), Some(GgmlDType::Q5_1)),
    facts(WriteType::Q4K, "q4_k", Some((12, 14)), Some(GgmlDType::Q4K)),
    facts(WriteType::Q4_0, "q4_0", Some((2, 2)), Some(GgmlDType::Q4_0)),
    facts(WriteType::Q4_1, "q4_1", Some((3, 3)), Some(GgmlDType::Q4_1)),
    facts(WriteType::Q3K, "q3_k", Some((11, 11)), Some(GgmlDType::Q3K)),
    facts(WriteType::Q2K, "q2_k", Some((10, 10)), Some(GgmlDType::Q2K)),
];

/// Other spellings of types.
const ALIASES: &[(&str, &str)] = &[
    ("fp32", "f32"),
    ("fp16", "f16"),
    ("f8_e4m3", "fp8"),
    ("fp8_e4m3", "fp8"),
    ("fp8_e4m3fn", "fp8"),
    ("float8_e4m3fn", "fp8"),
];

const fn facts(
    kind: WriteType,
    name: &'static str,
    numbers: Option<(u32, u32)>,
    blocks: Option<GgmlDType>,
) -> Facts {
    let (id, file_type) = match numbers {
        Some((id, file_type)) => (Some(id), Some(file_type)),
        None => (None, None),
    };
    Facts { kind, name, id, file_type, blocks }
}

impl WriteType {
    /// Every type, as messages and help list them.
    pub const NAMES: &'static str =
        "f32, f16, bf16, fp8, q8_0, q6_k, q5_k, q5_0, q5_1, q4_k, q4_0, q4_1, q3_k, q2_k";

    fn facts(self) -> &'static Facts {
        FACTS.iter().find(|facts| facts.kind == self).unwrap_or(&FACTS[0])
    }

    /// As it is typed: `q4_k`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// Its number in GGUF files.
    pub(crate) fn gguf_id(self) -> Option<u32> {
        self.facts().id
    }

    /// What a GGUF file mostly of this type says in `general.file_type`.
    pub(crate) fn file_type(self) -> Option<u32> {
        self.facts().file_type
    }

    /// The type of its blocks; `None` for plain types.
    pub(crate) fn blocks(self) -> Option<GgmlDType> {
        self.facts().blocks
    }

    /// Whether numbers share scales in blocks.
    #[must_use]
    pub fn is_blocks(self) -> bool {
        self.blocks().is_some()
    }

    /// The same type as files hold it.
    pub(crate) fn stored(self) -> StoredType {
        let in_gguf = self.gguf_id().and_then(gguf::stored_type);
        in_gguf.unwrap_or(StoredType::Plain(Dtype::F8_E4M3))
    }

    /// Bytes of so many numbers, which are whole blocks.
    pub(crate) fn bytes_of(self, numbers: usize) -> usize {
        let (block, bytes) = self.stored().block();
        numbers.checked_div(block).unwrap_or(0).saturating_mul(bytes)
    }
}

impl fmt::Display for WriteType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for WriteType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.trim().to_lowercase();
        let alias = ALIASES.iter().find(|(other, _)| *other == lower);
        let name = alias.map_or(lower.as_str(), |(_, name)| name);
        if let Some(facts) = FACTS.iter().find(|facts| facts.name == name) {
            return Ok(facts.kind);
        }
        let hint = match name.rsplit_once('_') {
            Some((one, "s" | "m" | "l")) if one.ends_with("_k") => format!(
                "; {name} is a mixture of types: take {one}, and others for some tensors with \
                 --tensor-type-rules"
            ),
            _ => String::new(),
        };
        Err(format!("expected one of {}{hint}", Self::NAMES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_fit_the_formats() {
        let names: Vec<&str> = FACTS.iter().map(|facts| facts.name).collect();
        assert_eq!(names.join(", "), WriteType::NAMES);
        for facts in FACTS {
            assert_eq!(facts.name.parse(), Ok(facts.kind));
            assert_eq!(facts.name.to_uppercase().parse(), Ok(facts.kind));
            if let Some(blocks) = facts.blocks {
                let size = (blocks.block_size(), blocks.type_size());
                assert_eq!(facts.kind.stored().block(), size, "{}", facts.name);
                assert_eq!(facts.kind.stored().to_string().to_lowercase(), facts.name);
            }
        }
        assert_eq!("fp8_e4m3fn".parse(), Ok(WriteType::Fp8));
        let mixture = "Q4_K_M".parse::<WriteType>().unwrap_err();
        assert!(mixture.contains("take q4_k"), "{mixture}");
        assert!("int8".parse::<WriteType>().is_err());
    }
}
