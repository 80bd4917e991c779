//! What a file will hold: its tensors in their order, where their numbers come from, and what
//! stands in front of them.

use std::ops::Range;

use super::{choose::Role, types::WriteType};

/// The formats that weights are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteFormat {
    /// GGUF 3, as llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF read it.
    Gguf,
    /// Safetensors, as published.
    Safetensors,
}

impl WriteFormat {
    /// The format that a file of this name has.
    #[must_use]
    pub fn from_path(path: &std::path::Path) -> Option<Self> {
        let end = path.extension()?.to_string_lossy().to_lowercase();
        match end.as_str() {
            "gguf" => Some(Self::Gguf),
            "safetensors" | "sft" => Some(Self::Safetensors),
            _ => None,
        }
    }

    /// Whether files of this format hold numbers of `kind`.
    #[must_use]
    pub fn holds(self, kind: WriteType) -> bool {
        match self {
            Self::Gguf => kind != WriteType::Fp8,
            Self::Safetensors => !kind.is_blocks(),
        }
    }

    /// As it is typed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gguf => "gguf",
            Self::Safetensors => "safetensors",
        }
    }
}

/// A part of a tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// So many rows along its first axis.
    Rows(Range<usize>),
    /// One index along an axis, which falls away.
    Slice {
        /// The axis.
        axis: usize,
        /// The index along it.
        index: usize,
    },
}

/// Where the bytes of a tensor come from.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// A tensor of the checkpoint, in the type that is written.
    Numbers {
        /// Its name there.
        source: String,
        /// Which part of it.
        part: Part,
        /// The type to write.
        kind: WriteType,
    },
    /// The bytes of the checkpoint's tensor as they are, which is of a type that GGUF numbers.
    Copied {
        /// Its name there.
        source: String,
        /// Which part of it, whole or rows.
        part: Part,
    },
    /// The scale of the fp8 tensor of this name, which stands before it.
    Scale(String),
    /// Bytes of a known type.
    Bytes {
        /// The type's name in safetensors files, and its number in GGUF files.
        kind: (&'static str, u32),
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// A tensor that is to be written, before its type is chosen.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    /// Its name in the new file.
    pub(crate) name: String,
    /// Its name in the checkpoint.
    pub(crate) source: String,
    /// Which part of it.
    pub(crate) part: Part,
    /// The part's shape.
    pub(crate) shape: Vec<usize>,
    /// What its model says of it.
    pub(crate) role: Role,
}

/// A tensor that will be written.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Its name in the new file.
    pub(crate) name: String,
    /// Its shape, the slowest axis first.
    pub(crate) shape: Vec<usize>,
    /// What it holds.
    pub(crate) content: Content,
}

/// A tensor's entry in a header.
pub(super) struct Listed<'a> {
    pub(super) name: &'a str,
    pub(super) shape: &'a [usize],
    /// The type's name in safetensors files.
    pub(super) name_of_type: &'static str,
    /// The type's number in GGUF files.
    pub(super) id: u32,
    pub(super) bytes: usize,
}

/// What a new file will hold.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// The format.
    pub(crate) format: WriteFormat,
    /// GGUF: keys with their types and values in bytes, in this order.
    pub(crate) keys: Vec<(String, Vec<u8>)>,
    /// Safetensors: texts of the header.
    pub(crate) texts: Vec<(String, String)>,
    /// The tensors in the order in which they are written.
    pub(crate) items: Vec<Item>,
}
