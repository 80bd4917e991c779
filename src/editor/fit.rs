//! Whether the parts of a model belong together, told from their configs before weights are read.

use super::planning::ENCODER;
use crate::{diffusion::qwen_image, error::Result, vlm, weights::ModelFiles};

/// Widths of the published text encoders, and what they are called.
const ENCODERS: [(usize, &str); 2] = [(3584, "Qwen2.5-VL 7B"), (2048, "Qwen2.5-VL 3B")];

/// Refuses a text encoder of another width than the transformer was trained with.
///
/// # Errors
/// The encoder's width against the transformer's, or configs that cannot be read.
pub(super) fn check_parts(files: &ModelFiles) -> Result<()> {
    let path = format!("{ENCODER}/config.json");
    let found = vlm::Config::load(files, &path)?.text.hidden_size;
    let expected = qwen_image::Config::load(files)?.conditioning_dim;
    if found == expected {
        return Ok(());
    }
    let named = |width: usize| match ENCODERS.iter().find(|(of, _)| *of == width) {
        Some((_, name)) => format!("{width} ({name})"),
        None => width.to_string(),
    };
    let transformer = files.describe("transformer/config.json");
    let expected = format!("{}, joint_attention_dim of {transformer}", named(expected));
    Err(files.config(&path, "hidden_size", named(found), expected))
}
