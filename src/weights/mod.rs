//! Weight files: found, checked, mapped, and read tensor by tensor with nothing skipped silently.

mod adapter_config;
mod alike;
mod assembly;
mod blocks;
pub mod checkpoint;
pub mod cursor;
pub mod files;
mod float8;
pub mod gguf;
pub mod identify;
mod kept;
pub mod lora;
mod mmap;
mod numbers;
pub mod probe;
mod rows;
mod safetensors_header;
mod scaled;
mod stored;
pub mod write;

pub(crate) use adapter_config::AdapterConfig;
pub use assembly::Assembly;
pub use checkpoint::{Checkpoint, TensorEntry};
pub use cursor::{AttentionType, Precision, Storage, Weights};
pub use files::{EmbeddedFile, ModelFiles};
pub(crate) use files::{model_name, shards};
pub(crate) use identify::depth;
pub use identify::{Family, family, identify};
pub use lora::{LoraFile, LoraReport, LowRankChanges};
pub use rows::FileRows;
pub use stored::StoredType;
pub use write::{TypeRules, WriteFormat, WriteType, WrittenFile};
