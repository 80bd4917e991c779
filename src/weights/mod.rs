//! Weight files: found, checked, mapped, and read tensor by tensor with nothing skipped silently.

pub mod checkpoint;
pub mod cursor;
pub mod files;
pub mod identify;
mod mmap;
pub mod probe;

pub use checkpoint::{Checkpoint, TensorEntry};
pub use cursor::{Precision, Storage, Weights};
pub use files::{EmbeddedFile, ModelFiles};
pub use identify::identify;
