//! The Qwen-Image transformer: predicts the velocity of the noisy picture's tokens.

mod batch;
mod block;
mod cache;
mod config;
pub(crate) mod export;
mod footprint;
pub(crate) mod header;
mod layout;
mod model;
mod modulation;
pub mod pack;
mod pass;
mod recorded;
mod rope;
mod store;

pub use batch::GuidancePass;
pub use cache::{BlockCache, StepCache};
pub(crate) use config::CLASS;
pub use config::Config;
pub use footprint::{Footprint, TokenCounts};
pub use model::{Branch, Conditioning, ModelInput, Outputs, Residency, Transformer};
pub use modulation::StepContext;
pub use pack::Grid;
pub(crate) use recorded::{Places, RecordedStep, Requests};
pub use recorded::{StepRecording, StepsRecorded};
