//! Low-rank adapters against `peft`, and files that are refused.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, Error,
    vlm::{Adapter, Call, GenerateOptions, Inputs, Sampling, VisionLanguageModel},
    weights::{ModelFiles, Precision, Storage},
};
use serde_json::{Value, json};

use super::{SHARE, fact, load, open, picture, read_json, wide};
use crate::common::{Reference, Tolerance, assert_close};

/// The adapters of `tests/data/make/adapter.py` and the models they were made for.
const VARIANTS: [(&str, &str, usize); 2] =
    [("qv", "../vlm/flat", 2 * 2), ("all", "tiny-qwen-edit", 4 * 7)];
const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

fn recorded(variant: &str) -> Reference {
    Reference::open(&format!("../vlm/adapters/{variant}"))
}

fn load_adapter(model: &VisionLanguageModel, folder: &Path) -> pentimento::Result<Adapter> {
    model.load_adapter(&ModelFiles::Folder(folder.to_owned()), ".")
}

fn prepare(model: &VisionLanguageModel, base: &Reference, prompt: &str) -> Inputs {
    if prompt == "vl" {
        return model.prepare(fact(base, "vl.text"), &[picture(base, "vl.png")]).unwrap();
    }
    let prompts = base.facts["prompts"].as_array().unwrap();
    let text = prompts.iter().find(|entry| entry["name"] == prompt).unwrap()["text"].as_str();
    let pictures = if prompt == "one" { vec![picture(base, "3.png")] } else { Vec::new() };
    model.prepare(text.unwrap(), &pictures).unwrap()
}

fn greedy() -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: 16,
        sampling: Sampling::Greedy,
        repetition_penalty: 1.0,
        seed: 0,
        stop_tokens: vec![514],
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn adapters_equal_peft() {
    for (variant, base, matrices) in VARIANTS {
        let (case, base) = (recorded(variant), Reference::open(base));
        let (model, cancel) = (open(&base), CancelToken::new());
        let adapter = load_adapter(&model, &case.folder).unwrap();
        assert_eq!(adapter.matrices(), matrices);
        let plain = Call::from(&cancel);
        let adapted = Call { adapter: Some(&adapter), ..plain };
        for prompt in case.facts["prompts"].as_array().unwrap() {
            let prompt = prompt.as_str().unwrap();
            let inputs = prepare(&model, &base, prompt);
            for (kind, call) in [("base", plain), ("adapted", adapted), ("base", plain)] {
                let name = |what: &str| format!("{kind}.{prompt}.{what}");
                let label = |what: &str| format!("{variant} {}", name(what));
                let hidden = model.hidden_states(&inputs, call).unwrap();
                let expected = case.tensor(&name("hidden_last"));
                assert_close(&label("hidden"), &hidden, expected, SHARE);
                let logits = model.logits(&inputs, call).unwrap();
                let expected = case.tensor(&name("logits"));
                let count = expected.dim(1).unwrap();
                let last = logits.narrow(1, logits.dim(1).unwrap() - count, count).unwrap();
                assert_close(&label("logits"), &last, expected, SHARE);
                let answer = model.generate(&inputs, &greedy(), call, &mut |_| ()).unwrap();
                assert_eq!(wide(&answer.tokens), case.ints(&name("greedy")), "{}", label("greedy"));
            }
        }
    }
}

#[test]
fn without_an_adapter_the_model_is_the_plain_one_bit_for_bit() {
    for (variant, base, _) in VARIANTS {
        let (case, base) = (recorded(variant), Reference::open(base));
        let (model, cancel) = (open(&base), CancelToken::new());
        let prompt = case.facts["prompts"][0].as_str().unwrap();
        let inputs = prepare(&model, &base, prompt);
        let before = bits(&model.hidden_states(&inputs, &cancel).unwrap());
        let adapter = load_adapter(&model, &case.folder).unwrap();
        let call = Call { adapter: Some(&adapter), cancel: &cancel };
        assert_ne!(bits(&model.hidden_states(&inputs, call).unwrap()), before);
        assert_eq!(bits(&model.hidden_states(&inputs, &cancel).unwrap()), before);
    }
}

#[test]
fn an_adapter_that_changes_nothing_gives_the_plain_model() {
    let base = Reference::open("tiny-qwen-edit");
    let (model, cancel) = (open(&base), CancelToken::new());
    let inputs = prepare(&model, &base, "vl");
    let plain = bits(&model.hidden_states(&inputs, &cancel).unwrap());
    let zero = |tensors: &mut HashMap<String, Tensor>| {
        tensors
            .iter_mut()
            .filter(|(name, _)| name.contains("lora_B"))
            .for_each(|(_, tensor)| *tensor = tensor.zeros_like().unwrap());
    };
    let (guard, path) = copy("all");
    edit_tensors(&path, zero);
    let by_weights = load_adapter(&model, &path).unwrap();
    drop(guard);
    let (_guard, path) = copy("all");
    edit_config(&path, |c| {
        c["lora_alpha"] = json!(0);
        c["alpha_pattern"] = Value::Null;
    });
    let by_scale = load_adapter(&model, &path).unwrap();
    for adapter in [&by_weights, &by_scale] {
        let call = Call { adapter: Some(adapter), cancel: &cancel };
        assert_eq!(bits(&model.hidden_states(&inputs, call).unwrap()), plain);
    }
}

#[test]
fn the_base_may_be_quantized() {
    let (case, base) = (recorded("all"), Reference::open("tiny-qwen-edit"));
    let cancel = CancelToken::new();
    for (storage, share) in [(Storage::Plain(DType::BF16), 1e-4), (Storage::Q8_0, 0.15)] {
        let precision = Precision { storage, ..Precision::reference() };
        let model = load(&base.folder, &precision).unwrap();
        let adapter = load_adapter(&model, &case.folder).unwrap();
        let inputs = prepare(&model, &base, "vl");
        for (kind, adapter) in [("base", None), ("adapted", Some(&adapter))] {
            let hidden = model.hidden_states(&inputs, Call { adapter, cancel: &cancel }).unwrap();
            let expected = case.tensor(&format!("{kind}.vl.hidden_last"));
            let name = format!("{kind} {storage:?}");
            assert_close(&name, &hidden, expected, Tolerance::Relative(share));
        }
    }
}

#[test]
fn every_spelling_of_names_is_read() {
    let base = Reference::open("tiny-qwen-edit");
    let (model, cancel) = (open(&base), CancelToken::new());
    let inputs = prepare(&model, &base, "vl");
    let logits = |folder: &Path| {
        let adapter = load_adapter(&model, folder).unwrap();
        bits(&model.logits(&inputs, Call { adapter: Some(&adapter), cancel: &cancel }).unwrap())
    };
    let expected = logits(&recorded("all").folder);
    let published = ".model.language_model.layers";
    for (from, to) in [
        (published, ".model.layers"),
        (published, ".language_model.model.layers"),
        (".weight", ".default.weight"),
    ] {
        let (_guard, path) = copy("all");
        edit_tensors(&path, |tensors| {
            let old = std::mem::take(tensors);
            tensors.extend(old.into_iter().map(|(name, x)| (name.replace(from, to), x)));
        });
        assert_eq!(logits(&path), expected, "{to}");
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let small = open(&Reference::open("../vlm/flat"));
    let adapter = load_adapter(&small, &recorded("qv").folder).unwrap();
    let base = Reference::open("tiny-qwen-edit");
    let model = open(&base);
    let inputs = prepare(&model, &base, "vl");
    let call = Call { adapter: Some(&adapter), cancel: &CancelToken::new() };
    let error = model.hidden_states(&inputs, call).unwrap_err();
    assert!(matches!(error, Error::Request(_)), "{error}");
    let message = error.to_string();
    assert!(message.contains("adapter: for 2 layers of width 48"), "{message}");
    assert!(message.contains("4 layers of width 64"), "{message}");
    refused("qv", &model, &|_| (), &["lora_A.weight", "[4, 48]", "[4, 64]"]);
}

/// A copy of an adapter's files, to be damaged.
fn copy(variant: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let target = tempfile::tempdir().unwrap();
    for file in [CONFIG, WEIGHTS] {
        fs_err::copy(recorded(variant).folder.join(file), target.path().join(file)).unwrap();
    }
    let path = target.path().to_owned();
    (target, path)
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let mut config: Value = read_json(&folder.join(CONFIG));
    edit(&mut config);
    fs_err::write(folder.join(CONFIG), config.to_string()).unwrap();
}

fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = folder.join(WEIGHTS);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, &path).unwrap();
}

#[track_caller]
fn refused(variant: &str, model: &VisionLanguageModel, damage: &dyn Fn(&Path), words: &[&str]) {
    let (_guard, path) = copy(variant);
    damage(&path);
    let error = load_adapter(model, &path).unwrap_err();
    assert!(error.is_model(), "{error}");
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message}\nlacks {word:?}");
    }
}

#[test]
fn settings_that_are_not_computed_are_refused() {
    let model = open(&Reference::open("../vlm/flat"));
    type Edit = fn(&mut Value);
    let edits: [(Edit, &[&str]); 17] = [
        (|c| c["peft_type"] = json!("IA3"), &["peft_type", "IA3", "LORA"]),
        (|c| drop(c.as_object_mut().unwrap().remove("peft_type")), &["peft_type", "nothing"]),
        (|c| c["use_dora"] = json!(true), &["use_dora", "true", "false"]),
        (|c| c["bias"] = json!("all"), &["bias", "all", "none"]),
        (|c| c["lora_bias"] = json!(true), &["lora_bias"]),
        (|c| c["modules_to_save"] = json!(["lm_head"]), &["modules_to_save", "lm_head"]),
        (|c| c["layer_replication"] = json!([[0, 2], [1, 2]]), &["layer_replication"]),
        (|c| c["fan_in_fan_out"] = json!(true), &["fan_in_fan_out"]),
        (|c| c["trainable_token_indices"] = json!([1]), &["trainable_token_indices"]),
        (|c| c["init_lora_weights"] = json!("pissa"), &["init_lora_weights", "pissa", "convert"]),
        (|c| c["a_new_thing"] = json!(3), &["a_new_thing", "3"]),
        (|c| c["r"] = json!(0), &["field r", "0", "1 to"]),
        (|c| c["r"] = json!("four"), &["field r", "four"]),
        (|c| c["lora_alpha"] = Value::Null, &["lora_alpha", "null", "a number"]),
        (|c| c["use_rslora"] = json!("yes"), &["use_rslora", "yes"]),
        (|c| c["rank_pattern"] = json!({"q_proj": -1}), &["rank_pattern.q_proj", "-1"]),
        (|c| c["alpha_pattern"] = json!({"q_(proj": 1}), &["alpha_pattern", "q_(proj"]),
    ];
    for (edit, words) in edits {
        refused("qv", &model, &|path| edit_config(path, edit), &[words, &[CONFIG]].concat());
    }
    let edit = |path: &Path| edit_config(path, |c| c["rank_pattern"] = json!([1]));
    refused("qv", &model, &edit, &[CONFIG, "rank_pattern"]);
}

#[test]
fn damaged_adapters_are_refused_by_name() {
    let model = open(&Reference::open("../vlm/flat"));
    let remove =
        |file: &'static str| move |path: &Path| fs_err::remove_file(path.join(file)).unwrap();
    refused("qv", &model, &remove(CONFIG), &[CONFIG, "not found", "peft"]);
    refused("qv", &model, &remove(WEIGHTS), &[WEIGHTS, "not found", "peft"]);
    let truncate = |path: &Path| {
        let bytes = fs_err::read(path.join(WEIGHTS)).unwrap();
        fs_err::write(path.join(WEIGHTS), &bytes[..bytes.len() - 10]).unwrap();
    };
    refused("qv", &model, &truncate, &[WEIGHTS, "truncated"]);
    let text = |path: &Path| fs_err::write(path.join(CONFIG), "{\"r\":").unwrap();
    refused("qv", &model, &text, &[CONFIG, "JSON"]);
    // A rank in the config that the tensors do not have.
    let rank = |path: &Path| edit_config(path, |c| c["r"] = json!(8));
    refused("qv", &model, &rank, &["q_proj.lora_A.weight", "[4, 48]", "[8, 48]"]);

    const Q: &str = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight";
    type Edit = fn(&mut HashMap<String, Tensor>);
    let edits: [(Edit, &[&str]); 7] = [
        (
            |t| *t.get_mut(Q).unwrap() = t[Q].t().unwrap().contiguous().unwrap(),
            &[Q, "[4, 48]", "[48, 4]"],
        ),
        (|t| drop(t.remove(Q)), &["q_proj.lora_B.weight is missing"]),
        (|t| drop(t.remove(&Q.replace("lora_B", "lora_A"))), &["q_proj.lora_A.weight is missing"]),
        (
            |t| drop(t.insert("base_model.model.lm_head.lora_A.weight".into(), t[Q].clone())),
            &["1 tensors", "lm_head.lora_A"],
        ),
        (|t| drop(t.insert(Q.replace("layers.1", "layers.2"), t[Q].clone())), &["layers.2"]),
        (
            |t| {
                let name = "base_model.model.model.visual.blocks.0.mlp.up_proj.lora_A.weight";
                t.insert(name.into(), t[Q].clone());
            },
            &["visual.blocks.0", "shared between roles", "language_model"],
        ),
        (|t| t.retain(|_, _| false), &["no tensors", "lora_A.weight"]),
    ];
    for (edit, words) in edits {
        refused("qv", &model, &|path| edit_tensors(path, edit), &[words, &[WEIGHTS]].concat());
    }
    // Names of another model: none fits, and they are listed.
    let foreign = |path: &Path| {
        edit_tensors(path, |t| {
            let old = std::mem::take(t);
            t.extend(old.into_iter().map(|(name, x)| (name.replace("self_attn", "attn"), x)));
        });
    };
    refused("qv", &model, &foreign, &["8 tensors", "layers.0.attn.q_proj.lora_A.weight"]);
}
