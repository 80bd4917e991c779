//! The spellings of tensor names in checkpoints of this model.

use crate::{error::Result, weights::Checkpoint};

/// What ComfyUI puts before every name.
const WRAPPERS: &[&str] =
    &["text_encoders.qwen25_7b.transformer.", "qwen25_7b.transformer.", "text_encoders."];
/// Each start of a name in newer checkpoints, and what published checkpoints have in its place.
const STARTS: &[(&str, &str)] =
    &[("model.language_model.", "model."), ("model.visual.", "visual.")];
/// Starts of names in GGUF files, of the language model and of the vision tower beside it.
const GGUF_STARTS: &[(&str, &str)] = &[
    ("token_embd.", "model.embed_tokens."),
    ("output_norm.", "model.norm."),
    ("output.", "lm_head."),
    ("v.patch_embd.", "visual.patch_embed.proj."),
    ("v.post_ln.", "visual.merger.ln_q."),
    ("mm.0.", "visual.merger.mlp.0."),
    ("mm.2.", "visual.merger.mlp.2."),
];
/// Names below `blk.N.` in GGUF files, and below `model.layers.N.`.
const GGUF_LAYER: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// Names below `v.blk.N.` in GGUF files, and below `visual.blocks.N.`.
const GGUF_BLOCK: &[(&str, &str)] = &[
    ("attn_qkv", "attn.qkv"),
    ("attn_q", "attn.q"),
    ("attn_k", "attn.k"),
    ("attn_v", "attn.v"),
    ("attn_out", "attn.proj"),
    ("ln1", "norm1"),
    ("ln2", "norm2"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// The second frame's half of the patch embedding in GGUF files.
const PATCHES: &str = "visual.patch_embed.proj.weight";

/// The published spelling of a tensor's name: `model.layers.…`, `visual.blocks.…`, `lm_head.…`.
///
/// ```
/// use pentimento::vlm::canonical_name;
/// assert_eq!(canonical_name("model.language_model.norm.weight"), "model.norm.weight");
/// assert_eq!(canonical_name("model.visual.merger.ln_q.weight"), "visual.merger.ln_q.weight");
/// assert_eq!(canonical_name("lm_head.weight"), "lm_head.weight");
/// assert_eq!(canonical_name("blk.7.attn_q.bias"), "model.layers.7.self_attn.q_proj.bias");
/// assert_eq!(canonical_name("v.blk.7.ffn_up.weight"), "visual.blocks.7.mlp.up_proj.weight");
/// ```
#[must_use]
pub fn canonical_name(name: &str) -> String {
    let name = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)).unwrap_or(name);
    for (other, published) in STARTS.iter().chain(GGUF_STARTS) {
        if let Some(rest) = name.strip_prefix(other) {
            return format!("{published}{rest}");
        }
    }
    let layer = gguf_name(name, "blk.", "model.layers", GGUF_LAYER);
    layer
        .or_else(|| gguf_name(name, "v.blk.", "visual.blocks", GGUF_BLOCK))
        .unwrap_or_else(|| name.to_owned())
}

/// `start N . part . weight` as `place . N . part' . weight`.
fn gguf_name(name: &str, start: &str, place: &str, parts: &[(&str, &str)]) -> Option<String> {
    let (index, rest) = name.strip_prefix(start)?.split_once('.')?;
    let (part, end) = rest.rsplit_once('.')?;
    let (_, published) = parts.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("{place}.{index}.{published}.{end}"))
}

/// The name in GGUF files of what is published under `name`; a vision tower's q, k and v and the two
/// frames of its patch embedding are in parts there. `None` for a name that is not of this model.
pub(super) fn gguf_name_of(name: &str) -> Option<String> {
    let whole =
        |(gguf, published): &(&str, &str)| Some(format!("{gguf}{}", name.strip_prefix(published)?));
    let layer = |start: &str, place: &str, parts: &[(&str, &str)]| {
        let (index, rest) = name.strip_prefix(place)?.strip_prefix('.')?.split_once('.')?;
        let (part, end) = rest.rsplit_once('.')?;
        let (gguf, _) = parts.iter().find(|(_, published)| *published == part)?;
        Some(format!("{start}{index}.{gguf}.{end}"))
    };
    GGUF_STARTS
        .iter()
        .find_map(whole)
        .or_else(|| layer("blk.", "model.layers", GGUF_LAYER))
        .or_else(|| layer("v.blk.", "visual.blocks", GGUF_BLOCK))
}

/// A checkpoint under the published names, with what GGUF files keep in parts put together.
///
/// # Errors
/// Two tensors of one name, or parts that do not fit together.
pub(crate) fn canonical(checkpoint: Checkpoint) -> Result<Checkpoint> {
    let mut checkpoint = checkpoint.rename(canonical_name)?;
    let second = format!("{PATCHES}.1");
    if checkpoint.contains(&second) {
        const FRAMES: usize = 2; // (out, channels, frames, y, x)
        checkpoint.stack(PATCHES.to_owned(), &[PATCHES.to_owned(), second], FRAMES)?;
    }
    let thirds: Vec<(String, String)> = checkpoint
        .tensors()
        .filter_map(|(name, _)| {
            let (place, end) = name.rsplit_once(".attn.q.")?;
            Some((format!("{place}.attn"), end.to_owned()))
        })
        .collect();
    for (place, end) in thirds {
        let parts = ["q", "k", "v"].map(|part| format!("{place}.{part}.{end}"));
        checkpoint.join_rows(format!("{place}.qkv.{end}"), &parts)?;
    }
    Ok(checkpoint)
}
