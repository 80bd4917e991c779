//! New weight files: numbers go from mapped files through a quantizer into a file that appears
//! when it is whole, a few chunks at a time, so that memory stays small however large the model is.
//!
//! Nothing here knows models: what a file holds and in which types is a `Layout`.

mod choose;
mod encode;
pub(crate) mod gguf;
mod layout;
mod safetensors;
mod stream;
mod types;

pub use choose::TypeRules;
pub(crate) use choose::{Choice, Fallback, Role, Wish};
pub(crate) use gguf::Key;
pub use layout::WriteFormat;
pub(crate) use layout::{Content, Draft, Item, Layout, Part};
pub use stream::WrittenFile;
pub(crate) use stream::{Staged, check_output, stage};
pub use types::WriteType;
