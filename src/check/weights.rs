//! A transformer of one block with random weights at the published dimensions, written to a folder as
//! loading reads it.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Result, Tensor};

/// The published dimensions, divided by `shrink` in tests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dimensions {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) conditioning: usize,
    pub(super) latent: usize,
    pub(super) layers: usize,
}

impl Dimensions {
    pub(super) fn new(shrink: usize) -> Self {
        let small = |n: usize| n.div_ceil(shrink.max(1));
        Self {
            heads: small(24),
            head_dim: 128,
            conditioning: small(3584),
            latent: 64,
            layers: small(60),
        }
    }

    fn dim(self) -> usize {
        self.heads * self.head_dim
    }
}

/// The type of the matrices in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Matrices {
    Bf16,
    /// fp8 e4m3 with a scale for each matrix, as ComfyUI writes them.
    Float8,
}

/// Writes `transformer/` below `folder`, unless it is there; everything but the matrices in bf16. With
/// `zero_cond`, references are modulated as free of noise.
pub(super) fn write(
    folder: &Path,
    device: &Device,
    dims: Dimensions,
    matrices: Matrices,
    zero_cond: bool,
) -> Result<()> {
    let folder = folder.join("transformer");
    if folder.join("config.json").is_file() {
        return Ok(());
    }
    fs_err::create_dir_all(&folder)?;
    let mut tensors = HashMap::new();
    for (name, shape) in shapes(dims) {
        let layer = name.strip_suffix(".weight").filter(|_| shape.len() == 2);
        match layer.filter(|layer| matrices == Matrices::Float8 && layer.contains("blocks")) {
            Some(layer) => {
                let scale = Tensor::new(SIZE, &Device::Cpu)?;
                tensors.insert(format!("{layer}.scale_weight"), scale);
                let x = Tensor::randn(0.0_f32, 1.0, shape, device)?.to_device(&Device::Cpu)?;
                tensors.insert(name, x.to_dtype(DType::F8E4M3)?);
            }
            None => {
                let x = Tensor::randn(0.0, SIZE, shape, device)?.to_dtype(DType::BF16)?;
                tensors.insert(name, x.to_device(&Device::Cpu)?);
            }
        }
    }
    candle_core::safetensors::save(&tensors, folder.join("diffusion_pytorch_model.safetensors"))?;
    let config = serde_json::json!({
        "_class_name": "QwenImageTransformer2DModel",
        "num_layers": 1,
        "attention_head_dim": dims.head_dim,
        "num_attention_heads": dims.heads,
        "joint_attention_dim": dims.conditioning,
        "in_channels": dims.latent,
        "out_channels": 16,
        "patch_size": 2,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": false,
        "zero_cond_t": zero_cond,
    });
    fs_err::write(folder.join("config.json"), config.to_string())?;
    Ok(())
}

/// Of the weights, so that sixty blocks stay finite.
const SIZE: f32 = 0.02;

/// Every tensor of a transformer with one block, by its published name.
fn shapes(dims: Dimensions) -> Vec<(String, Vec<usize>)> {
    let dim = dims.dim();
    let mut all = Vec::new();
    let mut linear = |name: &str, width_in: usize, width_out: usize| {
        all.push((format!("{name}.weight"), vec![width_out, width_in]));
        all.push((format!("{name}.bias"), vec![width_out]));
    };
    linear("time_text_embed.timestep_embedder.linear_1", 256, dim);
    linear("time_text_embed.timestep_embedder.linear_2", dim, dim);
    linear("txt_in", dims.conditioning, dim);
    linear("img_in", dims.latent, dim);
    linear("norm_out.linear", dim, 2 * dim);
    linear("proj_out", dim, dims.latent);
    let block = |name: &str| format!("transformer_blocks.0.{name}");
    for side in ["img", "txt"] {
        linear(&block(&format!("{side}_mod.1")), dim, 6 * dim);
        linear(&block(&format!("{side}_mlp.net.0.proj")), dim, 4 * dim);
        linear(&block(&format!("{side}_mlp.net.2")), 4 * dim, dim);
    }
    for name in
        ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    {
        linear(&block(&format!("attn.{name}")), dim, dim);
    }
    for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
        all.push((block(&format!("attn.{name}.weight")), vec![dims.head_dim]));
    }
    all.push(("txt_norm.weight".to_owned(), vec![dims.conditioning]));
    all
}
