//! The Qwen-Image transformer: predicts the velocity of the noisy picture's tokens.

mod block;
mod cache;
mod config;
pub(crate) mod export;
pub(crate) mod header;
mod model;
mod modulation;
pub mod pack;
mod rope;

pub use cache::{BlockCache, StepCache};
pub(crate) use config::CLASS;
pub use config::Config;
pub use model::{Branch, Conditioning, ModelInput, Outputs, Transformer};
pub use modulation::StepContext;
pub use pack::Grid;
