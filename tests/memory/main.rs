//! What a request takes, counted allocation by allocation, beside what was said before.
//!
//! In a binary of its own, whose allocator keeps the highest count. Pages of mapped files and the
//! stacks of threads are no allocations, so they do not count.
#![expect(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a test may panic")]
#![expect(clippy::print_stderr, reason = "the comparison is a table to look at")]

use std::{cell::RefCell, collections::HashMap, path::Path};

use candle_core::{DType, Tensor};
use peak_alloc::PeakAlloc;
use pentimento::{
    Device, EditRequest, Engine, EngineOptions, Event, ModelSource, PlacementOptions, Stage,
    StageMemory,
    layers::Linear,
    pixels::{Limits, Picture},
    vlm::VisionLanguageModel,
    weights::{Checkpoint, Precision, Storage, Weights},
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// What a stage took at most, counted.
struct Measured {
    stage: Stage,
    bytes: u64,
}

fn bytes(count: usize) -> u64 {
    count as u64
}

/// What tokenizer, templates and configs take, which are there before anything is estimated.
fn opened(source: &ModelSource) -> usize {
    let before = ALLOCATOR.current_usage();
    let files = source.files().unwrap();
    let model = VisionLanguageModel::open(&files, "text_encoder", &Precision::reference()).unwrap();
    let bytes = ALLOCATOR.current_usage() - before;
    drop(model);
    bytes
}

/// Runs one edit; returns the highest count of each stage, less what was there before.
fn measure(source: &ModelSource, options: &EngineOptions, request: &EditRequest) -> Vec<Measured> {
    let before = ALLOCATOR.current_usage() + opened(source);
    let measured = RefCell::new(Vec::new());
    let engine = Engine::open_for(source, options, request, &()).unwrap();
    let observer = |event: &Event<'_>| match *event {
        Event::Step { step: 0, .. } => {
            ALLOCATOR.reset_peak_usage();
        }
        Event::StageDone { stage, .. } => {
            let peak = ALLOCATOR.peak_usage().saturating_sub(before);
            measured.borrow_mut().push(Measured { stage, bytes: bytes(peak) });
        }
        _ => {}
    };
    engine.edit(request, &observer).unwrap();
    measured.into_inner()
}

fn picture() -> Picture {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/samples/add.png");
    Picture::open(&path, &Limits::default()).unwrap()
}

fn estimate(
    source: &ModelSource,
    options: &EngineOptions,
    request: &EditRequest,
) -> Vec<StageMemory> {
    Engine::memory(source, options, request, &()).unwrap().stages
}

/// Compares stage by stage, and prints the table.
fn compare(
    name: &str,
    source: &ModelSource,
    options: &EngineOptions,
    request: &EditRequest,
) -> Vec<(Stage, f64)> {
    let estimate = estimate(source, options, request);
    let measured = measure(source, options, request);
    assert_eq!(estimate.len(), measured.len());
    let mut ratios = Vec::new();
    for (said, found) in estimate.iter().zip(&measured) {
        assert_eq!(said.stage, found.stage);
        let ratio = said.in_use_bytes() as f64 / found.bytes as f64;
        eprintln!(
            "{name:<24} {:<22} said {:>12} counted {:>12} ratio {ratio:.3}",
            said.stage.label(),
            said.in_use_bytes(),
            found.bytes
        );
        ratios.push((said.stage, ratio));
    }
    ratios
}

/// Matrices of a part that is loaded, and their side.
const MATRICES: usize = 4;
const SIDE: usize = 2048;
/// What lists and counters take beside numbers.
const SMALL_BYTES: u64 = 1 << 16;
/// How far above the count an estimate may be. The planner's replies are taken as long as they may
/// be, which the pack's never are.
const RATIO_MAX: f64 = 1.3;
const RATIO_MAX_PLANNING: f64 = 1.7;

/// Both tests count the same allocations, so they run one after the other.
#[test]
fn memory_is_what_was_said() {
    what_is_freed_goes_back_to_the_system();
    loading_holds_what_was_said_beside_what_it_keeps();
    what_was_said_is_what_is_taken();
}

/// Memory below what is still in use is the system's again when a pool is trimmed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn what_is_freed_goes_back_to_the_system() {
    use pentimento::memory::{DeviceMemory, HostPool, Limit, private_bytes};
    const PIECE: usize = 64 << 10;
    let mut pieces: Vec<Vec<u8>> = (0..2048).map(|_| vec![1; PIECE]).collect();
    let last = pieces.pop();
    drop(pieces);
    let before = private_bytes().unwrap();
    DeviceMemory::new(HostPool::default(), Limit::Free).trim();
    let after = private_bytes().unwrap();
    assert!(after + bytes(1024 * PIECE) < before, "{before} before, {after} after");
    drop(last);
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn what_is_freed_goes_back_to_the_system() {}

/// While a part is loaded, no more is held than what it keeps and what was said for reading one
/// matrix: nothing where its bytes are laid out as they are, or widened; two panels in float32 for each
/// thread where it is quantized.
fn loading_holds_what_was_said_beside_what_it_keeps() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("part.safetensors");
    let zeros = || {
        let device = candle_core::Device::Cpu;
        Tensor::zeros((SIDE, SIDE), DType::BF16, &device).unwrap()
    };
    let tensors: HashMap<String, Tensor> =
        (0..MATRICES).map(|index| (format!("{index}.weight"), zeros())).collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    drop(tensors);
    for storage in [Storage::Q8_0, Storage::Q4K, Storage::Plain(DType::BF16), Storage::Compute] {
        let precision = Precision { storage, ..Precision::reference() };
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        let kept = checkpoint.kept_bytes(&precision);
        let loading = checkpoint.loading_bytes(&precision);
        let weights = Weights::new(checkpoint, precision);
        // Threads and their buffers.
        drop(Linear::load_without_bias(&weights.pp(0), SIDE, SIDE).unwrap());
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let load = |index| Linear::load_without_bias(&weights.pp(index), SIDE, SIDE).unwrap();
        let part: Vec<Linear> = (0..MATRICES).map(load).collect();
        let held = bytes(ALLOCATOR.current_usage() - before);
        let peak = bytes(ALLOCATOR.peak_usage() - before);
        let kept = kept + SMALL_BYTES;
        let most = kept + loading;
        // Beside the numbers stands what says where they are.
        let most_held = kept + 1024 * bytes(MATRICES);
        assert!(held <= most_held && kept * 20 <= held * 21, "{storage:?}: {held} of {kept}");
        assert!(peak <= most, "{storage:?}: {peak}, at most {most}");
        drop(part);
    }
}

/// Each stage's estimate is at least what is counted, and at most 1.3 times that. At the pack's own
/// size, with everything in memory as f32, an edit takes at most 15 % more than its weights.
fn what_was_said_is_what_is_taken() {
    let options = |storage, placement| EngineOptions {
        device: Device::Cpu,
        storage,
        placement,
        ..EngineOptions::default()
    };
    let turns = PlacementOptions { take_turns: true, ..PlacementOptions::default() };
    let streamed = PlacementOptions { stream_blocks: Some(1), ..turns };
    // Threads and tables that are made once.
    let mut request = EditRequest::new(picture(), "make it night and take the car away");
    (request.seed, request.steps) = (Some(1), Some(2));
    // An estimate counts replies of the full length; the pack's are some 60 tokens.
    request.planner.tokens_max = 192;
    measure(&ModelSource::Mini, &options(None, PlacementOptions::default()), &request);
    let mut faults = Vec::new();
    for (name, side, storage, placement) in [
        ("64 px", 64, None, PlacementOptions::default()),
        ("256 px", 256, None, PlacementOptions::default()),
        ("256 px, q8_0", 256, Some(Storage::Q8_0), PlacementOptions::default()),
        ("384 px", 384, None, PlacementOptions::default()),
        ("512 px, q8_0", 512, Some(Storage::Q8_0), PlacementOptions::default()),
        ("384 px, turns", 384, None, turns),
        ("384 px, streamed", 384, None, streamed),
    ] {
        let mut request = request.clone();
        request.area = Some(side * side);
        let options = options(storage, placement);
        if side == 64 {
            // As f32, since the pack's halves weigh too little beside the pictures.
            let wide =
                EngineOptions { storage: Some(Storage::Plain(DType::F32)), ..options.clone() };
            let engine = Engine::open(&ModelSource::Mini, &wide, &()).unwrap();
            let weights: u64 = engine.weights().iter().map(|share| share.bytes).sum();
            drop(engine);
            let measured = measure(&ModelSource::Mini, &wide, &request);
            let peak = measured.iter().map(|measured| measured.bytes).max().unwrap();
            assert!(peak * 100 <= weights * 115, "{peak} for weights of {weights}");
        }
        for (stage, ratio) in compare(name, &ModelSource::Mini, &options, &request) {
            let most = if stage == Stage::Plan { RATIO_MAX_PLANNING } else { RATIO_MAX };
            if !(1.0..=most).contains(&ratio) {
                faults.push(format!("{name}, {}: {ratio}", stage.label()));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
