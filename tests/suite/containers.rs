//! Every container and spelling of docs and README, each by a file that is written here: what is
//! read gives the numbers it stands for, what is not read says so by name and what to do.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use pentimento::{
    Engine, EngineOptions, ModelParts, ModelSource,
    weights::{Checkpoint, Precision, Storage, Weights},
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

use crate::{
    cli,
    common::{Reference, float8_bytes, parts, save_raw},
    engine,
    lora::bases::e5m2_of,
};

type Raw = (String, Dtype, Vec<usize>, Vec<u8>);

/// Writes tensors with metadata in the header.
fn save_with(path: &Path, tensors: &[Raw], metadata: &[(&str, String)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    fs_err::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn read(path: &Path, name: &str, shape: [usize; 2]) -> Vec<f32> {
    let precision = Precision { storage: Storage::Plain(DType::F32), ..Precision::reference() };
    let weights = Weights::new(Checkpoint::open_file(path).unwrap(), precision);
    let tensor = weights.tensor(name, &shape).unwrap();
    weights.finish(&[]).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn one(value: f32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

#[test]
fn comfyuis_newer_form_is_read_from_the_header_and_from_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let values = Tensor::new(&[[0.5_f32, -1.75, 208.0], [0.02, 0.0, -3.5]], &Device::Cpu).unwrap();
    let small = values.to_dtype(DType::F8E4M3).unwrap();
    let (e5m2, wide_e5m2) = e5m2_of(&values);
    let scale = 0.25_f32;
    for (dtype, format, bytes, wide) in [
        (
            Dtype::F8_E4M3,
            "float8_e4m3fn",
            float8_bytes(&small),
            small.to_dtype(DType::F32).unwrap(),
        ),
        (Dtype::F8_E5M2, "float8_e5m2", e5m2, wide_e5m2),
    ] {
        let wide: Vec<f32> = wide.flatten_all().unwrap().to_vec1().unwrap();
        let expected: Vec<f32> = wide.iter().map(|value| value * scale).collect();
        for prefix in ["", "model.diffusion_model."] {
            let layer = format!("{prefix}blocks.0.fc");
            let weight = (format!("{layer}.weight"), dtype, vec![2, 3], bytes.clone());
            let weight_scale = (format!("{layer}.weight_scale"), Dtype::F32, vec![], one(scale));
            let input_scale = (format!("{layer}.input_scale"), Dtype::F32, vec![], one(7.0));
            // Named in the header, with the prefix or without it.
            for listed in [layer.as_str(), "blocks.0.fc"] {
                let settings = json!({ "format": format, "full_precision_matrix_mult": true });
                let header = json!({ "format_version": "1.0", "layers": { listed: settings } });
                let tensors = [weight.clone(), weight_scale.clone(), input_scale.clone()];
                save_with(&path, &tensors, &[("_quantization_metadata", header.to_string())]);
                assert_eq!(
                    read(&path, &weight.0, [2, 3]),
                    expected,
                    "{format}: {listed} in the header"
                );
            }
            // Named by a tensor beside the weight.
            let text = json!({ "format": format }).to_string().into_bytes();
            let described = (format!("{layer}.comfy_quant"), Dtype::U8, vec![text.len()], text);
            save_raw(&path, &[weight.clone(), weight_scale, input_scale, described]);
            assert_eq!(read(&path, &weight.0, [2, 3]), expected, "{format}: described by a tensor");
            // A description promises a scale.
            let text = json!({ "format": format }).to_string().into_bytes();
            let described = (format!("{layer}.comfy_quant"), Dtype::U8, vec![text.len()], text);
            save_raw(&path, &[weight.clone(), described]);
            refused(&path, &[&weight.0, "weight_scale beside it"]);
            // Without a scale the numbers count as they are.
            save_raw(&path, std::slice::from_ref(&weight));
            assert_eq!(read(&path, &weight.0, [2, 3]), wide, "{format}: no scale");
        }
    }
}

#[test]
fn older_scaled_files_may_have_marks_of_any_kind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    // 0x38 is one in e4m3.
    let weight = || ("a.fc.weight".to_owned(), Dtype::F8_E4M3, vec![1, 2], vec![0x38, 0xb8]);
    let scale = || ("a.fc.scale_weight".to_owned(), Dtype::F32, vec![], one(3.0));
    for (mark, dtype, count) in [
        ("scaled_fp8", Dtype::F8_E4M3, 0),
        ("a.scaled_fp8", Dtype::F8_E4M3, 2),
        ("a.scaled_fp8", Dtype::F32, 2),
        ("text_encoders.scaled_fp8", Dtype::F8_E5M2, 0),
    ] {
        let bytes = vec![0; count * dtype.bitsize() / 8];
        let mark = (mark.to_owned(), dtype, vec![count], bytes);
        save_raw(&path, &[weight(), scale(), mark]);
        assert_eq!(read(&path, "a.fc.weight", [1, 2]), [3.0, -3.0]);
    }
}

#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let message = Checkpoint::open_file(path).unwrap_err().to_string();
    let name = path.file_name().unwrap().to_str().unwrap();
    for word in words.iter().chain(&[name]) {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

#[test]
fn containers_that_are_not_read_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let bytes = |name: &str, count: usize| -> Raw {
        (format!("blocks.0.fc.{name}"), Dtype::U8, vec![count], vec![0; count])
    };
    // ComfyUI's other formats, by a tensor and in the header.
    for format in ["int8_tensorwise", "nvfp4", "mxfp4", "mxfp8"] {
        let text = json!({ "format": format, "convrot": true }).to_string().into_bytes();
        let described = ("fc.comfy_quant".to_owned(), Dtype::U8, vec![text.len()], text);
        let weight = ("fc.weight".to_owned(), Dtype::I8, vec![2, 2], vec![0; 4]);
        save_raw(&path, &[weight.clone(), described]);
        refused(&path, &[format, "fc.comfy_quant", "float8_e4m3fn", "GGUF"]);
        let header = json!({ "format_version": "1.0", "layers": { "fc": { "format": format } } });
        save_with(&path, &[weight], &[("_quantization_metadata", header.to_string())]);
        refused(&path, &[format, "fc", "float8_e4m3fn", "GGUF"]);
    }
    save_with(&path, &[bytes("weight", 4)], &[("_quantization_metadata", "[1]".to_owned())]);
    refused(&path, &["_quantization_metadata", "layers with their formats"]);
    // nunchaku, bitsandbytes, AWQ and GPTQ.
    for (names, words) in [
        (&["qweight", "wscales", "smooth_factor", "proj_down"] as &[&str], "SVDQuant"),
        (
            &[
                "weight",
                "weight.absmax",
                "weight.quant_map",
                "weight.quant_state.bitsandbytes__nf4",
            ],
            "nf4",
        ),
        (&["qweight", "qzeros", "scales"], "GPTQ"),
        (&["qweight", "scales"], "AWQ"),
    ] {
        let tensors: Vec<Raw> = names.iter().map(|name| bytes(name, 4)).collect();
        save_raw(&path, &tensors);
        refused(&path, &[words, "blocks.0.fc.", "GGUF", "fp8"]);
    }
    // Whole numbers without a scale are no weights.
    let integers = ("fc.weight".to_owned(), Dtype::I8, vec![2, 2], vec![0; 4]);
    save_raw(&path, &[integers]);
    let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), Precision::reference());
    let message = weights.tensor("fc.weight", &[2, 2]).unwrap_err().to_string();
    assert!(message.contains("fc.weight has type I8, supported: F32"), "{message}");
    // Pickles, as torch saves them now and as it did.
    for (start, words) in [
        (&b"PK\x03\x04\x00\x00\x08\x08\x00\x00"[..], "zip"),
        (&b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."[..], "pickle"),
        (&b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00"[..], "pickle"),
    ] {
        for name in ["x.ckpt", "x.pt", "x.safetensors"] {
            let path = folder.path().join(name);
            fs_err::write(&path, start).unwrap();
            refused(&path, &[words, "convert to safetensors"]);
        }
    }
}

#[test]
fn pickles_are_refused_wherever_a_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.ckpt");
    fs_err::write(&path, b"PK\x03\x04\x00\x00\x08\x08\x00\x00").unwrap();
    let (text, reference) = (path.display().to_string(), Reference::open("tiny-qwen-2511"));
    let input = reference.folder.join("cases/edit_in.png").display().to_string();
    let model = reference.folder.display().to_string();
    let out = folder.path().join("out.png").display().to_string();
    for flag in ["--diffusion-model", "--llm", "--vae", "--lora"] {
        let arguments =
            ["edit", "-i", &input, "-p", "x", "-o", &out, "--model", &model, flag, &text];
        let message = cli::text(&cli::run(&arguments, 3).stderr);
        assert!(message.contains("zip archive") && message.contains("x.ckpt"), "{flag}: {message}");
    }
}

#[test]
fn an_encoder_of_another_size_than_the_transformers_is_refused() {
    let reference = Reference::open("tiny-qwen-2511");
    let folder = tempfile::tempdir().unwrap();
    engine::copy(&reference.folder, folder.path());
    let path = folder.path().join("transformer/config.json");
    let mut config = parts::json(&path);
    config["joint_attention_dim"] = json!(3584);
    fs_err::remove_file(&path).unwrap();
    fs_err::write(&path, config.to_string()).unwrap();
    let source = ModelSource::Folder(folder.path().to_owned());
    let options = EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() };
    let message = Engine::open(&source, &options, &()).unwrap_err().to_string();
    for words in [
        "text_encoder/config.json",
        "hidden_size: 64",
        "3584 (Qwen2.5-VL 7B)",
        "joint_attention_dim",
    ] {
        assert!(message.contains(words), "no {words:?} in: {message}");
    }
    // A file without a config, told by the length of its first key bias: 3B beside a 7B transformer.
    let llm = folder.path().join("qwen_2.5_vl_3b.safetensors");
    let bias = Tensor::zeros(256, DType::F32, &Device::Cpu).unwrap();
    let tensors = HashMap::from([("model.layers.0.self_attn.k_proj.bias", bias)]);
    candle_core::safetensors::save(&tensors, &llm).unwrap();
    let parts = ModelParts {
        folder: Some(folder.path().to_owned()),
        llm: Some(llm),
        ..ModelParts::default()
    };
    let message = Engine::open(&ModelSource::Files(parts), &options, &()).unwrap_err().to_string();
    for words in ["qwen_2.5_vl_3b.safetensors", "2048 (Qwen2.5-VL 3B)", "3584 (Qwen2.5-VL 7B)"] {
        assert!(message.contains(words), "no {words:?} in: {message}");
    }
}
