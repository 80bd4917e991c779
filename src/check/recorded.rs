//! Steps of the denoising loop that are recorded and started as a whole: whether they compute what others do, bit
//! for bit, what they take of the host, and whether their memory is given back.

use std::time::Duration;

use candle_core::{Device, Tensor};

use super::{
    Options,
    host::{BF16, CASES, Case, Narrow, Seen, median},
    on_kernels,
    report::{Finding, Row},
    weights::Dimensions,
};
use crate::{
    diffusion::{GuidancePass, StepRecording, StepsRecorded},
    error::Result,
    memory,
};

const PART: &str = "recorded";
/// Layers of the narrow models: those of the published one.
const LAYERS: usize = 60;
/// What a recorded step may take of the host: the least of several, since others use the host as well.
const HOST_MS_MAX: f64 = 1.0;

/// Narrow models of full depth, of every kind. Others run beside it, so it takes no times.
pub(super) fn check(device: &Device, options: &Options) -> Vec<Row> {
    let layers = LAYERS.div_ceil(options.shrink);
    on_kernels(device, || {
        let rows = CASES.iter().flat_map(|case| {
            rows(case.name, || Narrow::new(device, options, case, layers), (device, false))
        });
        rows.collect()
    })
}

/// Models at the published dimensions, with times.
pub(super) fn large(device: &Device, options: &Options) -> Vec<Row> {
    let dims = Dimensions::new(options.shrink);
    let batch =
        Case { name: "guidance in one batch", guidance: Some(GuidancePass::OneBatch), ..BF16 };
    let cases = [Case { name: "published dimensions", ..BF16 }, batch];
    on_kernels(device, || {
        let of_case = |case: &Case| {
            let name = format!("{} layers, {}", dims.layers, case.name);
            let model = || Narrow::of(device, options, case, (dims, "recorded"));
            rows(&name, model, (device, true))
        };
        cases.iter().flat_map(of_case).collect()
    })
}

fn rows<'a>(
    name: &str,
    model: impl FnOnce() -> Result<Narrow<'a>>,
    (device, is_timed): (&Device, bool),
) -> Vec<Row> {
    findings(model, (device, is_timed))
        .unwrap_or_else(|error| vec![("the whole".into(), Finding::failed(&error))])
        .into_iter()
        .map(|(what, finding)| Row { part: PART.into(), name: format!("{name}: {what}"), finding })
        .collect()
}

type Findings = Vec<(String, Finding)>;

fn findings<'a>(
    model: impl FnOnce() -> Result<Narrow<'a>>,
    (device, is_timed): (&Device, bool),
) -> Result<Findings> {
    let model = model()?;
    if is_timed {
        // It chooses algorithms, which the others then have.
        model.run(StepRecording::Off)?;
    }
    let single = model.run(StepRecording::Off)?;
    let before = memory::recorded_bytes(device);
    let whole = model.run(recording(device))?;
    let mut found: Findings = vec![
        ("numbers that differ".into(), at_most(count(differing(&single, &whole)?), 0.0)),
        (
            "bytes of graphs that are not given back".into(),
            at_most(count(memory::recorded_bytes(device)), 0.0),
        ),
        ("bytes of graphs before".into(), at_most(count(before), 0.0)),
    ];
    let Some(told) = whole.denoised.recorded else {
        let why = whole.denoised.unrecorded.unwrap_or_default();
        found.push(("recorded steps".into(), Finding::Failed(why)));
        return Ok(found);
    };
    let missing = whole.latents.len().saturating_sub(1 + told.steps);
    found.push(("steps that are not recorded".into(), at_most(count(missing), 0.0)));
    if !is_timed {
        return Ok(found);
    }
    let host = |of: &Seen| median(of.denoised.host.iter().map(|took| took.as_secs_f64()));
    let step = |of: &Seen| median(of.seconds.iter().copied());
    let all = |of: &Seen| of.seconds.iter().sum::<f64>();
    if device.is_cuda() {
        let all: Vec<String> =
            whole.denoised.host.iter().map(|of| format!("{:.2}", of.as_secs_f64() * 1e3)).collect();
        let name = format!("ms of the host, the least of recorded steps ({})", all.join(", "));
        let least =
            whole.denoised.host.iter().skip(1).min().map_or(f64::NAN, Duration::as_secs_f64);
        found.push((name, at_most(least * 1e3, HOST_MS_MAX)));
    }
    let StepsRecorded { what, steps, .. } = told;
    let (mib, nodes, steps) = (count(what.bytes >> 20), count(what.nodes), count(steps));
    let seconds = |of: Duration| of.as_secs_f64();
    let recording = format!("recording {} kernels, {} nodes", what.kernels, what.nodes);
    let preparing = format!("preparing them, with {} bytes", told.early_bytes);
    let memory = format!("taking memory, {} MiB", what.bytes >> 20);
    found.extend([
        ("the host's part of a step, recorded".into(), timed(host(&whole), 1.0, "steps/s")),
        ("of it the start".into(), timed(seconds(told.starting) / steps, 1.0, "steps/s")),
        ("the host's part of a step, not recorded".into(), timed(host(&single), 1.0, "steps/s")),
        ("a step, recorded".into(), timed(step(&whole), 1.0, "steps/s")),
        ("a step, not recorded".into(), timed(step(&single), 1.0, "steps/s")),
        (
            "all steps, all but the first recorded".into(),
            timed(all(&whole), steps + 1.0, "steps/s"),
        ),
        ("all steps, none recorded".into(), timed(all(&single), steps + 1.0, "steps/s")),
        (recording, timed(seconds(told.recording), nodes, "nodes/s")),
        (preparing, timed(seconds(told.preparing), nodes, "nodes/s")),
        (memory, timed(seconds(told.taking_memory), mib, "MiB/s")),
    ]);
    Ok(found)
}

/// What can be checked here: on the CPU a rehearsal.
fn recording(device: &Device) -> StepRecording {
    if device.is_cuda() { StepRecording::OnDevice } else { StepRecording::Rehearsed }
}

/// Numbers of the latents after each step that are not the same, bit for bit.
fn differing(one: &Seen, other: &Seen) -> Result<usize> {
    let bits = |of: &Tensor| -> Result<Vec<u32>> {
        let numbers = of.flatten_all()?.to_vec1::<f32>()?;
        Ok(numbers.into_iter().map(f32::to_bits).collect())
    };
    let mut differing = one.latents.len().abs_diff(other.latents.len());
    for (one, other) in one.latents.iter().zip(&other.latents) {
        let (one, other) = (bits(one)?, bits(other)?);
        differing += one.iter().zip(&other).filter(|(one, other)| one != other).count();
    }
    Ok(differing)
}

#[expect(clippy::cast_precision_loss, reason = "a small number")]
fn count<T: TryInto<u64>>(number: T) -> f64 {
    number.try_into().map_or(f64::NAN, |number| number as f64)
}

fn at_most(value: f64, limit: f64) -> Finding {
    Finding::Checked { value, limit }
}

fn timed(seconds: f64, amount: f64, unit: &'static str) -> Finding {
    Finding::Timed { seconds, rate: amount / seconds, unit: unit.into() }
}
