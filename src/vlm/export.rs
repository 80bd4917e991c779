//! A model of this kind as the two GGUF files that llama.cpp reads: language model and vision tower.
//!
//! Names and keys are those of llama.cpp's converter, as `gguf.rs` reads them.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    config::{Config, TextConfig},
    names,
    preprocess::Preprocessor,
    template,
    tokenizer::vocabulary_files,
};
use crate::{
    error::{ModelError, Result},
    weights::{
        Checkpoint, ModelFiles,
        write::{Draft, Key, Part, Role},
    },
};

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
/// The architecture in the keys of the language model.
const ARCHITECTURE: &str = "qwen2vl";
/// Frames of a patch that have names in GGUF files.
const FRAMES: usize = 2;
const PATCHES: &str = "visual.patch_embed.proj.weight";

/// One of the two files.
#[derive(Debug)]
pub(crate) struct Exported {
    /// Keys with types and values in bytes.
    pub(crate) keys: Vec<(String, Vec<u8>)>,
    /// Its tensors.
    pub(crate) drafts: Vec<Draft>,
}

/// Both files of the tensors in `checkpoint`, which are under the published names. The tokenizer of
/// a GGUF source is taken over byte by byte.
///
/// # Errors
/// Files that are missing or damaged, or dimensions that the format has no keys for.
pub(crate) fn gguf_files(
    files: &ModelFiles,
    folder: &str,
    checkpoint: &Checkpoint,
) -> Result<[Exported; 2]> {
    let path = format!("{folder}/config.json");
    let config = Config::load(files, &path)?;
    let preprocessor = Preprocessor::load(files, &["processor", folder], &config.vision)?;
    let mut language = Exported { keys: language_keys(&config.text), drafts: Vec::new() };
    language.keys.extend(tokenizer_keys(files, folder, checkpoint, &config)?);
    let keys = tower_keys(files, &path, &config, &preprocessor)?;
    let mut tower = Exported { keys, drafts: Vec::new() };
    for (name, entry) in checkpoint.tensors() {
        let Some(gguf) = names::gguf_name_of(name) else {
            return Err(ModelError::TensorsUnused {
                path: checkpoint.name().to_owned(),
                count: 1,
                names: name.to_owned(),
            }
            .into());
        };
        let draft = |written: String, part, shape, role| Draft {
            name: written,
            source: name.to_owned(),
            part,
            shape,
            role,
        };
        let shape = entry.shape.clone();
        if !name.starts_with("visual.") {
            let role = if name.starts_with("lm_head.") { Role::SixBits } else { Role::Usual };
            language.drafts.push(draft(gguf, Part::Whole, shape, role));
        } else if gguf.contains("attn_qkv") {
            let rows = shape.first().copied().unwrap_or(0).checked_div(3).unwrap_or(0);
            for (third, letter) in ["q", "k", "v"].into_iter().enumerate() {
                let part = Part::Rows(third * rows..(third + 1) * rows);
                let shape = [&[rows], &shape[1..]].concat();
                let written = gguf.replace("attn_qkv", &format!("attn_{letter}"));
                tower.drafts.push(draft(written, part, shape, Role::Kept));
            }
        } else if name == PATCHES {
            for index in 0..FRAMES {
                let mut shape = shape.clone();
                shape.remove(2); // (out, channels, frames, y, x)
                let part = Part::Slice { axis: 2, index };
                let end = if index == 0 { String::new() } else { format!(".{index}") };
                tower.drafts.push(draft(format!("{gguf}{end}"), part, shape, Role::Wide));
            }
        } else {
            tower.drafts.push(draft(gguf, Part::Whole, shape, Role::Kept));
        }
    }
    Ok([language, tower])
}

fn key(name: impl Into<String>, value: &Key<'_>) -> (String, Vec<u8>) {
    (name.into(), value.bytes())
}

/// A size as GGUF keeps it; all are limited when a config is read.
fn size(value: usize) -> Key<'static> {
    Key::U32(u32::try_from(value).unwrap_or(u32::MAX))
}

#[expect(clippy::cast_possible_truncation, reason = "the format keeps f32")]
fn number(value: f64) -> Key<'static> {
    Key::F32(value as f32)
}

fn language_keys(text: &TextConfig) -> Vec<(String, Vec<u8>)> {
    /// The format has room for so many axes.
    const AXES: usize = 4;
    let mut sections: Vec<i32> =
        text.mrope_section.iter().filter_map(|&n| i32::try_from(n).ok()).collect();
    sections.resize(sections.len().max(AXES), 0);
    let of = |name: &str| format!("{ARCHITECTURE}.{name}");
    vec![
        key("general.architecture", &Key::Text(ARCHITECTURE)),
        key("general.type", &Key::Text("model")),
        key(of("block_count"), &size(text.layers)),
        key(of("context_length"), &size(text.max_position_embeddings)),
        key(of("embedding_length"), &size(text.hidden_size)),
        key(of("feed_forward_length"), &size(text.intermediate_size)),
        key(of("attention.head_count"), &size(text.heads)),
        key(of("attention.head_count_kv"), &size(text.kv_heads)),
        key(of("rope.freq_base"), &number(text.rope_theta)),
        key(of("attention.layer_norm_rms_epsilon"), &number(text.rms_norm_eps)),
        key(of("rope.dimension_sections"), &Key::I32s(sections)),
    ]
}

fn tower_keys(
    files: &ModelFiles,
    path: &str,
    config: &Config,
    preprocessor: &Preprocessor,
) -> Result<Vec<(String, Vec<u8>)>> {
    /// llama.cpp's converter writes this side for models that take any.
    const IMAGE_SIDE_PX: u32 = 560;
    let vision = &config.vision;
    let fault = |field: &str, found: String, expected: &str| {
        Err(files.config(path, &format!("vision_config.{field}"), found, expected))
    };
    let full = &vision.full_attention_blocks;
    let period = full.first().map_or(0, |first| first + 1);
    let regular: Vec<usize> = (1..=vision.depth)
        .filter(|block| period > 0 && block.is_multiple_of(period))
        .map(|block| block - 1)
        .collect();
    if *full != regular || period == 0 {
        let expected = "for GGUF, every n-th block, as llama.cpp counts them";
        return fault("fullatt_block_indexes", format!("{full:?}"), expected);
    }
    if vision.temporal_patch_size != FRAMES {
        let found = vision.temporal_patch_size.to_string();
        return fault("temporal_patch_size", found, "2 for GGUF");
    }
    let (mean, std) = preprocessor.channels();
    let of = |name: &str| format!("clip.vision.{name}");
    Ok(vec![
        key("general.architecture", &Key::Text("clip")),
        key("general.type", &Key::Text("mmproj")),
        key("clip.has_vision_encoder", &Key::Bool(true)),
        key("clip.projector_type", &Key::Text("qwen2.5vl_merger")),
        key("clip.use_silu", &Key::Bool(true)),
        key(of("projection_dim"), &size(config.text.hidden_size)),
        key(of("image_size"), &Key::U32(IMAGE_SIDE_PX)),
        key(of("patch_size"), &size(vision.patch_size)),
        key(of("embedding_length"), &size(vision.hidden_size)),
        key(of("feed_forward_length"), &size(vision.intermediate_size)),
        key(of("block_count"), &size(vision.depth)),
        key(of("attention.head_count"), &size(vision.heads)),
        key(of("attention.layer_norm_epsilon"), &number(super::gguf::VISION_EPS)),
        key(of("image_mean"), &Key::F32s(mean.to_vec())),
        key(of("image_std"), &Key::F32s(std.to_vec())),
        key(of("n_wa_pattern"), &size(period)),
        key(of("spatial_merge_size"), &size(vision.merge_size)),
        key(of("window_size"), &size(vision.window_size)),
    ])
}

#[derive(Deserialize)]
struct TokenizerFile {
    model: Bpe,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

fn tokenizer_keys(
    files: &ModelFiles,
    folder: &str,
    checkpoint: &Checkpoint,
    config: &Config,
) -> Result<Vec<(String, Vec<u8>)>> {
    let raw = checkpoint.raw_metadata();
    if raw.contains_key("tokenizer.ggml.tokens") {
        let of_tokenizer = raw.iter().filter(|(name, _)| name.starts_with("tokenizer."));
        return Ok(of_tokenizer
            .map(|(name, value)| ((*name).to_owned(), value.to_vec()))
            .collect());
    }
    let folders = ["tokenizer", "processor", folder];
    let mut json = folders.iter().map(|folder| format!("{folder}/tokenizer.json"));
    let (vocabulary, merges, added) = match json.find(|path| files.exists(path)) {
        Some(path) => {
            let file: TokenizerFile = files.read_json(&path)?;
            let text = |merge| match merge {
                Merge::Text(text) => text,
                Merge::Pair(left, right) => format!("{left} {right}"),
            };
            let merges: Vec<String> = file.model.merges.into_iter().map(text).collect();
            let added = file.added_tokens.into_iter();
            let added: BTreeMap<u32, (String, bool)> =
                added.map(|token| (token.id, (token.content, token.special))).collect();
            (file.model.vocab, merges, added)
        }
        None => vocabulary_files(files, &folders)?,
    };
    let count = config.text.vocab_size;
    let mut tokens: Vec<(String, i32)> =
        (0..count).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    let mut put = |id: u32, token: String, kind| {
        if let Some(place) = tokens.get_mut(id as usize) {
            *place = (token, kind);
        }
    };
    for (token, id) in vocabulary {
        put(id, token, NORMAL);
    }
    let looks_special = |token: &str| token.starts_with("<|") && token.ends_with("|>");
    for (id, (token, special)) in &added {
        let kind = if *special || looks_special(token) { CONTROL } else { USER_DEFINED };
        put(*id, token.clone(), kind);
    }
    let end = added.iter().find(|(_, (token, _))| token == "<|endoftext|>").map(|(id, _)| *id);
    let (texts, kinds) = tokens.into_iter().unzip();
    let mut keys = vec![
        key("tokenizer.ggml.model", &Key::Text("gpt2")),
        key("tokenizer.ggml.pre", &Key::Text("qwen2")),
        key("tokenizer.ggml.tokens", &Key::Texts(texts)),
        key("tokenizer.ggml.token_type", &Key::I32s(kinds)),
        key("tokenizer.ggml.merges", &Key::Texts(merges)),
        key("tokenizer.ggml.add_bos_token", &Key::Bool(false)),
    ];
    if let Some(id) = config.eos_token_ids.first() {
        keys.push(key("tokenizer.ggml.eos_token_id", &Key::U32(*id)));
    }
    if let Some(id) = end {
        keys.push(key("tokenizer.ggml.bos_token_id", &Key::U32(id)));
        keys.push(key("tokenizer.ggml.padding_token_id", &Key::U32(id)));
    }
    if let Some((_, text)) = template::text(files, &["processor", "tokenizer", folder])? {
        keys.push(key("tokenizer.chat_template", &Key::Text(&text)));
    }
    Ok(keys)
}
