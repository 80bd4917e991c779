//! The header of a GGUF file, versions 2 and 3, little endian: metadata and the places of tensors.
//!
//! Follows <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. A header may claim anything,
//! so every count has a limit, every sum is checked, and nothing is reserved on a claim.

mod reader;
mod types;
mod values;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
};

use self::reader::{Fault, Reader, Step, fault};
pub(crate) use self::types::{IQ4_NL, IQ4_XS, from_id as stored_type, id_of as type_id};
pub use self::{
    types::BlockType,
    values::{Array, Value},
};
use super::stored::{SUPPORTED, StoredType};
use crate::error::{ModelError, Result};

/// The first bytes of every GGUF file.
pub(crate) const MAGIC: &[u8] = b"GGUF";
/// Most tensors in a file.
pub const TENSORS_MAX: usize = 1 << 16;
/// Most keys of metadata in a file.
pub const KEYS_MAX: usize = 1 << 16;
/// Longest name of a key or a tensor, in bytes.
pub const NAME_BYTES_MAX: usize = 1 << 16;
/// Most axes of a tensor; ggml has four, the original shape of a reshaped tensor may have five.
pub const AXES_MAX: usize = 5;
/// What a tensor's start is a multiple of, unless the file says otherwise.
pub(super) const ALIGNMENT: u64 = 32;
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
/// Smallest multiple that the format allows.
const ALIGNMENT_MIN: u64 = 8;
/// Largest multiple that is sensible: a page of the largest kind.
const ALIGNMENT_MAX: u64 = 1 << 21;
/// In front of a tensor's name: the shape it had before it was reshaped for quantization.
pub(super) const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";

/// Metadata by key.
pub type Metadata = BTreeMap<String, Value>;

/// Bytes in the file by key.
pub(super) type Spans = BTreeMap<String, Range<usize>>;

/// Where a tensor is and what it holds.
pub(super) struct Tensor {
    pub(super) kind: StoredType,
    /// The slowest axis first, as everywhere but in GGUF itself.
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) range: Range<usize>,
}

/// What stands in front of the numbers.
pub(super) struct Header {
    pub(super) metadata: Metadata,
    /// Where each key's type and value stand in the file.
    pub(super) spans: Spans,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

/// A tensor's entry before the place of the data is known.
struct Listed {
    kind: StoredType,
    shape: Vec<usize>,
    bytes: usize,
    offset: u64,
}

/// Reads the header of the file `name`, which begins with [`MAGIC`].
///
/// # Errors
/// [`ModelError::Corrupt`] for a file that is truncated, contradicts itself or is beyond a limit,
/// [`ModelError::TensorType`] for a type of numbers that is not known.
pub(super) fn read(name: &str, bytes: &[u8]) -> Result<Header> {
    let mut place = String::from("header");
    let mut unknown = None;
    let header = parse(bytes, &mut place, &mut unknown);
    if let Some((tensor, id)) = unknown {
        return Err(ModelError::TensorType {
            path: name.to_owned(),
            tensor,
            found: format!("number {id} of ggml's types"),
            supported: SUPPORTED,
        }
        .into());
    }
    header.map_err(|Fault { found, expected }| {
        ModelError::Corrupt {
            path: name.to_owned(),
            found: format!("{place}: {found}"),
            expected,
            hint: "the file is truncated or damaged; download it again".to_owned(),
        }
        .into()
    })
}

/// `place` says what is being read; a type that is not known is left in `unknown`.
fn parse(bytes: &[u8], place: &mut String, unknown: &mut Option<(String, u32)>) -> Step<Header> {
    let mut reader = Reader::new(bytes, MAGIC.len());
    match reader.u32()? {
        2 | 3 => {}
        0x0200_0000 | 0x0300_0000 => return fault("big-endian numbers", "a little-endian file"),
        other => return fault(format!("GGUF version {other}"), "version 2 or 3"),
    }
    let tensors = reader.count("tensors", TENSORS_MAX)?;
    let keys = reader.count("keys", KEYS_MAX)?;
    let (metadata, spans) = metadata(&mut reader, keys, place)?;
    "header".clone_into(place);
    let alignment = alignment(&metadata)?;
    let mut listed = BTreeMap::new();
    for index in 0..tensors {
        *place = format!("tensor {index} of {tensors}");
        let name = reader.string(NAME_BYTES_MAX)?;
        *place = format!("tensor {name}");
        let tensor = listed_tensor(&mut reader, name, unknown)?;
        match listed.entry(name.to_owned()) {
            Entry::Vacant(entry) => drop(entry.insert(tensor)),
            Entry::Occupied(_) => return fault("listed twice", "each tensor once"),
        }
    }
    let data = (reader.at() as u64).next_multiple_of(alignment);
    let mut placed = BTreeMap::new();
    for (name, tensor) in listed {
        *place = format!("tensor {name}");
        let range = range(&tensor, data, alignment, bytes.len())?;
        let shape = original_shape(&metadata, bytes, &name, tensor.shape)?;
        placed.insert(name, Tensor { kind: tensor.kind, shape, range });
    }
    refuse_overlaps(&placed, place)?;
    Ok(Header { metadata, spans, tensors: placed })
}

fn metadata(reader: &mut Reader<'_>, count: usize, place: &mut String) -> Step<(Metadata, Spans)> {
    let (mut metadata, mut spans) = (Metadata::new(), Spans::new());
    for index in 0..count {
        *place = format!("key {index} of {count}");
        let key = reader.string(NAME_BYTES_MAX)?;
        *place = format!("key {key}");
        let start = reader.at();
        let value = Value::read(reader)?;
        match metadata.entry(key.to_owned()) {
            Entry::Vacant(entry) => drop(entry.insert(value)),
            Entry::Occupied(_) => return fault("given twice", "each key once"),
        }
        spans.insert(key.to_owned(), start..reader.at());
    }
    Ok((metadata, spans))
}

fn alignment(metadata: &Metadata) -> Step<u64> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else { return Ok(ALIGNMENT) };
    let fits = |alignment: &u64| {
        alignment.is_power_of_two() && (ALIGNMENT_MIN..=ALIGNMENT_MAX).contains(alignment)
    };
    match value.as_u64().filter(fits) {
        Some(alignment) => Ok(alignment),
        None => fault(
            format!("{ALIGNMENT_KEY} {value}"),
            format!("a power of two from {ALIGNMENT_MIN} to {ALIGNMENT_MAX}"),
        ),
    }
}

/// The entry of the tensor `name`, whose name was read already.
fn listed_tensor(
    reader: &mut Reader<'_>,
    name: &str,
    unknown: &mut Option<(String, u32)>,
) -> Step<Listed> {
    let axes = reader.u32()? as usize;
    if axes > AXES_MAX {
        return fault(format!("{axes} axes"), format!("at most {AXES_MAX}"));
    }
    let mut shape = Vec::with_capacity(axes);
    for _ in 0..axes {
        shape.push(reader.count("numbers along an axis", usize::MAX)?);
    }
    let row = shape.first().copied().unwrap_or(1);
    shape.reverse(); // the slowest axis first
    let id = reader.u32()?;
    let Some(kind) = types::from_id(id) else {
        *unknown = Some((name.to_owned(), id));
        return fault(format!("type {id}"), "a known type");
    };
    let offset = reader.u64()?;
    let (block, block_bytes) = kind.block();
    if !row.is_multiple_of(block) {
        return fault(
            format!("rows of {row} numbers"),
            format!("a multiple of the block, {block}"),
        );
    }
    // An axis of length zero must not hide lengths that cannot be multiplied.
    let largest = shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n.max(1)));
    let numbers = largest.map(|largest| if shape.contains(&0) { 0 } else { largest });
    let bytes = numbers
        .and_then(|numbers| numbers.checked_div(block))
        .and_then(|blocks| blocks.checked_mul(block_bytes));
    match bytes {
        Some(bytes) => Ok(Listed { kind, shape, bytes, offset }),
        None => fault(format!("shape {shape:?}"), "a size that can be addressed"),
    }
}

/// The tensor's bytes in a file of `file_bytes`, whose data begin at `data`.
fn range(tensor: &Listed, data: u64, alignment: u64, file_bytes: usize) -> Step<Range<usize>> {
    let Listed { offset, bytes, .. } = tensor;
    if !offset.is_multiple_of(alignment) {
        return fault(format!("data at {offset}"), format!("a multiple of {alignment}"));
    }
    let start = data.checked_add(*offset).and_then(|start| usize::try_from(start).ok());
    let end = start.and_then(|start| start.checked_add(*bytes));
    match start.zip(end) {
        // A tensor without numbers may stand behind the file's last byte.
        Some((start, end)) if end <= file_bytes => Ok(start..end),
        Some((start, _)) if *bytes == 0 && start >= file_bytes => Ok(file_bytes..file_bytes),
        _ => fault(
            format!("{bytes} bytes at {offset} of the data, beyond the file's {file_bytes} bytes"),
            "data inside the file: it is truncated",
        ),
    }
}

/// The shape that the metadata give back to a tensor; it must hold as many numbers.
fn original_shape(
    metadata: &Metadata,
    bytes: &[u8],
    name: &str,
    shape: Vec<usize>,
) -> Step<Vec<usize>> {
    let key = format!("{ORIGINAL_SHAPE}{name}");
    let Some(value) = metadata.get(&key) else { return Ok(shape) };
    let expected = || format!("at most {AXES_MAX} axes with as many numbers as {shape:?}");
    let Value::Array(array) = value else { return fault(format!("{key} {value}"), expected()) };
    if array.count > AXES_MAX {
        return fault(format!("{key} with {} axes", array.count), expected());
    }
    let axis = |value: Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let original: Vec<usize> = match array.items(bytes, axis) {
        Some(original) => original,
        None => return fault(format!("{key} {value}"), expected()),
    };
    let product = |shape: &[usize]| shape.iter().try_fold(1_usize, |all, &n| all.checked_mul(n));
    if !original.contains(&0) && product(&original) == product(&shape) {
        Ok(original)
    } else {
        fault(format!("{key} {original:?}"), expected())
    }
}

fn refuse_overlaps(tensors: &BTreeMap<String, Tensor>, place: &mut String) -> Step<()> {
    let mut ranges: Vec<(&Range<usize>, &str)> = tensors
        .iter()
        .filter(|(_, tensor)| !tensor.range.is_empty())
        .map(|(name, tensor)| (&tensor.range, name.as_str()))
        .collect();
    ranges.sort_unstable_by_key(|(range, _)| range.start);
    for pair in ranges.windows(2) {
        let [(first, first_name), (second, second_name)] = pair else { continue };
        if second.start < first.end {
            *place = format!("tensor {second_name}");
            return fault(format!("shares bytes with {first_name}"), "data of its own");
        }
    }
    Ok(())
}
