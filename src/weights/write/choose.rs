//! Which type each tensor is written in.
//!
//! Only matrices, `[out, in]`, are written in fewer than 16 bits. A type of blocks needs rows that are
//! whole blocks: a type of 256 falls back to Q8_0 where rows are a multiple of 32, and a matrix that
//! fits neither stays plain, as `--dtype` does in memory. What a model's own rules keep stays plain
//! too. In GGUF files vectors are f32, which is what every reader of them expects.

use std::{fmt, str::FromStr};

use fancy_regex::Regex;
use safetensors::Dtype;

use super::{
    layout::{Content, Part, WriteFormat},
    types::WriteType,
};
use crate::weights::{TensorEntry, stored::StoredType};

/// Types for the tensors whose names a regular expression finds; the first that fits counts.
#[derive(Debug, Clone, Default)]
pub struct TypeRules(Vec<(Regex, WriteType)>);

impl TypeRules {
    /// The type that the rules ask for.
    fn find(&self, name: &str) -> Option<WriteType> {
        let fits = |rule: &&(Regex, WriteType)| rule.0.is_match(name).unwrap_or(false);
        self.0.iter().find(fits).map(|(_, kind)| *kind)
    }

    /// Rules that find none of these names, as they were typed.
    pub(crate) fn without_tensor(&self, names: &[&str]) -> Vec<String> {
        let finds = |regex: &Regex| names.iter().any(|name| regex.is_match(name).unwrap_or(false));
        let idle = self.0.iter().filter(|(regex, _)| !finds(regex));
        idle.map(|(regex, kind)| format!("{}={kind}", regex.as_str())).collect()
    }

    /// The types that the rules name.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = WriteType> {
        self.0.iter().map(|(_, kind)| *kind)
    }
}

impl FromStr for TypeRules {
    type Err = String;

    /// `REGEX=type,REGEX=type`; a comma ends a rule only behind a type.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut rules = Vec::new();
        let mut pending = String::new();
        for piece in text.split(',') {
            if !pending.is_empty() {
                pending.push(',');
            }
            pending.push_str(piece);
            let Some((pattern, kind)) = pending.rsplit_once('=') else { continue };
            let Ok(kind) = kind.parse() else { continue };
            let regex = Regex::new(pattern).map_err(|error| format!("{pattern:?}: {error}"))?;
            rules.push((regex, kind));
            pending.clear();
        }
        match pending.rsplit_once('=') {
            None if pending.is_empty() => Ok(Self(rules)),
            Some((_, kind)) => {
                let reason = kind.parse::<WriteType>().err().unwrap_or_default();
                Err(format!("{kind:?}: {reason}"))
            }
            None => Err(format!("{pending:?}: expected REGEX=type")),
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) format: WriteFormat,
    /// The type of matrices.
    pub(crate) kind: WriteType,
    /// Types of single tensors.
    pub(crate) rules: TypeRules,
    /// Every matrix in the type, whatever the model's own rules say.
    pub(crate) pure: bool,
}

/// What a model says of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nothing in particular.
    Usual,
    /// It stays plain where matrices are quantized.
    Kept,
    /// It needs at least six bits.
    SixBits,
    /// It is f32 unless a rule says otherwise.
    Wide,
}

/// A choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The numbers, in this type.
    As(WriteType),
    /// The bytes as they are.
    Copied,
}

/// What became of a matrix that could not have the wanted type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Fallback {
    pub(crate) wanted: WriteType,
    /// What it is written as; `None` for the bytes as they are.
    pub(crate) got: Option<WriteType>,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let got = self.got.map_or("what they were", WriteType::name);
        write!(f, "{} became {got}", self.wanted)
    }
}

impl Wish {
    /// The type of the tensor `name` of this shape, whose numbers come from `entry`.
    pub(crate) fn choose(
        &self,
        name: &str,
        shape: &[usize],
        entry: &TensorEntry,
        role: Role,
    ) -> (Choice, Option<Fallback>) {
        let rule = self.rules.find(name);
        if role == Role::Wide && rule.is_none() {
            return (Choice::As(WriteType::F32), None);
        }
        let wanted = rule.unwrap_or_else(|| self.usual(role));
        let is_small = wanted.is_blocks() || wanted == WriteType::Fp8;
        let is_matrix = matches!(shape, [_, _]) && !shape.contains(&0);
        if !is_small {
            let vector = shape.len() < 2 && self.format == WriteFormat::Gguf && rule.is_none();
            let kind = if vector { WriteType::F32 } else { wanted };
            return (same_or(kind, entry), None);
        }
        let is_kept = role == Role::Kept && !self.pure && rule.is_none();
        if !is_matrix || is_kept {
            return (self.plain(shape, entry), None);
        }
        if fits(wanted, shape) {
            return (same_or(wanted, entry), None);
        }
        let smaller = wanted.stored().block().0 > 32 && fits(WriteType::Q8_0, shape);
        let choice =
            if smaller { same_or(WriteType::Q8_0, entry) } else { self.plain(shape, entry) };
        let got = match &choice {
            Choice::As(kind) => Some(*kind),
            Choice::Copied => None,
        };
        (choice, Some(Fallback { wanted, got }))
    }

    fn usual(&self, role: Role) -> WriteType {
        let small = self.kind.is_blocks() && self.kind != WriteType::Q8_0;
        if role == Role::SixBits && small && !self.pure { WriteType::Q6K } else { self.kind }
    }

    /// A tensor that is not quantized now; one that is already stays so in a GGUF file.
    fn plain(&self, shape: &[usize], entry: &TensorEntry) -> Choice {
        if shape.len() < 2 && self.format == WriteFormat::Gguf {
            return same_or(WriteType::F32, entry);
        }
        match entry.kind {
            StoredType::Plain(Dtype::F16) => Choice::As(WriteType::F16),
            StoredType::Plain(Dtype::F32) => Choice::As(WriteType::F32),
            StoredType::Plain(_) => Choice::As(WriteType::Bf16),
            StoredType::Blocks(_) if shape.len() == 2 && self.format == WriteFormat::Gguf => {
                Choice::Copied
            }
            StoredType::Blocks(_) => Choice::As(WriteType::F16),
        }
    }
}

/// Whether the rows are whole blocks.
fn fits(kind: WriteType, shape: &[usize]) -> bool {
    /// Scales of fp8 matrices stand behind them, and are f32.
    const SCALE_BYTES: usize = 4;
    let width = shape.last().copied().unwrap_or(0);
    match kind {
        WriteType::Fp8 => shape.iter().product::<usize>().is_multiple_of(SCALE_BYTES),
        _ => width.is_multiple_of(kind.stored().block().0),
    }
}

/// What is quantized as wanted already is not quantized again.
fn same_or(kind: WriteType, entry: &TensorEntry) -> Choice {
    let is_small = kind.is_blocks() || kind == WriteType::Fp8;
    if is_small && entry.kind == kind.stored() && entry.is_in_one_piece() {
        Choice::Copied
    } else {
        Choice::As(kind)
    }
}

impl Choice {
    /// What is written of a part of the tensor `source`.
    pub(crate) fn content(self, source: &str, part: Part) -> Content {
        let source = source.to_owned();
        match self {
            Self::As(kind) => Content::Numbers { source, part, kind },
            Self::Copied => Content::Copied { source, part },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_the_first_counts() {
        let rules: TypeRules = r"^blocks\.\d{1,2}\.a=q4_k,blocks=Q8_0,x=bf16".parse().unwrap();
        assert_eq!(rules.find("blocks.12.a"), Some(WriteType::Q4K));
        assert_eq!(rules.find("blocks.123.a"), Some(WriteType::Q8_0));
        assert_eq!(rules.find("max"), Some(WriteType::Bf16));
        assert_eq!(rules.find("other"), None);
        assert!("".parse::<TypeRules>().unwrap().0.is_empty());
        for (text, word) in [("a", "REGEX=type"), ("a=q9", "q8_0"), ("(=f16", "(")] {
            let message = text.parse::<TypeRules>().unwrap_err();
            assert!(message.contains(word), "{message}");
        }
    }
}
