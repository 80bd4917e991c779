//! The transformer's config, and the models that look like it but are not.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    diffusion::config_check::{refuse_unknown_keys, require_class},
    error::{ModelError, Result},
    weights::{Checkpoint, ModelFiles, identify::TRANSFORMER_PREFIXES},
};

/// Where the config lies in a model folder.
pub(super) const PATH: &str = "transformer/config.json";
/// What the checkpoint should be, for messages.
pub(super) const EXPECTED: &str = "Qwen-Image-Edit, Qwen-Image-Edit-2509, Qwen-Image-Edit-2511";
/// The class that a config names.
pub(crate) const CLASS: &str = "QwenImageTransformer2DModel";
/// Side of the square of latent pixels that becomes one token; the pipelines pack with this number.
pub(super) const PATCH: usize = 2;
/// Present in files of the 2511 version that come without a config.
pub(crate) const ZERO_COND_MARK: &str = "__index_timestep_zero__";

#[derive(Debug, Deserialize)]
struct RawConfig {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    #[serde(default = "default_patch_size")]
    patch_size: usize,
    #[serde(default = "default_in_channels")]
    in_channels: usize,
    #[serde(default = "default_out_channels")]
    out_channels: Option<usize>,
    #[serde(default = "default_num_layers")]
    num_layers: usize,
    #[serde(default = "default_attention_head_dim")]
    attention_head_dim: usize,
    #[serde(default = "default_num_attention_heads")]
    num_attention_heads: usize,
    #[serde(default = "default_joint_attention_dim")]
    joint_attention_dim: usize,
    #[serde(default)]
    guidance_embeds: bool,
    #[serde(default = "default_axes_dims_rope")]
    axes_dims_rope: Vec<usize>,
    #[serde(default)]
    zero_cond_t: bool,
    #[serde(default, rename = "_zero_cond_t_decided")]
    decided: bool,
    #[serde(default)]
    use_additional_t_cond: bool,
    #[serde(default)]
    use_layer3d_rope: bool,
    #[serde(flatten)]
    unknown: BTreeMap<String, Value>,
}

fn default_patch_size() -> usize {
    2
}
fn default_in_channels() -> usize {
    64
}
#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn default_out_channels() -> Option<usize> {
    Some(16)
}
fn default_num_layers() -> usize {
    60
}
fn default_attention_head_dim() -> usize {
    128
}
fn default_num_attention_heads() -> usize {
    24
}
fn default_joint_attention_dim() -> usize {
    3584
}
fn default_axes_dims_rope() -> Vec<usize> {
    vec![16, 56, 56]
}

/// The transformer's dimensions, checked.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/transformers/transformer_qwenimage.py#L807-L823>.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Width of a token of latents: channels of the autoencoder times the patch's area.
    pub latent_dim: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Width of the conditioning.
    pub conditioning_dim: usize,
    /// Share of a head that turns with the picture's index, the row and the column.
    pub rope_axes: [usize; 3],
    /// Reference tokens are modulated as free of noise (the 2511 version).
    pub zero_cond_t: bool,
    /// Whether the weights have no say in `zero_cond_t`.
    pub(super) decided: bool,
}

impl Config {
    /// Reads `transformer/config.json`.
    ///
    /// # Errors
    /// A file that is missing or damaged, another model's config, dimensions that do not fit
    /// together, or a field whose value changes the arithmetic to something not computed here.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let raw: RawConfig = files.read_json(PATH)?;
        require_class(files, PATH, raw.class_name.as_deref(), CLASS)?;
        // The first published checkpoints carry a width that no layer uses.
        refuse_unknown_keys(files, PATH, &raw.unknown, &["pooled_projection_dim"])?;
        refuse_other_arithmetic(files, &raw)?;
        require_sizes(files, &raw)?;
        let rope_axes = rope_axes(files, &raw)?;
        Ok(Self {
            latent_dim: raw.in_channels,
            layers: raw.num_layers,
            head_dim: raw.attention_head_dim,
            heads: raw.num_attention_heads,
            conditioning_dim: raw.joint_attention_dim,
            rope_axes,
            zero_cond_t: raw.zero_cond_t,
            decided: raw.decided,
        })
    }

    /// Width of a token inside the model.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the autoencoder's latents.
    #[must_use]
    #[expect(clippy::integer_division, reason = "checked to be a multiple when loaded")]
    pub fn latent_channels(&self) -> usize {
        self.latent_dim / (PATCH * PATCH)
    }
}

fn refuse_other_arithmetic(files: &ModelFiles, raw: &RawConfig) -> Result<()> {
    let switches = [
        ("guidance_embeds", raw.guidance_embeds, "false: distilled guidance is not computed"),
        ("use_additional_t_cond", raw.use_additional_t_cond, "false: true is Qwen-Image-Layered"),
        ("use_layer3d_rope", raw.use_layer3d_rope, "false: true is Qwen-Image-Layered"),
    ];
    match switches.iter().find(|(_, on, _)| *on) {
        Some((field, _, expected)) => Err(files.config(PATH, field, "true", expected)),
        None => Ok(()),
    }
}

fn require_sizes(files: &ModelFiles, raw: &RawConfig) -> Result<()> {
    /// More than any model has; keeps products of sizes from overflowing.
    const SIZE_MAX: usize = 1 << 20;
    let sizes = [
        ("in_channels", raw.in_channels),
        ("num_layers", raw.num_layers),
        ("attention_head_dim", raw.attention_head_dim),
        ("num_attention_heads", raw.num_attention_heads),
        ("joint_attention_dim", raw.joint_attention_dim),
    ];
    for (field, size) in sizes {
        if !(1..=SIZE_MAX).contains(&size) {
            return Err(files.config(PATH, field, size, format!("1 to {SIZE_MAX}")));
        }
    }
    if raw.patch_size != PATCH {
        return Err(files.config(PATH, "patch_size", raw.patch_size, PATCH));
    }
    // The reference takes null for "as many as go in".
    let out_channels = raw.out_channels.unwrap_or(raw.in_channels);
    if out_channels.checked_mul(PATCH * PATCH) != Some(raw.in_channels) {
        let expected =
            format!("in_channels / patch_size² = {} / {}", raw.in_channels, PATCH * PATCH);
        return Err(files.config(PATH, "out_channels", out_channels, expected));
    }
    Ok(())
}

fn rope_axes(files: &ModelFiles, raw: &RawConfig) -> Result<[usize; 3]> {
    let found = format!("{:?}", raw.axes_dims_rope);
    let even_and_whole = |axes: &[usize; 3]| {
        axes.iter().all(|axis| axis.is_multiple_of(2))
            && axes.iter().try_fold(0_usize, |sum, &axis| sum.checked_add(axis))
                == Some(raw.attention_head_dim)
    };
    match <[usize; 3]>::try_from(raw.axes_dims_rope.as_slice()) {
        Ok(axes) if even_and_whole(&axes) => Ok(axes),
        _ => {
            let expected = format!(
                "three even numbers that add up to attention_head_dim = {}",
                raw.attention_head_dim
            );
            Err(files.config(PATH, "axes_dims_rope", found, expected))
        }
    }
}

/// A tensor's name without what other programs put before it.
pub(super) fn canonical_name(name: &str) -> String {
    TRANSFORMER_PREFIXES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name)
        .to_owned()
}

/// Refuses checkpoints of related models by their tensors, with the model's name.
pub(super) fn refuse_look_alikes(checkpoint: &Checkpoint) -> Result<()> {
    /// A piece of a tensor's name that only the named model has.
    const SIGNS: [(&str, &str); 5] = [
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
        ("transformer_blocks.0.img_mlp.w1.weight", "Boogu"),
        ("single_transformer_blocks.", "FLUX"),
        ("img_mlp.gate_up", "Qwen-Image-2.1"),
        ("img_mlp.gate_layer", "Qwen-Image-2.1"),
    ];
    const MAGE_FLOW_LATENT_DIM: usize = 128;
    let refuse = |model: &str, sign: &str| {
        Err(ModelError::Kind {
            path: checkpoint.name().to_owned(),
            found: format!("{model} (it has {sign})"),
            expected: EXPECTED.to_owned(),
        }
        .into())
    };
    for (name, entry) in checkpoint.tensors() {
        if let Some((sign, model)) = SIGNS.iter().find(|(sign, _)| name.contains(sign)) {
            return refuse(model, sign);
        }
        if name == "img_in.weight" && entry.shape.get(1) == Some(&MAGE_FLOW_LATENT_DIM) {
            return refuse("Mage-Flow", "an img_in for tokens of 128");
        }
    }
    Ok(())
}
