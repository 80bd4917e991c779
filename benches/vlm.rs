//! Qwen2.5-VL at the width of the 3B model, with two layers, two vision blocks and random weights:
//! a prompt of text, a picture, and the tokens of an answer.
//!
//! `cargo bench --bench vlm`; the vocabulary is small, so logits cost less than in the real model.
#![expect(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::{collections::HashMap, hint::black_box, path::Path, time::Duration};

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::RgbImage;
use pentimento::{
    CancelToken,
    vlm::{GenerateOptions, IMAGE_PLACEHOLDER, Sampling, VisionLanguageModel},
    weights::{ModelFiles, Precision, Storage},
};
use serde_json::json;

const WIDTH: usize = 2048;
const INNER: usize = 11_008;
const KV_WIDTH: usize = 256;
const VISION_WIDTH: usize = 1280;
const VISION_INNER: usize = 3420;
const LAYERS: usize = 2;
const VOCAB: usize = 2048;
const PROMPT_TOKENS: usize = 512;
const ANSWER_TOKENS: usize = 32;

/// A folder with the smallest tokenizer of the tests and random weights.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in ["text_encoder", "processor"] {
        fs_err::create_dir(folder.path().join(part)).unwrap();
    }
    let processor = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vlm/deep/processor");
    let tokenizer = "processor/tokenizer.json";
    fs_err::copy(processor.join("tokenizer.json"), folder.path().join(tokenizer)).unwrap();
    let settings = json!({ "min_pixels": 3136, "max_pixels": 12_845_056 }).to_string();
    let path = folder.path().join("processor/preprocessor_config.json");
    fs_err::write(path, settings).unwrap();
    let config = json!({
        "model_type": "qwen2_5_vl",
        "image_token_id": image_token(folder.path()),
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 2,
        "tie_word_embeddings": true,
        "vision_config": {
            "depth": LAYERS, "hidden_size": VISION_WIDTH, "intermediate_size": VISION_INNER,
            "num_heads": 16, "fullatt_block_indexes": [1],
        },
    });
    fs_err::write(folder.path().join("text_encoder/config.json"), config.to_string()).unwrap();
    let weights = folder.path().join("text_encoder/model.safetensors");
    candle_core::safetensors::save(&weights_by_name(), weights).unwrap();
    folder
}

fn image_token(folder: &Path) -> u32 {
    let files = ModelFiles::Folder(folder.to_owned());
    pentimento::vlm::Tokenizer::load(&files, &["processor"]).unwrap().id(IMAGE_PLACEHOLDER).unwrap()
}

fn weights_by_name() -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let tensor = Tensor::randn(0_f32, 0.02, shape, &Device::Cpu).unwrap();
        tensors.insert(name, tensor.to_dtype(DType::BF16).unwrap());
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, WIDTH]);
    add("model.norm.weight".into(), &[WIDTH]);
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}");
        for (name, out) in [("q", WIDTH), ("k", KV_WIDTH), ("v", KV_WIDTH)] {
            add(format!("{at}.self_attn.{name}_proj.weight"), &[out, WIDTH]);
            add(format!("{at}.self_attn.{name}_proj.bias"), &[out]);
        }
        add(format!("{at}.self_attn.o_proj.weight"), &[WIDTH, WIDTH]);
        add(format!("{at}.mlp.gate_proj.weight"), &[INNER, WIDTH]);
        add(format!("{at}.mlp.up_proj.weight"), &[INNER, WIDTH]);
        add(format!("{at}.mlp.down_proj.weight"), &[WIDTH, INNER]);
        add(format!("{at}.input_layernorm.weight"), &[WIDTH]);
        add(format!("{at}.post_attention_layernorm.weight"), &[WIDTH]);
        let at = format!("visual.blocks.{layer}");
        let (width, inner) = (VISION_WIDTH, VISION_INNER);
        for (name, out, from) in [
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ] {
            add(format!("{at}.{name}.weight"), &[out, from]);
            add(format!("{at}.{name}.bias"), &[out]);
        }
        add(format!("{at}.norm1.weight"), &[width]);
        add(format!("{at}.norm2.weight"), &[width]);
    }
    add("visual.patch_embed.proj.weight".into(), &[VISION_WIDTH, 3, 2, 14, 14]);
    add("visual.merger.ln_q.weight".into(), &[VISION_WIDTH]);
    for (index, out) in [(0, 4 * VISION_WIDTH), (2, WIDTH)] {
        add(format!("visual.merger.mlp.{index}.weight"), &[out, 4 * VISION_WIDTH]);
        add(format!("visual.merger.mlp.{index}.bias"), &[out]);
    }
    tensors
}

fn vlm(criterion: &mut Criterion) {
    let folder = folder();
    let files = ModelFiles::Folder(folder.path().to_owned());
    let cancel = CancelToken::new();
    for (storage, name) in
        [(Storage::Plain(DType::F32), "f32"), (Storage::Q8_0, "q8_0"), (Storage::Q4K, "q4_k")]
    {
        let precision = Precision { storage, ..Precision::reference() };
        let model = VisionLanguageModel::load(&files, "text_encoder", &precision).unwrap();
        let mut group = criterion.benchmark_group(format!("vlm/{name}"));
        group.sample_size(10).measurement_time(Duration::from_secs(5));
        let text = model.prepare(&"1".repeat(PROMPT_TOKENS), &[]).unwrap();
        group.bench_function(format!("hidden states of {PROMPT_TOKENS} tokens"), |bencher| {
            bencher.iter(|| black_box(model.hidden_states(&text, &cancel).unwrap()));
        });
        let picture = model.prepare(IMAGE_PLACEHOLDER, &[RgbImage::new(448, 448)]).unwrap();
        group.bench_function("tokens of a picture of 448 x 448", |bencher| {
            bencher.iter(|| black_box(model.vision_embeddings(&picture, &cancel).unwrap()));
        });
        let short = model.prepare("1", &[]).unwrap();
        let options = GenerateOptions {
            max_new_tokens: ANSWER_TOKENS,
            sampling: Sampling::Greedy,
            stop_tokens: Vec::new(),
            ..model.generate_options()
        };
        // Work per second is tokens per second here; the prompt of one token counts as one.
        group.throughput(Throughput::Elements(ANSWER_TOKENS as u64));
        group.bench_function(format!("answer of {ANSWER_TOKENS} tokens"), |bencher| {
            bencher.iter(|| model.generate(&short, &options, &cancel, &mut |_| ()).unwrap());
        });
        group.finish();
    }
}

criterion_group!(benches, vlm);
criterion_main!(benches);
