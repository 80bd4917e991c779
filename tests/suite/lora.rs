//! LoRA files for the transformer: the numbers are diffusers', from `tests/data/make/lora.py`.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use pentimento::{
    CancelToken, EditRequest, Engine, EngineOptions, Error, LoraSource, ModelError, ModelSource,
    diffusion::{
        Transformer,
        qwen_image::{ModelInput, Outputs},
        schedule::ScheduleConfig,
    },
    weights::{LoraFile, LowRankChanges, ModelFiles, Precision, Storage},
};

use crate::{
    common::{Reference, Tolerance, assert_close},
    diffusion::{conditioning, grids},
    engine::{assert_same_picture, copy, request},
};

pub(crate) mod bases;
mod settings;

type Tensors = HashMap<String, Tensor>;

const STORAGES: [Storage; 4] =
    [Storage::Compute, Storage::Plain(DType::BF16), Storage::Plain(DType::F16), Storage::Q8_0];

pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lora").join(name)
}

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(data(name), &Device::Cpu).unwrap()
}

fn reference() -> Reference {
    Reference::open("tiny-qwen-2511")
}

fn lora(path: impl Into<PathBuf>, strength: f64) -> LoraSource {
    LoraSource { path: path.into(), strength }
}

/// The sources of a recorded case.
fn case(name: &str) -> Vec<LoraSource> {
    let (every, few) = (data("every.safetensors"), data("few.safetensors"));
    match name {
        "minus" => vec![lora(every, -0.7)],
        "both" => vec![lora(every, 0.8), lora(few, 0.5)],
        _ => vec![LoraSource::new(every)],
    }
}

fn transformer(loras: &[LoraSource]) -> pentimento::Result<Transformer> {
    let files = ModelFiles::Folder(reference().folder);
    let precision = Precision::reference();
    let loras = loras
        .iter()
        .map(|lora| LoraFile::open(&lora.path, lora.strength))
        .collect::<pentimento::Result<Vec<_>>>()?;
    let (changes, _) = Transformer::read_loras(&files, &loras, &precision)?;
    Transformer::load_changed(&files, &precision, changes)
}

/// What the transformer makes of the recorded input, `[1, n, 64]`.
fn output(model: &Transformer) -> Tensor {
    let (reference, cancel) = (reference(), CancelToken::new());
    let input = ModelInput {
        tokens: reference.tensor("dit.hidden_states"),
        grids: &grids(&reference),
        conditioning: &conditioning(&reference),
    };
    let contexts = model.contexts(&[0.37], &cancel).unwrap();
    model.forward(&input, &contexts[0], Outputs::All, &cancel).unwrap()
}

fn options(loras: Vec<LoraSource>) -> EngineOptions {
    EngineOptions { device: pentimento::Device::Cpu, loras, ..EngineOptions::default() }
}

fn open(options: &EngineOptions) -> pentimento::Result<Engine> {
    Engine::open(&ModelSource::Folder(reference().folder), options, &())
}

fn edited(engine: &Engine) -> RgbImage {
    engine.edit(&request(&reference(), "pipe.nocfg"), &()).unwrap().picture.rgb
}

fn picture(levels: &Tensor) -> RgbImage {
    let (height, width, _) = levels.dims3().unwrap();
    let levels = levels.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    RgbImage::from_raw(width.try_into().unwrap(), height.try_into().unwrap(), levels).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_transformer_computes_what_diffusers_computes() {
    let cases = tensors("cases.safetensors");
    for name in ["every", "minus", "both"] {
        let model = transformer(&case(name)).unwrap();
        let expected = &cases[&format!("{name}.out")];
        assert_close(name, &output(&model), expected, Tolerance::Relative(1e-4));
    }
}

#[test]
fn edits_are_those_of_diffusers() {
    let cases = tensors("cases.safetensors");
    for name in ["every", "both"] {
        let engine = open(&options(case(name))).unwrap();
        assert_same_picture(name, &edited(&engine), &picture(&cases[&format!("{name}.levels")]));
        let modules: Vec<usize> = engine.loras().iter().map(|lora| lora.modules).collect();
        assert_eq!(modules, if name == "both" { vec![48, 6] } else { vec![48] });
        let share = engine.weights().iter().find(|share| share.part == "lora").unwrap();
        assert!(share.bytes > 40_000, "{share:?}");
    }
}

#[test]
fn a_strength_of_nought_is_the_plain_model_in_every_storage() {
    let exact = picture(&tensors("cases.safetensors")["every.levels"]);
    // Of the matrices only; the changes are kept in the type of the computation.
    for (storage, levels) in STORAGES.into_iter().zip([0.2, 0.2, 2.0, 12.0]) {
        let with = |loras| EngineOptions { storage: Some(storage), ..options(loras) };
        let plain = edited(&open(&with(Vec::new())).unwrap());
        let off = open(&with(vec![lora(data("every.safetensors"), 0.0)])).unwrap();
        assert_eq!(edited(&off), plain, "{storage:?}");
        assert_eq!(off.loras()[0].modules, 48);
        let on = edited(&open(&with(case("every"))).unwrap());
        let differences = on.as_raw().iter().zip(exact.as_raw());
        let sum: f64 = differences.map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        let mean = sum / exact.as_raw().len() as f64;
        assert!(mean <= levels, "{storage:?}: mean difference of {mean} levels");
        assert_ne!(on, plain, "{storage:?}");
    }
}

/// The alpha of a module of `every.safetensors`, as its header says.
fn alpha(module: &str) -> f32 {
    match module {
        "proj_out" => 1.5,
        "transformer_blocks.1.attn.to_v" => 5.0,
        _ if module.ends_with(".net.2") => 1.0,
        _ => 3.0,
    }
}

/// The factors of `every.safetensors` by module: down and up.
fn factors() -> BTreeMap<String, [Tensor; 2]> {
    let all = tensors("every.safetensors");
    let modules = all.keys().filter_map(|name| {
        name.strip_prefix("transformer.")?.strip_suffix(".lora_A.weight").map(str::to_owned)
    });
    let factor =
        |module: &str, end: &str| all[&format!("transformer.{module}.lora_{end}.weight")].clone();
    modules.map(|module| (module.clone(), [factor(&module, "A"), factor(&module, "B")])).collect()
}

/// The factors of `every.safetensors` under other names; alphas under the module's name.
fn spelled(
    module_name: impl Fn(&str) -> String,
    [down_end, up_end]: [&str; 2],
    with_alphas: bool,
) -> Tensors {
    let mut tensors = Tensors::new();
    for (module, [down, up]) in factors() {
        let name = module_name(&module);
        tensors.insert(format!("{name}{down_end}"), down);
        tensors.insert(format!("{name}{up_end}"), up);
        if with_alphas {
            let alpha = Tensor::new(alpha(&module), &Device::Cpu).unwrap();
            tensors.insert(format!("{name}.alpha"), alpha);
        }
    }
    tensors
}

fn save(folder: &Path, name: &str, tensors: &Tensors) -> PathBuf {
    let path = folder.join(name);
    candle_core::safetensors::save(tensors, &path).unwrap();
    path
}

#[test]
fn all_spellings_of_the_same_factors_give_the_same_bits() {
    let expected = bits(&output(&transformer(&case("every")).unwrap()));
    let flat = |module: &str| module.replace('.', "_");
    let inside = |module: &str| module.replace(".attn.", ".attn.processor.");
    let files = [
        spelled(
            |m| format!("lora_unet_{}", flat(m)),
            [".lora_down.weight", ".lora_up.weight"],
            true,
        ),
        spelled(|m| m.to_owned(), [".lora_down.weight", ".lora_up.weight"], true),
        spelled(|m| format!("diffusion_model.{m}"), [".lora_A", ".lora_B"], true),
        spelled(|m| format!("lycoris_{}", flat(m)), [".lora.down.weight", ".lora.up.weight"], true),
        spelled(
            |m| format!("unet.base_model.model.{}", inside(m)),
            [".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"],
            true,
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (index, file) in files.iter().enumerate() {
        let path = save(folder.path(), &format!("{index}.safetensors"), file);
        let found = bits(&output(&transformer(&[LoraSource::new(path)]).unwrap()));
        assert!(found == expected, "spelling {index} gives other numbers");
    }
    // peft's own: an adapter's name inside, and the alphas in a file beside it.
    let ends = [".lora_A.default.weight", ".lora_B.default.weight"];
    let file = spelled(|m| format!("base_model.model.{m}"), ends, false);
    let path = save(folder.path(), "adapter_model.safetensors", &file);
    let bare = bits(&output(&transformer(&[LoraSource::new(&path)]).unwrap()));
    assert!(bare != expected, "without alphas the scale is 1");
    let config = serde_json::json!({
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": { "img_mod.1": 3, "to_k": 3 },
        "alpha_pattern": { "net.2": 1, "proj_out": 1.5, "transformer_blocks.1.attn.to_v": 5 },
    });
    fs_err::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    let found = bits(&output(&transformer(&[LoraSource::new(&path)]).unwrap()));
    assert!(found == expected, "peft's spelling gives other numbers");
    // The folder stands for the file, and names it.
    let whole = LoraSource::new(folder.path());
    assert!(bits(&output(&transformer(&[whole]).unwrap())) == expected, "peft's folder");
    let name = LoraFile::open(folder.path(), 1.0).unwrap().name();
    assert_eq!(Some(name.as_str()), folder.path().file_name().and_then(|name| name.to_str()));
}

#[test]
fn merged_weights_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    copy(&reference().folder, folder.path());
    let path = folder.path().join("transformer/diffusion_pytorch_model.safetensors");
    let weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let mut weights: Tensors = weights
        .into_iter()
        .map(|(name, weight)| (name, weight.to_dtype(DType::F32).unwrap()))
        .collect();
    for (module, [down, up]) in factors() {
        let rank = down.dim(0).unwrap() as f64;
        let [down, up] = [down, up].map(|factor| factor.to_dtype(DType::F32).unwrap());
        let change = (up.matmul(&down).unwrap() * (f64::from(alpha(&module)) / rank)).unwrap();
        let weight = weights.get_mut(&format!("{module}.weight")).unwrap();
        *weight = (&*weight + change).unwrap();
    }
    fs_err::remove_file(&path).unwrap();
    candle_core::safetensors::save(&weights, &path).unwrap();
    let files = ModelFiles::Folder(folder.path().to_owned());
    let merged = Transformer::load(&files, &Precision::reference()).unwrap();
    let beside = transformer(&case("every")).unwrap();
    assert_close("merged", &output(&merged), &output(&beside), Tolerance::Relative(1e-4));
}

/// Writes a file and returns what is said about it.
#[track_caller]
fn fault(name: &str, tensors: &Tensors) -> ModelError {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), name, tensors);
    match transformer(&[LoraSource::new(path)]) {
        Err(Error::Model(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the damage was not seen"),
    }
}

const QUERY: &str = "transformer_blocks.0.attn.to_q";

/// A sound pair of factors for [`QUERY`], and a change of it.
fn pair(change: impl FnOnce(&mut Tensors)) -> Tensors {
    let mut tensors = Tensors::new();
    tensors.insert(format!("{QUERY}.lora_A.weight"), zeros(&[2, 48]));
    tensors.insert(format!("{QUERY}.lora_B.weight"), zeros(&[48, 2]));
    change(&mut tensors);
    tensors
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn what_is_no_low_rank_change_is_refused_by_name() {
    for (name, words) in [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("lora_mid.weight", "Tucker"),
        ("diff", "full rank"),
        ("diff_b", "bias"),
        ("b1.weight", "GLoRA"),
        ("weight", "no part of a low-rank change"),
    ] {
        let tensor = format!("{QUERY}.{name}");
        let error =
            fault("a.safetensors", &pair(|file| drop(file.insert(tensor.clone(), zeros(&[2, 2])))));
        let ModelError::Corrupt { path, found, expected, .. } = &error else { panic!("{error}") };
        assert!(path.ends_with("a.safetensors"), "{error}");
        assert!(found.contains(&tensor) && found.contains(words), "{error}");
        assert!(expected.contains("low-rank factors"), "{error}");
    }
}

#[test]
fn modules_that_the_model_does_not_have_are_listed() {
    let ends = ["lora_down.weight", "lora_up.weight"];
    for (module, words) in [
        ("lora_unet_double_blocks_0_img_attn_proj", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX"),
        ("transformer_blocks.0.attn.to_qkv", "fused"),
        ("transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q"),
        ("transformer_blocks.0.attn.norm_q", "norm_q"),
        ("lora_unet_transformer_blocks_0_attn_to_qq", "to_qq"),
    ] {
        let add = |file: &mut Tensors| {
            for end in ends {
                file.insert(format!("{module}.{end}"), zeros(&[2, 2]));
            }
        };
        let error = fault("a.safetensors", &pair(add)).to_string();
        for word in [module, words, "1 of 2 modules", "transformer_blocks.0.attn"] {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
    }
    for tensors in [Tensors::new(), text_encoder()] {
        let error = fault("a.safetensors", &tensors).to_string();
        assert!(error.contains("no modules of the transformer"), "{error}");
    }
}

/// A pair of factors for a text encoder.
fn text_encoder() -> Tensors {
    let name = "lora_te_layers_0_self_attn_q_proj";
    ["lora_down.weight", "lora_up.weight", "alpha"]
        .map(|end| (format!("{name}.{end}"), zeros(&[1])))
        .into()
}

#[test]
fn factors_that_do_not_fit_are_refused_with_both_shapes() {
    let (down, up) = (format!("{QUERY}.lora_A.weight"), format!("{QUERY}.lora_B.weight"));
    let alpha = format!("{QUERY}.alpha");
    let wrong = [
        (&down, vec![2, 47], vec![2, 48]),
        (&down, vec![2, 48, 1, 1], vec![2, 48]),
        (&down, vec![0, 48], vec![1, 48]),
        (&up, vec![47, 2], vec![48, 2]),
        (&up, vec![48, 3], vec![48, 2]),
        (&alpha, vec![2], vec![]),
    ];
    for (name, found, expected) in wrong {
        let tensor = zeros(&found);
        match fault("a.safetensors", &pair(|file| drop(file.insert(name.clone(), tensor)))) {
            ModelError::TensorShape { tensor, found: f, expected: e, .. } => {
                assert_eq!((&tensor, &f, &e), (name, &found, &expected));
            }
            other => panic!("{other}"),
        }
    }
    for gone in [&down, &up] {
        let error = fault("a.safetensors", &pair(|file| drop(file.remove(gone)))).to_string();
        assert!(error.contains("without the other factor"), "{error}");
    }
    let nan = Tensor::new(f32::NAN, &Device::Cpu).unwrap();
    let error = fault("a.safetensors", &pair(|file| drop(file.insert(alpha, nan)))).to_string();
    assert!(error.contains("NaN"), "{error}");
    let again = |file: &mut Tensors| {
        for (end, shape) in [("lora_down", [2, 48]), ("lora_up", [48, 2])] {
            let name = format!("lora_unet_{}.{end}.weight", QUERY.replace('.', "_"));
            file.insert(name, zeros(&shape));
        }
    };
    let error = fault("a.safetensors", &pair(again)).to_string();
    assert!(error.contains("for the same place"), "{error}");
    let numbers = Tensor::zeros((2, 48), DType::U8, &Device::Cpu).unwrap();
    let error = fault("a.safetensors", &pair(|file| drop(file.insert(down, numbers))));
    assert!(matches!(error, ModelError::TensorType { .. }), "{error}");
}

#[test]
fn damaged_files_and_configs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let bytes = fs_err::read(data("every.safetensors")).unwrap();
    for length in [0, 7, 100, bytes.len() - 1] {
        fs_err::write(&path, &bytes[..length]).unwrap();
        let error = LoraFile::open(&path, 1.0).unwrap_err();
        assert!(matches!(error, Error::Model(ModelError::Corrupt { .. })), "{length}: {error}");
    }
    for path in [folder.path().to_owned(), folder.path().join("none.safetensors")] {
        let error = LoraFile::open(&path, 1.0).unwrap_err();
        assert!(matches!(error, Error::Model(ModelError::Missing { .. })), "{error}");
    }
    let error = LoraFile::open(&data("few.safetensors"), f64::NAN).unwrap_err();
    assert!(matches!(error, Error::Request(_)), "{error}");
    let path = save(folder.path(), "adapter_model.safetensors", &pair(|_| {}));
    for (config, words) in [
        (
            serde_json::json!({ "peft_type": "LORA", "r": 3, "lora_alpha": 3 }),
            ["[2, 48]", "[3, 48]"],
        ),
        (
            serde_json::json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": true }),
            ["use_dora", "adapter_config.json"],
        ),
        (serde_json::json!({ "peft_type": "LOHA", "r": 2 }), ["peft_type", "LOHA"]),
    ] {
        fs_err::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let error = transformer(&[LoraSource::new(&path)]).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn changes_that_no_layer_takes_are_an_error() {
    let files = ModelFiles::Folder(reference().folder);
    let precision = Precision::reference();
    let loras = [LoraFile::open(&data("few.safetensors"), 1.0).unwrap()];
    let (changes, _) = Transformer::read_loras(&files, &loras, &precision).unwrap();
    let error = changes.finish().unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::TensorsUnused { count: 6, .. })), "{error}");
    LowRankChanges::default().finish().unwrap();
}

#[test]
fn tensors_for_text_encoders_are_skipped_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), "mixed.safetensors", &pair(|file| file.extend(text_encoder())));
    let engine = open(&options(vec![LoraSource::new(path)])).unwrap();
    let report = &engine.loras()[0];
    assert_eq!((report.name.as_str(), report.modules, report.skipped), ("mixed", 1, 3));
    let outcome = engine.edit(&request(&reference(), "pipe.nocfg"), &()).unwrap();
    assert!(outcome.notes.iter().any(|note| note.contains("3 tensors for a text encoder")));
}

#[test]
fn lightning_levels_are_the_references() {
    let text = fs_err::read_to_string(data("lightning.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    let config = ScheduleConfig::load(&ModelFiles::Folder(reference().folder)).unwrap();
    assert_eq!(cases.as_object().unwrap().len(), 4);
    for (name, case) in cases.as_object().unwrap() {
        let (steps, tokens) = name.split_once('.').unwrap();
        let (steps, tokens) = (steps.parse().unwrap(), tokens.parse().unwrap());
        let schedule = config.lightning().schedule(steps, tokens).unwrap();
        for (field, found) in [("sigmas", schedule.sigmas()), ("timesteps", schedule.timesteps())] {
            let expected: Vec<f32> = serde_json::from_value(case[field].clone()).unwrap();
            let [found, expected] =
                [found, &expected].map(|values| Tensor::new(values, &Device::Cpu).unwrap());
            assert_close(&format!("{name} {field}"), &found, &expected, Tolerance::Relative(2e-7));
        }
    }
}

#[test]
fn lightning_files_set_steps_guidance_and_schedule() {
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str| {
        let path = folder.path().join(name);
        fs_err::copy(data("few.safetensors"), &path).unwrap();
        LoraSource::new(path)
    };
    let four = named("Qwen-Image-Lightning-4steps-V1.0.safetensors");
    let engine = open(&options(vec![four.clone()])).unwrap();
    assert_eq!(engine.model().steps, 4);
    let ask = |steps: Option<usize>, cfg_scale: Option<f64>| EditRequest {
        negative_prompt: Some(" ".to_owned()),
        steps,
        cfg_scale,
        ..request(&reference(), "pipe.nocfg")
    };
    let outcome = engine.edit(&ask(None, None), &()).unwrap();
    assert_eq!((outcome.steps, outcome.cfg_scale), (4, 1.0));
    assert!(outcome.notes.iter().any(|note| note.contains("Lightning file for 4 steps")));
    assert!(!outcome.notes.iter().any(|note| note.contains("not for")), "{:?}", outcome.notes);
    let asked = engine.edit(&ask(Some(3), Some(2.0)), &()).unwrap();
    assert_eq!((asked.steps, asked.cfg_scale), (3, 2.0));
    assert!(asked.notes.iter().any(|note| note.contains("not for 3")), "{:?}", asked.notes);
    // The same changes under another name, or with the defaults of the model, follow its schedule.
    let plain = open(&options(vec![LoraSource::new(data("few.safetensors"))])).unwrap();
    let off = EngineOptions { no_lightning_defaults: true, ..options(vec![four.clone()]) };
    let off = open(&off).unwrap();
    let fixed = ask(Some(4), Some(1.0));
    let picture = |engine: &Engine| engine.edit(&fixed, &()).unwrap().picture.rgb;
    assert_eq!(picture(&plain), picture(&off));
    assert_eq!(off.model().steps, plain.model().steps);
    assert_ne!(picture(&plain), picture(&engine));
    // A file that is off asks for nothing, and two must agree.
    let zero = LoraSource { strength: 0.0, ..four.clone() };
    assert_eq!(open(&options(vec![zero])).unwrap().model().steps, plain.model().steps);
    let eight = named("Lightning-8steps.safetensors");
    let error = open(&options(vec![four, eight])).unwrap_err().to_string();
    assert!(error.contains("4 steps") && error.contains("8"), "{error}");
}
