//! What a weight file of this transformer says beyond its tensors, and which matrices stay plain.

use crate::weights::write::Role;

pub(crate) use super::config::ZERO_COND_MARK;

/// The architecture in GGUF files, as ComfyUI-GGUF and stable-diffusion.cpp know it.
pub(crate) const ARCHITECTURE: &str = "qwen_image";

/// Matrices at the ends of the network, through which everything passes: 41 million of 20 billion
/// weights. stable-diffusion.cpp and ComfyUI-GGUF keep such matrices as well; the modulation's, a third
/// of the model, are quantized there and here.
const KEPT: [&str; 5] = ["img_in.", "txt_in.", "time_text_embed.", "norm_out.", "proj_out."];

/// What is to be known of a tensor when its type is chosen.
pub(crate) fn role(name: &str) -> Role {
    if KEPT.iter().any(|start| name.starts_with(start)) { Role::Kept } else { Role::Usual }
}
