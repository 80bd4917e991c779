//! The keys of `config.json`: those that are read, and those that leave the arithmetic unchanged.

use serde_json::{Map, Value};

use crate::{error::Result, weights::ModelFiles};

/// Keys at the top.
pub(super) const ROOT: &[&str] = &[
    "image_token_id",
    "tie_word_embeddings",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
];

/// Keys of the language model: below `text_config`, or at the top in the older form.
pub(super) const TEXT: &[&str] = &[
    "attention_dropout",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "image_token_id",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
    "vocab_size",
];

/// Keys below `vision_config`.
pub(super) const VISION: &[&str] = &[
    "depth",
    "fullatt_block_indexes",
    "hidden_act",
    "hidden_size",
    "in_channels",
    "in_chans",
    "initializer_range",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "rope_parameters",
    "spatial_merge_size",
    "spatial_patch_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
];

/// Keys of the language model's rotary embedding.
pub(super) const ROPE: &[&str] = &["mrope_section", "rope_theta", "rope_type", "type"];

/// Keys that any config may hold and that change nothing here: bookkeeping of the library that
/// wrote it, training, and defaults of text generation.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// The older form: the language model's keys stand at the top. What remains there is the top's own.
pub(super) fn take_text(root: &mut Map<String, Value>) -> Map<String, Value> {
    let own = |key: &str| ROOT.contains(&key) && key != "tie_word_embeddings";
    let keys: Vec<String> =
        root.keys().filter(|key| TEXT.contains(&key.as_str()) && !own(key)).cloned().collect();
    keys.into_iter().filter_map(|key| root.remove_entry(&key)).collect()
}

/// Refuses keys of `map` that are neither `known` nor harmless.
///
/// # Errors
/// The first such key, as an error of its field.
pub(super) fn check(
    files: &ModelFiles,
    path: &str,
    section: &str,
    map: &Map<String, Value>,
    known: &[&str],
) -> Result<()> {
    // A nested config may repeat the language model's keys at the top; the nested ones count.
    let repeated = |key: &str| section.is_empty() && TEXT.contains(&key);
    let unknown = map.iter().find(|(key, value)| {
        let key = key.as_str();
        !known.contains(&key) && !HARMLESS.contains(&key) && !repeated(key) && !value.is_null()
    });
    match unknown {
        None => Ok(()),
        Some((key, value)) => {
            let expected = "no such key: it may change the arithmetic";
            Err(files.config(path, &format!("{section}{key}"), value, expected))
        }
    }
}
