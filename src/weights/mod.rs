//! Weight files: found, checked, mapped, and read tensor by tensor with nothing skipped silently.

mod adapter_config;
pub mod checkpoint;
pub mod cursor;
pub mod files;
pub mod identify;
pub mod lora;
mod mmap;
pub mod probe;

pub(crate) use adapter_config::AdapterConfig;
pub use checkpoint::{Checkpoint, TensorEntry};
pub use cursor::{Precision, Storage, Weights};
pub use files::{EmbeddedFile, ModelFiles};
pub use identify::identify;
pub use lora::{LoraFile, LoraReport, LowRankChanges};
