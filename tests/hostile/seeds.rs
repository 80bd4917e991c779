//! Sound inputs of each reader: small files of `tests/data`, and others that are written here.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

use crate::{gguf_writer::Gguf, readers::data};

fn file(path: &str) -> Vec<u8> {
    fs_err::read(data(path)).unwrap()
}

fn files(folder: &str, ends: &[&str]) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = fs_err::read_dir(data(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| ends.iter().any(|end| path.extension().is_some_and(|found| found == *end)))
        .collect();
    paths.sort();
    paths.iter().map(|path| fs_err::read(path).unwrap()).collect()
}

type Raw = (String, Dtype, Vec<usize>, Vec<u8>);

fn written(tensors: &[Raw], metadata: &[(&str, String)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    safetensors::serialize(views, metadata).unwrap()
}

fn floats(name: &str, shape: &[usize]) -> Raw {
    let count: usize = shape.iter().product();
    let bytes = (0..count).flat_map(|i| ((i as f32 * 0.37).sin()).to_le_bytes()).collect();
    (name.to_owned(), Dtype::F32, shape.to_vec(), bytes)
}

pub(crate) fn safetensors() -> Vec<Vec<u8>> {
    let metadata = [("format", "pt".to_owned()), ("title", "a \"b\" \u{e9}".to_owned())];
    vec![
        file("gguf/types.safetensors"),
        written(&[floats("a.weight", &[2, 3]), floats("b", &[]), floats("c", &[0])], &metadata),
    ]
}

pub(crate) fn scaled() -> Vec<Vec<u8>> {
    let bytes: Vec<u8> = (0..8).map(|i| i * 13).collect();
    let weight = |dtype| ("m.fc.weight".to_owned(), dtype, vec![2, 4], bytes.clone());
    let scale =
        |end: &str| ("m.fc".to_owned() + end, Dtype::F32, vec![], 0.5_f32.to_le_bytes().to_vec());
    let text = br#"{"format": "float8_e5m2", "full_precision_matrix_mult": true}"#.to_vec();
    let described = ("m.fc.comfy_quant".to_owned(), Dtype::U8, vec![text.len()], text);
    let mark = ("m.scaled_fp8".to_owned(), Dtype::F8_E4M3, vec![2], vec![0, 0]);
    let header =
        json!({ "format_version": "1.0", "layers": { "fc": { "format": "float8_e4m3fn" } } });
    vec![
        written(
            &[weight(Dtype::F8_E4M3), scale(".scale_weight"), scale(".scale_input"), mark],
            &[],
        ),
        written(&[weight(Dtype::F8_E5M2), scale(".weight_scale"), described], &[]),
        written(
            &[weight(Dtype::F8_E4M3), scale(".weight_scale"), scale(".input_scale")],
            &[("_quantization_metadata", header.to_string())],
        ),
    ]
}

/// Every kind of value, and a tensor with its shape from before.
pub(crate) fn gguf() -> Vec<Vec<u8>> {
    let mut small = Gguf::new();
    small.text("general.architecture", "qwen_image");
    small.int("general.alignment", 32);
    small.float("x.float", 0.5);
    small.bool("x.bool", true);
    small.floats("x.floats", &[1.0, 2.0]);
    small.texts("x.texts", &["a".to_owned(), String::new()]);
    small.raw_key("x.i64", 11, &(-5_i64).to_le_bytes());
    small.ints("comfy.gguf.orig_shape.w", &[2, 2, 2]);
    small.plain(
        "w",
        &Tensor::new(&[[1.0_f32, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], &Device::Cpu).unwrap(),
    );
    small.plain("empty", &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    vec![small.bytes(), file("gguf/types.gguf")]
}

/// Two matrices of a transformer.
pub(crate) fn small_transformer() -> Vec<u8> {
    written(
        &[
            floats("transformer_blocks.0.attn.to_q.weight", &[4, 4]),
            floats("transformer_blocks.0.attn.to_out.0.weight", &[4, 4]),
            floats("txt_norm.weight", &[4]),
        ],
        &[],
    )
}

/// Factors of both, without alphas.
pub(crate) fn bare_lora() -> Vec<u8> {
    written(
        &[
            floats("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", &[2, 4]),
            floats("base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight", &[4, 2]),
        ],
        &[],
    )
}

pub(crate) fn lora() -> Vec<Vec<u8>> {
    let named = |module: &str, [down, up]: [&str; 2]| {
        let alpha = (format!("{module}.alpha"), Dtype::I64, vec![], 3_i64.to_le_bytes().to_vec());
        [
            floats(&format!("{module}.{down}"), &[2, 4]),
            floats(&format!("{module}.{up}"), &[4, 2]),
            alpha,
        ]
    };
    let kohya = named(
        "lora_unet_transformer_blocks_0_attn_to_out_0",
        ["lora_down.weight", "lora_up.weight"],
    );
    let peft =
        named("transformer.transformer_blocks.0.attn.to_q", ["lora_A.weight", "lora_B.weight"]);
    let config = json!({ "transformer.peft_type": "LORA", "transformer.r": 2, "transformer.lora_alpha": 3.5 });
    let text = floats("lora_te_layers_0.lora_down.weight", &[1]);
    let mut mixed = kohya.to_vec();
    mixed.push(text);
    vec![
        written(&mixed, &[("ss_network_dim", "2".to_owned())]),
        written(&peft[..2], &[("lora_adapter_metadata", config.to_string())]),
        bare_lora(),
    ]
}

pub(crate) fn transformer() -> Vec<Vec<u8>> {
    let prefixed = |prefix: &str| {
        let tensors = [
            ("img_in.weight", vec![128, 64]),
            ("txt_in.weight", vec![128, 8]),
            ("txt_norm.weight", vec![8]),
            ("proj_out.weight", vec![64, 128]),
            ("transformer_blocks.0.attn.norm_q.weight", vec![128]),
            ("transformer_blocks.0.img_mod.1.weight", vec![2, 2]),
        ];
        let tensors: Vec<Raw> =
            tensors.iter().map(|(name, shape)| floats(&format!("{prefix}{name}"), shape)).collect();
        written(&tensors, &[("modelspec.title", "qwen-image-edit-2511".to_owned())])
    };
    vec![prefixed(""), prefixed("model.diffusion_model.")]
}

/// A language model in GGUF with a tokenizer of a few tokens; its matrices are not read.
pub(crate) fn language_model() -> Vec<Vec<u8>> {
    let mut file = Gguf::new();
    file.text("general.architecture", "qwen2vl");
    for (key, value) in [
        ("embedding_length", 16),
        ("feed_forward_length", 32),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("context_length", 128),
    ] {
        file.int(&format!("qwen2vl.{key}"), value);
    }
    file.float("qwen2vl.attention.layer_norm_rms_epsilon", 1e-6);
    file.float("qwen2vl.rope.freq_base", 1e6);
    file.ints("qwen2vl.rope.dimension_sections", &[1, 1, 2, 0]);
    file.int("tokenizer.ggml.eos_token_id", 5);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen2");
    let tokens = ["a", "b", "ab", "\u{120}", "<|image_pad|>", "<|im_end|>", "[PAD6]"];
    file.texts("tokenizer.ggml.tokens", &tokens.map(str::to_owned));
    file.ints("tokenizer.ggml.token_type", &[1, 1, 1, 1, 3, 3, 5]);
    file.texts("tokenizer.ggml.merges", &["a b".to_owned()]);
    file.text("tokenizer.chat_template", "{% for m in messages %}{{ m.role }}{% endfor %}");
    file.plain("token_embd.weight", &Tensor::zeros((7, 16), DType::F32, &Device::Cpu).unwrap());
    file.plain("blk.0.attn_q.bias", &Tensor::zeros(16, DType::F32, &Device::Cpu).unwrap());
    file.plain("output.weight", &Tensor::zeros((7, 16), DType::F32, &Device::Cpu).unwrap());
    vec![file.bytes()]
}

/// The vision tower of it, as far as its config is told from it.
pub(crate) fn vision_tower() -> Vec<u8> {
    let mut file = Gguf::new();
    file.text("general.architecture", "clip");
    file.text("clip.projector_type", "qwen2.5vl_merger");
    file.bool("clip.use_silu", true);
    for (key, value) in
        [("block_count", 2), ("attention.head_count", 2), ("patch_size", 14), ("n_wa_pattern", 2)]
    {
        file.int(&format!("clip.vision.{key}"), value);
    }
    file.floats("clip.vision.image_mean", &[0.5, 0.5, 0.5]);
    file.floats("clip.vision.image_std", &[0.5, 0.5, 0.5]);
    for (name, shape) in [
        ("v.patch_embd.weight", &[16_usize, 3, 14, 14][..]),
        ("v.patch_embd.weight.1", &[16, 3, 14, 14]),
        ("v.blk.0.ffn_gate.weight", &[32, 16]),
        ("mm.2.weight", &[16, 64]),
    ] {
        file.plain(name, &Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
    }
    file.bytes()
}

pub(crate) fn one_tensor(name: &str) -> Vec<u8> {
    written(&[floats(name, &[2])], &[])
}

pub(crate) fn index() -> Vec<Vec<u8>> {
    let map = json!({
        "metadata": { "total_size": 16 },
        "weight_map": { "a": "a.safetensors", "b": "b.safetensors" },
    });
    vec![map.to_string().into_bytes()]
}

pub(crate) fn lora_config() -> Vec<Vec<u8>> {
    let config = json!({
        "peft_type": "LORA", "r": 3, "lora_alpha": 3.5, "use_rslora": true, "bias": "none",
        "rank_pattern": { "attn\\.to_(q|k)": 2 }, "alpha_pattern": { "to_q": 5 },
        "target_modules": ["to_q"],
    });
    vec![config.to_string().into_bytes()]
}

pub(crate) fn adapter_config() -> Vec<Vec<u8>> {
    vec![file("vlm/adapters/qv/adapter_config.json")]
}

pub(crate) fn configs() -> Vec<Vec<u8>> {
    let tagged = |(tag, path): (usize, &str)| {
        let mut bytes = vec![tag as u8];
        bytes.extend(file(&format!("reference/tiny-qwen-2511/{path}")));
        bytes
    };
    let paths = [
        "transformer/config.json",
        "text_encoder/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ];
    let mut all: Vec<Vec<u8>> = paths.into_iter().enumerate().map(tagged).collect();
    let preprocessor = json!({
        "min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    });
    all.push([&[4], preprocessor.to_string().as_bytes()].concat());
    all
}

pub(crate) fn tokenizer() -> Vec<Vec<u8>> {
    let text = file("reference/tiny-qwen-2511/tokenizer/tokenizer.json");
    let mut small: serde_json::Value = serde_json::from_slice(&text).unwrap();
    small["model"]["vocab"] = json!({ "a": 0, "b": 1, "ab": 2, "\u{120}": 3, "e": 4 });
    small["model"]["merges"] = json!([["a", "b"]]);
    let added: Vec<_> = small["added_tokens"].as_array().unwrap()[..3].to_vec();
    small["added_tokens"] = added.into();
    vec![small.to_string().into_bytes(), text]
}

pub(crate) fn template() -> Vec<Vec<u8>> {
    let qwen = "{% set image_count = namespace(value=0) %}{% for message in messages %}\
        {% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}\
        <|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n\
        {% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}\
        {% set image_count.value = image_count.value + 1 %}Picture {{ image_count.value }}: <|vision_start|><|image_pad|><|vision_end|>\
        {% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let small = "{% for m in messages %}{{ m.role | upper }}{{ loop.index }}{% endfor %}{{ range(3) | list }}";
    vec![qwen.into(), small.into()]
}

pub(crate) fn plan() -> Vec<Vec<u8>> {
    let plan = json!({
        "version": 1,
        "request": "paint the house blue and take away the car",
        "decomposition": { "actions": ["recolor", "delete"], "subjects": ["house", "car"], "goals": ["blue", "gone"] },
        "steps": [
            { "action": "recolor", "subject": "house", "goal": "blue", "prompt": "paint the house blue" },
            { "action": "delete", "subject": "car", "goal": "gone", "prompt": "remove the car" },
        ],
    });
    vec![plan.to_string().into_bytes()]
}

pub(crate) fn decomposition() -> Vec<Vec<u8>> {
    [
        "<action>recolor; delete; replace</action>\n<subject>coat; car; background</subject>\n<goal>red; gone; night</goal>",
        "<action>add</action>\n<subject>red tree</subject>\n<goal>top left</goal>",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

pub(crate) fn prompts() -> Vec<Vec<u8>> {
    let text = "[decompose.system]\nTake requests apart.\n\n[decompose.user]\n{request}\n";
    vec![text.as_bytes().to_vec()]
}

/// Pictures of every format, up to a few kilobytes.
pub(crate) fn pictures() -> Vec<Vec<u8>> {
    let ends = ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm", "qoi"];
    files("pictures", &ends).into_iter().filter(|bytes| bytes.len() < 8192).collect()
}

pub(crate) fn sizes() -> Vec<Vec<u8>> {
    vec![vec![64, 1, 64, 1], vec![0; 58]]
}
