//! Config, tokenizer and picture settings from the metadata of GGUF files.
//!
//! The keys are those that llama.cpp's converter writes:
//! <https://github.com/ggml-org/llama.cpp/blob/master/conversion/qwenvl.py> and gguf-py 0.19.

use serde_json::{Map, Value as Json, json};

use crate::{
    error::{ModelError, Result},
    weights::{Checkpoint, gguf::Value},
};

/// What tokens are in `tokenizer.ggml.token_type`.
const NORMAL: u64 = 1;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const TOKENS: &str = "tokenizer.ggml.tokens";
/// The vision tower's norms add this to the mean square.
pub(super) const VISION_EPS: f64 = 1e-6;
/// Side of an attention window in pixels, where a file names none.
const WINDOW_PX: u64 = 112;

/// The text files that a folder has for the language model, made from metadata.
#[derive(Debug)]
pub(crate) struct Texts {
    /// `config.json`.
    pub(crate) config: String,
    /// `preprocessor_config.json`.
    pub(crate) preprocessor: String,
}

/// The tokenizer's files, made from metadata.
#[derive(Debug)]
pub(crate) struct TokenizerTexts {
    /// `vocab.json`.
    pub(crate) vocabulary: String,
    /// `merges.txt`.
    pub(crate) merges: String,
    /// `tokenizer_config.json`.
    pub(crate) config: String,
    /// `chat_template.jinja`, where the file has one.
    pub(crate) chat_template: Option<String>,
}

/// The architecture that the language model's keys begin with.
///
/// # Errors
/// Another architecture.
pub(crate) fn architecture(language: &Checkpoint) -> Result<&str> {
    let name = language.value("general.architecture").and_then(Value::as_text);
    match name {
        None => Ok("qwen2vl"),
        Some(name) if name.starts_with("qwen2") && name.ends_with("vl") => Ok(name),
        Some(name) => Err(kind(language, name, "qwen2vl, as language models of Qwen2.5-VL")),
    }
}

fn kind(checkpoint: &Checkpoint, found: &str, expected: &str) -> crate::Error {
    ModelError::Kind {
        path: checkpoint.name().to_owned(),
        found: found.to_owned(),
        expected: expected.to_owned(),
    }
    .into()
}

/// Checks that these are a language model and its vision tower, and writes their config.
///
/// # Errors
/// Files of another architecture, or keys that are missing or not computed with.
pub(crate) fn texts(language: &Checkpoint, vision: &Checkpoint) -> Result<Texts> {
    let (text, vocabulary) = text_config(language)?;
    let tower = vision_config(vision)?;
    let image_token = language
        .list(TOKENS, |token| token.as_text().map(|token| token == super::IMAGE_PLACEHOLDER))?
        .iter()
        .position(|is_image| *is_image);
    let Some(image_token) = image_token else {
        return Err(language.metadata_fault(
            TOKENS,
            format!("{vocabulary} tokens"),
            format!("{} among them", super::IMAGE_PLACEHOLDER),
        ));
    };
    let channels = |key: &str| -> Result<Json> {
        // Decimal digits as they are written in the published file, not f32's own.
        let digit = |value: Value| value.as_f64().map(|number| short(number).to_string());
        let digits = vision.list(key, digit)?;
        Ok(digits.iter().filter_map(|digits| digits.parse::<f64>().ok()).collect())
    };
    let preprocessor = json!({
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 16_384,
        "patch_size": tower["patch_size"],
        "temporal_patch_size": tower["temporal_patch_size"],
        "merge_size": tower["spatial_merge_size"],
        "image_mean": channels("clip.vision.image_mean")?,
        "image_std": channels("clip.vision.image_std")?,
    });
    let config = json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": image_token,
        "tie_word_embeddings": !language.contains("output.weight"),
        "text_config": text,
        "vision_config": tower,
    });
    Ok(Texts { config: config.to_string(), preprocessor: preprocessor.to_string() })
}

/// The shortest number that is the same as an f32.
#[expect(clippy::cast_possible_truncation, reason = "the file holds f32")]
fn short(number: f64) -> f32 {
    number as f32
}

/// The language model's config and the size of its vocabulary.
fn text_config(language: &Checkpoint) -> Result<(Map<String, Json>, usize)> {
    let name = architecture(language)?;
    let size = |key: &str| whole(language, &format!("{name}.{key}"));
    let vocabulary = rows(language, "token_embd.weight")?;
    let mut config = Map::new();
    for (key, ours) in [
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("context_length", "max_position_embeddings"),
    ] {
        config.insert(ours.to_owned(), size(key)?.into());
    }
    let eps = number(language, &format!("{name}.attention.layer_norm_rms_epsilon"))?;
    let theta = number(language, &format!("{name}.rope.freq_base"))?;
    let sections = format!("{name}.rope.dimension_sections");
    let mut sections = match language.value(&sections) {
        Some(_) => language.list(&sections, |value| value.as_u64())?,
        None => vec![16, 24, 24],
    };
    while sections.last() == Some(&0) {
        sections.pop(); // the format keeps room for a fourth axis
    }
    config.insert("vocab_size".to_owned(), vocabulary.into());
    config.insert("hidden_act".to_owned(), "silu".into());
    config.insert("rms_norm_eps".to_owned(), eps.into());
    let rope = json!({ "rope_type": "default", "rope_theta": theta, "mrope_section": sections });
    config.insert("rope_parameters".to_owned(), rope);
    if let Some(end) = language.value("tokenizer.ggml.eos_token_id").and_then(Value::as_u64) {
        config.insert("eos_token_id".to_owned(), end.into());
    }
    Ok((config, vocabulary))
}

fn vision_config(vision: &Checkpoint) -> Result<Json> {
    const EXPECTED: &str = "clip with a vision tower of Qwen2.5-VL (a mmproj file)";
    match vision.value("general.architecture").and_then(Value::as_text) {
        Some("clip") | None => {}
        Some(other) => return Err(kind(vision, other, EXPECTED)),
    }
    let projector = ["clip.projector_type", "clip.vision.projector_type"]
        .iter()
        .find_map(|key| vision.value(key).and_then(Value::as_text));
    if let Some(other) =
        projector.filter(|name| !name.starts_with("qwen2") || !name.ends_with("vl_merger"))
    {
        return Err(kind(vision, other, EXPECTED));
    }
    if vision.value("clip.use_silu").and_then(Value::as_bool) == Some(false) {
        return Err(vision.metadata_fault("clip.use_silu", false, "true, as in Qwen2.5-VL"));
    }
    let eps = vision.value("clip.vision.attention.layer_norm_epsilon").and_then(Value::as_f64);
    if let Some(eps) = eps.filter(|eps| (eps - VISION_EPS).abs() > VISION_EPS * 1e-3) {
        let key = "clip.vision.attention.layer_norm_epsilon";
        return Err(vision.metadata_fault(key, eps, VISION_EPS));
    }
    let depth = whole(vision, "clip.vision.block_count")?;
    let period = whole(vision, "clip.vision.n_wa_pattern")?;
    // Every so many blocks, the last of them sees the whole picture.
    let full: Vec<u64> =
        (0..depth.min(1 << 12)).filter(|block| (block + 1).is_multiple_of(period)).collect();
    let or = |key: &str, default: u64| vision.value(key).and_then(Value::as_u64).unwrap_or(default);
    Ok(json!({
        "depth": depth,
        "hidden_size": rows(vision, "v.patch_embd.weight")?,
        "intermediate_size": rows(vision, "v.blk.0.ffn_gate.weight")?,
        "num_heads": whole(vision, "clip.vision.attention.head_count")?,
        "out_hidden_size": rows(vision, "mm.2.weight")?,
        "patch_size": whole(vision, "clip.vision.patch_size")?,
        "temporal_patch_size": if vision.contains("v.patch_embd.weight.1") { 2 } else { 1 },
        "spatial_merge_size": or("clip.vision.spatial_merge_size", 2),
        "window_size": or("clip.vision.window_size", WINDOW_PX),
        "fullatt_block_indexes": full,
        "hidden_act": "silu",
    }))
}

/// The tokenizer in a language model's metadata.
///
/// # Errors
/// Metadata that are missing or of another kind of tokenizer.
pub(crate) fn tokenizer_texts(language: &Checkpoint) -> Result<TokenizerTexts> {
    for (key, expected) in [("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")] {
        let found = language.value(key).and_then(Value::as_text);
        if let Some(other) = found.filter(|found| *found != expected) {
            return Err(language.metadata_fault(key, other, expected));
        }
    }
    let text = |value: Value| match value {
        Value::Text(text) => Some(text),
        _ => None,
    };
    let tokens = language.list(TOKENS, text)?;
    let kinds = language.list("tokenizer.ggml.token_type", |value| value.as_u64())?;
    if kinds.len() != tokens.len() {
        let found = format!("{} types of {} tokens", kinds.len(), tokens.len());
        return Err(language.metadata_fault("tokenizer.ggml.token_type", found, "one for each"));
    }
    let (mut vocabulary, mut added) = (Map::new(), Map::new());
    for (id, (token, kind)) in tokens.into_iter().zip(kinds).enumerate() {
        match kind {
            NORMAL => drop(vocabulary.insert(token, id.into())),
            CONTROL | USER_DEFINED => {
                let entry = json!({ "content": token, "special": kind == CONTROL });
                added.insert(id.to_string(), entry);
            }
            _ => {} // fills the matrix up, and is never written
        }
    }
    let merges = language.list("tokenizer.ggml.merges", text)?;
    let chat_template = language.value("tokenizer.chat_template").and_then(Value::as_text);
    Ok(TokenizerTexts {
        vocabulary: Json::Object(vocabulary).to_string(),
        merges: merges.join("\n"),
        config: json!({ "added_tokens_decoder": added }).to_string(),
        chat_template: chat_template.map(str::to_owned),
    })
}

/// A whole number above zero.
fn whole(checkpoint: &Checkpoint, key: &str) -> Result<u64> {
    let value = checkpoint.value(key);
    value.and_then(Value::as_u64).filter(|value| *value > 0).ok_or_else(|| {
        let found = value.map_or_else(|| "nothing".to_owned(), ToString::to_string);
        checkpoint.metadata_fault(key, found, "a whole number above zero")
    })
}

fn number(checkpoint: &Checkpoint, key: &str) -> Result<f64> {
    let value = checkpoint.value(key);
    let number =
        value.and_then(Value::as_f64).and_then(|value| short(value).to_string().parse().ok());
    // JSON has no word for other numbers: they would become null, which stands for a default.
    number.filter(|number: &f64| number.is_finite()).ok_or_else(|| {
        let found = value.map_or_else(|| "nothing".to_owned(), ToString::to_string);
        checkpoint.metadata_fault(key, found, "a number")
    })
}

/// Rows of a tensor that has to be there.
fn rows(checkpoint: &Checkpoint, tensor: &str) -> Result<usize> {
    let rows = checkpoint.shape(tensor).and_then(|shape| shape.first().copied());
    rows.ok_or_else(|| {
        let path = checkpoint.name().to_owned();
        let near = " (is this the right file?)".to_owned();
        ModelError::TensorMissing { path, tensor: tensor.to_owned(), near }.into()
    })
}
