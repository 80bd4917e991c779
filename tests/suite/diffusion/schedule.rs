//! Noise levels equal the scheduler's.

use pentimento::{
    Error, ModelError, RequestError, diffusion::schedule::ScheduleConfig, weights::ModelFiles,
};

use super::{Tensors, files, fixture, tensors, vector};
use crate::common::{Reference, Tolerance, assert_close};

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
    // The reference checkpoints have one scheduler, so its numbers are recorded once.
    let recorded = Reference::open("tiny-qwen-edit");
    for reference in Reference::all() {
        let config = ScheduleConfig::load(&files(&reference)).unwrap();
        for steps in [2, 4, 8, 30] {
            for tokens in [24, 256, 4096] {
                let schedule = config.schedule(steps, tokens).unwrap();
                let name = format!("sched.{steps}.{tokens}");
                let sigmas = recorded.tensor(&format!("{name}.sigmas"));
                let timesteps = recorded.tensor(&format!("{name}.timesteps"));
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

#[test]
fn a_step_moves_along_the_velocity() {
    let (_folder, files) = scheduler_folder(&serde_json::json!({}));
    let schedule = ScheduleConfig::load(&files).unwrap().schedule(4, 64).unwrap();
    let (latents, velocity) = (vector(&[1.0, -2.0]), vector(&[0.5, 4.0]));
    let next = schedule.advance(1, &latents, &velocity).unwrap(); // from 0.75 to 0.5
    assert_close("step", &next, &vector(&[0.875, -3.0]), Tolerance::Absolute(1e-6));
    let error = schedule.advance(4, &latents, &velocity).unwrap_err();
    assert!(matches!(error, Error::Request(RequestError::Field { field: "step", .. })), "{error}");
}
