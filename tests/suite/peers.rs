//! Files that other programs made: llama.cpp's converter and llama-quantize, stable-diffusion.cpp's
//! convert mode. Their numbers are those that gguf-py reads, and they stand for a model.

use std::path::{Path, PathBuf};

use candle_core::DType;
use pentimento::{
    AskRequest, Assistant, Engine, EngineOptions, ModelParts, ModelSource,
    weights::{Checkpoint, Precision, Weights},
};
use sha2::{Digest, Sha256};

use crate::{common::Reference, engine};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peers")
}

fn options() -> EngineOptions {
    EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() }
}

#[test]
fn numbers_are_those_of_gguf_py() {
    let digests = fs_err::read_to_string(data().join("digests.json")).unwrap();
    let digests: serde_json::Value = serde_json::from_str(&digests).unwrap();
    let files = digests.as_object().unwrap();
    assert_eq!(files.len(), 3);
    for (file, tensors) in files {
        let checkpoint = Checkpoint::open_file(&data().join(file)).unwrap();
        let shapes: Vec<(String, Vec<usize>)> = checkpoint
            .tensors()
            .map(|(name, entry)| (name.to_owned(), entry.shape.clone()))
            .collect();
        assert_eq!(shapes.len(), tensors.as_object().unwrap().len(), "{file}");
        let weights = Weights::new(checkpoint, Precision::reference());
        for (name, shape) in shapes {
            let numbers = weights.tensor(&name, &shape).unwrap().to_dtype(DType::F32).unwrap();
            let numbers: Vec<f32> = numbers.flatten_all().unwrap().to_vec1().unwrap();
            let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            let digest = Sha256::digest(bytes);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(tensors[&name], digest, "{file}: {name}");
        }
    }
}

#[test]
fn llama_cpps_language_model_answers() {
    let llm = Some(data().join("llama-q5_1.gguf"));
    let source = ModelSource::Files(ModelParts { llm, ..ModelParts::default() });
    let assistant = Assistant::open(&source, &options(), &()).unwrap();
    let reference = Reference::open("tiny-qwen-edit");
    let picture = engine::request(&reference, "pipe.cfg").pictures.remove(0);
    let mut request = AskRequest::new(vec![picture], "what is it?");
    request.tokens_max = 4;
    let outcome = assistant.ask(&request, &()).unwrap();
    assert!(outcome.prompt_tokens > 4);
}

#[test]
fn stable_diffusion_cpps_transformer_edits() {
    let reference = Reference::open("tiny-qwen-edit");
    let source = ModelSource::Files(ModelParts {
        folder: Some(reference.folder.clone()),
        diffusion_model: Some(data().join("sd-q4_0.gguf")),
        ..ModelParts::default()
    });
    let engine = Engine::open(&source, &options(), &()).unwrap();
    let mut request = engine::request(&reference, "pipe.cfg");
    request.steps = Some(2);
    engine.edit(&request, &()).unwrap();
}
