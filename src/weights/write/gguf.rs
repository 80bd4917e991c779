//! The header of a GGUF file, version 3, little endian.

use super::layout::Listed;
use crate::weights::gguf::{ALIGNMENT, ALIGNMENT_KEY, MAGIC, ORIGINAL_SHAPE};

const VERSION: u32 = 3;
/// Most axes of a tensor in ggml.
const AXES_MAX: usize = 4;
/// Numbers of types of values.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// The value of a key: its type and its bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Key<'a> {
    /// A whole number from zero.
    U32(u32),
    /// A number.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// Text.
    Text(&'a str),
    /// Whole numbers.
    I32s(Vec<i32>),
    /// Numbers.
    F32s(Vec<f32>),
    /// Texts.
    Texts(Vec<String>),
}

impl Key<'_> {
    /// Type and value as they stand in a file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let tagged = |tag: u32, value: &[u8]| [&tag.to_le_bytes()[..], value].concat();
        match self {
            Self::U32(value) => tagged(U32, &value.to_le_bytes()),
            Self::F32(value) => tagged(F32, &value.to_le_bytes()),
            Self::Bool(value) => tagged(BOOL, &[u8::from(*value)]),
            Self::Text(text) => tagged(TEXT, &string(text)),
            Self::I32s(items) => {
                array(I32, items.len(), items.iter().flat_map(|item| item.to_le_bytes()))
            }
            Self::F32s(items) => {
                array(F32, items.len(), items.iter().flat_map(|item| item.to_le_bytes()))
            }
            Self::Texts(items) => {
                array(TEXT, items.len(), items.iter().flat_map(|item| string(item)))
            }
        }
    }
}

fn array(tag: u32, count: usize, items: impl Iterator<Item = u8>) -> Vec<u8> {
    let mut bytes = [ARRAY.to_le_bytes(), tag.to_le_bytes()].concat();
    bytes.extend((count as u64).to_le_bytes());
    bytes.extend(items);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// What stands before the data, which begin at its end.
pub(super) fn header(keys: &[(String, Vec<u8>)], tensors: &[Listed<'_>]) -> Vec<u8> {
    let alignment = u32::try_from(ALIGNMENT).unwrap_or(u32::MAX);
    let mut all = vec![(ALIGNMENT_KEY.to_owned(), Key::U32(alignment).bytes())];
    for tensor in tensors.iter().filter(|tensor| tensor.shape.len() > AXES_MAX) {
        let axes = tensor.shape.iter().filter_map(|&n| i32::try_from(n).ok()).collect();
        all.push((format!("{ORIGINAL_SHAPE}{}", tensor.name), Key::I32s(axes).bytes()));
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend(((keys.len() + all.len()) as u64).to_le_bytes());
    for (key, value) in keys.iter().chain(&all) {
        bytes.extend(string(key));
        bytes.extend(value);
    }
    let mut offset = 0;
    for tensor in tensors {
        bytes.extend(string(tensor.name));
        let dims = dims(tensor.shape);
        bytes.extend(u32::try_from(dims.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend(tensor.id.to_le_bytes());
        bytes.extend(u64::to_le_bytes(offset));
        offset += (tensor.bytes as u64).next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len() + padding(bytes.len()), 0);
    bytes
}

/// Bytes between the end of something at `at` and the next place where something begins.
pub(super) fn padding(at: usize) -> usize {
    let at = at as u64;
    usize::try_from(at.next_multiple_of(ALIGNMENT) - at).unwrap_or(0)
}

/// The fastest axis first, at most four; the slowest ones are put together.
fn dims(shape: &[usize]) -> Vec<u64> {
    let extra = shape.len().saturating_sub(AXES_MAX);
    let (slow, fast) = shape.split_at(extra);
    let mut dims: Vec<u64> = fast.iter().rev().map(|&n| n as u64).collect();
    if dims.is_empty() {
        dims.push(1); // a single number is a list of one
    }
    if let Some(last) = dims.last_mut() {
        *last *= slow.iter().map(|&n| n as u64).product::<u64>();
    }
    dims
}
