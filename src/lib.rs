//! Pentimento edits pictures on this machine: one sentence says what should change.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod diffusion;
pub mod error;
pub mod layers;
pub mod memory;
pub mod ops;
pub mod pixels;
pub mod progress;
pub mod vlm;
pub mod weights;

pub use error::{Error, ModelError, PictureError, RequestError, Result};
pub use progress::{CancelToken, Event, Observer, Stage};
