//! Which model a weight file belongs to, told from its tensors.

use super::checkpoint::Checkpoint;

/// Prefixes under which tools save a transformer.
pub const TRANSFORMER_PREFIXES: &[&str] =
    &["transformer.", "model.diffusion_model.", "diffusion_model."];

/// What a weight file is for, as far as this program has a use for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Family {
    /// The editor's transformer.
    Transformer,
    /// A vision-language model, whole.
    VisionLanguage,
    /// A language model in GGUF, whose vision tower is a file of its own.
    Language,
    /// A vision tower in GGUF.
    VisionTower,
    /// The autoencoder.
    Autoencoder,
    /// Low-rank changes of a model.
    Lora,
    /// A model that is known, but not supported.
    Other,
}

impl Family {
    /// As lists name it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Transformer => "transformer",
            Self::VisionLanguage => "vision-language",
            Self::Language => "language",
            Self::VisionTower => "vision tower",
            Self::Autoencoder => "autoencoder",
            Self::Lora => "LoRA",
            Self::Other => "not supported",
        }
    }
}

/// Prefixes under which ComfyUI saves a vision-language model.
const ENCODER_PREFIXES: &[&str] =
    &["text_encoders.qwen25_7b.transformer.", "qwen25_7b.transformer.", "text_encoders."];

/// A rule: every name must be there. Rules that ask for more come first.
const RULES: &[(&[&str], &str)] = &[
    (
        &["time_text_embed.addition_t_embedding.weight", "txt_norm.weight"],
        "Qwen-Image-Layered transformer (not supported)",
    ),
    (
        &["transformer_blocks.0.img_mlp.gate_up.weight"],
        "Qwen-Image 2.1 transformer (not supported)",
    ),
    (&["transformer_blocks.0.img_mlp.w1.weight"], "a relative of Qwen-Image (not supported)"),
    (&["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"], "Qwen-Image transformer"),
    (
        &["single_transformer_blocks.0.attn.to_q.weight"],
        "FLUX transformer, diffusers names (not supported)",
    ),
    (&["double_stream_modulation_img.lin.weight"], "FLUX.2 transformer (not supported)"),
    (&["double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX.1 transformer (not supported)"),
    (&["visual.patch_embed.proj.weight", "model.embed_tokens.weight"], "Qwen2.5-VL"),
    (&["model.visual.patch_embed.proj.weight"], "Qwen2.5-VL"),
    (
        &["quant_conv.weight", "encoder.conv_in.weight", "encoder.mid_block.resnets.0.norm1.gamma"],
        "Qwen-Image autoencoder",
    ),
    (&["decoder.middle.0.residual.0.gamma", "conv1.weight"], "Qwen-Image autoencoder, Wan names"),
    (&["blk.0.attn_q.bias", "token_embd.weight"], "a language model, GGUF names"),
    (&["v.patch_embd.weight", "v.blk.0.ln1.weight"], "a vision tower (mmproj), GGUF names"),
    (&["unet.conv_in.weight"], "Stable Diffusion UNet (not supported)"),
    (
        &["model.diffusion_model.input_blocks.0.0.weight"],
        "Stable Diffusion checkpoint (not supported)",
    ),
];

/// The model's name, where the tensors tell.
#[must_use]
pub fn identify(checkpoint: &Checkpoint) -> Option<&'static str> {
    let holds = |name: &str| {
        checkpoint.contains(name)
            || TRANSFORMER_PREFIXES
                .iter()
                .chain(ENCODER_PREFIXES)
                .any(|prefix| checkpoint.contains(&format!("{prefix}{name}")))
    };
    RULES.iter().find(|(names, _)| names.iter().all(|name| holds(name))).map(|(_, model)| *model)
}

/// How many blocks there are, by the highest number after `start` in a tensor's name; `None` without any.
pub(crate) fn depth<'a>(names: impl Iterator<Item = &'a str>, start: &str) -> Option<usize> {
    let number = |name: &str| name.strip_prefix(start)?.split('.').next()?.parse::<usize>().ok();
    names.filter_map(number).max().map(|last| last.saturating_add(1))
}

/// What the file is for, where the tensors tell.
#[must_use]
pub fn family(checkpoint: &Checkpoint) -> Option<Family> {
    /// Endings of the factors of low-rank changes.
    const FACTORS: [&str; 4] = ["lora_A", "lora_down", "lora.down", "lora_linear_layer.down"];
    let Some(model) = identify(checkpoint) else {
        let is_factor = |name: &str| FACTORS.iter().any(|factor| name.contains(factor));
        return checkpoint.tensors().any(|(name, _)| is_factor(name)).then_some(Family::Lora);
    };
    Some(match model {
        "Qwen-Image transformer" => Family::Transformer,
        "Qwen2.5-VL" => Family::VisionLanguage,
        "a language model, GGUF names" => Family::Language,
        "a vision tower (mmproj), GGUF names" => Family::VisionTower,
        "Qwen-Image autoencoder" | "Qwen-Image autoencoder, Wan names" => Family::Autoencoder,
        _ => Family::Other,
    })
}
