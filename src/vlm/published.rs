//! The published sizes of Qwen2.5-VL, for weight files that come without a config.

use serde_json::{Map, Value, json};

use super::canonical_name;
use crate::weights::{Checkpoint, depth};

/// A tensor whose length tells the sizes apart.
const SIGN: &str = "model.layers.0.self_attn.k_proj.bias";

/// What differs between the published sizes.
struct Size {
    /// Length of [`SIGN`].
    sign: usize,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocabulary: usize,
    tied: bool,
}

/// <https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/config.json> and the same of 3B.
const SIZES: [Size; 2] = [
    Size {
        sign: 512,
        hidden: 3584,
        inner: 18_944,
        layers: 28,
        heads: 28,
        kv_heads: 4,
        vocabulary: 152_064,
        tied: false,
    },
    Size {
        sign: 256,
        hidden: 2048,
        inner: 11_008,
        layers: 36,
        heads: 16,
        kv_heads: 2,
        vocabulary: 151_936,
        tied: true,
    },
];

/// `config.json` of the published model that the weights are of; `None` for another size.
pub(crate) fn config(checkpoint: &Checkpoint) -> Option<String> {
    let mut tensors = checkpoint.tensors();
    let (_, sign) = tensors.find(|(name, _)| canonical_name(name) == SIGN)?;
    let size = SIZES.iter().find(|size| sign.shape == [size.sign])?;
    Some(json_of(size).to_string())
}

/// Whether a `config.json` is of the width, depth and vocabulary that the weights have.
pub(crate) fn fits(config: &Map<String, Value>, checkpoint: &Checkpoint) -> bool {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    let text = config.get("text_config").and_then(Value::as_object).unwrap_or(config);
    let size = |part: Option<&Map<String, Value>>, key: &str| {
        part.and_then(|part| part.get(key)?.as_u64()).and_then(|size| usize::try_from(size).ok())
    };
    let names: Vec<(String, &[usize])> = checkpoint
        .tensors()
        .map(|(name, entry)| (canonical_name(name), entry.shape.as_slice()))
        .collect();
    let blocks = |start: &str| depth(names.iter().map(|(name, _)| name.as_str()), start);
    let embedding = names.iter().find(|(name, _)| name == EMBEDDING).map(|(_, shape)| *shape);
    let vision = config.get("vision_config").and_then(Value::as_object);
    let written = [size(Some(text), "vocab_size"), size(Some(text), "hidden_size")];
    embedding.is_some_and(|shape| shape.iter().copied().map(Some).eq(written))
        && blocks("model.layers.") == size(Some(text), "num_hidden_layers")
        && blocks("visual.blocks.") == size(vision, "depth")
}

/// `preprocessor_config.json` of every published size.
pub(crate) fn preprocessor() -> String {
    let (min, max) = (56 * 56, 28 * 28 * 16_384);
    json!({ "min_pixels": min, "max_pixels": max, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2 })
        .to_string()
}

fn json_of(size: &Size) -> Value {
    json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": 151_655,
        "tie_word_embeddings": size.tied,
        "text_config": {
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": { "type": "mrope", "mrope_section": [16, 24, 24] },
            "eos_token_id": 151_645,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": size.hidden,
            "patch_size": 14,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    })
}
