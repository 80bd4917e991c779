//! All integration tests, in one binary so that they link once.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::integer_division,
    reason = "the numbers of a test are known to fit"
)]

mod cli;
mod common;
mod containers;
mod convert;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
mod cuda;
mod diffusion;
mod docs;
mod engine;
mod eval;
mod fused;
mod gguf;
mod library;
mod lora;
mod memory;
mod not_finite;
mod odd_files;
mod ops;
mod peers;
mod pixels;
mod plan;
mod single_files;
mod tidy;
mod vlm;
mod weights;
