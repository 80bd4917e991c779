//! Weights that are not numbers: the stage is named, and nothing is written.

use candle_core::{Device, Tensor};
use pentimento::{Engine, EngineOptions, Error, ModelSource, weights::Storage};

use crate::{cli, common::Reference, engine};

/// A copy of a model with NaN in one tensor.
fn damaged(part: &str, tensor: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    engine::copy(&Reference::open("tiny-qwen-edit").folder, folder.path());
    let path = folder.path().join(part);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let shape = tensors[tensor].shape().clone();
    tensors.insert(tensor.to_owned(), Tensor::full(f32::NAN, shape, &Device::Cpu).unwrap());
    fs_err::remove_file(&path).unwrap();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    folder
}

#[test]
fn weights_that_are_not_finite_are_an_error_of_their_stage() {
    let reference = Reference::open("tiny-qwen-edit");
    let vae = "vae/diffusion_pytorch_model.safetensors";
    for (part, tensor, named) in [
        ("transformer/diffusion_pytorch_model.safetensors", "proj_out.bias", "denoising"),
        ("transformer/diffusion_pytorch_model.safetensors", "txt_in.bias", "denoising"),
        ("text_encoder/model.safetensors", "model.norm.weight", "reading the request"),
        (vae, "encoder.conv_in.bias", "encoding the picture"),
        (vae, "decoder.conv_out.bias", "decoding"),
    ] {
        let folder = damaged(part, tensor);
        let source = ModelSource::Folder(folder.path().to_owned());
        let options = EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() };
        let engine = Engine::open(&source, &options, &()).unwrap();
        let error = engine.edit(&engine::request(&reference, "pipe.nocfg"), &()).unwrap_err();
        match error {
            Error::NotFinite { stage, count, .. } => {
                assert!(stage == named && count > 0, "{tensor}: {stage}, expected {named}");
            }
            other => panic!("{tensor}: {other}"),
        }
    }
}

#[test]
fn matrices_that_are_not_finite_are_not_quantized() {
    let matrix = "transformer_blocks.0.img_mlp.net.2.weight";
    let folder = damaged("transformer/diffusion_pytorch_model.safetensors", matrix);
    let source = ModelSource::Folder(folder.path().to_owned());
    for storage in [Storage::Q8_0, Storage::Q4K] {
        let options = EngineOptions {
            device: pentimento::Device::Cpu,
            storage: Some(storage),
            ..EngineOptions::default()
        };
        let message = Engine::open(&source, &options, &()).unwrap_err().to_string();
        for word in ["diffusion_pytorch_model.safetensors", matrix, "not finite"] {
            assert!(message.contains(word), "no {word:?} in: {message}");
        }
    }
}

#[test]
fn nothing_is_written_where_a_stage_fails() {
    let reference = Reference::open("tiny-qwen-edit");
    let input = reference.folder.join("cases/edit_in.png").display().to_string();
    let folder = damaged("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias");
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("out.png").display().to_string();
    let model = folder.path().display().to_string();
    let mut arguments = vec!["edit", "-i", &input, "-p", "make it night", "-o", &path];
    arguments.extend(["--model", &model, "--area", "64x64", "--steps", "2", "-s", "7"]);
    arguments.extend(["--strategy", "direct"]);
    let said = cli::text(&cli::run(&arguments, 1).stderr);
    assert!(said.contains("decoding produced") && said.contains("not finite"), "{said}");
    assert_eq!(fs_err::read_dir(out.path()).unwrap().count(), 0, "a file was left behind");
}
