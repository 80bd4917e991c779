//! A reference checkpoint written as the single files that people have.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use pentimento::ModelParts;
use serde_json::Value;

use super::{Reference, gguf_writer::Gguf};

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, Tensor>;

/// The type that the tensor with a name and a shape is written in; `None` for its own as f32.
pub(crate) type Kinds = fn(&str, &Tensor) -> Kind;

/// A type of a GGUF file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Plain(DType),
    Blocks(GgmlDType),
}

/// Everything as float32.
pub(crate) fn all_f32(_: &str, _: &Tensor) -> Kind {
    Kind::Plain(DType::F32)
}

/// As quantized files are: types differ from layer to layer, vectors stay plain.
pub(crate) fn mixed(name: &str, tensor: &Tensor) -> Kind {
    let &[_, width] = tensor.dims() else { return Kind::Plain(DType::F32) };
    let digit = name.bytes().map(usize::from).sum::<usize>() % 4;
    match (width % 256, width % 32, digit) {
        (0, _, _) => Kind::Blocks(GgmlDType::Q4K),
        (_, 0, 0 | 1) => Kind::Blocks(GgmlDType::Q8_0),
        (_, 0, 2) => Kind::Blocks(GgmlDType::Q5_1),
        (_, 0, _) => Kind::Blocks(GgmlDType::Q4_0),
        (_, _, 0 | 1) => Kind::Plain(DType::F16),
        _ => Kind::Plain(DType::BF16),
    }
}

/// A tensor as it comes back from a file of this type.
pub(crate) fn rounded(tensor: &Tensor, kind: Kind) -> Tensor {
    let wide = tensor.to_dtype(DType::F32).unwrap().force_contiguous().unwrap();
    match kind {
        Kind::Plain(dtype) => wide.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap(),
        Kind::Blocks(kind) => {
            let blocks = candle_core::quantized::QTensor::quantize(&wide, kind).unwrap();
            blocks.dequantize(&Device::Cpu).unwrap()
        }
    }
}

fn add(file: &mut Gguf, name: &str, tensor: &Tensor, kind: Kind) {
    match kind {
        Kind::Plain(dtype) => file.plain(name, &tensor.to_dtype(dtype).unwrap()),
        Kind::Blocks(kind) => file.quantized(name, tensor, kind),
    }
}

pub(crate) fn load(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect()
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap()
}

/// The transformer in GGUF, with its config beside it but for the version.
pub(crate) fn transformer(reference: &Reference, path: &Path, kinds: Kinds) {
    let folder = reference.folder.join("transformer");
    let mut file = Gguf::new();
    file.text("general.architecture", "qwen_image");
    for (name, tensor) in load(&folder.join("diffusion_pytorch_model.safetensors")) {
        let kind = kinds(&name, &tensor);
        add(&mut file, &name, &tensor, kind);
    }
    file.write(path);
    let mut config = json(&folder.join("config.json"));
    config.as_object_mut().unwrap().remove("zero_cond_t");
    fs_err::write(path.with_file_name("config.json"), config.to_string()).unwrap();
}

/// The language model's name in GGUF, or the vision tower's.
fn gguf_name(name: &str) -> String {
    let mut name = name.to_owned();
    for (ours, gguf) in [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("visual.blocks.", "v.blk."),
        ("visual.merger.ln_q.", "v.post_ln."),
        ("visual.merger.mlp.", "mm."),
        ("visual.patch_embed.proj.", "v.patch_embd."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("attn.qkv", "attn_qkv"),
        ("attn.proj", "attn_out"),
        ("norm1", "ln1"),
        ("norm2", "ln2"),
    ] {
        name = name.replace(ours, gguf);
    }
    name
}

/// The language model in GGUF with its tokenizer; the vision tower stays away.
pub(crate) fn language_model(reference: &Reference, path: &Path, kinds: Kinds) {
    let mut file = language_keys(reference);
    for (name, tensor) in load(&reference.folder.join("text_encoder/model.safetensors")) {
        if !name.starts_with("visual.") {
            let kind = kinds(&name, &tensor);
            add(&mut file, &gguf_name(&name), &tensor, kind);
        }
    }
    file.write(path);
}

fn language_keys(reference: &Reference) -> Gguf {
    let config = &json(&reference.folder.join("text_encoder/config.json"))["text_config"];
    let number = |key: &str| u32::try_from(config[key].as_u64().unwrap()).unwrap();
    let mut file = Gguf::new();
    file.text("general.architecture", "qwen2vl");
    for (key, ours) in [
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("context_length", "max_position_embeddings"),
    ] {
        file.int(&format!("qwen2vl.{key}"), number(ours));
    }
    file.float("qwen2vl.attention.layer_norm_rms_epsilon", 1e-6);
    file.float("qwen2vl.rope.freq_base", 1e6);
    file.ints("qwen2vl.rope.dimension_sections", &[2, 3, 3, 0]);
    file.int("tokenizer.ggml.eos_token_id", number("eos_token_id"));
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen2");
    let tokenizer = json(&reference.folder.join("tokenizer/tokenizer.json"));
    let mut tokens = BTreeMap::new();
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens.insert(id.as_u64().unwrap(), (token.clone(), 1));
    }
    for token in tokenizer["added_tokens"].as_array().unwrap() {
        let content = token["content"].as_str().unwrap().to_owned();
        tokens.insert(token["id"].as_u64().unwrap(), (content, 3));
    }
    let (texts, kinds): (Vec<String>, Vec<i32>) = tokens.into_values().unzip();
    file.texts("tokenizer.ggml.tokens", &texts);
    file.ints("tokenizer.ggml.token_type", &kinds);
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(|pair| {
        let part = |i: usize| pair[i].as_str().unwrap();
        pair.as_str().map_or_else(|| format!("{} {}", part(0), part(1)), str::to_owned)
    });
    file.texts("tokenizer.ggml.merges", &merges.collect::<Vec<_>>());
    file
}

/// The vision tower in GGUF, attention and patch embedding in parts.
pub(crate) fn vision_tower(reference: &Reference, path: &Path, kinds: Kinds) {
    let config = &json(&reference.folder.join("text_encoder/config.json"))["vision_config"];
    let number = |key: &str| u32::try_from(config[key].as_u64().unwrap()).unwrap();
    let mut file = Gguf::new();
    file.text("general.architecture", "clip");
    file.text("general.type", "mmproj");
    file.text("clip.projector_type", "qwen2.5vl_merger");
    file.bool("clip.use_silu", true);
    file.int("clip.vision.block_count", number("depth"));
    file.int("clip.vision.attention.head_count", number("num_heads"));
    file.int("clip.vision.patch_size", number("patch_size"));
    file.int("clip.vision.n_wa_pattern", 2);
    file.float("clip.vision.attention.layer_norm_epsilon", 1e-6);
    file.floats("clip.vision.image_mean", &[0.481_454_66, 0.457_827_5, 0.408_210_73]);
    file.floats("clip.vision.image_std", &[0.268_629_54, 0.261_302_6, 0.275_777_1]);
    for (name, tensor) in load(&reference.folder.join("text_encoder/model.safetensors")) {
        if !name.starts_with("visual.") {
            continue;
        }
        let gguf = gguf_name(&name);
        for (name, part) in parts(&gguf, &tensor) {
            let kind = kinds(&name, &part);
            add(&mut file, &name, &part, kind);
        }
    }
    file.write(path);
}

fn parts(name: &str, tensor: &Tensor) -> Vec<(String, Tensor)> {
    if name.contains("attn_qkv") {
        let thirds = tensor.chunk(3, 0).unwrap();
        let named = |(part, tensor)| (name.replace("qkv", part), tensor);
        return ["q", "k", "v"].into_iter().zip(thirds).map(named).collect();
    }
    if name == "v.patch_embd.weight" {
        let frame = |i| tensor.narrow(2, i, 1).unwrap().squeeze(2).unwrap().contiguous().unwrap();
        return vec![(name.to_owned(), frame(0)), (format!("{name}.1"), frame(1))];
    }
    vec![(name.to_owned(), tensor.clone())]
}

/// The autoencoder under Wan's names, which has one residual block on each level.
pub(crate) fn wan_autoencoder(reference: &Reference, path: &Path) {
    let tensors = load(&reference.folder.join("vae/diffusion_pytorch_model.safetensors"));
    let renamed: std::collections::HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (wan_name(&name), tensor)).collect();
    candle_core::safetensors::save(&renamed, path).unwrap();
}

fn wan_name(name: &str) -> String {
    const LEVEL: usize = 3;
    let mut name = name.to_owned();
    for (ours, wan) in [
        ("post_quant_conv.", "conv2."),
        ("quant_conv.", "conv1."),
        ("mid_block.resnets.0", "middle.0"),
        ("mid_block.attentions.0", "middle.1"),
        ("mid_block.resnets.1", "middle.2"),
        ("norm_out.", "head.0."),
        ("conv_out.", "head.2."),
        ("down_blocks.", "downsamples."),
        (".norm1.", ".residual.0."),
        (".conv1.", ".residual.2."),
        (".norm2.", ".residual.3."),
        (".conv2.", ".residual.6."),
        ("conv_shortcut.", "shortcut."),
        ("conv_in.", "conv1."),
    ] {
        name = name.replace(ours, wan);
    }
    for block in 0..4 {
        for resnet in 0..LEVEL - 1 {
            let flat = format!("upsamples.{}.", block * LEVEL + resnet);
            name = name.replace(&format!("up_blocks.{block}.resnets.{resnet}."), &flat);
        }
        let flat = format!("upsamples.{}.", block * LEVEL + LEVEL - 1);
        name = name.replace(&format!("up_blocks.{block}.upsamplers.0."), &flat);
    }
    name
}

/// All parts of a reference as single files below `folder`.
pub(crate) fn write_all(reference: &Reference, folder: &Path, kinds: Kinds) -> ModelParts {
    for part in ["unet", "llm", "vae"] {
        fs_err::create_dir_all(folder.join(part)).unwrap();
    }
    let place = |path: &str| -> PathBuf { folder.join(path) };
    let parts = ModelParts {
        diffusion_model: Some(place("unet/qwen-image-edit-2511.gguf")),
        llm: Some(place("llm/Qwen2.5-VL-tiny-Q4_K_M.gguf")),
        vae: Some(place("vae/qwen_image_vae.safetensors")),
        ..ModelParts::default()
    };
    transformer(reference, parts.diffusion_model.as_ref().unwrap(), kinds);
    language_model(reference, parts.llm.as_ref().unwrap(), kinds);
    vision_tower(reference, &place("llm/mmproj-F16.gguf"), kinds);
    wan_autoencoder(reference, parts.vae.as_ref().unwrap());
    parts
}
