//! Models put together from single files give what the folder gives, and say what does not fit.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use pentimento::{
    Engine, EngineOptions, Event, ModelInfo, ModelParts, ModelSource,
    diffusion::vae::{Autoencoder, Tiling},
    vlm::Tokenizer,
    weights::{ModelFiles, Precision, Storage},
};
use tempfile::TempDir;

use crate::{
    cli,
    common::{
        Reference, float8_bytes,
        parts::{self, Kind, all_f32, mixed, rounded},
        save_raw,
    },
    engine,
};

const NAME: &str = "tiny-qwen-2511";
const CASE: &str = "pipe.two";

fn options(storage: Option<Storage>) -> EngineOptions {
    EngineOptions { device: pentimento::Device::Cpu, storage, ..EngineOptions::default() }
}

fn edited(source: &ModelSource, storage: Option<Storage>) -> RgbImage {
    let engine = Engine::open(source, &options(storage), &()).unwrap();
    assert_eq!(engine.model().version, "Qwen-Image-Edit-2511");
    engine.edit(&engine::request(&Reference::open(NAME), CASE), &()).unwrap().picture.rgb
}

/// Mean difference of two pictures in levels.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
    sum / a.as_raw().len() as f64
}

/// A copy of the reference's folder with tensors as they come back from quantized files.
fn rounded_folder(kinds: parts::Kinds) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    engine::copy(&Reference::open(NAME).folder, folder.path());
    for file in
        ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    {
        let path = folder.path().join(file);
        let round = |(name, tensor): (String, Tensor)| {
            let kind = if name.starts_with("visual.") {
                Kind::Plain(DType::F32)
            } else {
                kinds(&name, &tensor)
            };
            (name, rounded(&tensor, kind))
        };
        let tensors: std::collections::HashMap<String, Tensor> =
            parts::load(&path).into_iter().map(round).collect();
        fs_err::remove_file(&path).unwrap();
        candle_core::safetensors::save(&tensors, &path).unwrap();
    }
    folder
}

#[test]
fn single_files_in_f32_give_the_folders_picture_exactly() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let files = parts::write_all(&reference, folder.path(), all_f32);
    let expected = edited(&ModelSource::Folder(reference.folder.clone()), None);
    assert_eq!(edited(&ModelSource::Files(files), None), expected);
    engine::assert_same_picture(NAME, &expected, &engine::expected(&reference, CASE));
}

#[test]
fn quantized_files_give_the_picture_of_their_numbers() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let mut files = parts::write_all(&reference, folder.path(), mixed);
    // The vision tower in f32, so that attention in parts is rounded in no other way than whole.
    files.mmproj = Some(folder.path().join("llm/tower.gguf"));
    parts::vision_tower(&reference, files.mmproj.as_ref().unwrap(), all_f32);
    let source = ModelSource::Files(files);
    let dequantized = rounded_folder(mixed);
    let expected = edited(&ModelSource::Folder(dequantized.path().to_owned()), None);
    // Widened while reading, the numbers are the same, to the bit.
    assert_eq!(edited(&source, Some(Storage::Plain(DType::F32))), expected);
    // Multiplied in blocks, activations are rounded to eight bits.
    let in_blocks = edited(&source, None);
    let mean = difference(&in_blocks, &expected);
    assert!(mean > 0.0 && mean <= 12.0, "mean difference of {mean} levels");
}

#[test]
fn memory_of_quantized_files_is_estimated_as_stored() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let source = ModelSource::Files(parts::write_all(&reference, folder.path(), mixed));
    let needed = |storage| {
        let engine = Engine::open(&source, &options(storage), &()).unwrap();
        engine.weights().iter().map(|share| share.bytes).sum::<u64>()
    };
    let (stored, wide) = (needed(None), needed(Some(Storage::Plain(DType::F32))));
    let info = ModelInfo::read(&source).unwrap();
    let elements: u64 = info.parts.iter().map(|part| part.parameters).sum();
    // Of the autoencoder's kernels one slice of three is kept; rows are filled up to whole panels.
    assert!(wide > elements * 4 / 2 && wide < elements * 5, "{wide} for {elements} numbers");
    assert!(stored < wide && stored > wide / 8, "{stored} of {wide}");
}

#[test]
fn the_autoencoder_is_the_same_under_both_names() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let parts = parts::write_all(&reference, folder.path(), all_f32);
    let load = |files: &ModelFiles| Autoencoder::load(files, &Precision::reference()).unwrap();
    let wan = load(&ModelSource::Files(parts).files().unwrap());
    let ours = load(&ModelFiles::Folder(reference.folder.clone()));
    assert_eq!(wan.config(), ours.config());
    let cancel = pentimento::CancelToken::new();
    let values: Vec<f32> = (0..3 * 32 * 48).map(|i| (i as f32 * 0.37).sin()).collect();
    let picture = Tensor::from_vec(values, (1, 3, 32, 48), &Device::Cpu).unwrap();
    let bits = |model: &Autoencoder| {
        let latents = model.encode(&picture, &Tiling::default(), &cancel).unwrap();
        let picture = model.decode(&latents, &Tiling::default(), &cancel).unwrap();
        let values: Vec<f32> = picture.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(&wan), bits(&ours));
}

#[test]
fn the_tokenizer_of_the_metadata_is_the_files() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let files = ModelSource::Files(parts::write_all(&reference, folder.path(), all_f32));
    let load = |files: &ModelFiles| Tokenizer::load(files, &["tokenizer"]).unwrap();
    let metadata = load(&files.files().unwrap());
    let file = load(&ModelFiles::Folder(reference.folder.clone()));
    assert_eq!(metadata.id_end(), file.id_end());
    for text in [
        "make the coat red<|im_end|>\n<|vision_start|><|image_pad|><|vision_end|>",
        "  é 你好 1234 it's\r\n\n",
        "<|im_start|>user\n\"quoted\" {}",
    ] {
        let tokens = metadata.encode(text).unwrap();
        assert_eq!(tokens, file.encode(text).unwrap(), "{text:?}");
        assert_eq!(metadata.decode(&tokens).unwrap(), file.decode(&tokens).unwrap());
    }
}

#[test]
fn a_folder_lends_what_has_no_file() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let all = parts::write_all(&reference, folder.path(), all_f32);
    let expected = edited(&ModelSource::Folder(reference.folder.clone()), None);
    let rest = Some(reference.folder.clone());
    for parts in [
        ModelParts { folder: rest.clone(), vae: all.vae.clone(), ..ModelParts::default() },
        ModelParts { folder: rest.clone(), llm: all.llm.clone(), ..ModelParts::default() },
        ModelParts {
            folder: rest,
            diffusion_model: all.diffusion_model.clone(),
            ..Default::default()
        },
    ] {
        assert_eq!(edited(&ModelSource::Files(parts.clone()), None), expected, "{parts:?}");
    }
    // A language model in safetensors, under ComfyUI's names, with config and tokenizer beside it.
    let comfy = folder.path().join("comfy");
    fs_err::create_dir_all(&comfy).unwrap();
    let encoder = reference.folder.join("text_encoder");
    let wrapped: std::collections::HashMap<String, Tensor> =
        parts::load(&encoder.join("model.safetensors"))
            .into_iter()
            .map(|(name, tensor)| (format!("text_encoders.qwen25_7b.transformer.{name}"), tensor))
            .collect();
    let llm = comfy.join("qwen_2.5_vl.safetensors");
    candle_core::safetensors::save(&wrapped, &llm).unwrap();
    fs_err::copy(encoder.join("config.json"), comfy.join("config.json")).unwrap();
    fs_err::copy(reference.folder.join("tokenizer/tokenizer.json"), comfy.join("tokenizer.json"))
        .unwrap();
    let parts = ModelParts { llm: Some(llm), ..all };
    assert_eq!(edited(&ModelSource::Files(parts), None), expected);
}

/// Tensors tell neither the version, nor how heads are shared among the axes of a position, nor what a language
/// model of no published size is like, nor the statistics of latents.
#[test]
fn a_folder_lends_the_configs_that_files_lack() {
    let reference = Reference::open(NAME);
    let (lender, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    engine::copy(&reference.folder, lender.path());
    let config = lender.path().join("vae/config.json");
    let mut statistics = parts::json(&config);
    statistics["latents_mean"] = (0..16).map(|channel| f64::from(channel) / 16.0).collect();
    fs_err::write(&config, statistics.to_string()).unwrap();
    let expected = edited(&ModelSource::Folder(lender.path().to_owned()), None);
    assert_ne!(expected, edited(&ModelSource::Folder(reference.folder.clone()), None));
    let file = |part: &str, source: &str, prefix: &str| {
        let named = |(name, tensor)| (format!("{prefix}{name}"), tensor);
        let tensors: std::collections::HashMap<String, Tensor> =
            parts::load(&reference.folder.join(source)).into_iter().map(named).collect();
        let path = files.path().join(part).with_extension("safetensors");
        candle_core::safetensors::save(&tensors, &path).unwrap();
        Some(path)
    };
    let weights = "diffusion_pytorch_model.safetensors";
    let parts = ModelParts {
        folder: Some(lender.path().to_owned()),
        diffusion_model: file("a", &format!("transformer/{weights}"), "model.diffusion_model."),
        llm: file("b", "text_encoder/model.safetensors", "text_encoders.qwen25_7b.transformer."),
        vae: file("c", &format!("vae/{weights}"), ""),
        ..ModelParts::default()
    };
    assert_eq!(edited(&ModelSource::Files(parts.clone()), None), expected);
    let heard = std::cell::RefCell::new(Vec::new());
    let observer = |event: &Event<'_>| {
        if let Event::Note(note) = event {
            heard.borrow_mut().push((*note).to_owned());
        }
    };
    Engine::open(&ModelSource::Files(parts.clone()), &options(None), &observer).unwrap();
    let notes = heard.into_inner().join("\n");
    assert!(notes.contains("taken for Qwen-Image-Edit-2511, as --model's is"), "{notes}");
    // Those of another model do not help.
    let config = lender.path().join("transformer/config.json");
    let mut other = parts::json(&config);
    other["num_layers"] = 7.into();
    fs_err::write(&config, other.to_string()).unwrap();
    refused(parts.clone(), &["a.safetensors", "norm_q.weight", "[128]"]);
    refused(ModelParts { folder: None, ..parts }, &["a.safetensors", "norm_q.weight", "[128]"]);
}

#[test]
fn a_shard_stands_for_all_shards() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let whole = ModelParts { folder: Some(reference.folder.clone()), ..ModelParts::default() };
    for (part, stem) in [("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")] {
        let below = folder.path().join(part);
        fs_err::create_dir(&below).unwrap();
        let source = reference.folder.join(part);
        fs_err::copy(source.join("config.json"), below.join("config.json")).unwrap();
        let tensors = parts::load(&source.join(format!("{stem}.safetensors")));
        for shard in 0..2 {
            let of_shard = tensors.iter().enumerate().filter(|(index, _)| index % 2 == shard);
            let of_shard: std::collections::HashMap<String, Tensor> =
                of_shard.map(|(_, (name, tensor))| (name.clone(), tensor.clone())).collect();
            let name = format!("{stem}-0000{}-of-00002.safetensors", shard + 1);
            candle_core::safetensors::save(&of_shard, below.join(name)).unwrap();
        }
    }
    let at = |name: &str| Some(folder.path().join(name));
    let parts = ModelParts {
        diffusion_model: at("transformer/diffusion_pytorch_model-00002-of-00002.safetensors"),
        llm: at("text_encoder/model-00001-of-00002.safetensors"),
        ..whole.clone()
    };
    let expected = edited(&ModelSource::Files(whole), None);
    assert_eq!(edited(&ModelSource::Files(parts.clone()), None), expected);
    let gone = "model-00002-of-00002.safetensors";
    fs_err::remove_file(folder.path().join("text_encoder").join(gone)).unwrap();
    refused(parts, &[gone, "not found"]);
}

#[track_caller]
fn refused(parts: ModelParts, words: &[&str]) {
    let error = Engine::open(&ModelSource::Files(parts), &options(None), &()).unwrap_err();
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

#[test]
fn missing_parts_are_named_together() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let all = parts::write_all(&reference, folder.path(), all_f32);
    let only = |change: fn(&mut ModelParts)| {
        let mut parts = all.clone();
        change(&mut parts);
        parts
    };
    refused(only(|p| p.llm = None), &["text_encoder", "--llm FILE", "--model DIR"]);
    refused(only(|p| (p.llm, p.vae) = (None, None)), &["--llm FILE, --vae FILE"]);
    refused(only(|p| p.diffusion_model = None), &["transformer", "--diffusion-model FILE"]);
    refused(only(|p| p.llm = p.vae.clone()), &["qwen_image_vae.safetensors", "Qwen2.5-VL 7B"]);
    refused(only(|p| p.vae = p.diffusion_model.clone()), &["2511.gguf", "encoder.conv_in.weight"]);
    refused(only(|p| p.diffusion_model = p.vae.clone()), &["Wan names", "Qwen-Image-Edit-2511"]);
    refused(only(|p| p.llm = p.diffusion_model.clone()), &["qwen_image", "qwen2vl"]);
    refused(only(|p| p.mmproj = p.llm.clone()), &["qwen2vl", "mmproj"]);
}

#[test]
fn autoencoders_of_other_families_are_refused_as_such() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    // Stable Diffusion's and FLUX's have these, but other blocks.
    let other = folder.path().join("ae.safetensors");
    let one = Tensor::ones((8, 3, 3, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
    let names = ["encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"];
    let tensors: std::collections::HashMap<&str, Tensor> =
        names.into_iter().map(|name| (name, one.clone())).collect();
    candle_core::safetensors::save(&tensors, &other).unwrap();
    let parts =
        ModelParts { folder: Some(reference.folder), vae: Some(other), ..ModelParts::default() };
    refused(parts, &["ae.safetensors", "no Qwen-Image autoencoder"]);
}

#[test]
fn vision_towers_are_looked_for_and_checked() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let all = parts::write_all(&reference, folder.path(), all_f32);
    let tower = folder.path().join("llm/mmproj-F16.gguf");
    let away = folder.path().join("away.gguf");
    fs_err::rename(&tower, &away).unwrap();
    refused(all.clone(), &["mmproj-F16.gguf", "not found", "--mmproj FILE"]);
    for name in ["mmproj-one.gguf", "mmproj-two.gguf"] {
        fs_err::copy(&away, folder.path().join("llm").join(name)).unwrap();
    }
    refused(all.clone(), &["mmproj-one, mmproj-two", "--mmproj FILE"]);
    // The tower of another size, told by its last layer.
    let narrow: fn(&str, &Tensor) -> Kind = all_f32;
    let mut other = Reference::open(NAME);
    let changed = tempfile::tempdir().unwrap();
    engine::copy(&other.folder, changed.path());
    let path = changed.path().join("text_encoder/model.safetensors");
    let mut tensors: std::collections::HashMap<String, Tensor> =
        parts::load(&path).into_iter().collect();
    for name in ["visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"] {
        let half = tensors[name].narrow(0, 0, 32).unwrap().contiguous().unwrap();
        tensors.insert(name.to_owned(), half);
    }
    fs_err::remove_file(&path).unwrap();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    other.folder = changed.path().to_owned();
    let wrong = folder.path().join("wrong.gguf");
    parts::vision_tower(&other, &wrong, narrow);
    let parts = ModelParts { mmproj: Some(wrong), ..all };
    refused(
        parts,
        &["wrong.gguf", "out_hidden_size", "32", "64, the language model's hidden_size"],
    );
}

#[test]
fn the_version_follows_flag_file_and_name() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let all = parts::write_all(&reference, folder.path(), all_f32);
    let first = all.diffusion_model.clone().unwrap();
    let version = |name: &str, zero_cond_t: Option<bool>| {
        let path = first.with_file_name(name);
        if path != first {
            fs_err::copy(&first, &path).unwrap();
        }
        let parts = ModelParts { diffusion_model: Some(path), zero_cond_t, ..all.clone() };
        let notes = std::sync::Mutex::new(Vec::new());
        let hear = |event: &Event<'_>| {
            if let Event::Note(note) = event {
                notes.lock().unwrap().push((*note).to_owned());
            }
        };
        let engine = Engine::open(&ModelSource::Files(parts), &options(None), &hear).unwrap();
        (engine.model().version, notes.into_inner().unwrap())
    };
    let plain = |name, flag| {
        let (version, notes) = version(name, flag);
        assert!(notes.is_empty(), "{notes:?}");
        version
    };
    assert_eq!(plain("qwen-image-edit-2511.gguf", None), "Qwen-Image-Edit-2511");
    assert_eq!(plain("qwen-image-edit-2511.gguf", Some(false)), "Qwen-Image-Edit-2509");
    assert_eq!(plain("Qwen-Image-Edit-2509-Q8_0.gguf", None), "Qwen-Image-Edit-2509");
    assert_eq!(plain("Qwen-Image-Edit-2509-Q8_0.gguf", Some(true)), "Qwen-Image-Edit-2511");
    assert_eq!(plain("Qwen_Image_Edit.gguf", None), "Qwen-Image-Edit");
    let (unnamed, notes) = version("model.gguf", None);
    assert_eq!(unnamed, "Qwen-Image-Edit-2509");
    assert!(notes[0].contains("qwen_image_zero_cond_t=true"), "{notes:?}");
    // The config beside the file comes before its name.
    let config = first.with_file_name("config.json");
    let text = fs_err::read_to_string(&config).unwrap();
    let says = |value: &str| {
        let with = text.replacen('{', &format!("{{\"zero_cond_t\": {value}, "), 1);
        fs_err::write(&config, with).unwrap();
    };
    says("true");
    assert_eq!(plain("Qwen-Image-Edit-2509-Q8_0.gguf", None), "Qwen-Image-Edit-2511");
    says("false");
    assert_eq!(plain("qwen-image-edit-2511.gguf", None), "Qwen-Image-Edit-2509");
    assert_eq!(plain("Qwen_Image_Edit.gguf", None), "Qwen-Image-Edit");
    assert_eq!(plain("model.gguf", None), "Qwen-Image-Edit-2509");
    says("\"true\"");
    refused(all, &["config.json", "zero_cond_t", "\"true\"", "true or false"]);
}

#[test]
fn relatives_of_the_transformer_are_refused_by_name() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let all = parts::write_all(&reference, folder.path(), all_f32);
    let path = all.diffusion_model.clone().unwrap();
    let source = reference.folder.join("transformer/diffusion_pytorch_model.safetensors");
    for (tensor, model) in [
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
        ("single_transformer_blocks.0.attn.to_q.weight", "FLUX"),
        ("transformer_blocks.0.img_mlp.gate_up.weight", "Qwen-Image-2.1"),
    ] {
        let mut tensors: std::collections::HashMap<String, Tensor> =
            parts::load(&source).into_iter().collect();
        tensors.insert(tensor.to_owned(), Tensor::ones(1, DType::F32, &Device::Cpu).unwrap());
        candle_core::safetensors::save(&tensors, &path).unwrap();
        refused(all.clone(), &[model, "qwen-image-edit-2511.gguf"]);
    }
}

/// How a matrix is scaled in fp8 files.
#[derive(Debug, Clone, Copy)]
enum Scaled {
    No,
    Older,
    Newer,
}

#[test]
fn fp8_files_give_the_picture_of_their_numbers() {
    use safetensors::Dtype;
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let mut all = parts::write_all(&reference, folder.path(), all_f32);
    let path = folder.path().join("unet/qwen-image-edit-2511-fp8.safetensors");
    all.diffusion_model = Some(path.clone());
    let source = reference.folder.join("transformer/diffusion_pytorch_model.safetensors");
    for style in [Scaled::No, Scaled::Older, Scaled::Newer] {
        let dequantized = rounded_folder(all_f32);
        let (mut raw, mut values) = (Vec::new(), std::collections::HashMap::new());
        let scale = 0.01_f32;
        for (name, tensor) in parts::load(&source) {
            let tensor = tensor.to_dtype(DType::F32).unwrap();
            let prefixed = format!("model.diffusion_model.{name}");
            let Some(layer) = prefixed.strip_suffix(".weight").filter(|_| tensor.rank() == 2)
            else {
                let flat: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                let bytes = flat.iter().flat_map(|value| value.to_le_bytes()).collect();
                raw.push((prefixed, Dtype::F32, tensor.dims().to_vec(), bytes));
                values.insert(name, tensor);
                continue;
            };
            let scale = if matches!(style, Scaled::No) { 1.0 } else { scale };
            let small = (&tensor / f64::from(scale)).unwrap().to_dtype(DType::F8E4M3).unwrap();
            let wide = small.to_dtype(DType::F32).unwrap();
            values.insert(name.clone(), wide.affine(f64::from(scale), 0.0).unwrap());
            let bytes = float8_bytes(&small);
            raw.push((prefixed.clone(), Dtype::F8_E4M3, tensor.dims().to_vec(), bytes));
            let one = scale.to_le_bytes().to_vec();
            match style {
                Scaled::No => {}
                Scaled::Older => {
                    raw.push((format!("{layer}.scale_weight"), Dtype::F32, vec![1], one.clone()));
                    raw.push((format!("{layer}.scale_input"), Dtype::F32, vec![1], one));
                }
                Scaled::Newer => {
                    let text = br#"{"format": "float8_e4m3fn"}"#.to_vec();
                    raw.push((format!("{layer}.weight_scale"), Dtype::F32, vec![], one));
                    raw.push((format!("{layer}.comfy_quant"), Dtype::U8, vec![text.len()], text));
                }
            }
        }
        if matches!(style, Scaled::Older) {
            let mark = "model.diffusion_model.scaled_fp8".to_owned();
            raw.push((mark, Dtype::F8_E4M3, vec![2], vec![0, 0]));
        }
        save_raw(&path, &raw);
        let target = dequantized.path().join("transformer/diffusion_pytorch_model.safetensors");
        candle_core::safetensors::save(&values, target).unwrap();
        let expected = edited(&ModelSource::Folder(dequantized.path().to_owned()), None);
        let files = ModelSource::Files(all.clone());
        assert_eq!(edited(&files, Some(Storage::Plain(DType::F32))), expected, "{style:?}");
        // By default they are kept as they are stored.
        let mean = difference(&edited(&files, None), &expected);
        let limit = if matches!(style, Scaled::No) { 0.2 } else { 1.0 };
        assert!(mean <= limit, "{style:?}: mean difference of {mean} levels");
    }
}

#[test]
fn other_ways_of_scaling_are_refused_by_name() {
    use safetensors::Dtype;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let weight = |dtype, bytes: usize| ("fc.weight".to_owned(), dtype, vec![4], vec![0; bytes]);
    let scale = |shape: Vec<usize>| {
        let bytes = vec![0; 4 * shape.iter().product::<usize>()];
        ("fc.weight_scale".to_owned(), Dtype::F32, shape, bytes)
    };
    let describe = |text: &str| {
        ("fc.comfy_quant".to_owned(), Dtype::U8, vec![text.len()], text.as_bytes().to_vec())
    };
    let float8 = || weight(Dtype::F8_E4M3, 4);
    for (tensors, words) in [
        (
            vec![weight(Dtype::U8, 4), describe(r#"{"format":"nvfp4"}"#)],
            ["nvfp4", "fc.comfy_quant"],
        ),
        (vec![float8(), describe("{")], ["no JSON", "fc.comfy_quant"]),
        (vec![float8(), scale(vec![4])], ["fc.weight_scale", "[4]"]),
        (vec![weight(Dtype::F32, 16), scale(vec![1])], ["fc.weight_scale", "weight of type F8"]),
    ] {
        save_raw(&path, &tensors);
        let message = pentimento::weights::Checkpoint::open_file(&path).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn the_program_takes_single_files() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let files = parts::write_all(&reference, folder.path(), mixed);
    let text = |path: &Path| path.display().to_string();
    let out = text(&folder.path().join("out.png"));
    let input = text(&reference.folder.join("cases/edit_in.png"));
    let transformer = text(files.diffusion_model.as_ref().unwrap());
    let llm = text(files.llm.as_ref().unwrap());
    let tower = text(&folder.path().join("llm/mmproj-F16.gguf"));
    let vae = text(files.vae.as_ref().unwrap());
    let mut arguments = vec!["edit", "-i", &input, "-p", "make it night", "-o", &out, "-s", "7"];
    arguments.extend(["--area", "64x64", "--steps", "2", "--strategy", "direct"]);
    arguments.extend(["--diffusion-model", &transformer]);
    arguments.extend(["--qwen2vl", &llm, "--llm_vision", &tower]);
    arguments.extend(["--model-args", "qwen_image_zero_cond_t=false"]);
    let missing = cli::text(&cli::run(&arguments, 3).stderr);
    assert!(missing.contains("--vae FILE") && !missing.contains("--llm"), "{missing}");
    arguments.extend(["--vae", &vae]);
    cli::run(&arguments, 0);
    assert!(image::open(&out).is_ok());
    cli::run(&["edit", "-i", &input, "-p", "x", "-o", &out, "--model-args", "x=1"], 2);

    let info = cli::text(&cli::run(&["info", &transformer], 0).stdout);
    for words in ["general.architecture: qwen_image", "Q8_0", "F16", "Qwen-Image transformer"] {
        assert!(info.contains(words), "no {words:?} in: {info}");
    }
    let info = cli::text(&cli::run(&["info", &llm, "--json"], 0).stdout);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["metadata"]["qwen2vl.embedding_length"], "64");
    assert_eq!(info["metadata"]["tokenizer.ggml.tokens"], "[526 strings]");
    assert_eq!(info["tensors"]["blk.0.attn_q.bias"]["type"], "F32");
    assert_eq!(info["model"], "a language model, GGUF names");
}

#[test]
fn a_language_model_alone_answers() {
    let reference = Reference::open(NAME);
    let folder = tempfile::tempdir().unwrap();
    let all = parts::write_all(&reference, folder.path(), all_f32);
    let source = ModelSource::Files(ModelParts { llm: all.llm, ..ModelParts::default() });
    let answer = |source: &ModelSource| {
        let assistant = pentimento::Assistant::open(source, &options(None), &()).unwrap();
        let picture = engine::request(&reference, CASE).pictures.remove(0);
        let mut request = pentimento::AskRequest::new(vec![picture], "what is it?");
        request.tokens_max = 6;
        let outcome = assistant.ask(&request, &()).unwrap();
        (outcome.answer, outcome.prompt_tokens)
    };
    assert_eq!(answer(&source), answer(&ModelSource::Folder(reference.folder.clone())));
}
