//! The autoencoder's config.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    diffusion::config_check::{refuse_unknown_keys, require_class},
    error::Result,
    weights::ModelFiles,
};

const PATH: &str = "vae/config.json";
/// The class that a config names.
pub(crate) const CLASS: &str = "AutoencoderKLQwenImage";
/// More than any model has; keeps products of sizes from overflowing.
const SIZE_MAX: usize = 1 << 16;
const LEVELS_MAX: usize = 8;

const DEFAULT_MEAN: [f64; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
    -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
];
const DEFAULT_STD: [f64; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
    1.6382, 1.1253, 2.8251, 1.9160,
];

#[derive(Debug, Deserialize)]
struct RawConfig {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    #[serde(default = "default_base_dim")]
    base_dim: usize,
    #[serde(default = "default_z_dim")]
    z_dim: usize,
    #[serde(default = "default_dim_mult")]
    dim_mult: Vec<usize>,
    #[serde(default = "default_num_res_blocks")]
    num_res_blocks: usize,
    #[serde(default)]
    attn_scales: Vec<f64>,
    #[serde(default = "default_temperal_downsample")]
    temperal_downsample: Vec<bool>,
    #[serde(default = "default_input_channels")]
    input_channels: usize,
    #[serde(default = "default_mean")]
    latents_mean: Vec<f64>,
    #[serde(default = "default_std")]
    latents_std: Vec<f64>,
    #[serde(flatten)]
    unknown: BTreeMap<String, Value>,
}

fn default_base_dim() -> usize {
    96
}
fn default_z_dim() -> usize {
    16
}
fn default_dim_mult() -> Vec<usize> {
    vec![1, 2, 4, 4]
}
fn default_num_res_blocks() -> usize {
    2
}
fn default_temperal_downsample() -> Vec<bool> {
    vec![false, true, true]
}
fn default_input_channels() -> usize {
    3
}
fn default_mean() -> Vec<f64> {
    DEFAULT_MEAN.to_vec()
}
fn default_std() -> Vec<f64> {
    DEFAULT_STD.to_vec()
}

/// The autoencoder's dimensions, checked.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py#L672-L705>.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Channels at full resolution, before the multipliers.
    pub base_dim: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Multipliers of `base_dim`, one per resolution from full to latent.
    pub dim_mult: Vec<usize>,
    /// Residual blocks of the encoder at each resolution; the decoder has one more.
    pub residual_blocks: usize,
    /// Whether the step to the next lower resolution also halves time. A single picture has no
    /// time, so this only says which tensors the file carries besides.
    pub halves_time: Vec<bool>,
    /// Channels of a picture.
    pub picture_channels: usize,
    /// What is subtracted from each channel of the latents.
    pub latents_mean: Vec<f64>,
    /// What each channel of the latents is divided by.
    pub latents_std: Vec<f64>,
}

impl Config {
    /// Reads `vae/config.json`.
    ///
    /// # Errors
    /// A file that is missing or damaged, another model's config, or dimensions that do not fit
    /// together or are not computed here.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let raw: RawConfig = files.read_json(PATH)?;
        require_class(files, PATH, raw.class_name.as_deref(), CLASS)?;
        // Dropout is for training only.
        refuse_unknown_keys(files, PATH, &raw.unknown, &["dropout"])?;
        require_sizes(files, &raw)?;
        require_latent_statistics(files, &raw)?;
        Ok(Self {
            base_dim: raw.base_dim,
            latent_channels: raw.z_dim,
            dim_mult: raw.dim_mult,
            residual_blocks: raw.num_res_blocks,
            halves_time: raw.temperal_downsample,
            picture_channels: raw.input_channels,
            latents_mean: raw.latents_mean,
            latents_std: raw.latents_std,
        })
    }

    /// Pixels along the side of one latent pixel.
    #[must_use]
    pub fn pixels_per_latent(&self) -> usize {
        1 << self.halves_time.len()
    }

    /// Channels at each resolution from full to latent, with those of the first convolution in
    /// front.
    pub(super) fn channels(&self) -> Vec<usize> {
        std::iter::once(1).chain(self.dim_mult.iter().copied()).map(|m| m * self.base_dim).collect()
    }
}

fn require_sizes(files: &ModelFiles, raw: &RawConfig) -> Result<()> {
    let sizes = [
        ("base_dim", raw.base_dim),
        ("z_dim", raw.z_dim),
        ("num_res_blocks", raw.num_res_blocks),
        ("input_channels", raw.input_channels),
    ]
    .into_iter()
    .chain(raw.dim_mult.iter().map(|&mult| ("dim_mult", mult)));
    for (field, size) in sizes {
        if !(1..=SIZE_MAX).contains(&size) {
            return Err(files.config(PATH, field, size, format!("1 to {SIZE_MAX}")));
        }
    }
    if raw.input_channels != 3 {
        let expected = "3: the picture's red, green and blue";
        return Err(files.config(PATH, "input_channels", raw.input_channels, expected));
    }
    // The reference's encoder fails on them: it passes its cache to blocks that take none.
    if !raw.attn_scales.is_empty() {
        let found = format!("{:?}", raw.attn_scales);
        return Err(files.config(PATH, "attn_scales", found, "[]"));
    }
    if !(2..=LEVELS_MAX).contains(&raw.dim_mult.len()) {
        let expected = format!("2 to {LEVELS_MAX} numbers");
        return Err(files.config(PATH, "dim_mult", format!("{:?}", raw.dim_mult), expected));
    }
    if raw.temperal_downsample.len() + 1 != raw.dim_mult.len() {
        let found = format!("{:?}", raw.temperal_downsample);
        let expected = format!("one less than dim_mult has: {}", raw.dim_mult.len() - 1);
        return Err(files.config(PATH, "temperal_downsample", found, expected));
    }
    // Each enlargement of the decoder halves the channels of its resolution.
    let halved = raw.dim_mult.iter().skip(1).map(|mult| mult * raw.base_dim);
    if let Some(odd) = halved.into_iter().find(|channels| !channels.is_multiple_of(2)) {
        return Err(files.config(PATH, "base_dim", odd, "even channels below full resolution"));
    }
    Ok(())
}

fn require_latent_statistics(files: &ModelFiles, raw: &RawConfig) -> Result<()> {
    let statistics = [("latents_mean", &raw.latents_mean), ("latents_std", &raw.latents_std)];
    for (field, values) in statistics {
        if values.len() != raw.z_dim {
            let found = format!("{} numbers", values.len());
            return Err(files.config(PATH, field, found, format!("z_dim = {}", raw.z_dim)));
        }
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(files.config(PATH, field, value, "finite numbers"));
        }
    }
    match raw.latents_std.iter().find(|&&value| value <= 0.0) {
        Some(value) => Err(files.config(PATH, "latents_std", value, "numbers above 0")),
        None => Ok(()),
    }
}
