//! Converted files: their bytes, their numbers, the pictures they give, and what is refused.

mod layout;
mod refused;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use pentimento::{
    ConvertOutcome, ConvertRequest, Engine, EngineOptions, ModelParts, ModelSource, convert,
    weights::{Checkpoint, Precision, Storage, Weights, WriteType},
};

use crate::{
    common::{Reference, Tolerance, assert_close, parts},
    engine,
};

/// Matrices of 64, 96, 256 and 384 columns.
const EDIT: &str = "edit-23";
const EDIT_CASE: &str = "pipe.cfg";
const NEWEST: &str = "tiny-qwen-2511";
const NEWEST_CASE: &str = "pipe.two";

fn part(reference: &Reference, name: &str) -> PathBuf {
    reference.folder.join(name)
}

#[track_caller]
fn converted(request: &ConvertRequest) -> ConvertOutcome {
    convert(request, &()).unwrap()
}

fn edited(source: &ModelSource, storage: Option<Storage>, name: &str, case: &str) -> RgbImage {
    let options =
        EngineOptions { device: pentimento::Device::Cpu, storage, ..EngineOptions::default() };
    let engine = Engine::open(source, &options, &()).unwrap();
    engine.edit(&engine::request(&Reference::open(name), case), &()).unwrap().picture.rgb
}

/// The reference's folder with one part replaced.
fn with(reference: &Reference, change: impl FnOnce(&mut ModelParts)) -> ModelSource {
    let mut parts = ModelParts { folder: Some(reference.folder.clone()), ..ModelParts::default() };
    change(&mut parts);
    ModelSource::Files(parts)
}

/// Mean difference of two pictures in levels.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.as_raw().len() as f64
}

/// All tensors of a file as f32.
fn numbers(path: &Path) -> BTreeMap<String, Tensor> {
    let weights = Weights::new(Checkpoint::open_file(path).unwrap(), Precision::reference());
    let shapes: Vec<(String, Vec<usize>)> = weights
        .checkpoint()
        .tensors()
        .map(|(name, entry)| (name.to_owned(), entry.shape.clone()))
        .collect();
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let tensor = weights.tensor(&name, &shape).unwrap();
            (name, tensor)
        })
        .collect()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let wide = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    wide.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_conversion_gives_the_picture_of_dtype_to_the_bit() {
    let reference = Reference::open(EDIT);
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::Folder(reference.folder.clone());
    let plain = edited(&source, None, EDIT, EDIT_CASE);
    for (kind, storage, types) in [
        (WriteType::Q8_0, Storage::Q8_0, &["BF16", "F32", "Q8_0"][..]),
        // Only the second matrices of the feed-forwards have rows of 256.
        (WriteType::Q4K, Storage::Q4K, &["BF16", "F32", "Q4_K", "Q8_0"]),
    ] {
        let path = folder.path().join(format!("qwen-image-edit-{kind}.gguf"));
        let request = ConvertRequest::new(part(&reference, "transformer"), &path, kind);
        let outcome = converted(&request);
        assert_eq!(outcome.version, Some("Qwen-Image-Edit"));
        assert_eq!(outcome.files[0].types.keys().collect::<Vec<_>>(), types, "{kind}");
        let expected = edited(&source, Some(storage), EDIT, EDIT_CASE);
        let file = with(&reference, |parts| parts.diffusion_model = Some(path));
        // The text encoder is quantized while loading in both.
        assert_eq!(edited(&file, Some(storage), EDIT, EDIT_CASE), expected, "{kind}");
        assert!(difference(&expected, &plain) > 0.0, "{kind} changes nothing");
    }
}

#[test]
fn the_ends_of_the_network_stay_plain() {
    let reference = Reference::open(EDIT);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edit.gguf");
    let mut request = ConvertRequest::new(part(&reference, "transformer"), &path, WriteType::Q8_0);
    converted(&request);
    let kind = |path: &Path, name: &str| {
        let checkpoint = Checkpoint::open_file(path).unwrap();
        let found = checkpoint.tensors().find(|(found, _)| *found == name);
        found.unwrap_or_else(|| panic!("no {name}")).1.kind.to_string()
    };
    let stored = part(&reference, "transformer/diffusion_pytorch_model.safetensors");
    for name in ["img_in", "txt_in", "norm_out.linear", "proj_out"] {
        let name = format!("{name}.weight");
        assert_eq!(kind(&path, &name), kind(&stored, &name), "{name}");
    }
    for name in ["img_mod.1", "attn.to_q", "txt_mlp.net.2"] {
        assert_eq!(kind(&path, &format!("transformer_blocks.0.{name}.weight")), "Q8_0");
    }
    for name in ["txt_norm.weight", "proj_out.bias", "transformer_blocks.0.attn.norm_q.weight"] {
        assert_eq!(kind(&path, name), "F32", "{name}");
    }
    // What a rule asks for comes first, in a type of blocks for matrices only.
    request.rules = r"^img_in\.=q5_1,attn\.to_q=bf16,^txt_norm=q8_0,atn=f16".parse().unwrap();
    request.output = folder.path().join("rules.gguf");
    let notes = converted(&request).notes;
    assert!(notes.iter().any(|note| note.contains("the rule atn=f16 finds")), "{notes:?}");
    assert!(!notes.iter().any(|note| note.contains("to_q")), "{notes:?}");
    assert_eq!(kind(&request.output, "img_in.weight"), "Q5_1");
    assert_eq!(kind(&request.output, "img_in.bias"), "F32");
    assert_eq!(kind(&request.output, "txt_norm.weight"), "F32");
    assert_eq!(kind(&request.output, "transformer_blocks.1.attn.to_q.weight"), "BF16");
    assert_eq!(kind(&request.output, "transformer_blocks.1.attn.to_k.weight"), "Q8_0");
}

#[test]
fn plain_types_give_the_numbers_of_the_source() {
    let reference = Reference::open(NEWEST);
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::Folder(reference.folder.clone());
    let expected = edited(&source, None, NEWEST, NEWEST_CASE);
    for name in ["t.gguf", "t.safetensors"] {
        let path = folder.path().join(name);
        let input = part(&reference, "transformer");
        let outcome = converted(&ConvertRequest::new(input, &path, WriteType::F32));
        assert_eq!(outcome.version, Some("Qwen-Image-Edit-2511"));
        // Neither the file's name nor a config beside it tells version and dimensions.
        let file = with(&reference, |parts| parts.diffusion_model = Some(path));
        assert_eq!(edited(&file, None, NEWEST, NEWEST_CASE), expected, "{name}");
        let info = pentimento::ModelInfo::read(&file).unwrap();
        assert_eq!(info.version, "Qwen-Image-Edit-2511");
    }
    // There and back again: nothing is lost, whatever is between.
    let stored = part(&reference, "transformer/diffusion_pytorch_model.safetensors");
    let first = numbers(&stored);
    let back = folder.path().join("back.safetensors");
    converted(&ConvertRequest::new(folder.path().join("t.gguf"), &back, WriteType::F32));
    let mut last = numbers(&back);
    assert!(last.remove("__index_timestep_zero__").is_some());
    assert_eq!(first.keys().collect::<Vec<_>>(), last.keys().collect::<Vec<_>>());
    for (name, tensor) in &first {
        assert_eq!(bits(tensor), bits(&last[name]), "{name}");
    }
}

#[test]
fn fp8_is_scaled_as_comfyui_scales_it() {
    let reference = Reference::open(NEWEST);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fp8.safetensors");
    let input = part(&reference, "transformer");
    let outcome = converted(&ConvertRequest::new(&input, &path, WriteType::Fp8));
    assert_eq!(outcome.files[0].types["F8_E4M3"], 42);
    let source = numbers(&input.join("diffusion_pytorch_model.safetensors"));
    let found = numbers(&path);
    let raw = fs_err::read(&path).unwrap();
    let raw = safetensors::SafeTensors::deserialize(&raw).unwrap();
    let mut scaled = 0;
    for (name, tensor) in &source {
        let largest: f32 = tensor
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
            .to_scalar()
            .unwrap();
        let Some(layer) = name.strip_suffix(".weight") else { continue };
        let Ok(scale) = raw.tensor(&format!("{layer}.weight_scale")) else {
            assert_eq!(bits(tensor), bits(&found[name]), "{name}");
            continue;
        };
        let scale = f32::from_le_bytes(scale.data().try_into().unwrap());
        assert_eq!(scale.to_bits(), (largest / 448.0).to_bits(), "{name}");
        assert_eq!(raw.tensor(name).unwrap().dtype(), safetensors::Dtype::F8_E4M3);
        let text = raw.tensor(&format!("{layer}.comfy_quant")).unwrap().data();
        assert_eq!(text, br#"{"format": "float8_e4m3fn"}"#);
        // Half a step of three bits of fraction, at the largest.
        assert_close(name, &found[name], tensor, Tolerance::Relative(1.0 / 28.0 + 1e-6));
        scaled += 1;
    }
    assert_eq!(scaled, 42);
    // Written again, the bytes are the same ones.
    let again = folder.path().join("again.safetensors");
    converted(&ConvertRequest::new(&path, &again, WriteType::Fp8));
    assert_eq!(fs_err::read(&path).unwrap().len(), fs_err::read(&again).unwrap().len());
    for (name, tensor) in numbers(&again) {
        assert_eq!(bits(&tensor), bits(&found[&name]), "{name}");
    }
    let file = with(&reference, |parts| parts.diffusion_model = Some(path));
    let plain = ModelSource::Folder(reference.folder.clone());
    let mean = difference(
        &edited(&file, None, NEWEST, NEWEST_CASE),
        &edited(&plain, None, NEWEST, NEWEST_CASE),
    );
    assert!(mean > 0.0 && mean < 12.0, "mean difference of {mean} levels");
}

#[test]
fn a_text_encoder_becomes_a_language_model_and_its_tower() {
    let reference = Reference::open(NEWEST);
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::Folder(reference.folder.clone());
    let input = part(&reference, "text_encoder");
    let path = folder.path().join("llm-f32.gguf");
    let outcome = converted(&ConvertRequest::new(&input, &path, WriteType::F32));
    assert_eq!(outcome.files.len(), 2);
    assert_eq!(outcome.files[1].path, folder.path().join("mmproj-llm-f32.gguf"));
    // The tower beside it and the tokenizer in it are found.
    let file = with(&reference, |parts| parts.llm = Some(path.clone()));
    let expected = edited(&source, None, NEWEST, NEWEST_CASE);
    assert_eq!(edited(&file, None, NEWEST, NEWEST_CASE), expected);
    // Alone, they hold the settings of the pictures as well.
    let alone = ModelParts { llm: Some(path.clone()), ..ModelParts::default() };
    let alone = ModelSource::Files(alone).files().unwrap();
    let made: serde_json::Value = alone.read_json("processor/preprocessor_config.json").unwrap();
    let published = parts::json(&part(&reference, "processor/processor_config.json"));
    let published = &published["image_processor"];
    for key in ["patch_size", "merge_size", "temporal_patch_size"] {
        assert_eq!(made[key], published[key], "{key}");
    }
    for key in ["image_mean", "image_std"] {
        let numbers = |value: &serde_json::Value| -> Vec<u32> {
            let list = value[key].as_array().unwrap().iter();
            list.map(|number| (number.as_f64().unwrap() as f32).to_bits()).collect()
        };
        assert_eq!(numbers(&made), numbers(published), "{key}");
    }
    // Quantized throughout but for the embedding, it is what `--dtype q8_0` makes.
    let quantized = folder.path().join("llm-q8_0.gguf");
    let mut request = ConvertRequest::new(&input, &quantized, WriteType::Q8_0);
    request.pure = true;
    request.rules = "^token_embd=bf16".parse().unwrap();
    request.mmproj_output = Some(folder.path().join("tower.gguf"));
    converted(&request);
    let file = with(&reference, |parts| {
        (parts.llm, parts.mmproj) = (Some(quantized), request.mmproj_output.clone());
    });
    let expected = edited(&source, Some(Storage::Q8_0), NEWEST, NEWEST_CASE);
    assert_eq!(edited(&file, Some(Storage::Q8_0), NEWEST, NEWEST_CASE), expected);
    // Back to one file under the published names, from the two.
    let back = folder.path().join("back.safetensors");
    let mut request = ConvertRequest::new(&path, &back, WriteType::F32);
    request.inputs.push(folder.path().join("mmproj-llm-f32.gguf"));
    converted(&request);
    let (first, last) = (numbers(&input.join("model.safetensors")), numbers(&back));
    assert_eq!(first.keys().collect::<Vec<_>>(), last.keys().collect::<Vec<_>>());
    for (name, tensor) in &first {
        assert_eq!(bits(tensor), bits(&last[name]), "{name}");
    }
}

#[test]
fn shards_autoencoders_and_quantized_sources_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vlm/merge3/text_encoder");
    let whole = folder.path().join("whole.safetensors");
    converted(&ConvertRequest::new(&data, &whole, WriteType::Bf16));
    let (found, mut tensors) = (numbers(&whole), 0);
    for shard in 1..=5 {
        let shard = data.join(format!("model-0000{shard}-of-00005.safetensors"));
        for (name, tensor) in parts::load(&shard) {
            let wide = tensor.to_dtype(DType::BF16).unwrap();
            let published = pentimento::vlm::canonical_name(&name);
            assert_eq!(bits(&found[&published]), bits(&wide), "{name}");
            tensors += 1;
        }
    }
    assert_eq!(found.len(), tensors);

    let reference = Reference::open(NEWEST);
    let vae = folder.path().join("vae.safetensors");
    converted(&ConvertRequest::new(part(&reference, "vae"), &vae, WriteType::F32));
    let source = ModelSource::Folder(reference.folder.clone());
    let file = with(&reference, |parts| parts.vae = Some(vae));
    let expected = edited(&source, None, NEWEST, NEWEST_CASE);
    assert_eq!(edited(&file, None, NEWEST, NEWEST_CASE), expected);

    // What is quantized as asked already is copied; other types are made of its numbers.
    let first = folder.path().join("one-q8_0.gguf");
    let reference = Reference::open(EDIT);
    let input = part(&reference, "transformer");
    converted(&ConvertRequest::new(input, &first, WriteType::Q8_0));
    let second = folder.path().join("two-q8_0.gguf");
    let again = converted(&ConvertRequest::new(&first, &second, WriteType::Q8_0));
    assert_eq!(again.notes, [""; 0]);
    assert_eq!(fs_err::read(&first).unwrap(), fs_err::read(&second).unwrap());
    let third = folder.path().join("three.gguf");
    let other = converted(&ConvertRequest::new(&first, &third, WriteType::Q4_0));
    assert!(other.notes[0].contains("quantized before"), "{:?}", other.notes);
    let wide = folder.path().join("wide.safetensors");
    converted(&ConvertRequest::new(&first, &wide, WriteType::F32));
    let wide = numbers(&wide);
    for (name, tensor) in numbers(&first) {
        assert_eq!(bits(&tensor), bits(&wide[&name]), "{name}");
    }
}

#[test]
fn quantizers_are_as_good_as_ggmls() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/weights");
    let bytes = fs_err::read(data.join("quantizers.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let x = parts::load(&data.join("quantizers.safetensors"))["x"].clone();
    let folder = tempfile::tempdir().unwrap();
    // A transformer by its names, with the matrix as its modulation.
    let input = folder.path().join("t.safetensors");
    let norm = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
    let tensors = std::collections::HashMap::from([
        ("transformer_blocks.0.img_mod.1.weight", x.clone()),
        ("txt_norm.weight", norm),
    ]);
    candle_core::safetensors::save(&tensors, &input).unwrap();
    let wide = x.to_dtype(DType::F32).unwrap();
    let rms = |y: &Tensor| -> f64 {
        let error = (y - &wide).unwrap().sqr().unwrap().mean_all().unwrap();
        f64::from(error.to_scalar::<f32>().unwrap()).sqrt()
    };
    // Bytes that are ggml's, or by how much the error may be larger.
    for (name, worse) in [
        ("q8_0", None),
        ("q5_0", None),
        ("q5_1", None),
        ("q4_0", None),
        ("q4_1", None),
        ("q3_k", Some(1.001)),
        ("q6_k", Some(1.05)),
        ("q5_k", Some(1.05)),
        ("q4_k", Some(1.06)),
        ("q2_k", Some(1.0)),
    ] {
        let kind: WriteType = name.parse().unwrap();
        let output = folder.path().join(format!("{name}.gguf"));
        converted(&ConvertRequest::new(&input, &output, kind));
        let theirs = golden.tensor(name).unwrap().data();
        let file = fs_err::read(&output).unwrap();
        let is_same = file.windows(theirs.len()).any(|bytes| bytes == theirs);
        let Some(worse) = worse else {
            assert!(is_same, "{name}: other bytes than ggml's");
            continue;
        };
        let ours = &numbers(&output)["transformer_blocks.0.img_mod.1.weight"];
        let mut file = crate::common::gguf_writer::Gguf::new();
        let id = u32::from_le_bytes(id_of(&output));
        file.raw("x", x.dims(), id, theirs);
        let path = folder.path().join("theirs.gguf");
        file.write(&path);
        let ratio = rms(ours) / rms(&numbers(&path)["x"]);
        assert!(ratio <= worse, "{name}: {ratio} of ggml's error");
    }
}

/// The number of the modulation's type in the header of a file with two tensors.
fn id_of(path: &Path) -> [u8; 4] {
    let bytes = fs_err::read(path).unwrap();
    let name = b"transformer_blocks.0.img_mod.1.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    // After the number of axes and two lengths.
    bytes[at + 4 + 16..at + 4 + 20].try_into().unwrap()
}
