//! Where the scales of a LoRA file come from.

use candle_core::{DType, Device, Tensor};
use pentimento::{LoraSource, ModelError};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::{QUERY, bits, data, fault, open, options, output, pair, save, spelled, transformer};
use crate::{common::save_raw, engine::request};

/// A change of one matrix by factors of ones, without an alpha.
fn ones(change: impl FnOnce(&mut super::Tensors)) -> super::Tensors {
    pair(|file| {
        let one = |x: Tensor| Tensor::ones(x.dims(), DType::F32, &Device::Cpu).unwrap();
        *file = file.drain().map(|(name, x)| (name, one(x))).collect();
        change(file);
    })
}

#[test]
fn alphas_of_every_number_type_count() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let expected = {
        let alpha = Tensor::new(4.0_f32, &Device::Cpu).unwrap();
        let path = save(
            folder.path(),
            "f32.safetensors",
            &ones(|file| {
                file.insert(format!("{QUERY}.alpha"), alpha);
            }),
        );
        bits(&output(&transformer(&[LoraSource::new(path)]).unwrap()))
    };
    let write = |dtype: Dtype, shape: Vec<usize>, bytes: &[u8]| {
        let ones: Vec<u8> = [1.0_f32; 96].iter().flat_map(|one| one.to_le_bytes()).collect();
        save_raw(
            &path,
            &[
                (format!("{QUERY}.lora_A.weight"), Dtype::F32, vec![2, 48], ones.clone()),
                (format!("{QUERY}.lora_B.weight"), Dtype::F32, vec![48, 2], ones),
                (format!("{QUERY}.alpha"), dtype, shape, bytes.to_vec()),
            ],
        );
        transformer(&[LoraSource::new(&path)])
    };
    let cases: [(Dtype, &[u8]); 13] = [
        (Dtype::I64, &4_i64.to_le_bytes()),
        (Dtype::U64, &4_u64.to_le_bytes()),
        (Dtype::I32, &4_i32.to_le_bytes()),
        (Dtype::U32, &4_u32.to_le_bytes()),
        (Dtype::I16, &4_i16.to_le_bytes()),
        (Dtype::U16, &4_u16.to_le_bytes()),
        (Dtype::I8, &[4]),
        (Dtype::U8, &[4]),
        (Dtype::F64, &4.0_f64.to_le_bytes()),
        (Dtype::F16, &half::f16::from_f32(4.0).to_le_bytes()),
        (Dtype::BF16, &half::bf16::from_f32(4.0).to_le_bytes()),
        (Dtype::F8_E4M3, &[0x48]),
        (Dtype::F8_E5M2, &[0x44]),
    ];
    for (dtype, bytes) in cases {
        for shape in [vec![], vec![1]] {
            let model = write(dtype, shape, bytes).unwrap();
            assert!(bits(&output(&model)) == expected, "{dtype:?}: another scale");
        }
    }
    let error = write(Dtype::BOOL, vec![], &[1]).unwrap_err().to_string();
    assert!(error.contains("alpha has type BOOL"), "{error}");
    let error = write(Dtype::F64, vec![], &f64::INFINITY.to_le_bytes()).unwrap_err().to_string();
    assert!(error.contains("alpha is inf"), "{error}");
}

/// The config that belongs to `every.safetensors`, with other targets.
fn config(targets: Value) -> Value {
    json!({
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": { "img_mod.1": 3, "to_k": 3 },
        "alpha_pattern": { "net.2": 1, "proj_out": 1.5, "transformer_blocks.1.attn.to_v": 5 },
        "target_modules": targets,
    })
}

#[test]
fn a_config_beside_a_file_counts_when_it_names_the_files_modules() {
    let expected = bits(&output(&transformer(&super::case("every")).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let ends = [".lora_A.weight", ".lora_B.weight"];
    let file = spelled(|m| format!("transformer.{m}"), ends, false);
    let path = save(folder.path(), "watercolour.safetensors", &file);
    let sources = [LoraSource::new(&path)];
    let bare = bits(&output(&transformer(&sources).unwrap()));
    assert!(bare != expected, "without alphas the scale is 1");
    let place = folder.path().join("adapter_config.json");
    let mut targets: Vec<String> = super::factors().into_keys().collect();
    let with = |targets: Value| {
        fs_err::write(&place, config(targets).to_string()).unwrap();
        bits(&output(&transformer(&sources).unwrap()))
    };
    // Whole names, ends of names, or a pattern.
    assert!(with(json!(targets)) == expected, "whole names");
    let ends = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mod.1",
        "txt_mod.1",
        "net.0.proj",
        "net.2",
        "img_in",
        "txt_in",
        "proj_out",
        "linear",
        "linear_1",
        "linear_2",
    ];
    let ends: Vec<&str> = ends
        .into_iter()
        .filter(|end| {
            targets.iter().any(|target| target.ends_with(&format!(".{end}")) || target == end)
        })
        .collect();
    assert!(with(json!(ends)) == expected, "ends of names");
    assert!(
        with(json!(r"(transformer_blocks|time_text_embed|norm_out)\..*|img_in|txt_in|proj_out"))
            == expected,
        "a pattern"
    );
    // The config of another file.
    for other in [
        json!(["q_proj", "v_proj"]),
        json!("all-linear"),
        json!("model\\..*"),
        json!("("),
        json!([1]),
        json!([]),
        Value::Null,
    ] {
        assert!(with(other.clone()) == bare, "{other} is not about this file");
    }
    targets.push("more".to_owned());
    assert!(with(json!(targets)) == bare, "one target more than the file has");
    fs_err::write(&place, "no JSON").unwrap();
    assert!(bits(&output(&transformer(&sources).unwrap())) == bare);
}

#[test]
fn a_config_that_is_not_used_is_noted_and_pefts_name_settles_it() {
    let expected = bits(&output(&transformer(&super::case("every")).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let file = spelled(str::to_owned, [".lora_A.weight", ".lora_B.weight"], false);
    let path = save(folder.path(), "watercolour.safetensors", &file);
    let sources = [LoraSource::new(&path)];
    let place = folder.path().join("adapter_config.json");
    fs_err::write(&place, config(json!(["q_proj"])).to_string()).unwrap();
    let engine = open(&options(sources.to_vec())).unwrap();
    assert!(engine.loras()[0].config_ignored);
    let outcome = engine.edit(&request(&super::reference(), "pipe.nocfg"), &()).unwrap();
    let said = outcome.notes.iter().any(|note| note.contains("watercolour: nothing says"));
    assert!(said, "{:?}", outcome.notes);
    // Peft's own name says that the config is the file's, whatever its targets are.
    fs_err::rename(&path, folder.path().join("adapter_model.safetensors")).unwrap();
    let sources = [LoraSource::new(folder.path().join("adapter_model.safetensors"))];
    fs_err::write(&place, config(Value::Null).to_string()).unwrap();
    assert!(bits(&output(&transformer(&sources).unwrap())) == expected);
    fs_err::write(&place, "no JSON").unwrap();
    let error = transformer(&sources).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json"), "{error}");
}

#[test]
fn a_config_beside_a_file_with_alphas_is_not_needed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("every.safetensors");
    fs_err::copy(data("every.safetensors"), &path).unwrap();
    fs_err::write(folder.path().join("adapter_config.json"), "no JSON").unwrap();
    let engine = open(&options(vec![LoraSource::new(&path)])).unwrap();
    assert!(!engine.loras()[0].config_ignored);
}

#[test]
fn a_config_that_names_the_files_modules_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), "b.safetensors", &pair(|_| {}));
    for (field, value, words) in [
        ("r", json!(3), ["[2, 48]", "[3, 48]"]),
        ("use_dora", json!(true), ["use_dora", "adapter_config.json"]),
        ("peft_type", json!("LOHA"), ["peft_type", "LOHA"]),
    ] {
        let mut config = json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [QUERY],
        });
        config[field] = value;
        fs_err::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let error = transformer(&[LoraSource::new(&path)]).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn alphas_of_no_number_are_refused_by_type() {
    let two = Tensor::zeros(2, DType::I64, &Device::Cpu).unwrap();
    let error = fault(
        "a.safetensors",
        &pair(|file| {
            file.insert(format!("{QUERY}.alpha"), two);
        }),
    );
    assert!(matches!(error, ModelError::TensorShape { .. }), "{error}");
}
