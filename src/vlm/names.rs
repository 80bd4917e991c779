//! The two spellings of tensor names in checkpoints of this model.

/// Each start of a name in newer checkpoints, and what published checkpoints have in its place.
const STARTS: &[(&str, &str)] =
    &[("model.language_model.", "model."), ("model.visual.", "visual.")];

/// The published spelling of a tensor's name: `model.layers.…`, `visual.blocks.…`, `lm_head.…`.
///
/// ```
/// use pentimento::vlm::canonical_name;
/// assert_eq!(canonical_name("model.language_model.norm.weight"), "model.norm.weight");
/// assert_eq!(canonical_name("model.visual.merger.ln_q.weight"), "visual.merger.ln_q.weight");
/// assert_eq!(canonical_name("lm_head.weight"), "lm_head.weight");
/// ```
#[must_use]
pub fn canonical_name(name: &str) -> String {
    for (newer, published) in STARTS {
        if let Some(rest) = name.strip_prefix(newer) {
            return format!("{published}{rest}");
        }
    }
    name.to_owned()
}
