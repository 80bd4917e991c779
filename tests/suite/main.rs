//! All integration tests, in one binary so that they link once.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod cli;
mod common;
mod diffusion;
mod engine;
mod ops;
mod pixels;
mod tidy;
mod vlm;
mod weights;
