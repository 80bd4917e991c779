//! Tests of diffusion: noise, schedules, guidance, the transformer, the autoencoder and the loop.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, Error, Event, ModelError, RequestError, Stage,
    diffusion::{
        Conditioning, Denoise, DiffusionModel, Grid, Transformer,
        guidance::rescaled_guidance,
        noise::{CpuGenerator, CudaGenerator, CudaGrid, NoiseSource},
        qwen_image::{
            ModelInput, Outputs,
            pack::{latents_from_tokens, tokens_from_latents},
        },
        schedule::ScheduleConfig,
        vae::{Autoencoder, Tiling},
    },
    weights::{ModelFiles, Precision, Storage},
};

use crate::common::{Reference, Tolerance, assert_close};

type Tensors = std::collections::HashMap<String, Tensor>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/diffusion").join(name)
}

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(fixture(name), &Device::Cpu).unwrap()
}

fn files(reference: &Reference) -> ModelFiles {
    ModelFiles::Folder(reference.folder.clone())
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

#[track_caller]
fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    f64::from(difference.to_scalar::<f32>().unwrap())
}

// ---- noise ----

#[test]
fn noise_equals_torch_on_the_cpu() {
    let mut cases = 0;
    for (name, expected) in tensors("noise.safetensors") {
        let Some(rest) = name.strip_prefix("seed.") else { continue };
        let (seed, count) = rest.split_once('.').unwrap();
        let drawn = NoiseSource::Cpu.standard_normal(seed.parse().unwrap(), count.parse().unwrap());
        assert_close(&name, &vector(&drawn), &expected, Tolerance::Absolute(1e-6));
        cases += 1;
    }
    assert_eq!(cases, 44 + 16);
}

#[test]
fn one_generator_keeps_the_odd_number_between_calls() {
    let expected = tensors("noise.safetensors");
    let mut generator = CpuGenerator::new(77);
    for (i, count) in [3, 20, 2, 1, 33].into_iter().enumerate() {
        let drawn = generator.standard_normal(count);
        let name = format!("calls.{i}");
        assert_close(&name, &vector(&drawn), &expected[&name], Tolerance::Absolute(1e-6));
    }
    assert!(generator.standard_normal(0).is_empty());
}

/// Published numbers: the docstring of AUTOMATIC1111's `modules/rng_philox.py` (seed 0), and what
/// torch printed on NVIDIA devices in
/// <https://github.com/pytorch/pytorch/issues/79496> (seed 10) and
/// <https://github.com/pytorch/pytorch/issues/158398> (seed 42).
#[test]
fn noise_equals_torch_on_cuda() {
    let draw = |seed, count| CudaGenerator::new(seed, CudaGrid::UNLIMITED).standard_normal(count);
    let imitated = [
        -0.924_662_6,
        -0.425_344_15,
        -2.643_845_7,
        0.145_183_88,
        -0.120_866_47,
        -0.579_725_64,
        -0.622_851_2,
        -0.328_387_1,
        -1.074_542_3,
        -0.363_144_07,
        -1.671_050_7,
        2.265_505,
    ];
    let tolerance = Tolerance::Absolute(1e-6);
    assert_close("seed 0", &vector(&draw(0, 12)), &vector(&imitated), tolerance);
    let printed = Tolerance::Absolute(6e-5); // four digits
    assert_close("seed 10", &vector(&draw(10, 3)), &vector(&[-0.1029, 1.6810, -0.2708]), printed);
    // A tensor of 64 × 2048 on a device with 28 multiprocessors of 1536 threads.
    let grid = CudaGrid::of_device(28, 1536);
    let rows = NoiseSource::Cuda(grid).standard_normal(42, 64 * 2048);
    let check = |start: usize, numbers: [f32; 3]| {
        let found = &rows[start..start + 3];
        assert_close("seed 42", &vector(found), &vector(&numbers), printed);
    };
    check(0, [0.1940, 2.1614, -0.1721]);
    check(2048, [-0.4574, 0.8063, 0.1580]);
    check(61 * 2048, [-0.4861, 0.3358, 1.0578]);
    check(62 * 2048, [0.7881, 0.8339, -1.1424]);
    check(64 * 2048 - 3, [-0.4841, 1.2850, -0.0282]);
}

// ---- schedules ----

fn scheduler_folder(config: &serde_json::Value) -> (tempfile::TempDir, ModelFiles) {
    let folder = tempfile::tempdir().unwrap();
    fs_err::create_dir(folder.path().join("scheduler")).unwrap();
    let path = folder.path().join("scheduler/scheduler_config.json");
    fs_err::write(path, config.to_string()).unwrap();
    let files = ModelFiles::Folder(folder.path().to_owned());
    (folder, files)
}

#[track_caller]
fn check_levels(name: &str, config: &ScheduleConfig, expected: &Tensors, place: &str) {
    let (steps, tokens) = place.split_once('.').unwrap();
    let schedule = config.schedule(steps.parse().unwrap(), tokens.parse().unwrap()).unwrap();
    let sigmas = &expected[&format!("{name}.{place}.sigmas")];
    let timesteps = &expected[&format!("{name}.{place}.timesteps")];
    let name = format!("{name}.{place}");
    assert_close(&name, &vector(schedule.sigmas()), sigmas, Tolerance::Absolute(1e-6));
    assert_close(&name, &vector(schedule.timesteps()), timesteps, Tolerance::Relative(1e-6));
    assert_eq!(schedule.steps() + 1, schedule.sigmas().len());
}

#[test]
fn schedules_of_many_configs_equal_the_reference() {
    let text = fs_err::read_to_string(fixture("schedules.json")).unwrap();
    let configs: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let expected = tensors("schedules.safetensors");
    let mut cases = 0;
    for (name, config) in &configs {
        let (_folder, files) = scheduler_folder(config);
        let config = ScheduleConfig::load(&files).unwrap();
        for key in expected.keys().filter(|key| key.ends_with(".sigmas")) {
            let Some(rest) = key.strip_prefix(&format!("{name}.")) else { continue };
            check_levels(name, &config, &expected, rest.strip_suffix(".sigmas").unwrap());
            cases += 1;
        }
    }
    assert_eq!(cases * 2, expected.len());
}

#[test]
fn schedules_of_the_reference_checkpoints() {
    for reference in Reference::all() {
        let config = ScheduleConfig::load(&files(&reference)).unwrap();
        for steps in [2, 4, 8, 30] {
            for tokens in [24, 256, 4096] {
                let schedule = config.schedule(steps, tokens).unwrap();
                let name = format!("sched.{steps}.{tokens}");
                let sigmas = reference.tensor(&format!("{name}.sigmas"));
                let timesteps = reference.tensor(&format!("{name}.timesteps"));
                let (found, tolerance) = (vector(schedule.sigmas()), Tolerance::Absolute(1e-6));
                assert_close(&name, &found, sigmas, tolerance);
                let (found, tolerance) = (vector(schedule.timesteps()), Tolerance::Relative(1e-6));
                assert_close(&name, &found, timesteps, tolerance);
            }
        }
    }
}

#[test]
fn numbers_of_steps_outside_the_limits_are_refused() {
    let terminal = scheduler_folder(&serde_json::json!({ "shift_terminal": 0.02 }));
    let plain = scheduler_folder(&serde_json::json!({}));
    let terminal = ScheduleConfig::load(&terminal.1).unwrap();
    let plain = ScheduleConfig::load(&plain.1).unwrap();
    for (config, steps) in [(&terminal, 0), (&terminal, 1), (&terminal, 1001), (&plain, 0)] {
        let error = config.schedule(steps, 64).unwrap_err();
        assert!(
            matches!(error, Error::Request(RequestError::Field { field: "steps", .. })),
            "{error}"
        );
    }
    assert_eq!(plain.schedule(1, 64).unwrap().sigmas(), [1.0, 0.0]);
    assert_eq!(terminal.schedule(1000, 64).unwrap().steps(), 1000);
}

#[test]
fn scheduler_configs_that_compute_something_else_are_refused() {
    for (config, field) in [
        (serde_json::json!({ "use_beta_sigmas": true }), "use_beta_sigmas"),
        (serde_json::json!({ "stochastic_sampling": true }), "stochastic_sampling"),
        (
            serde_json::json!({ "use_karras_sigmas": true, "use_exponential_sigmas": true }),
            "use_karras_sigmas",
        ),
        (serde_json::json!({ "time_shift_type": "cosine" }), "time_shift_type"),
        (serde_json::json!({ "shift": 0.0 }), "shift"),
        (serde_json::json!({ "shift_terminal": 1.0 }), "shift_terminal"),
        (serde_json::json!({ "num_train_timesteps": 0 }), "num_train_timesteps"),
        (serde_json::json!({ "use_dynamic_shifting": true, "max_shift": null }), "max_shift"),
        (
            serde_json::json!({ "use_dynamic_shifting": true, "max_image_seq_len": 256 }),
            "max_image_seq_len",
        ),
        (serde_json::json!({ "order": 2 }), "order"),
    ] {
        let (_folder, files) = scheduler_folder(&config);
        let error = ScheduleConfig::load(&files).unwrap_err();
        match &error {
            Error::Model(ModelError::Config { field: found, path, .. }) => {
                assert_eq!(found, field);
                assert!(path.ends_with("scheduler_config.json"));
            }
            _ => panic!("{field}: {error}"),
        }
    }
    let (_folder, files) = scheduler_folder(&serde_json::json!({ "_class_name": "DDIMScheduler" }));
    let error = ScheduleConfig::load(&files).unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::Kind { .. })), "{error}");
    // Keys that turn nothing on, and notes, are no reason to refuse.
    let (_folder, files) = scheduler_folder(
        &serde_json::json!({ "_note": 1, "use_flow_sigmas": false, "sigma_min": null }),
    );
    ScheduleConfig::load(&files).unwrap();
}

// ---- guidance and packing ----

#[test]
fn guidance_keeps_the_length_of_the_prediction() {
    let positive = Tensor::new(&[[[3.0_f32, 4.0], [1.0, 0.0]]], &Device::Cpu).unwrap();
    let negative = Tensor::new(&[[[3.0_f32, 0.0], [1.0, 0.0]]], &Device::Cpu).unwrap();
    let guided = rescaled_guidance(&positive, &negative, 2.0).unwrap();
    // (3, 8) has the length √73 and is brought to that of (3, 4).
    let ratio = 5.0 / 73.0_f32.sqrt();
    let expected = Tensor::new(&[[[3.0 * ratio, 8.0 * ratio], [1.0, 0.0]]], &Device::Cpu).unwrap();
    assert_close("guidance", &guided, &expected, Tolerance::Absolute(1e-6));
}

#[test]
fn packing_orders_channels_before_the_places_in_a_patch() {
    let latents = Tensor::arange(0.0_f32, 48.0, &Device::Cpu).unwrap();
    let latents = latents.reshape((1, 2, 4, 6)).unwrap();
    let (tokens, grid) = tokens_from_latents(&latents).unwrap();
    assert_eq!((tokens.dims(), grid), (&[1, 6, 8][..], Grid { height: 2, width: 3 }));
    let token: Vec<f32> = tokens.get(0).unwrap().get(1).unwrap().to_vec1().unwrap();
    assert_eq!(token, [2.0, 3.0, 8.0, 9.0, 26.0, 27.0, 32.0, 33.0]);
    let back = latents_from_tokens(&tokens, grid).unwrap();
    assert!(largest_difference(&back, &latents) == 0.0);

    let odd = latents.narrow(2, 0, 3).unwrap();
    assert!(matches!(tokens_from_latents(&odd), Err(Error::Request(_))));
    let other = Grid { height: 2, width: 2 };
    assert!(matches!(latents_from_tokens(&tokens, other), Err(Error::Request(_))));
}

// ---- the transformer ----

fn grids(reference: &Reference) -> Vec<Grid> {
    let shapes: Vec<[usize; 3]> =
        serde_json::from_value(reference.facts["dit.img_shapes"].clone()).unwrap();
    shapes.iter().map(|&[_, height, width]| Grid { height, width }).collect()
}

fn conditioning(reference: &Reference) -> Conditioning {
    Conditioning { hidden_states: reference.tensor("dit.encoder_hidden_states").clone() }
}

#[test]
fn the_transformer_equals_the_reference() {
    for reference in Reference::all() {
        let model = Transformer::load(&files(&reference), &Precision::reference()).unwrap();
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let cancel = CancelToken::new();
        let contexts = model.contexts(&[0.999, 0.37], &cancel).unwrap();
        for (time, context) in ["0.999", "0.37"].into_iter().zip(&contexts) {
            let name = format!("{}: dit.out.{time}", reference.name());
            let expected = reference.tensor(&format!("dit.out.{time}"));
            let all = model.forward(&input, context, Outputs::All, &cancel).unwrap();
            assert_close(&name, &all, expected, Tolerance::Relative(1e-5));
            // Leaving out what a pipeline does not use changes nothing else.
            let target = model.forward(&input, context, Outputs::Target, &cancel).unwrap();
            let part = all.narrow(1, 0, grids[0].tokens()).unwrap();
            assert_close(&name, &target, &part, Tolerance::Relative(1e-6));
            // Neither does computing the modulation of one step alone.
            let alone = model.contexts(&[time.parse().unwrap()], &cancel).unwrap();
            let alone = model.forward(&input, &alone[0], Outputs::All, &cancel).unwrap();
            assert_close(&name, &alone, &all, Tolerance::Relative(1e-6));
        }
    }
}

#[test]
fn quantized_storage_stays_near_the_reference() {
    for reference in Reference::all() {
        let precision = Precision { storage: Storage::Q8_0, ..Precision::reference() };
        let model = Transformer::load(&files(&reference), &precision).unwrap();
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let context = &model.contexts(&[0.37], &CancelToken::new()).unwrap()[0];
        let out = model.forward(&input, context, Outputs::All, &CancelToken::new()).unwrap();
        let expected = reference.tensor("dit.out.0.37");
        assert_close(reference.name(), &out, expected, Tolerance::Relative(0.05));
    }
}

#[test]
fn tokens_that_do_not_fit_are_refused() {
    let reference = Reference::open("tiny-qwen-edit");
    let model = Transformer::load(&files(&reference), &Precision::reference()).unwrap();
    let (grids, conditioning) = (grids(&reference), conditioning(&reference));
    let tokens = reference.tensor("dit.hidden_states");
    let cancel = CancelToken::new();
    let context = &model.contexts(&[0.5], &cancel).unwrap()[0];
    let fault = |tokens: &Tensor, grids: &[Grid], conditioning: &Conditioning| {
        let input = ModelInput { tokens, grids, conditioning };
        match model.forward(&input, context, Outputs::Target, &cancel).unwrap_err() {
            Error::Request(RequestError::Field { field, .. }) => field,
            other => panic!("{other}"),
        }
    };
    assert_eq!(fault(tokens, &grids[..1], &conditioning), "latents");
    assert_eq!(fault(&tokens.narrow(2, 0, 32).unwrap(), &grids, &conditioning), "latents");
    assert_eq!(fault(&tokens.narrow(1, 0, 0).unwrap(), &[], &conditioning), "latents");
    let states = |shape: (usize, usize, usize)| Conditioning {
        hidden_states: Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap(),
    };
    assert_eq!(fault(tokens, &grids, &states((1, 9, 65))), "conditioning");
    assert_eq!(fault(tokens, &grids, &states((1, 0, 64))), "conditioning");
    assert_eq!(fault(tokens, &grids, &states((2, 9, 64))), "conditioning");
    assert_eq!(fault(tokens, &grids, &states((1, 5000, 64))), "prompt");
}

// ---- the autoencoder ----

/// `x · std + mean`, the autoencoder's own latents.
fn denormalised(autoencoder: &Autoencoder, x: &Tensor) -> Tensor {
    let statistic = |values: &[f64]| {
        let values = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        values.reshape((1, values.elem_count(), 1, 1)).unwrap()
    };
    let config = autoencoder.config();
    let x = x.broadcast_mul(&statistic(&config.latents_std)).unwrap();
    x.broadcast_add(&statistic(&config.latents_mean)).unwrap()
}

fn normalised(autoencoder: &Autoencoder, x: &Tensor) -> Tensor {
    let zero = denormalised(autoencoder, &x.zeros_like().unwrap());
    let one = denormalised(autoencoder, &x.ones_like().unwrap());
    ((x - &zero).unwrap() / (one - zero).unwrap()).unwrap()
}

#[test]
fn the_autoencoder_equals_the_three_dimensional_reference() {
    for reference in Reference::all() {
        let autoencoder = Autoencoder::load(&files(&reference), &Precision::reference()).unwrap();
        let cancel = CancelToken::new();
        let picture = reference.tensor("vae.image").squeeze(2).unwrap();
        let mean = reference.tensor("vae.mean").squeeze(2).unwrap();
        let latents = autoencoder.encode(&picture, &Tiling::default(), &cancel).unwrap();
        let found = denormalised(&autoencoder, &latents);
        assert_close(reference.name(), &found, &mean, Tolerance::Relative(1e-5));
        let latents = normalised(&autoencoder, &mean);
        let decoded = autoencoder.decode(&latents, &Tiling::default(), &cancel).unwrap();
        let expected = reference.tensor("vae.decoded").squeeze(2).unwrap();
        assert_close(reference.name(), &decoded, &expected, Tolerance::Relative(1e-5));
    }
}

/// Tiles that share twice as much as the layers see equal the whole; with less, errors appear where
/// tiles meet. Random weights carry them further than trained ones do.
#[test]
fn tiles_equal_the_whole() {
    for name in ["tiny-qwen-plus", "edit-23"] {
        let reference = Reference::open(name);
        let autoencoder = Autoencoder::load(&files(&reference), &Precision::reference()).unwrap();
        let cancel = CancelToken::new();
        let picture = smooth_picture(400, 320);
        let whole = autoencoder.encode(&picture, &Tiling::OFF, &cancel).unwrap();
        let decoded = autoencoder.decode(&whole, &Tiling::OFF, &cancel).unwrap();
        let exact_px = autoencoder.exact_overlap_px();
        // Tile, overlap, and the largest and the mean difference allowed.
        for (tile_px, overlap_px, largest, mean) in
            [(2 * exact_px, exact_px, 1e-5, 1e-6), (160, 80, 0.05, 1e-3), (128, 32, 1.0, 2e-2)]
        {
            let tiling = Tiling { above_pixels: 0, tile_px, overlap_px };
            let latents = autoencoder.encode(&picture, &tiling, &cancel).unwrap();
            let again = autoencoder.decode(&whole, &tiling, &cancel).unwrap();
            for (tiled, whole) in [(&latents, &whole), (&again, &decoded)] {
                let found = largest_difference(tiled, whole);
                let average = (tiled - whole).unwrap().abs().unwrap().mean_all().unwrap();
                let average = f64::from(average.to_scalar::<f32>().unwrap());
                assert!(
                    found <= largest && average <= mean,
                    "{name}, tiles of {tile_px} px sharing {overlap_px} px: {found:e}, {average:e}"
                );
            }
        }
        // Up to the threshold nothing is tiled.
        let tiling = Tiling { above_pixels: 400 * 320, tile_px: 64, overlap_px: 0 };
        assert!(!tiling.applies(400, 320) && tiling.applies(400, 328));
        let latents = autoencoder.encode(&picture, &tiling, &cancel).unwrap();
        assert!(largest_difference(&latents, &whole) == 0.0);
    }
}

/// A picture with slow and fast changes, from −1 to 1.
fn smooth_picture(height: usize, width: usize) -> Tensor {
    let value = |c: usize, y: usize, x: usize| {
        let (c, y, x) = (c as f32, y as f32, x as f32);
        0.6 * (x / 23.0 + c).sin() * (y / 31.0 - c).cos() + 0.4 * (x * y / 97.0).sin()
    };
    let values: Vec<f32> = (0..3)
        .flat_map(|c| (0..height).flat_map(move |y| (0..width).map(move |x| value(c, y, x))))
        .collect();
    Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu).unwrap()
}

#[test]
fn pictures_and_latents_that_do_not_fit_are_refused() {
    let reference = Reference::open("tiny-qwen-edit");
    let autoencoder = Autoencoder::load(&files(&reference), &Precision::reference()).unwrap();
    let cancel = CancelToken::new();
    let zeros = |shape: [usize; 4]| Tensor::zeros(&shape, DType::F32, &Device::Cpu).unwrap();
    for shape in [[1, 3, 33, 32], [1, 3, 32, 36], [1, 4, 32, 32], [1, 3, 0, 32]] {
        let error = autoencoder.encode(&zeros(shape), &Tiling::OFF, &cancel).unwrap_err();
        let expected = RequestError::Field {
            field: "picture",
            found: format!("{} channels, {} × {}", shape[1], shape[3], shape[2]),
            expected: "3 channels, sides a multiple of 8".to_owned(),
        };
        assert!(matches!(&error, Error::Request(found) if *found == expected), "{error}");
    }
    for shape in [[1, 15, 4, 4], [1, 16, 0, 4]] {
        let error = autoencoder.decode(&zeros(shape), &Tiling::OFF, &cancel).unwrap_err();
        assert!(
            matches!(error, Error::Request(RequestError::Field { field: "latents", .. })),
            "{error}"
        );
    }
    cancel.cancel();
    let picture = zeros([1, 3, 32, 32]);
    let error = autoencoder.encode(&picture, &Tiling::OFF, &cancel).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let error = autoencoder.decode(&zeros([1, 16, 4, 4]), &Tiling::OFF, &cancel).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
}

// ---- the loop ----

/// What goes into a recorded run of a pipeline, and the run's own facts.
struct Run {
    name: String,
    reference: Reference,
    tag: &'static str,
    inputs: Tensors,
}

impl Run {
    fn open(checkpoint: &str, tag: &'static str) -> Self {
        let name = format!("{checkpoint}-{tag}");
        let inputs = tensors(&format!("loop-{name}.safetensors"));
        Self { name, reference: Reference::open(checkpoint), tag, inputs }
    }

    fn fact(&self, field: &str) -> &serde_json::Value {
        &self.reference.facts[self.tag][field]
    }

    fn number(&self, field: &str) -> u64 {
        self.fact(field).as_u64().unwrap()
    }

    fn grids(&self) -> Vec<Grid> {
        let rows = self.inputs["grids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        rows.iter()
            .map(|row| Grid {
                height: usize::try_from(row[0]).unwrap(),
                width: usize::try_from(row[1]).unwrap(),
            })
            .collect()
    }

    fn conditioning(&self, name: &str) -> Option<Conditioning> {
        Some(Conditioning { hidden_states: self.inputs.get(name)?.clone() })
    }
}

#[test]
fn the_loop_equals_the_pipeline() {
    for (checkpoint, tag) in
        [("tiny-qwen-2511", "pipe.two"), ("edit-23", "pipe.cfg"), ("tiny-qwen-plus", "pipe.nocfg")]
    {
        let run = Run::open(checkpoint, tag);
        let model = DiffusionModel::load(&files(&run.reference), &Precision::reference()).unwrap();
        let (grids, cancel) = (run.grids(), CancelToken::new());
        let height = usize::try_from(run.number("height")).unwrap();
        let width = usize::try_from(run.number("width")).unwrap();
        assert_eq!(model.grid(height, width).unwrap(), grids[0], "{}", run.name);
        let noise = model.initial_noise(NoiseSource::Cpu, run.number("seed"), grids[0]).unwrap();
        assert_close(&run.name, &noise, &run.inputs["noise"], Tolerance::Absolute(1e-6));

        let steps = usize::try_from(run.number("steps")).unwrap();
        let schedule = model.schedule().schedule(steps, grids[0].tokens()).unwrap();
        let positive = run.conditioning("positive").unwrap();
        let negative = run.conditioning("negative");
        assert_eq!(negative.is_some(), tag != "pipe.nocfg");
        let denoise = Denoise {
            noise: &noise,
            references: Some(&run.inputs["references"]),
            grids: &grids,
            positive: &positive,
            negative: negative.as_ref(),
            cfg_scale: run.fact("true_cfg_scale").as_f64().unwrap(),
            schedule: &schedule,
        };
        let heard = RefCell::new(Vec::new());
        let observer = |event: &Event<'_>| match event {
            Event::Step { stage: Stage::Denoise, step, of, .. } => {
                heard.borrow_mut().push((*step, *of));
            }
            Event::StageDone { stage: Stage::Denoise, .. } => {
                heard.borrow_mut().push((steps, steps));
            }
            other => panic!("{other:?}"),
        };
        let mut recorded = 0;
        let mut record = |step: usize, latents: &Tensor| {
            let name = format!("{tag}.latents.{step}");
            assert_close(&name, latents, run.reference.tensor(&name), Tolerance::Relative(1e-4));
            recorded += 1;
        };
        let latents = denoise.run(model.transformer(), &observer, &cancel, &mut record).unwrap();
        assert_eq!(recorded, steps);
        assert_eq!(heard.into_inner(), (0..=steps).map(|i| (i, steps)).collect::<Vec<_>>());

        let picture = model.picture(&latents, grids[0], &Tiling::default(), &cancel).unwrap();
        let picture = ((picture + 1.0).unwrap() / 2.0).unwrap(); // to the pipeline's [0, 1]
        let expected = run.reference.tensor(&format!("{tag}.image"));
        assert_close(&run.name, &picture, expected, Tolerance::Relative(1e-4));
    }
}

#[test]
fn a_negative_prompt_counts_only_with_a_scale_above_one() {
    let run = Run::open("edit-23", "pipe.cfg");
    let files = files(&run.reference);
    let model = Transformer::load(&files, &Precision::reference()).unwrap();
    let schedule = ScheduleConfig::load(&files).unwrap().schedule(2, 32).unwrap();
    let (positive, negative) = (run.conditioning("positive"), run.conditioning("negative"));
    let latents = |negative: Option<&Conditioning>, cfg_scale: f64| {
        let denoise = Denoise {
            noise: &run.inputs["noise"],
            references: Some(&run.inputs["references"]),
            grids: &run.grids(),
            positive: positive.as_ref().unwrap(),
            negative,
            cfg_scale,
            schedule: &schedule,
        };
        denoise.run(&model, &(), &CancelToken::new(), &mut |_, _| {}).unwrap()
    };
    let plain = latents(None, 4.0);
    assert!(largest_difference(&plain, &latents(negative.as_ref(), 1.0)) == 0.0);
    assert!(largest_difference(&plain, &latents(negative.as_ref(), 4.0)) > 1e-3);
}

#[test]
fn cancelling_stops_within_a_step() {
    let run = Run::open("tiny-qwen-2511", "pipe.two");
    let files = files(&run.reference);
    let model = Transformer::load(&files, &Precision::reference()).unwrap();
    let schedule = ScheduleConfig::load(&files).unwrap().schedule(20, 32).unwrap();
    let cancel = CancelToken::new();
    let positive = run.conditioning("positive").unwrap();
    let denoise = Denoise {
        noise: &run.inputs["noise"],
        references: Some(&run.inputs["references"]),
        grids: &run.grids(),
        positive: &positive,
        negative: None,
        cfg_scale: 1.0,
        schedule: &schedule,
    };
    // Cancelled as the third step begins: the step is not finished.
    let observer = |event: &Event<'_>| {
        if matches!(event, Event::Step { step: 2, .. }) {
            cancel.cancel();
        }
    };
    let mut finished = 0;
    let error = denoise.run(&model, &observer, &cancel, &mut |_, _| finished += 1).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert_eq!(finished, 2);
}

#[test]
fn noise_that_does_not_fit_and_values_that_are_not_finite_are_refused() {
    let run = Run::open("edit-23", "pipe.cfg");
    let files = files(&run.reference);
    let model = Transformer::load(&files, &Precision::reference()).unwrap();
    let schedule = ScheduleConfig::load(&files).unwrap().schedule(2, 32).unwrap();
    let positive = run.conditioning("positive").unwrap();
    let grids = run.grids();
    let fault = |noise: &Tensor, cfg_scale: f64| {
        let denoise = Denoise {
            noise,
            references: Some(&run.inputs["references"]),
            grids: &grids,
            positive: &positive,
            negative: None,
            cfg_scale,
            schedule: &schedule,
        };
        denoise.run(&model, &(), &CancelToken::new(), &mut |_, _| {}).unwrap_err()
    };
    let noise = &run.inputs["noise"];
    let short = fault(&noise.narrow(1, 1, grids[0].tokens() - 1).unwrap(), 1.0);
    assert!(matches!(short, Error::Request(RequestError::Field { field: "noise", .. })), "{short}");
    let scale = fault(noise, f64::NAN);
    assert!(matches!(scale, Error::Request(RequestError::Field { field: "cfg-scale", .. })));
    let broken = (noise * f64::INFINITY).unwrap();
    let error = fault(&broken, 1.0);
    let total = noise.elem_count();
    assert!(
        matches!(error, Error::NotFinite { count, total: found, .. } if count > 0 && found == total),
        "{error}"
    );
}

// ---- damaged folders ----

/// A copy of a checkpoint's diffusion parts that a test may damage.
struct Copy(tempfile::TempDir);

impl Copy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Reference::open("tiny-qwen-edit").folder;
        for part in ["transformer", "vae", "scheduler"] {
            fs_err::create_dir(folder.path().join(part)).unwrap();
            for entry in fs_err::read_dir(source.join(part)).unwrap() {
                let entry = entry.unwrap();
                fs_err::copy(entry.path(), folder.path().join(part).join(entry.file_name()))
                    .unwrap();
            }
        }
        Self(folder)
    }

    fn set(self, file: &str, field: &str, value: serde_json::Value) -> Self {
        let path = self.0.path().join(file);
        let text = fs_err::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config[field] = value;
        fs_err::write(&path, config.to_string()).unwrap();
        self
    }

    fn change_tensors(self, part: &str, change: impl FnOnce(&mut Tensors)) -> Self {
        let path = self.0.path().join(part).join("diffusion_pytorch_model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        self
    }

    fn load(&self) -> pentimento::Result<DiffusionModel> {
        let files = ModelFiles::Folder(self.0.path().to_owned());
        DiffusionModel::load(&files, &Precision::reference())
    }

    #[track_caller]
    fn fault(&self) -> ModelError {
        match self.load() {
            Err(Error::Model(error)) => error,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("the damage was not seen"),
        }
    }
}

#[test]
fn configs_that_do_not_fit_are_refused_with_the_field() {
    let (transformer, vae) = ("transformer/config.json", "vae/config.json");
    for (file, field, value) in [
        (transformer, "guidance_embeds", serde_json::json!(true)),
        (transformer, "use_additional_t_cond", serde_json::json!(true)),
        (transformer, "use_layer3d_rope", serde_json::json!(true)),
        (transformer, "axes_dims_rope", serde_json::json!([4, 6, 8])),
        (transformer, "axes_dims_rope", serde_json::json!([5, 5, 6])),
        (transformer, "axes_dims_rope", serde_json::json!([16])),
        (transformer, "patch_size", serde_json::json!(1)),
        (transformer, "out_channels", serde_json::json!(null)),
        (transformer, "out_channels", serde_json::json!(32)),
        (transformer, "num_layers", serde_json::json!(0)),
        (transformer, "num_attention_heads", serde_json::json!(usize::MAX)),
        (transformer, "window_size", serde_json::json!(8)),
        (vae, "attn_scales", serde_json::json!([0.5])),
        (vae, "dim_mult", serde_json::json!([1])),
        (vae, "temperal_downsample", serde_json::json!([true])),
        (vae, "latents_mean", serde_json::json!([0.0])),
        (vae, "latents_std", serde_json::json!(vec![0.0; 16])),
        (vae, "input_channels", serde_json::json!(4)),
        (vae, "base_dim", serde_json::json!(0)),
        (vae, "scale_factor_spatial", serde_json::json!(16)),
    ] {
        match Copy::new().set(file, field, value.clone()).fault() {
            ModelError::Config { path, field: found, .. } => {
                assert_eq!(found, field);
                assert!(path.ends_with(file), "{path}");
            }
            other => panic!("{field} = {value}: {other}"),
        }
    }
    for (file, class) in
        [(transformer, "FluxTransformer2DModel"), (vae, "AutoencoderKL"), (vae, "AutoencoderKLWan")]
    {
        let error = Copy::new().set(file, "_class_name", serde_json::json!(class)).fault();
        assert!(matches!(&error, ModelError::Kind { found, .. } if found == class), "{error}");
    }
    // Older files carry a width that nothing uses.
    Copy::new().set(transformer, "pooled_projection_dim", 768.into()).load().unwrap();
}

#[test]
fn parts_of_different_models_are_refused() {
    let mut copy = Copy::new();
    for (field, value) in [("in_channels", 32), ("out_channels", 8)] {
        copy = copy.set("transformer/config.json", field, value.into());
    }
    let copy = copy.change_tensors("transformer", |tensors| {
        for name in ["img_in.weight", "proj_out.weight", "proj_out.bias"] {
            let axis = usize::from(name == "img_in.weight");
            let half = tensors[name].narrow(axis, 0, 32).unwrap().contiguous().unwrap();
            tensors.insert(name.to_owned(), half);
        }
    });
    let error = copy.fault();
    assert!(matches!(&error, ModelError::Config { field, .. } if field == "z_dim"), "{error}");
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_their_names() {
    let name = "transformer_blocks.1.attn.to_k.weight";
    let copy = Copy::new().change_tensors("transformer", |tensors| {
        tensors.remove(name).unwrap();
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::TensorMissing { tensor, .. } if tensor == name),
        "{error}"
    );

    let copy = Copy::new().change_tensors("transformer", |tensors| {
        let narrow = tensors[name].narrow(0, 0, 8).unwrap();
        tensors.insert(name.to_owned(), narrow);
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::TensorShape { tensor, found, .. } if tensor == name && found[0] == 8),
        "{error}"
    );

    for (part, extra) in [("transformer", "extra.weight"), ("vae", "encoder.extra.weight")] {
        let copy = Copy::new().change_tensors(part, |tensors| {
            tensors.insert(extra.to_owned(), vector(&[1.0]));
        });
        let error = copy.fault();
        assert!(
            matches!(&error, ModelError::TensorsUnused { names, .. } if names == extra),
            "{error}"
        );
    }

    let kernel = "decoder.up_blocks.0.resnets.0.conv1.weight";
    let copy = Copy::new().change_tensors("vae", |tensors| {
        let flat = tensors[kernel].narrow(2, 2, 1).unwrap().contiguous().unwrap();
        tensors.insert(kernel.to_owned(), flat);
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::TensorShape { tensor, .. } if tensor == kernel),
        "{error}"
    );
}

#[test]
fn models_that_look_alike_are_refused_by_name() {
    for (tensor, model) in [
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
        ("transformer_blocks.0.img_mlp.w1.weight", "Boogu"),
        ("single_transformer_blocks.0.attn.to_q.weight", "FLUX"),
        ("transformer_blocks.0.img_mlp.gate_up.weight", "Qwen-Image-2.1"),
        ("transformer_blocks.0.img_mlp.gate_layer.weight", "Qwen-Image-2.1"),
    ] {
        let copy = Copy::new().change_tensors("transformer", |tensors| {
            tensors.insert(format!("model.diffusion_model.{tensor}"), vector(&[0.0]));
        });
        let error = copy.fault();
        assert!(
            matches!(&error, ModelError::Kind { found, .. } if found.starts_with(model)),
            "{error}"
        );
    }
    let copy = Copy::new().change_tensors("transformer", |tensors| {
        let wide = Tensor::zeros((48, 128), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("img_in.weight".to_owned(), wide);
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::Kind { found, .. } if found.starts_with("Mage")),
        "{error}"
    );
}

#[test]
fn names_with_a_prefix_and_the_mark_of_2511_are_understood() {
    let output = |model: &DiffusionModel| {
        let reference = Reference::open("tiny-qwen-edit");
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let context = &model.transformer().contexts(&[0.37], &CancelToken::new()).unwrap()[0];
        model.transformer().forward(&input, context, Outputs::All, &CancelToken::new()).unwrap()
    };
    let plain = output(&Copy::new().load().unwrap());
    for prefix in ["transformer.", "diffusion_model.", "model.diffusion_model."] {
        let copy = Copy::new().change_tensors("transformer", |tensors| {
            *tensors = tensors.drain().map(|(name, x)| (format!("{prefix}{name}"), x)).collect();
        });
        assert!(largest_difference(&plain, &output(&copy.load().unwrap())) == 0.0, "{prefix}");
    }
    let marked = Copy::new().change_tensors("transformer", |tensors| {
        tensors.insert("__index_timestep_zero__".to_owned(), vector(&[0.0]));
    });
    let marked = marked.load().unwrap();
    assert!(marked.transformer().config().zero_cond_t);
    assert!(largest_difference(&plain, &output(&marked)) > 1e-3);
}

#[test]
fn not_a_number_in_the_weights_is_an_error() {
    let run = Run::open("edit-23", "pipe.cfg");
    let copy = Copy::new().change_tensors("transformer", |tensors| {
        let name = "transformer_blocks.2.img_mlp.net.2.bias";
        let nan = (&tensors[name] * f64::NAN).unwrap();
        tensors.insert(name.to_owned(), nan);
    });
    let model = copy.load().unwrap();
    let positive = run.conditioning("positive").unwrap();
    let grids = run.grids();
    let schedule = model.schedule().schedule(8, grids[0].tokens()).unwrap();
    let denoise = Denoise {
        noise: &run.inputs["noise"],
        references: Some(&run.inputs["references"]),
        grids: &grids,
        positive: &positive,
        negative: None,
        cfg_scale: 1.0,
        schedule: &schedule,
    };
    let mut finished = 0;
    let error = denoise
        .run(model.transformer(), &(), &CancelToken::new(), &mut |_, _| finished += 1)
        .unwrap_err();
    assert!(matches!(error, Error::NotFinite { stage: "denoising", .. }), "{error}");
    assert_eq!(finished, 0, "the first step must tell");
}
