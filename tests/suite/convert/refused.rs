//! What is refused, and that nothing is left behind.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, ConvertRequest, Error, Event, Overwrite, convert,
    weights::{WriteFormat, WriteType},
};

use super::{NEWEST, converted, part};
use crate::{cli, common::Reference};

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Converts, and checks the message and that the output's folder is as it was.
#[track_caller]
fn refused(request: &ConvertRequest, words: &[&str]) -> Error {
    let folder = request.output.parent().unwrap();
    let before = names(folder);
    let error = convert(request, &()).unwrap_err();
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
    assert_eq!(names(folder), before, "{message}");
    error
}

fn transformer_of(matrix: Tensor, path: &Path) {
    let norm = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
    let tensors = HashMap::from([
        ("transformer_blocks.0.img_mod.1.weight", matrix),
        ("txt_norm.weight", norm),
    ]);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn outputs_that_cannot_be_are_refused_before_any_work() {
    let reference = Reference::open(NEWEST);
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    let input = part(&reference, "transformer");
    let request = ConvertRequest::new(&input, &output, WriteType::Q8_0);
    fs_err::write(&output, b"mine").unwrap();
    refused(&request, &["out.gguf", "already exists", "--force"]);
    assert_eq!(fs_err::read(&output).unwrap(), b"mine");
    let replacing = ConvertRequest { overwrite: Overwrite::Replace, ..request.clone() };
    converted(&replacing);
    assert!(fs_err::read(&output).unwrap().starts_with(b"GGUF"));
    let at = |name: &str| ConvertRequest { output: folder.path().join(name), ..request.clone() };
    refused(&at("out.bin"), &["out.bin", ".gguf or .safetensors"]);
    refused(&at("out.safetensors"), &["safetensors", "q8_0", "fp8"]);
    let fp8 = ConvertRequest { kind: WriteType::Fp8, ..at("fp8.gguf") };
    refused(&fp8, &["gguf", "fp8"]);
    let named = ConvertRequest { format: Some(WriteFormat::Gguf), ..at("out.bin") };
    converted(&named);
    let missing = ConvertRequest { output: folder.path().join("none/x.gguf"), ..request };
    let message = convert(&missing, &()).unwrap_err().to_string();
    assert!(message.contains("make the folder first"), "{message}");
}

#[test]
fn inputs_that_cannot_be_converted_are_named() {
    let reference = Reference::open(NEWEST);
    let folder = tempfile::tempdir().unwrap();
    let request =
        |input: &Path| ConvertRequest::new(input, folder.path().join("out.gguf"), WriteType::Q8_0);
    let whole = request(&reference.folder);
    refused(&whole, &["a whole model", "transformer", "text_encoder", "vae"]);
    refused(&request(&part(&reference, "vae")), &["autoencoder", ".safetensors"]);
    refused(&request(&part(&reference, "tokenizer")), &["no weights"]);
    refused(&request(&folder.path().join("none.gguf")), &["none.gguf"]);
    let lora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lora/few.safetensors");
    refused(&request(&lora), &["few.safetensors", "LoRA"]);
    let picture = reference.folder.join("cases/edit_in.png");
    refused(&request(&picture), &["edit_in.png", "safetensors"]);
    let mut none = request(&lora);
    none.inputs.clear();
    refused(&none, &["INPUT"]);
}

#[test]
fn files_that_hold_other_models_as_well_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = part(&Reference::open(NEWEST), "transformer");
    let path = path.join("diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("vae.decoder.conv1.weight".to_owned(), one);
    let input = folder.path().join("t.safetensors");
    candle_core::safetensors::save(&tensors, &input).unwrap();
    let request = ConvertRequest::new(&input, folder.path().join("out.gguf"), WriteType::Bf16);
    refused(&request, &["t.safetensors", "1 tensors", "vae.decoder.conv1.weight"]);
}

#[test]
fn numbers_that_a_type_cannot_hold_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("t.safetensors");
    let of = |number: f32| {
        let mut numbers = vec![0.5; 2 * 64];
        numbers[70] = number;
        transformer_of(Tensor::from_vec(numbers, (2, 64), &Device::Cpu).unwrap(), &input);
    };
    let request =
        |kind| ConvertRequest::new(&input, folder.path().join(format!("{kind}.gguf")), kind);
    of(f32::NAN);
    for kind in [WriteType::Bf16, WriteType::F32, WriteType::Q8_0] {
        refused(&request(kind), &["t.safetensors", "img_mod.1.weight", "NaN", "finite"]);
    }
    of(70_000.0);
    for kind in [WriteType::F16, WriteType::Q5_1] {
        refused(&request(kind), &["img_mod.1.weight", "70000", "--tensor-type-rules", "=bf16"]);
    }
    converted(&request(WriteType::Bf16));
}

#[test]
fn a_cancelled_conversion_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("t.safetensors");
    let large = Tensor::ones((2048, 2048), DType::F32, &Device::Cpu).unwrap();
    transformer_of(large, &input);
    for after in [0, 2] {
        let cancel = CancelToken::new();
        let request = ConvertRequest {
            cancel: cancel.clone(),
            ..ConvertRequest::new(&input, folder.path().join("out.gguf"), WriteType::Q4K)
        };
        let heard = std::sync::atomic::AtomicUsize::new(0);
        let stop = |event: &Event<'_>| {
            let step = matches!(event, Event::Step { .. });
            if step && heard.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == after {
                cancel.cancel();
            }
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let error = pool.install(|| convert(&request, &stop)).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert_eq!(names(folder.path()), ["t.safetensors"], "after {after}");
    }
}

#[test]
fn the_program_converts() {
    let reference = Reference::open(NEWEST);
    let folder = tempfile::tempdir().unwrap();
    let text = |path: PathBuf| path.display().to_string();
    let (input, output) =
        (text(part(&reference, "transformer")), text(folder.path().join("t.gguf")));
    let shown = cli::run(&["convert", &input, "-o", &output, "--type", "q8_0"], 0);
    let (stdout, stderr) = (cli::text(&shown.stdout), cli::text(&shown.stderr));
    for word in [&output, "sha256", "fingerprint", "Qwen-Image-Edit-2511", "Q8_0"] {
        assert!(stdout.contains(word), "no {word:?} in: {stdout}");
    }
    assert!(stderr.contains("q8_0 became bf16"), "{stderr}");
    cli::run(&["convert", &input, "-o", &output, "--type", "q8_0"], 1);
    let again = ["convert", &input, "-o", &output, "--type", "q4_k", "--force", "--json"];
    let json = cli::text(&cli::run(&again, 0).stdout);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["version"], "Qwen-Image-Edit-2511");
    assert_eq!(json["files"][0]["sha256"].as_str().unwrap().len(), 64);
    let mixture = cli::run(&["convert", &input, "-o", "x.gguf", "--type", "q4_k_m"], 2);
    let mixture = cli::text(&mixture.stderr);
    assert!(mixture.contains("--tensor-type-rules"), "{mixture}");
    let info = cli::text(&cli::run(&["info", &output], 0).stdout);
    assert!(info.contains("version: Qwen-Image-Edit-2511, since its config has"), "{info}");
}
