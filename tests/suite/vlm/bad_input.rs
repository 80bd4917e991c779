//! Files and prompts that are refused, and what the messages say.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use image::RgbImage;
use pentimento::{Error, vlm::IMAGE_PLACEHOLDER, weights::Precision};
use serde_json::{Value, json};

use super::{computed_picture, load, open, read_json};
use crate::common::Reference;

/// A copy of a reference's files, to be damaged.
fn copy_of(name: &str) -> (tempfile::TempDir, PathBuf) {
    let source = Reference::open(name).folder;
    let target = tempfile::tempdir().unwrap();
    for part in ["text_encoder", "tokenizer", "processor"] {
        let Ok(entries) = fs_err::read_dir(source.join(part)) else { continue };
        fs_err::create_dir(target.path().join(part)).unwrap();
        for entry in entries {
            let entry = entry.unwrap();
            fs_err::copy(entry.path(), target.path().join(part).join(entry.file_name())).unwrap();
        }
    }
    let path = target.path().to_owned();
    (target, path)
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = read_json(path);
    edit(&mut value);
    fs_err::write(path, value.to_string()).unwrap();
}

#[track_caller]
fn refused(folder: &Path, words: &[&str]) {
    let error = load(folder, &Precision::reference()).unwrap_err();
    assert!(error.is_model(), "{error}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message}\nlacks {word:?}");
    }
}

#[test]
fn configs_that_cannot_be_computed_are_refused() {
    type Edit = fn(&mut Value);
    let nested: [(Edit, &[&str]); 16] = [
        (
            |c| c["architectures"][0] = json!("Qwen2VLForConditionalGeneration"),
            &["Qwen2VLFor", "Qwen2_5_VLFor"],
        ),
        (|c| c["model_type"] = json!("llama"), &["config.json", "llama"]),
        (
            |c| c["text_config"]["num_attention_heads"] = json!(5),
            &["hidden_size", "64", "multiple", "5"],
        ),
        (
            |c| c["text_config"]["num_key_value_heads"] = json!(3),
            &["num_attention_heads", "multiple", "3"],
        ),
        (
            |c| c["text_config"]["rope_parameters"]["mrope_section"] = json!([2, 3, 4]),
            &["mrope_section", "16"],
        ),
        (
            |c| c["text_config"]["rope_parameters"]["rope_type"] = json!("yarn"),
            &["rope_type", "yarn"],
        ),
        (|c| c["text_config"]["rope_parameters"]["factor"] = json!(2), &["rope_parameters.factor"]),
        (|c| c["text_config"]["hidden_act"] = json!("gelu"), &["text_config.hidden_act", "silu"]),
        (|c| c["text_config"]["layer_types"][0] = json!("sliding_attention"), &["layer_types"]),
        (
            |c| c["text_config"]["logit_scale"] = json!(0.5),
            &["text_config.logit_scale", "arithmetic"],
        ),
        (|c| c["quantization_config"] = json!({"bits": 4}), &["quantization_config"]),
        (|c| c["vision_config"]["num_heads"] = json!(3), &["vision_config.hidden_size", "3"]),
        (|c| c["vision_config"]["out_hidden_size"] = json!(32), &["out_hidden_size", "64"]),
        (|c| c["vision_config"]["window_size"] = json!(20), &["window_size", "28 px"]),
        (|c| c["vision_config"]["depth"] = json!(0), &["vision_config.depth", "0"]),
        (|c| c["image_token_id"] = json!(3), &["image_token_id", "3", IMAGE_PLACEHOLDER]),
    ];
    for (edit, words) in nested {
        let (_guard, folder) = copy_of("tiny-qwen-edit");
        edit_json(&folder.join("text_encoder/config.json"), edit);
        refused(&folder, words);
    }
    let (_guard, folder) = copy_of("../vlm/flat");
    edit_json(&folder.join("text_encoder/config.json"), |c| c["use_sliding_window"] = json!(true));
    load(&folder, &Precision::reference()).unwrap();
    edit_json(&folder.join("text_encoder/config.json"), |c| c["max_window_layers"] = json!(1));
    refused(&folder, &["use_sliding_window"]);
}

#[test]
fn damaged_files_are_refused_by_name() {
    type Edit = fn(&Path);
    let edits: [(&str, Edit, &[&str]); 9] = [
        (
            "text_encoder/config.json",
            |p| fs_err::remove_file(p).unwrap(),
            &["config.json", "not found"],
        ),
        ("text_encoder/config.json", |p| fs_err::write(p, "{\"a\":").unwrap(), &["config.json"]),
        (
            "text_encoder/model.safetensors",
            |p| fs_err::remove_file(p).unwrap(),
            &["model.safetensors"],
        ),
        (
            "tokenizer/tokenizer.json",
            |p| fs_err::write(p, "{}").unwrap(),
            &["tokenizer.json", "a tokenizer"],
        ),
        (
            "tokenizer/tokenizer.json",
            |p| fs_err::write(p, [255, 254]).unwrap(),
            &["tokenizer.json", "UTF-8"],
        ),
        (
            "processor/processor_config.json",
            |p| fs_err::remove_file(p).unwrap(),
            &["preprocessor_config.json"],
        ),
        (
            "processor/processor_config.json",
            |p| edit_json(p, |c| c["image_processor"]["patch_size"] = json!(16)),
            &["patch_size", "16", "14"],
        ),
        (
            "processor/processor_config.json",
            |p| edit_json(p, |c| c["image_processor"]["do_resize"] = json!(false)),
            &["do_resize"],
        ),
        (
            "text_encoder/generation_config.json",
            |p| edit_json(p, |c| c["num_beams"] = json!(4)),
            &["num_beams", "4"],
        ),
    ];
    for (file, edit, words) in edits {
        let (_guard, folder) = copy_of("tiny-qwen-edit");
        edit(&folder.join(file));
        refused(&folder, words);
    }
    let (_guard, folder) = copy_of("../vlm/flat");
    let merges = folder.join("tokenizer/merges.txt");
    fs_err::write(&merges, "#version: 0.2\na b c\n").unwrap();
    refused(&folder, &["merges.txt", "line 2"]);
    fs_err::write(&merges, "zzz qqq\n").unwrap();
    refused(&folder, &["merges.txt"]);
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    type Edit = fn(&mut HashMap<String, Tensor>);
    let edits: [(Edit, &[&str]); 6] = [
        (|t| drop(t.remove("model.norm.weight")), &["model.norm.weight", "missing"]),
        (|t| drop(t.remove("lm_head.weight")), &["lm_head.weight", "tie_word_embeddings"]),
        (
            |t| drop(t.insert("visual.merger.ln_q.weight".into(), t["model.norm.weight"].clone())),
            &["visual.merger.ln_q.weight", "[64]", "[32]"],
        ),
        (
            |t| drop(t.insert("lm_head.weight".into(), t["model.norm.weight"].clone())),
            &["lm_head.weight", "[64]"],
        ),
        (
            |t| {
                drop(t.insert(
                    "model.language_model.norm.weight".into(),
                    t["model.norm.weight"].clone(),
                ))
            },
            &["model.norm.weight", "twice"],
        ),
        (
            |t| drop(t.insert("model.layers.9.extra".into(), t["model.norm.weight"].clone())),
            &["model.layers.9.extra", "not part of the model"],
        ),
    ];
    for (edit, words) in edits {
        let (_guard, folder) = copy_of("tiny-qwen-edit");
        let path = folder.join("text_encoder/model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        refused(&folder, words);
    }
}

#[test]
fn prompts_that_cannot_be_answered_are_refused() {
    let model = open(&Reference::open("tiny-qwen-edit"));
    let small = computed_picture(40, 40);
    let refused = |text: &str, pictures: &[RgbImage], words: &[&str]| {
        let error = model.prepare(text, pictures).unwrap_err();
        assert!(matches!(error, Error::Request(_)), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{error}\nlacks {word:?}");
        }
    };
    refused("", &[], &["prompt", "no text"]);
    refused("no placeholder", std::slice::from_ref(&small), &["0 × <|image_pad|>", "1 pictures"]);
    refused("<|image_pad|><|image_pad|>", &[small], &["2 × <|image_pad|>", "1 pictures"]);
    refused(&"make it red ".repeat(8_334), &[], &["tokens", "at most 4096 tokens"]);
    refused(&"x".repeat(5 << 20), &[], &["prompt", "bytes"]);
    refused("<|image_pad|>", &[RgbImage::new(0, 5)], &["image", "0 × 5"]);
    refused("<|image_pad|>", &[RgbImage::new(1, 201)], &["image", "1 × 201", "200 to 1"]);
    model.prepare("<|image_pad|>", &[RgbImage::new(1, 200)]).unwrap();
    model.prepare("<|image_pad|>", &[RgbImage::new(1, 1)]).unwrap();
}
