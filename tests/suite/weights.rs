//! Weight files: what is read, and what damaged or foreign files say.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use pentimento::{
    Engine, EngineOptions, Error, ModelInfo, ModelSource,
    layers::Linear,
    weights::{Checkpoint, ModelFiles, Precision, Storage, Weights, identify},
};

use crate::{common::Reference, engine};

fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

/// Opens a copy of a reference in which `change` was made, and returns what the engine says.
#[track_caller]
fn message_after(name: &str, change: impl FnOnce(&Path)) -> String {
    let reference = Reference::open(name);
    let folder = tempfile::tempdir().unwrap();
    engine::copy(&reference.folder, folder.path());
    change(folder.path());
    let source = ModelSource::Folder(folder.path().to_owned());
    let options = EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() };
    let error = Engine::open(&source, &options, &()).unwrap_err();
    assert!(error.is_model(), "{error:?}");
    error.to_string()
}

/// Rewrites one weight file of a folder.
fn edit_tensors(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";

#[test]
fn damaged_files_are_named() {
    let truncate = |bytes: u64| {
        move |folder: &Path| {
            let file =
                fs_err::OpenOptions::new().write(true).open(folder.join(TRANSFORMER)).unwrap();
            file.set_len(bytes).unwrap();
        }
    };
    let replace = |text: &'static str| {
        move |folder: &Path| fs_err::write(folder.join(TRANSFORMER), text).unwrap()
    };
    let edit = "tiny-qwen-edit";
    assert_says(&message_after(edit, truncate(100_000)), &[TRANSFORMER, "byte", "truncated"]);
    assert_says(&message_after(edit, truncate(500)), &[TRANSFORMER, "truncated"]);
    assert_says(&message_after(edit, truncate(0)), &[TRANSFORMER, "empty"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
    assert_says(&message_after(edit, replace(pointer)), &[TRANSFORMER, "git lfs pull"]);
    assert_says(
        &message_after(edit, replace("<!DOCTYPE html><html></html>")),
        &[TRANSFORMER, "HTML"],
    );
    let remove = |folder: &Path| fs_err::remove_file(folder.join(TRANSFORMER)).unwrap();
    assert_says(&message_after(edit, remove), &[TRANSFORMER, "not found"]);
}

#[test]
fn foreign_tensors_are_named() {
    let change = |change: fn(&mut HashMap<String, Tensor>)| {
        message_after("tiny-qwen-edit", |folder| edit_tensors(&folder.join(TRANSFORMER), change))
    };
    let missing = change(|tensors| drop(tensors.remove("transformer_blocks.1.attn.to_q.weight")));
    assert_says(&missing, &[TRANSFORMER, "transformer_blocks.1.attn.to_q.weight", "missing"]);
    let extra = change(|tensors| drop(tensors.insert("surplus.weight".into(), ones(&[2]))));
    assert_says(&extra, &[TRANSFORMER, "surplus.weight", "1 tensors"]);
    let shape = change(|tensors| drop(tensors.insert("proj_out.bias".into(), ones(&[7]))));
    assert_says(&shape, &[TRANSFORMER, "proj_out.bias", "[7]", "[64]"]);
    let kind = change(|tensors| {
        let ids = Tensor::zeros(64, DType::U32, &Device::Cpu).unwrap();
        tensors.insert("proj_out.bias".into(), ids);
    });
    assert_says(&kind, &[TRANSFORMER, "proj_out.bias", "U32", "BF16"]);
}

#[test]
fn foreign_folders_are_named() {
    let replace = |file: &'static str, from: &'static str, to: &'static str| {
        message_after("tiny-qwen-edit", move |folder| {
            let path = folder.join(file);
            let text = fs_err::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            fs_err::write(path, text.replace(from, to)).unwrap();
        })
    };
    let class = replace("model_index.json", "QwenImageEditPipeline", "FluxKontextPipeline");
    assert_says(&class, &["model_index.json", "FluxKontextPipeline", "QwenImageEditPlusPipeline"]);
    let json = replace("transformer/config.json", "{", "[");
    assert_says(&json, &["transformer/config.json", "a list", "a JSON object"]);
    let axes = replace(
        "transformer/config.json",
        "\"num_attention_heads\": 3",
        "\"num_attention_heads\": 0",
    );
    assert_says(&axes, &["transformer/config.json", "num_attention_heads"]);
    let guided = replace(
        "transformer/config.json",
        "\"guidance_embeds\": false",
        "\"guidance_embeds\": true",
    );
    assert_says(&guided, &["transformer/config.json", "guidance_embeds"]);
    let missing = message_after("tiny-qwen-edit", |folder| {
        fs_err::remove_file(folder.join("model_index.json")).unwrap();
    });
    assert_says(&missing, &["model_index.json"]);
    let encoder = message_after("tiny-qwen-edit", |folder| {
        fs_err::remove_dir_all(folder.join("text_encoder")).unwrap();
    });
    assert_says(&encoder, &["text_encoder"]);
}

#[test]
fn shards_read_as_the_single_file() {
    let reference = Reference::open("tiny-qwen-edit");
    let folder = tempfile::tempdir().unwrap();
    engine::copy(&reference.folder, folder.path());
    let single = folder.path().join(TRANSFORMER);
    let tensors = candle_core::safetensors::load(&single, &Device::Cpu).unwrap();
    let digest =
        |folder: &Path| ModelInfo::read(&ModelSource::Folder(folder.to_owned())).unwrap().digest;
    let before = digest(folder.path());
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let (first, second) = names.split_at(names.len() / 2);
    let mut map = serde_json::Map::new();
    for (shard, names) in [("shard-1.safetensors", first), ("shard-2.safetensors", second)] {
        let part: HashMap<&str, Tensor> =
            names.iter().map(|name| (name.as_str(), tensors[*name].clone())).collect();
        candle_core::safetensors::save(&part, folder.path().join("transformer").join(shard))
            .unwrap();
        map.extend(names.iter().map(|name| ((*name).clone(), shard.into())));
    }
    fs_err::remove_file(&single).unwrap();
    let index = folder.path().join("transformer/diffusion_pytorch_model.safetensors.index.json");
    fs_err::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    assert_eq!(digest(folder.path()), before);
    let source = ModelSource::Folder(folder.path().to_owned());
    Engine::open(&source, &EngineOptions::default(), &()).unwrap();

    // A listed shard that is not there, and a listed tensor that is in no shard.
    fs_err::rename(
        folder.path().join("transformer/shard-2.safetensors"),
        folder.path().join("away"),
    )
    .unwrap();
    let error = Engine::open(&source, &EngineOptions::default(), &()).unwrap_err().to_string();
    assert_says(&error, &["shard-2.safetensors", "not found"]);
    fs_err::write(&index, r#"{"weight_map":{"ghost":"shard-1.safetensors"}}"#).unwrap();
    let error = Engine::open(&source, &EngineOptions::default(), &()).unwrap_err().to_string();
    assert_says(&error, &["ghost", "no shard"]);
    fs_err::write(&index, r#"{"weight_map":{"a":"../../etc/passwd"}}"#).unwrap();
    let error = Engine::open(&source, &EngineOptions::default(), &()).unwrap_err().to_string();
    assert_says(&error, &["../../etc/passwd", "a file name"]);
}

#[test]
fn hostile_headers_are_typed_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let header = |json: &str, data: usize| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        fs_err::write(&path, bytes).unwrap();
        match Checkpoint::open_file(&path) {
            Err(Error::Model(error)) => error.to_string(),
            other => panic!("{json}: {other:?}"),
        }
    };
    let overlapping = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#;
    let huge = r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#;
    let backwards = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#;
    let beyond = r#"{"a":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}"#;
    let gap = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    for (json, data) in [
        (overlapping, 6),
        (huge, 8),
        (backwards, 8),
        (beyond, 4),
        (gap, 40),
        ("{", 0),
        ("{\"a\":1}", 0),
    ] {
        assert_says(&header(json, data), &["x.safetensors"]);
    }
    fs_err::write(&path, [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat()).unwrap();
    assert!(matches!(Checkpoint::open_file(&path), Err(Error::Model(_))));
}

#[test]
fn a_linear_layer_in_a_smaller_type_is_near_the_plain_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let random = |shape: &[usize]| Tensor::randn(0_f32, 1.0, shape, &Device::Cpu).unwrap();
    save(&path, &[("fc.weight", random(&[48, 64])), ("fc.bias", random(&[48]))]);
    let x = random(&[5, 64]);
    let run = |storage| {
        let precision = Precision { storage, ..Precision::reference() };
        let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), precision);
        let y = Linear::load(&weights.pp("fc"), 64, 48).unwrap().forward(&x).unwrap();
        weights.finish(&[]).unwrap();
        y
    };
    let exact = run(Storage::Compute);
    for (storage, limit) in [
        (Storage::Plain(DType::BF16), 0.2),
        (Storage::Plain(DType::F16), 0.03),
        (Storage::Q8_0, 0.6),
        // Rows of 64 are no whole super-block: they become Q8_0.
        (Storage::Q4K, 0.6),
    ] {
        let difference = (run(storage) - &exact).unwrap().abs().unwrap().max_all().unwrap();
        let difference: f32 = difference.to_scalar().unwrap();
        assert!(difference > 0.0 && difference < limit, "{storage:?}: {difference}");
    }
}

#[test]
fn leftovers_and_ignore_lists() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    save(&path, &[("a", ones(&[1])), ("b.c", ones(&[1])), ("b.d", ones(&[1]))]);
    let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), Precision::reference());
    weights.tensor("a", &[1]).unwrap();
    assert_says(&weights.finish(&[]).unwrap_err().to_string(), &["2 tensors", "b.c, b.d"]);
    weights.finish(&["b."]).unwrap();
    let missing = weights.pp("b").tensor("e", &[1]).unwrap_err().to_string();
    assert_says(&missing, &["b.e", "missing"]);
}

#[test]
fn a_variant_is_found_when_it_is_the_only_one() {
    let folder = tempfile::tempdir().unwrap();
    fs_err::create_dir(folder.path().join("vae")).unwrap();
    let files = ModelFiles::Folder(folder.path().to_owned());
    let error = files.checkpoint("vae", "model").unwrap_err().to_string();
    assert_says(&error, &["vae/model.safetensors", "not found"]);
    save(&folder.path().join("vae/model.fp16.safetensors"), &[("a", ones(&[1]))]);
    assert!(files.checkpoint("vae", "model").unwrap().contains("a"));
}

#[test]
fn files_are_told_apart_by_their_tensors() {
    let reference = Reference::open("tiny-qwen-edit");
    let model =
        |path: &str| identify(&Checkpoint::open_file(&reference.folder.join(path)).unwrap());
    assert_eq!(model(TRANSFORMER), Some("Qwen-Image transformer"));
    assert_eq!(model("text_encoder/model.safetensors"), Some("Qwen2.5-VL"));
    assert_eq!(model("vae/diffusion_pytorch_model.safetensors"), Some("Qwen-Image autoencoder"));
    assert_eq!(model("cases/cases.safetensors"), None);
}

#[test]
fn the_version_comes_from_the_folder() {
    let version = |name: &str| {
        ModelInfo::read(&ModelSource::Folder(Reference::open(name).folder)).unwrap().version
    };
    assert_eq!(version("tiny-qwen-edit"), "Qwen-Image-Edit");
    assert_eq!(version("tiny-qwen-plus"), "Qwen-Image-Edit-2509");
    assert_eq!(version("tiny-qwen-2511"), "Qwen-Image-Edit-2511");
}

#[test]
fn rows_are_read_where_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.safetensors");
    let numbers = Tensor::arange(0_f32, 40.0, &Device::Cpu).unwrap().reshape((10, 4)).unwrap();
    let halves = numbers.to_dtype(DType::BF16).unwrap();
    let tensors = [("wide.weight", numbers.clone()), ("half.weight", halves)];
    candle_core::safetensors::save(&tensors.into_iter().collect(), &path).unwrap();
    let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), Precision::reference());
    for name in ["wide", "half"] {
        let rows = weights.pp(name).file_rows("weight", [10, 4]).unwrap().unwrap();
        let picked = rows.pick(&[9, 0, 9]).unwrap().to_dtype(DType::F32).unwrap();
        let expected = [36., 37., 38., 39., 0., 1., 2., 3., 36., 37., 38., 39.];
        assert_eq!(picked.flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);
        assert_eq!(rows.pick(&[]).unwrap().dims(), [0, 4]);
        let beyond = rows.pick(&[1, 10]).unwrap_err().to_string();
        assert!(beyond.contains("row 10 of a matrix of 10"), "{beyond}");
    }
    assert!(weights.pp("wide").file_rows("weight", [4, 10]).is_err());
    assert!(weights.pp("none").file_rows("weight", [10, 4]).is_err());
    weights.finish(&[]).unwrap();
}
