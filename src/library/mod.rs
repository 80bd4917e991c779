//! Model files on this machine: where they are, what they are, and whether they are whole.
//!
//! Looked through are folders that a person names, Hugging Face's cache and ComfyUI's folders. Only
//! headers are read, except by [`verify()`].

mod describe;
mod resolve;
mod verify;
mod walk;

pub use describe::{Entry, describe, part};
pub use resolve::{Want, resolve};
pub use verify::{Verdict, verify};
pub use walk::{Candidate, Place, Places, walk};
