//! The metadata of a GGUF file.

use std::{fmt, ops::Range};

use super::reader::{Reader, Step, fault};

/// Longest string, in bytes; chat templates are the longest that occur.
pub(super) const STRING_BYTES_MAX: usize = 16 << 20;
/// Most items of an array; vocabularies are the largest that occur.
const ITEMS_MAX: usize = 1 << 24;

/// What a key stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number from zero.
    Unsigned(u64),
    /// A whole number.
    Signed(i64),
    /// A number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// Text.
    Text(String),
    /// Values of one type; they stay in the file until they are asked for.
    Array(Array),
}

/// A list of values in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    kind: Kind,
    /// Number of values.
    pub(crate) count: usize,
    range: Range<usize>,
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    U64,
    I64,
    F64,
}

const ARRAY: u32 = 9;

impl Kind {
    fn from_id(id: u32) -> Step<Self> {
        Ok(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Text,
            ARRAY => return fault("an array of arrays", "an array of plain values"),
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            other => return fault(format!("value type {other}"), "a type from 0 to 12"),
        })
    }

    /// Bytes of a value; `None` for text.
    fn bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Text => "strings",
            Self::F32 | Self::F64 => "numbers",
            Self::Bool => "truth values",
            _ => "whole numbers",
        }
    }

    fn read(self, reader: &mut Reader<'_>) -> Step<Value> {
        Ok(match self {
            Self::U8 => Value::Unsigned(u8::from_le_bytes(reader.take()?).into()),
            Self::U16 => Value::Unsigned(u16::from_le_bytes(reader.take()?).into()),
            Self::U32 => Value::Unsigned(reader.u32()?.into()),
            Self::U64 => Value::Unsigned(reader.u64()?),
            Self::I8 => Value::Signed(i8::from_le_bytes(reader.take()?).into()),
            Self::I16 => Value::Signed(i16::from_le_bytes(reader.take()?).into()),
            Self::I32 => Value::Signed(i32::from_le_bytes(reader.take()?).into()),
            Self::I64 => Value::Signed(i64::from_le_bytes(reader.take()?)),
            Self::F32 => Value::Float(f32::from_le_bytes(reader.take()?).into()),
            Self::F64 => Value::Float(f64::from_le_bytes(reader.take()?)),
            Self::Bool => match reader.take()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return fault(format!("{other} as a truth value"), "0 or 1"),
            },
            Self::Text => Value::Text(reader.string(STRING_BYTES_MAX)?.to_owned()),
        })
    }
}

impl Value {
    /// The value that stands next.
    pub(super) fn read(reader: &mut Reader<'_>) -> Step<Self> {
        match reader.u32()? {
            ARRAY => Ok(Self::Array(Array::read(reader)?)),
            id => Kind::from_id(id)?.read(reader),
        }
    }

    /// A whole number from zero, however it is stored.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A number.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "metadata's whole numbers are small")]
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// Text.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Yes or no.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl Array {
    /// Checks that the items are there, without keeping them.
    fn read(reader: &mut Reader<'_>) -> Step<Self> {
        let kind = Kind::from_id(reader.u32()?)?;
        let count = reader.count("items in an array", ITEMS_MAX)?;
        let start = reader.at();
        match kind.bytes() {
            Some(bytes) => reader.pass(bytes.saturating_mul(count))?,
            None => {
                for _ in 0..count {
                    reader.string(STRING_BYTES_MAX)?;
                }
            }
        }
        Ok(Self { kind, count, range: start..reader.at() })
    }

    /// The items, read from the file they were found in; `None` where `read` does not take one.
    pub(crate) fn items<T>(
        &self,
        bytes: &[u8],
        read: impl Fn(Value) -> Option<T>,
    ) -> Option<Vec<T>> {
        let mut reader = Reader::new(bytes.get(..self.range.end)?, self.range.start);
        (0..self.count).map(|_| read(self.kind.read(&mut reader).ok()?)).collect()
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(value) => value.fmt(f),
            Self::Signed(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Bool(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
            Self::Array(array) => write!(f, "[{} {}]", array.count, array.kind.name()),
        }
    }
}
