//! The planner: grammars, agents, plans carried out, and what is computed once.

use std::{cell::RefCell, path::Path};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use pentimento::{
    Assistant, CancelToken, EditRequest, Engine, EngineOptions, Error, Event, HandOver,
    ModelSource, Plan, PlanRequest, PlannerSource, RequestError, Stage, Strategy,
    pixels::{Limits, Picture},
    plan::{
        Action, Decomposition, PlanOptions, PlannedBy, Planner, Prompts, Step,
        decomposition_grammar, steps_grammar,
    },
    vlm::{Call, VisionLanguageModel},
    weights::{ModelFiles, Precision},
};

use crate::common::Reference;

const STREET: &str = "paint the house blue, take away the car and make it night";

fn pack() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini")
}

fn options() -> EngineOptions {
    EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() }
}

fn engine() -> Engine {
    Engine::open(&ModelSource::Mini, &options(), &()).unwrap()
}

fn street() -> Picture {
    Picture::open(pack().join("samples/street.png"), &Limits::default()).unwrap()
}

fn model_of(files: &ModelFiles) -> VisionLanguageModel {
    VisionLanguageModel::load(files, "text_encoder", &Precision::reference()).unwrap()
}

fn mini_model() -> VisionLanguageModel {
    model_of(&ModelSource::Mini.files().unwrap())
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z >> 33) as usize) % n
    }
}

/// Random token streams under the mask of a grammar.
struct Streams {
    model: VisionLanguageModel,
    grammar: String,
    stops: Vec<u32>,
    /// The tokens that end an answer, a list or an item.
    marks: Vec<u32>,
    random: Random,
}

impl Streams {
    fn new(grammar: String, seed: u64) -> Self {
        let model = mini_model();
        let stops = model.generate_options().stop_tokens;
        let is_mark = |token: &u32| {
            let piece = model.tokenizer().decode(&[*token]).unwrap();
            stops.contains(token) || piece.starts_with(['<', ';', '\n'])
        };
        let marks = (0..model.tokenizer().id_end()).filter(is_mark).collect();
        Self { model, grammar, stops, marks, random: Random(seed) }
    }

    /// One stream as text; `whole` says of a text whether it is a valid place to end.
    fn next(&mut self, whole: &dyn Fn(&str) -> bool) -> String {
        let mut constraint = self.model.constraint(&self.grammar).unwrap();
        let mut tokens = Vec::new();
        loop {
            let allowed = constraint.allowed().unwrap();
            let text = self.model.tokenizer().decode(&tokens).unwrap();
            let may_end = self.stops.iter().any(|stop| allowed.contains(*stop));
            // A character of which only the first bytes have come is no place to end.
            let expected = whole(&text) && !text.ends_with('\u{fffd}');
            assert_eq!(may_end, expected, "the end after {text:?}");
            // Marks more often than their share, so that replies take many shapes and end.
            let mut choices: Vec<u32> =
                self.marks.iter().copied().filter(|mark| allowed.contains(*mark)).collect();
            if choices.is_empty() || self.random.below(2) == 0 {
                choices = allowed.tokens().collect();
            }
            assert!(!choices.is_empty(), "nothing may follow {text:?}");
            let token = choices[self.random.below(choices.len())];
            if self.stops.contains(&token) {
                return text;
            }
            tokens.push(token);
            constraint.accept(token).unwrap();
            if constraint.is_complete() {
                return self.model.tokenizer().decode(&tokens).unwrap();
            }
        }
    }
}

#[test]
fn random_tokens_under_the_mask_are_decompositions() {
    let mut streams = Streams::new(decomposition_grammar(), 1);
    let mut longest = 0;
    for _ in 0..10_000 {
        let reply = streams
            .next(&|text| Decomposition::parse(text).is_ok_and(|parts| !parts.actions.is_empty()));
        let parts = Decomposition::parse(&reply).unwrap();
        assert!(!parts.actions.is_empty(), "{reply:?}");
        assert_eq!(Decomposition::parse(&parts.to_string()).unwrap(), parts);
        longest = longest.max(parts.steps_min());
    }
    assert!(longest > 3, "the streams are too alike");
}

#[test]
fn random_tokens_under_the_mask_are_numbered_steps() {
    let mut streams = Streams::new(steps_grammar(), 2);
    let lines_are_numbered = |text: &str| {
        !text.is_empty()
            && text.split('\n').enumerate().all(|(at, line)| {
                let step = line.strip_prefix(&format!("{}. ", at + 1));
                step.is_some_and(|step| !step.is_empty() && step.trim() == step)
            })
    };
    for _ in 0..10_000 {
        let reply = streams.next(&lines_are_numbered);
        assert!(lines_are_numbered(&reply), "{reply:?}");
    }
}

#[test]
fn the_prompts_are_as_they_were_reviewed() {
    // A changed prompt changes every plan: look at some plans, then write the files anew.
    let model = model_of(&ModelFiles::Folder(Reference::open("tiny-qwen-edit").folder));
    let prompts = Prompts::default();
    let parts = Decomposition {
        actions: vec![Action::Recolor, Action::Delete],
        subjects: vec!["coat".to_owned(), "car".to_owned()],
        goals: vec!["red".to_owned(), "gone".to_owned()],
    };
    for (name, messages) in [
        ("decompose", prompts.for_decomposition(1, " make the coat red and remove the car \n")),
        ("sequence", prompts.for_sequencing(2, &parts)),
    ] {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/plan/{name}.txt"));
        let found = model.chat(&messages).unwrap();
        if std::env::var_os("PENTIMENTO_WRITE").is_some() {
            fs_err::write(&path, &found).unwrap();
        }
        assert_eq!(
            found,
            fs_err::read_to_string(&path).unwrap(),
            "PENTIMENTO_WRITE=1 renews {name}"
        );
    }
}

#[test]
fn the_pack_plans_its_samples() {
    let text = fs_err::read_to_string(pack().join("samples/prompts.json")).unwrap();
    let samples: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let assistant = Assistant::open(&ModelSource::Mini, &options(), &()).unwrap();
    let mut right = 0;
    for sample in &samples {
        let field = |name: &str| sample[name].as_str().unwrap();
        let input = pack().join("samples").join(field("input"));
        let picture = Picture::open(&input, &Limits::default()).unwrap();
        let request = PlanRequest::new(vec![picture], field("request"));
        let outcome = assistant.plan(&request, &()).unwrap();
        outcome.plan.check().unwrap();
        assert_eq!(outcome.plan.request, field("request"));
        assert_eq!(outcome.planned_by, PlannedBy::Agent, "{}", outcome.reply);
        let steps: Vec<&str> = outcome.plan.steps.iter().map(|step| step.prompt.as_str()).collect();
        let expected: Vec<&str> = sample["sub_requests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s.as_str().unwrap())
            .collect();
        right += usize::from(steps == expected);
    }
    // The pack's own figure is in its model card; its first sample is the README's.
    assert!(right * 10 >= samples.len() * 8, "{right} of {}", samples.len());
}

#[test]
fn a_request_in_another_language_is_planned() {
    let assistant = Assistant::open(&ModelSource::Mini, &options(), &()).unwrap();
    for prompt in ["把房子涂成蓝色，然后移走汽车", "Färbe das Häuschen grün & lösche „das Auto“ 🚗"]
    {
        // The pack knows no such words, so the plan means nothing; but it is one.
        let outcome = assistant.plan(&PlanRequest::new(vec![street()], prompt), &()).unwrap();
        assert_eq!(outcome.plan.request, prompt);
        assert!(!outcome.plan.steps.is_empty());
    }
}

#[test]
fn a_reply_without_end_or_form_is_an_error_with_what_was_written() {
    let assistant = Assistant::open(&ModelSource::Mini, &options(), &()).unwrap();
    let error = |planner: PlanOptions| {
        let request = PlanRequest { planner, ..PlanRequest::new(vec![street()], STREET) };
        assistant.plan(&request, &()).unwrap_err()
    };
    let short = error(PlanOptions { tokens_max: 6, ..PlanOptions::default() });
    let Error::Request(RequestError::Unfinished { tokens: 6, produced, .. }) = &short else {
        panic!("{short}")
    };
    assert!(produced.starts_with("<action>"), "{produced}");
    assert!(
        error(PlanOptions { tokens_max: 0, ..PlanOptions::default() }).to_string().contains("1 to")
    );
    let hot = error(PlanOptions { temperature: f32::NAN, ..PlanOptions::default() });
    assert!(hot.to_string().contains("planner-temperature"), "{hot}");

    // Random weights keep no format by themselves.
    let model = model_of(&ModelFiles::Folder(Reference::open("tiny-qwen-edit").folder));
    let (prompts, cancel) = (Prompts::default(), CancelToken::new());
    let free = PlanOptions { grammar: false, tokens_max: 12, ..PlanOptions::default() };
    let planner =
        Planner { model: &model, prompts: &prompts, options: &free, call: Call::from(&cancel) };
    let seen = model.look(&[RgbImage::new(56, 56)]).unwrap();
    let error = planner.plan(&seen, STREET).unwrap_err();
    let request = matches!(
        error,
        Error::Request(RequestError::Unfinished { .. } | RequestError::Malformed { .. })
    );
    assert!(request, "{error}");
}

#[test]
fn pictures_are_looked_at_once_and_the_tokens_are_the_same() {
    let (model, cancel) = (mini_model(), CancelToken::new());
    let pictures = [street().rgb];
    let seen = model.look(&pictures).unwrap();
    let prompts = Prompts::default();
    for text in ["what is this?", "and what color?"] {
        let messages = prompts.for_decomposition(1, text);
        let text = model.chat(&messages).unwrap();
        let reused = model.prepare_seen(&text, &seen).unwrap();
        let anew = model.prepare(&text, &pictures).unwrap();
        assert_eq!(reused.tokens(), anew.tokens());
        let hidden = |inputs| bits(&model.hidden_states(inputs, &cancel).unwrap());
        assert_eq!(hidden(&reused), hidden(&anew));
        assert!(seen.is_embedded());
    }
    let error = mini_model().prepare_seen("<|image_pad|>", &seen).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn what_is_kept_between_requests_changes_nothing() {
    let engine = engine();
    let mut request = EditRequest::new(street(), STREET);
    request.seed = Some(5);
    for strategy in [Strategy::Single, Strategy::Sequential, Strategy::Direct] {
        request.strategy = strategy;
        engine.forget();
        let first = engine.edit(&request, &()).unwrap();
        let again = engine.edit(&request, &()).unwrap();
        let fresh = self::engine().edit(&request, &()).unwrap();
        assert!(first.picture.rgb == again.picture.rgb);
        assert!(first.picture.rgb == fresh.picture.rgb);
        assert_eq!((first.plan, first.prompts), (fresh.plan, fresh.prompts));
    }
}

#[test]
fn a_planner_with_the_text_encoders_weights_is_loaded_once() {
    let folder = tempfile::tempdir().unwrap();
    let ModelFiles::Embedded { files, .. } = ModelSource::Mini.files().unwrap() else {
        panic!("the pack is part of the program")
    };
    for file in files {
        let path = folder.path().join(file.path);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, file.bytes).unwrap();
    }
    let planner =
        |model: &Path| PlannerSource { model: Some(model.to_owned()), ..PlannerSource::default() };
    let notes = RefCell::new(Vec::new());
    let note = |event: &Event<'_>| {
        if let Event::Note(note) = event {
            notes.borrow_mut().push((*note).to_owned());
        }
    };
    let shared = EngineOptions { planner: planner(folder.path()), ..options() };
    let shared = Engine::open(&ModelSource::Mini, &shared, &note).unwrap();
    assert!(shared.planner_is_shared());
    assert!(notes.borrow()[0].contains("loaded once"), "{notes:?}");

    // The same numbers in a wider type are other files, so they are loaded beside the encoder's;
    // the plans are the same.
    let path = folder.path().join("text_encoder/model.safetensors");
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let wide = tensors.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F32).unwrap()));
    candle_core::safetensors::save(&wide.collect(), &path).unwrap();
    let apart = EngineOptions { planner: planner(folder.path()), ..options() };
    let apart = Engine::open(&ModelSource::Mini, &apart, &()).unwrap();
    assert!(!apart.planner_is_shared());
    // Sharing takes the memory of the editor alone; a model of its own is counted and refused where
    // it does not fit.
    let parts = |engine: &Engine| engine.weights().iter().map(|w| w.part).collect::<Vec<_>>();
    assert_eq!(parts(&shared), ["transformer", "text_encoder", "vae"]);
    assert_eq!(parts(&apart), ["transformer", "text_encoder", "vae", "planner"]);
    // Matrices stay as wide as they are stored.
    assert!(apart.weights()[1].bytes < apart.weights()[3].bytes);
    let mut request = EditRequest::new(street(), STREET);
    request.seed = Some(1);
    let (a, b) = (shared.edit(&request, &()).unwrap(), apart.edit(&request, &()).unwrap());
    assert_eq!(a.plan, b.plan);
    assert!(a.picture.rgb == b.picture.rgb);

    let missing = EngineOptions { planner: planner(Path::new("/no/such")), ..options() };
    let error = Engine::open(&ModelSource::Mini, &missing, &()).unwrap_err().to_string();
    assert!(error.contains("/no/such") && error.contains("config.json"), "{error}");
}

#[test]
fn a_plan_made_by_hand_is_carried_out() {
    let engine = engine();
    let plan = Plan::new(
        "by hand",
        vec![
            Step::new(Action::Recolor, "red house", "blue", "recolor the red house to blue"),
            Step::new(Action::Replace, "background", "night", "change the background to night"),
        ],
    );
    let mut request = EditRequest::new(street(), "");
    (request.plan, request.seed) = (Some(plan.clone()), Some(1));
    let single = engine.edit(&request, &()).unwrap();
    assert_eq!(single.strategy, Strategy::Single);
    assert_eq!(single.prompts, ["recolor the red house to blue; change the background to night"]);
    assert_eq!((single.plan.as_ref(), single.planned_by), (Some(&plan), None));

    let seen = RefCell::new(Vec::new());
    request.strategy = Strategy::Sequential;
    let sequential = engine
        .edit(&request, &|event: &Event<'_>| {
            let line = match event {
                Event::Planned(plan) => format!("plan of {}", plan.steps.len()),
                Event::StepStarted { index, of, prompt } => format!("{index}/{of} {prompt}"),
                Event::StepDone { index, picture, .. } => {
                    format!("{index} done {:?}", picture.rgb.dimensions())
                }
                _ => return,
            };
            seen.borrow_mut().push(line);
        })
        .unwrap();
    assert_eq!(
        seen.into_inner(),
        [
            "plan of 2",
            "0/2 recolor the red house to blue",
            "0 done (64, 64)",
            "1/2 change the background to night",
            "1 done (64, 64)",
        ]
    );
    let denoised = |stages: &[pentimento::StageReport]| {
        stages.iter().filter(|report| report.stage == Stage::Denoise).count()
    };
    assert_eq!((denoised(&single.stages), denoised(&sequential.stages)), (1, 2));

    // The first pass of several is a direct edit with its sub-request.
    let mut first = EditRequest::new(street(), "recolor the red house to blue");
    (first.strategy, first.seed) = (Strategy::Direct, Some(1));
    let first = engine.edit(&first, &()).unwrap().picture;
    let mut second = EditRequest::new(first, "change the background to night");
    (second.strategy, second.seed) = (Strategy::Direct, Some(2));
    request.hand_over = HandOver::Pixels;
    let by_pixels = engine.edit(&request, &()).unwrap().picture.rgb;
    assert!(by_pixels == engine.edit(&second, &()).unwrap().picture.rgb);
    assert!(by_pixels != sequential.picture.rgb); // latents are not rounded to levels

    request.strategy = Strategy::Direct;
    assert!(engine.edit(&request, &()).unwrap_err().to_string().contains("strategy"));
    (request.strategy, request.plan) = (Strategy::Single, Some(Plan::new("", Vec::new())));
    assert!(engine.edit(&request, &()).unwrap_err().to_string().contains("steps: 0"));
}

#[test]
fn auto_goes_direct_for_one_step() {
    let engine = engine();
    let edit = |prompt: &str, strategy| {
        let mut request = EditRequest::new(street(), prompt);
        (request.strategy, request.seed) = (strategy, Some(1));
        engine.edit(&request, &()).unwrap()
    };
    let one = edit("make it night", Strategy::Auto);
    assert_eq!((one.strategy, one.prompts[0].as_str()), (Strategy::Direct, "make it night"));
    assert_eq!(one.plan.unwrap().steps.len(), 1);
    assert!(one.picture.rgb == edit("make it night", Strategy::Direct).picture.rgb);
    let many = edit(STREET, Strategy::Auto);
    assert_eq!(many.strategy, Strategy::Single);
    assert!(many.picture.rgb == edit(STREET, Strategy::Single).picture.rgb);
}

/// An adapter of the pack's language model: rank 2 on every query projection, `B` as given.
fn adapter(folder: &Path, b: f32) {
    let device = &Device::Cpu;
    let mut tensors = std::collections::HashMap::new();
    for layer in 0..5 {
        let at = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        let a = Tensor::arange(0_f32, 256.0, device).unwrap().sin().unwrap();
        tensors.insert(format!("{at}.lora_A.weight"), a.reshape((2, 128)).unwrap());
        let b = Tensor::full(b, (128, 2), device).unwrap();
        tensors.insert(format!("{at}.lora_B.weight"), b);
    }
    candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors")).unwrap();
    let config = serde_json::json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
    });
    fs_err::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn an_adapter_changes_the_decomposition_and_not_the_edit() {
    let folder = tempfile::tempdir().unwrap();
    let source =
        PlannerSource { adapter: Some(folder.path().to_owned()), ..PlannerSource::default() };
    let adapted = |b: f32| {
        adapter(folder.path(), b);
        let options = EngineOptions { planner: source.clone(), ..options() };
        Engine::open(&ModelSource::Mini, &options, &()).unwrap()
    };
    let edit = |engine: &Engine, strategy| {
        let mut request = EditRequest::new(street(), STREET);
        (request.strategy, request.seed) = (strategy, Some(1));
        engine.edit(&request, &())
    };
    let (plain, zero, strong) = (engine(), adapted(0.0), adapted(3.0));
    let picture = |engine: &Engine, strategy| edit(engine, strategy).unwrap().picture.rgb;
    let single = Strategy::Single;
    assert!(picture(&zero, single) == picture(&plain, single));
    // The encoder of the editor is the base, whatever the decomposer wears.
    assert!(picture(&strong, Strategy::Direct) == picture(&plain, Strategy::Direct));
    let plan = |engine: &Engine| edit(engine, single).ok().and_then(|outcome| outcome.plan);
    assert_ne!(plan(&strong), plan(&plain));
}

#[test]
fn planning_can_be_cancelled() {
    let engine = engine();
    let request = EditRequest::new(street(), STREET);
    let cancel = request.cancel.clone();
    let result = engine.edit(&request, &move |event: &Event<'_>| {
        if matches!(event, Event::Step { stage: Stage::Plan, .. }) {
            cancel.cancel();
        }
    });
    assert!(matches!(result, Err(Error::Cancelled)));
}
