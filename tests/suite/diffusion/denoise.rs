//! The denoising loop equals the pipeline's.

use std::cell::RefCell;

use candle_core::Tensor;
use pentimento::{
    CancelToken, Error, Event, RequestError, Stage,
    diffusion::{
        Conditioning, Denoise, Denoised, DiffusionModel, GuidancePass, Residency, StepCache,
        StepRecording, Transformer,
        noise::NoiseSource,
        qwen_image::{Branch, ModelInput, Outputs},
        schedule::ScheduleConfig,
        vae::Tiling,
    },
    weights::Precision,
};

use super::{Run, files, largest_difference};
use crate::common::{Tolerance, assert_close};

/// Checkpoints, pipelines that their reference has, and how guidance goes through the blocks.
const PIPELINES: [(&str, &str, GuidancePass); 5] = [
    ("tiny-qwen-2511", "pipe.two", GuidancePass::InTurn),
    ("tiny-qwen-2511", "pipe.two", GuidancePass::OneBatch),
    ("edit-23", "pipe.cfg", GuidancePass::InTurn),
    ("edit-23", "pipe.cfg", GuidancePass::OneBatch),
    ("tiny-qwen-plus", "pipe.nocfg", GuidancePass::InTurn),
];

#[test]
fn the_loop_equals_the_pipeline() {
    for (checkpoint, tag, guidance) in PIPELINES {
        let run = Run::open(checkpoint, tag);
        let model = DiffusionModel::load(&files(&run.reference), &Precision::reference()).unwrap();
        model.transformer().set_guidance(guidance);
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
        assert_eq!(heard.into_inner(), (0..steps).map(|i| (i, steps)).collect::<Vec<_>>());

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

/// More steps than are prepared together.
#[test]
fn preparing_steps_together_changes_nothing() {
    let run = Run::open("tiny-qwen-2511", "pipe.two");
    let files = files(&run.reference);
    let model = Transformer::load(&files, &Precision::reference()).unwrap();
    let schedule = ScheduleConfig::load(&files).unwrap().schedule(10, 32).unwrap();
    let (grids, cancel) = (run.grids(), CancelToken::new());
    let (noise, references) = (&run.inputs["noise"], &run.inputs["references"]);
    let conditioning = run.conditioning("positive").unwrap();
    let mut latents = noise.clone();
    for (step, time) in schedule.timesteps().iter().enumerate() {
        let context = &model.contexts(&[time / 1000.0], &cancel).unwrap()[0];
        let tokens = &Tensor::cat(&[&latents, references], 1).unwrap();
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let velocity = model.forward(&input, context, Outputs::All, &cancel).unwrap();
        let velocity = velocity.narrow(1, 0, grids[0].tokens()).unwrap();
        latents = schedule.advance(step, &latents, &velocity).unwrap();
    }
    let denoise = Denoise {
        noise,
        references: Some(references),
        grids: &grids,
        positive: &conditioning,
        negative: None,
        cfg_scale: 1.0,
        schedule: &schedule,
    };
    let together = denoise.run(&model, &(), &cancel, &mut |_, _| {}).unwrap();
    assert_close("together", &together, &latents, Tolerance::Relative(1e-5));
}

/// A CPU records nothing, but computes at the fixed places that a recording has: more steps than are prepared
/// together, with other modulation in each.
#[test]
fn steps_at_fixed_places_are_the_same_bit_for_bit() {
    for (checkpoint, tag, guidance) in PIPELINES {
        let run = Run::open(checkpoint, tag);
        let files = files(&run.reference);
        let model = Transformer::load(&files, &Precision::reference()).unwrap();
        model.set_guidance(guidance);
        let (grids, cancel) = (run.grids(), CancelToken::new());
        let (positive, negative) =
            (run.conditioning("positive").unwrap(), run.conditioning("negative"));
        let schedule = ScheduleConfig::load(&files).unwrap();
        let denoised = |recording: StepRecording, steps: usize| {
            model.set_step_recording(recording);
            let denoise = Denoise {
                noise: &run.inputs["noise"],
                references: Some(&run.inputs["references"]),
                grids: &grids,
                positive: &positive,
                negative: negative.as_ref(),
                cfg_scale: 3.0,
                schedule: &schedule.schedule(steps, grids[0].tokens()).unwrap(),
            };
            let mut after = Vec::new();
            let mut record = |_, latents: &Tensor| after.push(latents.clone());
            let done = denoise.run_cached(&model, None, &(), &cancel, &mut record).unwrap();
            assert_eq!(done.host.len(), steps);
            (after, done)
        };
        let steps = 10;
        let (single, plain) = denoised(StepRecording::OnDevice, steps);
        assert!(plain.recorded.is_none() && plain.unrecorded.is_some(), "on a CPU");
        let (whole, rehearsed) = denoised(StepRecording::Rehearsed, steps);
        let told = rehearsed.recorded.unwrap();
        assert_eq!((told.steps, rehearsed.unrecorded), (steps - 1, None), "{}", run.name);
        for (single, whole) in single.iter().zip(&whole) {
            assert!(largest_difference(single, whole) == 0.0, "{}", run.name);
        }
        assert!(largest_difference(&rehearsed.latents, &plain.latents) == 0.0);
        // One step more would not pay.
        let (_, short) = denoised(StepRecording::Rehearsed, 2);
        assert!(short.recorded.is_none() && short.unrecorded.is_some());
    }
}

#[test]
fn cancelling_stops_within_a_step() {
    let run = Run::open("tiny-qwen-2511", "pipe.two");
    let files = files(&run.reference);
    let model = Transformer::load(&files, &Precision::reference()).unwrap();
    let schedule = ScheduleConfig::load(&files).unwrap().schedule(20, 32).unwrap();
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
    for recording in [StepRecording::Off, StepRecording::Rehearsed] {
        model.set_step_recording(recording);
        let cancel = CancelToken::new();
        // Cancelled as the third step begins: the step is not finished.
        let observer = |event: &Event<'_>| {
            if matches!(event, Event::Step { step: 2, .. }) {
                cancel.cancel();
            }
        };
        let mut finished = 0;
        let error = denoise.run(&model, &observer, &cancel, &mut |_, _| finished += 1).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{recording:?}: {error}");
        assert_eq!(finished, 2, "{recording:?}");
    }
}

#[test]
fn a_step_that_is_not_whole_is_not_recorded() {
    let run = Run::open("tiny-qwen-2511", "pipe.two");
    let model = Transformer::load(&files(&run.reference), &Precision::reference()).unwrap();
    model.set_step_recording(StepRecording::Rehearsed);
    let recorded = |cache| cached(&run, &model, 5, cache).recorded.is_some();
    assert!(recorded(None));
    let cache = Some(StepCache::new(0.1).unwrap());
    assert!(!recorded(cache), "a cache decides in the middle of a step");
    model.set_residency(Residency::Streamed { blocks: 1 });
    assert!(!recorded(None), "blocks are read anew in each step");
    // As many as there are, but not what modulates them.
    model.set_residency(Residency::Streamed { blocks: model.config().layers });
    assert!(!recorded(None), "projections are read between steps");
    model.set_residency(Residency::Resident);
    model.fill(&CancelToken::new()).unwrap();
    assert!(recorded(None));
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

/// Both predictions of a step go through the blocks together.
#[test]
fn guidance_in_one_pass_is_two_passes_bit_for_bit() {
    let run = Run::open("edit-23", "pipe.cfg");
    let model = Transformer::load(&files(&run.reference), &Precision::reference()).unwrap();
    let (positive, negative) =
        (run.conditioning("positive").unwrap(), run.conditioning("negative").unwrap());
    assert_ne!(positive.hidden_states.dims(), negative.hidden_states.dims(), "other lengths");
    let (grids, cancel) = (run.grids(), CancelToken::new());
    let tokens = Tensor::cat(&[&run.inputs["noise"], &run.inputs["references"]], 1).unwrap();
    let contexts = model.contexts(&[0.8], &cancel).unwrap();
    for outputs in [Outputs::Target, Outputs::All] {
        let input = |conditioning| ModelInput { tokens: &tokens, grids: &grids, conditioning };
        let alone = [&positive, &negative]
            .map(|of| model.forward(&input(of), &contexts[0], outputs, &cancel).unwrap());
        let mut branches =
            [&positive, &negative].map(|of| Branch { input: input(of), cache: None });
        let together = model.forward_each(&mut branches, &contexts[0], outputs, &cancel).unwrap();
        assert_eq!(together.len(), 2);
        for (together, alone) in together.iter().zip(&alone) {
            assert!(largest_difference(together, alone) == 0.0, "{outputs:?}");
        }
    }
}

/// A run of `steps` steps with a step cache, and the steps that it left out.
fn cached(run: &Run, model: &Transformer, steps: usize, cache: Option<StepCache>) -> Denoised {
    let tokens = run.grids()[0].tokens();
    let schedule = ScheduleConfig::load(&files(&run.reference)).unwrap();
    let (positive, negative) = (run.conditioning("positive"), run.conditioning("negative"));
    let denoise = Denoise {
        noise: &run.inputs["noise"],
        references: Some(&run.inputs["references"]),
        grids: &run.grids(),
        positive: positive.as_ref().unwrap(),
        negative: negative.as_ref(),
        cfg_scale: 3.0,
        schedule: &schedule.schedule(steps, tokens).unwrap(),
    };
    denoise.run_cached(model, cache, &(), &CancelToken::new(), &mut |_, _| {}).unwrap()
}

#[test]
fn a_step_cache_leaves_steps_out_and_is_off_unless_asked_for() {
    let run = Run::open("edit-23", "pipe.cfg");
    let model = Transformer::load(&files(&run.reference), &Precision::reference()).unwrap();
    let off = cached(&run, &model, 16, None);
    assert_eq!(off.reused, 0);
    // Nothing is below a threshold of nought: the arithmetic is the plain one, bit for bit.
    let never = cached(&run, &model, 16, Some(StepCache::new(0.0).unwrap()));
    assert_eq!(never.reused, 0);
    assert!(largest_difference(&off.latents, &never.latents) == 0.0);
    // Both predictions of a step count; steps 4 to 14 of 16 may be left out, three in a row.
    let always = cached(&run, &model, 16, Some(StepCache::new(1e9).unwrap()));
    assert_eq!(always.reused, 2 * 9, "4 5 6 _ 8 9 10 _ 12 13 14");
    let error = largest_difference(&off.latents, &always.latents);
    assert!(error > 1e-4, "the cache changed nothing");
    let some = cached(&run, &model, 16, Some(StepCache::new(1.0).unwrap()));
    assert!(some.reused > 0 && some.reused < always.reused, "{}", some.reused);
    assert!(largest_difference(&off.latents, &some.latents) <= error);
}
