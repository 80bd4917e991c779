//! The whole engine against the reference pipelines, and the promises of its interface.

use std::{cell::RefCell, path::Path, time::Instant};

use candle_core::DType;
use image::RgbImage;
use pentimento::{
    CancelToken, EditRequest, Engine, EngineOptions, Error, Event, ModelSource, Stage, Strategy,
    memory::Budget,
    pixels::{Limits, Picture},
    weights::Storage,
};

use crate::common::Reference;

/// The area of the copies for the vision-language model in the references of the Plus pipelines.
const VL_AREA_PLUS: u64 = 112 * 112;

fn options() -> EngineOptions {
    EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() }
}

/// A request that needs no planner: the reference checkpoints' weights are random.
pub(crate) fn direct(picture: Picture, prompt: &str) -> EditRequest {
    let mut request = EditRequest::new(picture, prompt);
    request.strategy = Strategy::Direct;
    request
}

fn open(reference: &Reference) -> Engine {
    Engine::open(&ModelSource::Folder(reference.folder.clone()), &options(), &()).unwrap()
}

fn picture(path: &Path) -> Picture {
    Picture::open(path, &Limits::default()).unwrap()
}

/// The request that the reference recorded as `tag`.
pub(crate) fn request(reference: &Reference, tag: &str) -> EditRequest {
    let facts = &reference.facts[tag];
    let cases = reference.folder.join("cases");
    let mut request =
        EditRequest::new(picture(&cases.join("edit_in.png")), facts["prompt"].as_str().unwrap());
    if tag == "pipe.two" {
        request.pictures.push(picture(&cases.join("edit_in2.png")));
    }
    let number = |field: &str| facts[field].as_u64().unwrap();
    request.strategy = Strategy::Direct;
    request.negative_prompt = facts["negative_prompt"].as_str().map(str::to_owned);
    request.cfg_scale = facts["true_cfg_scale"].as_f64();
    request.steps = Some(number("steps").try_into().unwrap());
    request.seed = Some(number("seed"));
    request.width = Some(number("width").try_into().unwrap());
    request.height = Some(number("height").try_into().unwrap());
    request.area = reference.facts["target_area"].as_u64();
    request.vl_area = (reference.facts["family"] != "edit").then_some(VL_AREA_PLUS);
    request
}

/// The recorded picture as 8-bit levels.
pub(crate) fn expected(reference: &Reference, tag: &str) -> RgbImage {
    let levels = format!("{tag}.levels");
    let image = if reference.has(&levels) {
        reference.tensor(&levels).clone()
    } else {
        // One that is compared elsewhere as numbers from 0 to 1.
        let image = (reference.tensor(&format!("{tag}.image")) * 255.0).unwrap();
        image.round().unwrap().to_dtype(DType::U8).unwrap()
    };
    let (_, height, width) = image.squeeze(0).unwrap().dims3().unwrap();
    let levels = image.squeeze(0).unwrap().permute((1, 2, 0)).unwrap().flatten_all().unwrap();
    let levels = levels.to_vec1().unwrap();
    RgbImage::from_raw(width.try_into().unwrap(), height.try_into().unwrap(), levels).unwrap()
}

/// At most one level of difference on 99.9 % of the values.
#[track_caller]
pub(crate) fn assert_same_picture(name: &str, actual: &RgbImage, expected: &RgbImage) {
    assert_eq!(actual.dimensions(), expected.dimensions(), "{name}: size");
    let differences = actual.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b));
    let far = differences.clone().filter(|difference| *difference > 1).count();
    let total = expected.as_raw().len();
    let most = differences.max().unwrap_or(0);
    assert!(
        far * 1000 <= total,
        "{name}: {far} of {total} values differ by more than 1, at most {most}"
    );
}

pub(crate) fn tags(reference: &Reference) -> Vec<&'static str> {
    let all = ["pipe.cfg", "pipe.nocfg", "pipe.two"];
    all.into_iter().filter(|tag| !reference.facts[tag].is_null()).collect()
}

#[test]
fn edits_are_the_references() {
    for reference in Reference::all() {
        let engine = open(&reference);
        for tag in tags(&reference) {
            let outcome = engine.edit(&request(&reference, tag), &()).unwrap();
            let name = format!("{} {tag}", reference.name());
            assert_same_picture(&name, &outcome.picture.rgb, &expected(&reference, tag));
            assert_eq!(outcome.seed, reference.facts[tag]["seed"].as_u64().unwrap());
        }
    }
}

/// The reference shows the editor pictures at the model's area, whatever size the result has.
#[test]
fn a_size_beside_an_area_gives_the_references_picture() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/diffusion");
    for (name, tag) in [("tiny-qwen-edit", "pipe.cfg"), ("tiny-qwen-2511", "pipe.two")] {
        let reference = Reference::open(name);
        let engine = open(&reference);
        let mut request = request(&reference, tag);
        request.prompt = "make the coat red".to_owned();
        (request.negative_prompt, request.cfg_scale) = (Some(" ".to_owned()), Some(3.0));
        (request.steps, request.seed) = (Some(3), Some(11));
        (request.width, request.height) = (Some(80), Some(48));
        let expected = picture(&data.join(format!("other-size-{name}.png"))).rgb;
        let found = engine.edit(&request, &()).unwrap().picture.rgb;
        assert_same_picture(name, &found, &expected);
        // Without an area the edited picture has the result's size for the editor too.
        if request.pictures.len() > 1 {
            continue; // the others would have the published area
        }
        (request.vl_area, request.area) = (request.area, None);
        let found = engine.edit(&request, &()).unwrap().picture.rgb;
        assert_eq!(found.dimensions(), (80, 48));
        assert_ne!(found, expected);
    }
}

#[test]
fn the_shipped_pack_makes_its_sample_pictures() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/samples");
    let text = fs_err::read_to_string(folder.join("prompts.json")).unwrap();
    let samples: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert!(samples.len() >= 8);
    let engine = Engine::open(&ModelSource::Mini, &options(), &()).unwrap();
    for sample in samples {
        let field = |name: &str| sample[name].as_str().unwrap().to_owned();
        let input = picture(&folder.join(field("input")));
        let mut request = direct(input, &field("prompt"));
        request.seed = Some(0);
        let outcome = engine.edit(&request, &()).unwrap();
        let expected = picture(&folder.join(field("expected"))).rgb;
        assert_same_picture(&field("input"), &outcome.picture.rgb, &expected);
    }
}

#[test]
fn the_same_seed_gives_the_same_picture_on_any_number_of_threads() {
    let reference = Reference::open("tiny-qwen-2511");
    let engine = open(&reference);
    let request = request(&reference, "pipe.two");
    let edit = || {
        engine.forget();
        engine.edit(&request, &()).unwrap().picture.rgb
    };
    let first = edit();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(edit), first, "{threads} threads");
    }
}

#[test]
fn the_result_has_the_inputs_size_alpha_and_profile() {
    let reference = Reference::open("tiny-qwen-edit");
    let engine = open(&reference);
    let mut input =
        Picture::from_rgb(RgbImage::from_fn(75, 50, |x, y| image::Rgb([x as u8, y as u8, 9])));
    input.alpha = Some(image::GrayImage::from_fn(75, 50, |x, _| image::Luma([x as u8])));
    input.icc = Some(b"a profile".to_vec());
    let mut request = direct(input.clone(), "make it night");
    (request.area, request.steps, request.seed) = (Some(64 * 64), Some(2), Some(3));
    let outcome = engine.edit(&request, &()).unwrap();
    assert_eq!(outcome.picture.rgb.dimensions(), (75, 50));
    assert_eq!(outcome.picture.alpha, input.alpha);
    assert_eq!(outcome.picture.icc, input.icc);
    assert_eq!(outcome.working_size.width % 32, 0);
}

#[test]
fn a_picture_of_one_pixel_and_a_ribbon_are_edited() {
    let reference = Reference::open("tiny-qwen-edit");
    let engine = open(&reference);
    for (width, height) in [(1, 1), (300, 2)] {
        let mut request = direct(Picture::from_rgb(RgbImage::new(width, height)), "brighter");
        (request.area, request.steps, request.seed) = (Some(64 * 64), Some(2), Some(3));
        let outcome = engine.edit(&request, &()).unwrap();
        assert_eq!(outcome.picture.rgb.dimensions(), (width, height));
    }
}

#[test]
fn bad_requests_are_refused_by_field() {
    let reference = Reference::open("tiny-qwen-edit");
    let engine = open(&reference);
    let check = |change: &dyn Fn(&mut EditRequest), words: &[&str]| {
        let mut request = request(&reference, "pipe.nocfg");
        change(&mut request);
        let message = engine.edit(&request, &()).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    check(&|r| r.prompt = " \n".into(), &["prompt"]);
    check(&|r| r.prompt = "a red coat ".repeat(10_000), &["prompt", "tokens", "1024"]);
    check(&|r| r.negative_prompt = Some("x ".repeat(50_000)), &["negative prompt", "tokens"]);
    check(&|r| r.steps = Some(0), &["steps", "to 1000"]);
    check(&|r| r.steps = Some(1001), &["steps", "1001"]);
    check(&|r| r.cfg_scale = Some(f64::NAN), &["cfg-scale", "NaN"]);
    check(&|r| r.cfg_scale = Some(-1.0), &["cfg-scale"]);
    check(&|r| r.width = Some(100), &["width", "100", "96 or 112"]);
    check(&|r| r.height = Some(0), &["height"]);
    check(&|r| r.area = Some(3), &["area"]);
    check(&|r| r.pictures.clear(), &["pictures"]);
    check(&|r| r.pictures.push(r.pictures[0].clone()), &["QwenImageEditPlusPipeline"]);
}

#[test]
fn guidance_says_when_it_does_not_run() {
    let reference = Reference::open("tiny-qwen-edit");
    let engine = open(&reference);
    let run = |negative: Option<&str>, scale: Option<f64>| {
        let mut request = request(&reference, "pipe.nocfg");
        (request.negative_prompt, request.cfg_scale) = (negative.map(str::to_owned), scale);
        request.steps = Some(2);
        engine.edit(&request, &()).unwrap()
    };
    assert!(run(None, None).notes[0].contains("no guidance"));
    assert!(run(None, Some(3.0)).notes[0].contains("needs a negative prompt"));
    assert!(run(Some(""), Some(1.0)).notes[0].contains("above 1"));
    let guided = run(Some(""), Some(3.0));
    assert!(guided.notes.is_empty());
    assert!((guided.cfg_scale - 3.0).abs() < 1e-9);
    assert_ne!(guided.picture.rgb, run(None, Some(1.0)).picture.rgb);
}

#[test]
fn a_request_can_be_cancelled_in_every_stage() {
    let reference = Reference::open("tiny-qwen-plus");
    let engine = open(&reference);
    for stage in [Stage::EncodePrompt, Stage::EncodePicture, Stage::Denoise, Stage::Decode] {
        let mut request = request(&reference, "pipe.cfg");
        request.cancel = CancelToken::new();
        let cancel = request.cancel.clone();
        let observer = move |event: &Event<'_>| match event {
            Event::Step { stage: now, .. } if *now == stage => cancel.cancel(),
            _ => {}
        };
        let result = engine.edit(&request, &observer);
        assert!(matches!(result, Err(Error::Cancelled)), "{stage:?}");
    }
}

#[test]
fn loading_can_be_cancelled() {
    let reference = Reference::open("tiny-qwen-plus");
    let options = options();
    options.cancel.cancel();
    let result = Engine::open(&ModelSource::Folder(reference.folder), &options, &());
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn progress_counts_every_step() {
    let reference = Reference::open("tiny-qwen-edit");
    let engine = open(&reference);
    let steps = RefCell::new(Vec::new());
    let start = Instant::now();
    let outcome = engine
        .edit(&request(&reference, "pipe.cfg"), &|event: &Event<'_>| {
            if let Event::Step { stage: Stage::Denoise, step, of, elapsed } = *event {
                assert!(elapsed <= start.elapsed());
                steps.borrow_mut().push((step, of));
            }
        })
        .unwrap();
    let steps = steps.into_inner();
    assert_eq!(steps, [(0, 4), (1, 4), (2, 4), (3, 4)]);
    let stages: Vec<Stage> = outcome.stages.iter().map(|report| report.stage).collect();
    assert_eq!(stages, [Stage::EncodePrompt, Stage::EncodePicture, Stage::Denoise, Stage::Decode]);
    assert!(outcome.stages.iter().all(|report| report.elapsed <= start.elapsed()));
}

#[test]
fn smaller_types_stay_near_the_reference() {
    let reference = Reference::open("edit-23");
    let exact = expected(&reference, "pipe.nocfg");
    // bf16 is the type of the file: keeping it loses nothing. Q8_0 and f16 round.
    let storages = [
        (Storage::Plain(DType::BF16), 0.2),
        (Storage::Plain(DType::F16), 2.0),
        (Storage::Q8_0, 12.0),
    ];
    for (storage, levels) in storages {
        let options = EngineOptions { storage: Some(storage), ..options() };
        let source = ModelSource::Folder(reference.folder.clone());
        let engine = Engine::open(&source, &options, &()).unwrap();
        let outcome = engine.edit(&request(&reference, "pipe.nocfg"), &()).unwrap();
        let differences = outcome.picture.rgb.as_raw().iter().zip(exact.as_raw());
        let sum: f64 = differences.map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        let mean = sum / exact.as_raw().len() as f64;
        assert!(mean <= levels, "{storage:?}: mean difference of {mean} levels");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_loaded() {
    let reference = Reference::open("tiny-qwen-edit");
    let source = ModelSource::Folder(reference.folder.clone());
    let options = EngineOptions { budget: Budget::ram_at_most(1), ..options() };
    let error = Engine::open(&source, &options, &()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("--max-ram 0.0"), "{error}");
    // What is wrong with the request is said first.
    let check = |change: &dyn Fn(&mut EditRequest), word: &str| {
        let mut request = request(&reference, "pipe.nocfg");
        change(&mut request);
        let error = Engine::open_for(&source, &options, &request, &()).unwrap_err();
        assert!(error.to_string().starts_with(word), "{error}");
    };
    check(&|r| r.steps = Some(1), "steps");
    check(&|r| r.cfg_scale = Some(1e9), "cfg-scale");
    check(&|r| r.pictures.clear(), "pictures");
    check(&|r| r.prompt.clear(), "prompt");
}

/// Copies a model folder without its cases.
pub(crate) fn copy(from: &Path, to: &Path) {
    for entry in fs_err::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            if entry.file_name() != "cases" {
                fs_err::create_dir_all(&target).unwrap();
                copy(&entry.path(), &target);
            }
        } else {
            fs_err::copy(entry.path(), target).unwrap();
        }
    }
}
