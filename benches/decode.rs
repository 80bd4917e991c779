//! The language model's prefill and decoding, a few times; `llama_cpp.sh` runs it in turn with
//! llama.cpp.
//!
//! `decode FOLDER f32|bf16|q8_0|q4_k PROMPT_TOKENS ANSWER_TOKENS REPEATS` prints one line for each
//! repeat after a first, untimed one: tokens a second of a prompt, and of an answer to a prompt of
//! one token.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark may panic")]
#![expect(clippy::print_stdout, reason = "numbers for llama_cpp.sh")]

use std::{path::Path, time::Instant};

use candle_core::DType;
use pentimento::{
    CancelToken,
    vlm::{GenerateOptions, Inputs, Sampling, VisionLanguageModel},
    weights::{ModelFiles, Precision, Storage},
};

fn main() {
    // `cargo bench` without arguments only builds it.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [folder, kept, prompt, answer, repeats] = arguments.as_slice() else { return };
    let storage = match kept.as_str() {
        "f32" => Storage::Plain(DType::F32),
        "bf16" => Storage::Plain(DType::BF16),
        "q8_0" => Storage::Q8_0,
        "q4_k" => Storage::Q4K,
        other => panic!("{other}: expected f32, bf16, q8_0 or q4_k"),
    };
    let [prompt, answer, repeats]: [usize; 3] =
        [prompt, answer, repeats].map(|n| n.parse().unwrap());
    let files = ModelFiles::Folder(Path::new(folder).to_owned());
    let precision = Precision { storage, ..Precision::reference() };
    let model = VisionLanguageModel::load(&files, "text_encoder", &precision).unwrap();
    let prompt = model.prepare(&"1".repeat(prompt), &[]).unwrap();
    let one = model.prepare("1", &[]).unwrap();
    for repeat in 0..=repeats {
        let prefill = prompt.tokens().len() as f64 / seconds(&model, &prompt, 1);
        let first = seconds(&model, &one, 1);
        let decode = answer as f64 / (seconds(&model, &one, 1 + answer) - first);
        if repeat > 0 {
            println!("{prefill:.3},{decode:.3}");
        }
    }
}

/// How long an answer of so many tokens takes.
fn seconds(model: &VisionLanguageModel, inputs: &Inputs, tokens: usize) -> f64 {
    let options = GenerateOptions {
        max_new_tokens: tokens,
        sampling: Sampling::Greedy,
        stop_tokens: Vec::new(),
        ..model.generate_options()
    };
    let start = Instant::now();
    let answer = model.generate(inputs, &options, &CancelToken::new(), &mut |_| ()).unwrap();
    assert_eq!(answer.tokens.len(), tokens);
    start.elapsed().as_secs_f64()
}
