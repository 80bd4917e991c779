//! Qwen2.5-VL: reads pictures and text, and writes text.
//!
//! [`VisionLanguageModel::prepare`] turns a prompt and its pictures into [`Inputs`]; from them come
//! [`hidden_states`](VisionLanguageModel::hidden_states) for an editor,
//! [`logits`](VisionLanguageModel::logits), or an answer by
//! [`generate`](VisionLanguageModel::generate).

pub mod adapter;
mod cache;
pub mod config;
mod config_keys;
pub mod constraint;
mod decode;
pub(crate) mod export;
mod footprint;
pub mod generate;
pub(crate) mod gguf;
mod language;
pub mod model;
mod names;
pub mod positions;
pub mod preprocess;
pub(crate) mod published;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub(crate) mod random;
mod rotary;
pub mod sampling;
pub mod seen;
pub mod template;
pub mod tokenizer;
mod vision;

pub use adapter::{Adapter, Call};
pub use config::{Config, TextConfig, VisionConfig};
pub use constraint::{Allowed, Constraint};
pub use footprint::Load;
pub use generate::{Finish, GenerateOptions, Generation};
pub use model::{IMAGE_PLACEHOLDER, Inputs, VisionLanguageModel};
pub(crate) use names::canonical;
pub use names::canonical_name;
pub use positions::{Position, Positions};
pub use preprocess::{PatchGrid, Patches, Preprocessor};
pub use sampling::Sampling;
pub use seen::Seen;
pub use template::{ChatTemplate, Message, Part};
pub use tokenizer::{TextStream, Tokenizer};
