//! Ways to save memory: they change where numbers lie, not which numbers come out.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use pentimento::{
    CancelToken, EditOutcome, EditRequest, Engine, EngineOptions, Error, Event, ModelError,
    ModelSource, Placement, PlacementOptions, Stage, Strategy,
    diffusion::{
        GuidancePass, Residency, Transformer,
        qwen_image::{ModelInput, Outputs},
    },
    memory::{Budget, DeviceMemory, Limit, Rung, SimulatedDevice, pool::Injected},
    pixels::{Limits, Picture},
    plan::{Action, Plan, Step},
    weights::{LoraFile, LowRankChanges, ModelFiles, Precision, Storage},
};

use crate::{
    cli::{run, text},
    common::Reference,
    diffusion::{conditioning, grids},
    engine::{copy, direct, request},
    lora::data,
};

fn options(placement: PlacementOptions) -> EngineOptions {
    EngineOptions { device: pentimento::Device::Cpu, placement, ..EngineOptions::default() }
}

fn bits(x: &Tensor) -> Vec<u32> {
    let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// What a transformer makes of the recorded input, for all tokens and for the target's.
fn outputs(model: &Transformer, reference: &Reference) -> [Vec<u32>; 2] {
    let cancel = CancelToken::new();
    let input = ModelInput {
        tokens: reference.tensor("dit.hidden_states"),
        grids: &grids(reference),
        conditioning: &conditioning(reference),
    };
    let contexts = model.contexts(&[0.37, 0.9], &cancel).unwrap();
    [Outputs::All, Outputs::Target]
        .map(|outputs| bits(&model.forward(&input, &contexts[1], outputs, &cancel).unwrap()))
}

#[test]
fn streamed_blocks_compute_what_resident_ones_do() {
    for reference in Reference::all() {
        let files = ModelFiles::Folder(reference.folder.clone());
        for storage in [Storage::Compute, Storage::Q8_0] {
            let precision = Precision { storage, ..Precision::reference() };
            let resident = Transformer::load(&files, &precision).unwrap();
            let layers = resident.config().layers;
            assert_eq!(resident.blocks_in_memory(), layers);
            let expected = outputs(&resident, &reference);
            for blocks in 0..=layers {
                let residency = Residency::Streamed { blocks };
                let changes = LowRankChanges::default();
                let model = Transformer::open(&files, &precision, changes, residency).unwrap();
                assert_eq!(outputs(&model, &reference), expected, "{} {blocks}", reference.name());
                assert_eq!(model.blocks_in_memory(), blocks);
            }
            // From one way to the other, and back.
            resident.set_residency(Residency::Streamed { blocks: 1 });
            assert_eq!(outputs(&resident, &reference), expected);
            resident.release();
            assert_eq!(resident.blocks_in_memory(), 0);
            resident.set_residency(Residency::Resident);
            assert_eq!(outputs(&resident, &reference), expected);
            assert_eq!(resident.blocks_in_memory(), layers);
        }
    }
}

#[test]
fn low_rank_changes_apply_to_streamed_blocks() {
    let reference = Reference::open("tiny-qwen-2511");
    let files = ModelFiles::Folder(reference.folder.clone());
    let precision = Precision::reference();
    let model = |residency| {
        let loras = [("every.safetensors", 0.8), ("few.safetensors", 0.5)]
            .map(|(name, strength)| LoraFile::open(&data(name), strength).unwrap());
        let (changes, _) = Transformer::read_loras(&files, &loras, &precision).unwrap();
        Transformer::open(&files, &precision, changes, residency).unwrap()
    };
    let plain = Transformer::load(&files, &precision).unwrap();
    let resident = model(Residency::Resident);
    let expected = outputs(&resident, &reference);
    assert_ne!(expected, outputs(&plain, &reference));
    let streamed = model(Residency::Streamed { blocks: 0 });
    for _ in 0..2 {
        assert_eq!(outputs(&streamed, &reference), expected);
    }
}

#[test]
fn streamed_blocks_are_checked_when_the_model_is_opened() {
    let reference = Reference::open("tiny-qwen-edit");
    let path = "transformer/diffusion_pytorch_model.safetensors";
    let tensors =
        || candle_core::safetensors::load(reference.folder.join(path), &Device::Cpu).unwrap();
    let error = |tensors: &std::collections::HashMap<String, Tensor>| {
        let folder = tempfile::tempdir().unwrap();
        copy(&reference.folder, folder.path());
        candle_core::safetensors::save(tensors, folder.path().join(path)).unwrap();
        let files = ModelFiles::Folder(folder.path().to_owned());
        let (changes, residency) = (LowRankChanges::default(), Residency::Streamed { blocks: 0 });
        Transformer::open(&files, &Precision::reference(), changes, residency).unwrap_err()
    };
    let name = "transformer_blocks.1.attn.to_q.weight";
    let mut missing = tensors();
    let tensor = missing.remove(name).unwrap();
    assert!(matches!(error(&missing), Error::Model(ModelError::TensorMissing { tensor, .. })
        if tensor == name));
    let mut narrow = tensors();
    narrow.insert(name.into(), tensor.narrow(0, 0, 1).unwrap().contiguous().unwrap());
    assert!(matches!(error(&narrow), Error::Model(ModelError::TensorShape { .. })));
    let mut left_over = tensors();
    left_over.insert("transformer_blocks.1.attn.to_z.weight".into(), tensor.clone());
    assert!(matches!(error(&left_over), Error::Model(ModelError::TensorsUnused { .. })));
    let mut numbers = tensors();
    numbers.insert(name.into(), tensor.to_dtype(DType::I64).unwrap());
    assert!(matches!(error(&numbers), Error::Model(ModelError::TensorType { .. })));
}

fn sample() -> Picture {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/samples/add.png");
    Picture::open(&path, &Limits::default()).unwrap()
}

/// Two passes of the pack on one picture.
fn two_passes() -> EditRequest {
    let steps = vec![
        Step::new(Action::Recolor, "house", "blue", "recolor the house to blue"),
        Step::new(Action::Relight, "light", "night", "change the light to night"),
    ];
    let mut request = EditRequest::new(sample(), "");
    request.plan = Some(Plan::new("make the house blue and the light night", steps));
    request.strategy = Strategy::Sequential;
    (request.seed, request.steps) = (Some(5), Some(2));
    request
}

#[test]
fn every_placement_gives_the_same_picture() {
    let edited = |placement, request: &EditRequest| {
        let engine = Engine::open(&ModelSource::Mini, &options(placement), &()).unwrap();
        let outcome = engine.edit(request, &()).unwrap();
        // What was read once and dropped is read again for the next request.
        engine.forget();
        let again = engine.edit(request, &()).unwrap();
        assert_eq!(again.picture.rgb, outcome.picture.rgb);
        outcome
    };
    let mut planned = EditRequest::new(sample(), "paint the house blue and make it night");
    (planned.seed, planned.steps) = (Some(5), Some(2));
    for request in [two_passes(), planned] {
        let resident = edited(PlacementOptions::default(), &request);
        assert_eq!(resident.memory.placement, Placement::RESIDENT);
        assert!(!resident.notes.iter().any(|note| note.contains("to save memory")));
        for (take_turns, stream_blocks) in
            [(true, None), (false, Some(0)), (true, Some(0)), (true, Some(3))]
        {
            let placement =
                PlacementOptions { take_turns, stream_blocks, ..PlacementOptions::default() };
            let outcome = edited(placement, &request);
            assert_eq!(outcome.picture.rgb, resident.picture.rgb, "{placement:?}");
            assert_eq!(outcome.plan, resident.plan);
            assert_eq!(outcome.memory.placement.take_turns, take_turns);
            assert!(outcome.notes.iter().any(|note| note.contains("to save memory")));
        }
    }
}

/// The mean difference in levels.
fn difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let pairs = a.as_raw().iter().zip(b.as_raw());
    pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.as_raw().len() as f64
}

#[test]
fn tiles_stay_near_the_whole() {
    let reference = Reference::open("edit-23");
    let edited = |tiles| {
        let placement = PlacementOptions { tiles, ..PlacementOptions::default() };
        let source = ModelSource::Folder(reference.folder.clone());
        let engine = Engine::open(&source, &options(placement), &()).unwrap();
        let rgb = RgbImage::from_fn(352, 320, |x, y| {
            image::Rgb([(x * 255 / 352) as u8, (y * 255 / 320) as u8, ((x + y) % 256) as u8])
        });
        let mut request = direct(Picture::from_rgb(rgb), "make it night");
        (request.width, request.height) = (Some(352), Some(320));
        (request.seed, request.steps) = (Some(1), Some(2));
        (request.vl_area, request.cfg_scale) = (Some(64 * 64), Some(1.0));
        engine.edit(&request, &()).unwrap()
    };
    let whole = edited(None);
    let outcome = edited(Some(Some(256)));
    assert_eq!(outcome.memory.placement.tile_px, Some(256));
    let mean = difference(&outcome.picture.rgb, &whole.picture.rgb);
    assert!(mean <= 0.5, "mean difference of {mean} levels");
}

#[test]
fn a_request_that_cannot_fit_is_refused_with_a_way_out() {
    let reference = Reference::open("tiny-qwen-edit");
    let source = ModelSource::Folder(reference.folder.clone());
    let budget = Budget::ram_at_most(1 << 20);
    let options = EngineOptions { budget, ..options(PlacementOptions::default()) };
    let request = request(&reference, "pipe.nocfg");
    let plan = Engine::memory(&source, &options, &request, &()).unwrap();
    assert!(!plan.fits() && plan.hint.as_ref().unwrap().contains("--max-ram"), "{plan:?}");
    let error = Engine::open_for(&source, &options, &request, &()).unwrap_err();
    match error {
        Error::OutOfMemory { needed_bytes, available_bytes, hint, .. } => {
            assert_eq!(needed_bytes, plan.peak_bytes);
            assert!(available_bytes < needed_bytes);
            assert_eq!(hint, plan.hint.unwrap());
        }
        other => panic!("{other}"),
    }
}

#[test]
fn an_engine_that_is_open_refuses_a_request_that_is_too_large() {
    let reference = Reference::open("tiny-qwen-edit");
    let source = ModelSource::Folder(reference.folder.clone());
    let used = pentimento::memory::private_bytes().unwrap();
    let budget = Budget::ram_at_most(used + (160 << 20));
    let options = EngineOptions { budget, ..options(PlacementOptions::default()) };
    let small = request(&reference, "pipe.nocfg");
    let engine = Engine::open_for(&source, &options, &small, &()).unwrap();
    let mut large = request(&reference, "pipe.nocfg");
    (large.width, large.height) = (Some(4096), Some(4096));
    let error = engine.edit(&large, &()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("--area"), "{error}");
}

#[test]
fn a_dry_run_tells_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.png").display().to_string();
    let sample =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/samples/add.png");
    let sample = sample.display().to_string();
    let edit = ["edit", "-i", &sample, "-p", "make it night", "-o", &out, "--dry-run"];
    let table = text(&run(&edit, 0).stdout);
    for word in ["planning", "denoising", "decoding", "most in use", "transformer           stays"]
    {
        assert!(table.contains(word), "no {word:?} in {table}");
    }
    let json = |more: &[&str]| -> serde_json::Value {
        let arguments = [edit.as_slice(), &["--json"], more].concat();
        serde_json::from_slice(&run(&arguments, 0).stdout).unwrap()
    };
    let value = json(&[]);
    assert_eq!(value["fits"], true);
    assert_eq!(value["memory"]["placement"]["transformer"], "resident");
    assert_eq!(value["memory"]["stages"].as_array().unwrap().len(), 5);
    let value = json(&["--offload", "--stream-layers=2", "--max-ram", "-0.5"]);
    assert_eq!(value["memory"]["placement"]["take_turns"], true);
    assert_eq!(value["memory"]["placement"]["transformer"]["streamed"]["blocks"], 2);
    let value = json(&["--max-ram", "0.001"]);
    assert_eq!(value["fits"], false);
    assert!(value["memory"]["hint"].as_str().unwrap().contains("--max-ram"));
    let plan = ["plan", "-i", &sample, "-p", "make it night", "--dry-run"];
    assert!(text(&run(&plan, 0).stdout).contains("planning"));
    assert!(!folder.path().join("out.png").exists());
}

/// One edit on a simulated device; nothing may be held when the engine is gone.
fn edited_on(device: SimulatedDevice, request: &EditRequest) -> pentimento::Result<EditOutcome> {
    let memory = DeviceMemory::new(device, Limit::Free);
    let options =
        EngineOptions { memory: Some(memory.clone()), ..options(PlacementOptions::default()) };
    let result = Engine::open(&ModelSource::Mini, &options, &())
        .and_then(|engine| engine.edit(request, &()));
    assert!(memory.holdings().values().all(|holding| holding.now == 0));
    assert_eq!(memory.usage().used, 0);
    result
}

#[test]
fn an_edit_makes_room_wherever_memory_runs_out() {
    const BYTES: u64 = 1 << 40;
    /// Leases of an engine that is opened, and of a whole edit.
    const OPENING: u64 = 3;
    const WHOLE: u64 = OPENING + 5;
    let mut request = EditRequest::new(sample(), "make it night");
    (request.seed, request.steps) = (Some(5), Some(2));
    let plain = edited_on(SimulatedDevice::new(BYTES), &request).unwrap();
    assert!(plain.memory.made_room.is_empty());
    for index in 0..=WHOLE {
        let once = SimulatedDevice::new(BYTES).failing(Injected::Nth(index));
        match edited_on(once, &request) {
            Err(Error::OutOfMemory { .. }) => assert!(index < OPENING, "{index}"),
            Err(other) => panic!("{index}: {other}"),
            Ok(outcome) => {
                assert_eq!(outcome.picture.rgb, plain.picture.rgb, "{index}");
                let expected: &[Rung] = if index < WHOLE { &[Rung::DropCaches] } else { &[] };
                assert_eq!(outcome.memory.made_room, expected, "{index}");
            }
        }
        let for_good = SimulatedDevice::new(BYTES).failing(Injected::From(index));
        let ended = edited_on(for_good, &request);
        assert_eq!(matches!(ended, Err(Error::OutOfMemory { .. })), index < WHOLE, "{index}");
    }
}

#[test]
fn planner_and_editor_share_a_device_without_growth() {
    let memory = DeviceMemory::new(SimulatedDevice::new(1 << 40), Limit::Free);
    let placement = PlacementOptions { take_turns: true, ..PlacementOptions::default() };
    let options = EngineOptions { memory: Some(memory.clone()), ..options(placement) };
    let engine = Engine::open(&ModelSource::Mini, &options, &()).unwrap();
    let mut request = EditRequest::new(sample(), "paint the house blue and make it night");
    (request.seed, request.steps) = (Some(5), Some(2));
    engine.edit(&request, &()).unwrap();
    let first = memory.usage();
    for _ in 0..2 {
        engine.forget();
        engine.edit(&request, &()).unwrap();
    }
    assert_eq!(memory.usage().reserved_high, first.reserved_high);
    let holdings = engine.holdings();
    let weights = holdings["text_encoder"].high + holdings["transformer"].high;
    assert!(memory.usage().used_high < weights + holdings["vae"].high + (64 << 20));
    assert_eq!(holdings["text_encoder"].now, 0);
    assert!(holdings["transformer"].now > 0);
}

#[test]
fn blocks_are_read_while_the_planner_writes() {
    let options = options(PlacementOptions::default());
    let mut request = EditRequest::new(sample(), "paint the house blue and make it night");
    (request.seed, request.steps) = (Some(5), Some(2));
    let loads = |outcome: &EditOutcome| {
        outcome.stages.iter().filter(|report| report.stage == Stage::Load).count()
    };
    let before = Engine::open(&ModelSource::Mini, &options, &()).unwrap();
    let expected = before.edit(&request, &()).unwrap();
    assert_eq!(loads(&expected), 0);
    let engine = Engine::open_for(&ModelSource::Mini, &options, &request, &()).unwrap();
    // Their place is held from the beginning.
    let held = |engine: &Engine| engine.holdings()["transformer"].now;
    assert_eq!(held(&engine), held(&before));
    // Stopped as planning begins: nothing is lost that a second try would need.
    let stop = |event: &Event<'_>| {
        if matches!(event, Event::Step { stage: Stage::Plan, .. }) {
            request.cancel.cancel();
        }
    };
    assert!(matches!(engine.edit(&request, &stop), Err(Error::Cancelled)));
    let request = EditRequest { cancel: CancelToken::new(), ..request.clone() };
    let outcome = engine.edit(&request, &()).unwrap();
    assert_eq!((outcome.picture.rgb, outcome.plan), (expected.picture.rgb, expected.plan));
    // What the first try read is there.
    let engine = Engine::open_for(&ModelSource::Mini, &options, &request, &()).unwrap();
    assert_eq!(loads(&engine.edit(&request, &()).unwrap()), 1);
    assert_eq!(loads(&engine.edit(&request, &()).unwrap()), 0);
}

#[test]
fn guidance_in_one_batch_gives_the_same_picture() {
    let reference = Reference::open("tiny-qwen-2511");
    let source = ModelSource::Folder(reference.folder.clone());
    let request = request(&reference, "pipe.two");
    let edited = |guidance| {
        let placement = PlacementOptions { guidance, ..PlacementOptions::default() };
        let engine = Engine::open(&source, &options(placement), &()).unwrap();
        engine.edit(&request, &()).unwrap()
    };
    let in_turn = edited(None);
    assert_eq!(in_turn.memory.placement, Placement::RESIDENT);
    let together = edited(Some(GuidancePass::OneBatch));
    assert_eq!(together.memory.placement.guidance, GuidancePass::OneBatch);
    let pairs = in_turn.picture.rgb.as_raw().iter().zip(together.picture.rgb.as_raw());
    assert!(pairs.into_iter().all(|(a, b)| a.abs_diff(*b) <= 1));
    let step = |outcome: &EditOutcome| {
        let denoise = outcome.memory.stages.iter().find(|stage| stage.stage == Stage::Denoise);
        denoise.unwrap().activation_bytes
    };
    assert!(step(&together) > step(&in_turn));
    // Where memory runs out, the batch is split before anything slower is tried. In tiles the autoencoder
    // takes less than the step.
    let placement = PlacementOptions {
        guidance: Some(GuidancePass::OneBatch),
        tiles: Some(Some(32)),
        ..PlacementOptions::default()
    };
    let tiled = Engine::open(&source, &options(placement), &()).unwrap();
    let expected = tiled.edit(&request, &()).unwrap();
    let memory = DeviceMemory::new(
        SimulatedDevice::new(1 << 40).failing(Injected::Above(step(&expected) - 1)),
        Limit::Free,
    );
    let options = EngineOptions { memory: Some(memory), ..options(placement) };
    let engine = Engine::open(&source, &options, &()).unwrap();
    let outcome = engine.edit(&request, &()).unwrap();
    assert_eq!(outcome.memory.made_room, [Rung::DropCaches, Rung::SplitGuidance]);
    let pairs = expected.picture.rgb.as_raw().iter().zip(outcome.picture.rgb.as_raw());
    assert!(pairs.into_iter().all(|(a, b)| a.abs_diff(*b) <= 1));
}
