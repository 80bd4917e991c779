//! What a step of the denoising loop asks of the host: a model of full depth and few numbers a token, which keeps a
//! device waiting.
//!
//! Each step is a range for a profiler. `scripts/cuda-host-work.sh` runs this part on a driver that only counts, and
//! so sees every call of a step; the difference between two depths is what a layer takes.

use std::{cell::RefCell, path::Path, time::Instant};

use candle_core::{DType, Device, Tensor};

use super::{
    Options, on_kernels,
    report::{Finding, Row},
    weights::{self, Dimensions, Matrices},
};
use crate::{
    diffusion::{
        Conditioning, Denoise, Grid, GuidancePass, Transformer,
        schedule::{Schedule, ScheduleConfig},
    },
    error::Result,
    progress::{CancelToken, Event},
    weights::{ModelFiles, Precision, Storage},
};

const PART: &str = "host";
/// Layers of the two models that are compared.
const LAYERS: [usize; 2] = [4, 24];
/// The first one warms up, and the first and the last read numbers back to see whether they are finite.
const STEPS: usize = 6;
/// A 1024 × 1024 picture and a reference of the same size.
const SIDE: usize = 64;
/// Tokens of the request, and of what to stay away from.
const TEXT: [usize; 2] = [512, 384];

/// What a model is, and how it is run.
struct Case {
    name: &'static str,
    matrices: Matrices,
    storage: Storage,
    float8_products: bool,
    /// Whether references are modulated as free of noise.
    zero_cond: bool,
    guidance: Option<GuidancePass>,
}

const BF16: Case = Case {
    name: "bf16",
    matrices: Matrices::Bf16,
    storage: Storage::Compute,
    float8_products: false,
    zero_cond: false,
    guidance: None,
};
const CASES: [Case; 9] = [
    BF16,
    Case { name: "bf16, guidance in turn", guidance: Some(GuidancePass::InTurn), ..BF16 },
    Case { name: "bf16, guidance in one batch", guidance: Some(GuidancePass::OneBatch), ..BF16 },
    Case { name: "bf16, references free of noise", zero_cond: true, ..BF16 },
    Case {
        name: "bf16, references free of noise, guidance in one batch",
        zero_cond: true,
        guidance: Some(GuidancePass::OneBatch),
        ..BF16
    },
    Case { name: "Q8_0", storage: Storage::Q8_0, ..BF16 },
    Case { name: "Q4_K", storage: Storage::Q4K, ..BF16 },
    Case { name: "fp8 widened", matrices: Matrices::Float8, ..BF16 },
    Case { name: "fp8", matrices: Matrices::Float8, float8_products: true, ..BF16 },
];

pub(super) fn steps(device: &Device, options: &Options) -> Vec<Row> {
    on_kernels(device, || {
        CASES
            .iter()
            .flat_map(|case| {
                LAYERS.map(|layers| row(device, options, case, layers.div_ceil(options.shrink)))
            })
            .collect()
    })
}

fn row(device: &Device, options: &Options, case: &Case, layers: usize) -> Row {
    let finding = match median_step(device, options, case, layers) {
        Ok(seconds) => Finding::Timed { seconds, rate: 1.0 / seconds, unit: "steps/s".into() },
        Err(error) => Finding::failed(&error),
    };
    Row { part: PART.into(), name: format!("{layers} narrow layers, {}", case.name), finding }
}

/// The median time of the steps between the first and the last.
fn median_step(device: &Device, options: &Options, case: &Case, layers: usize) -> Result<f64> {
    // The smallest width that every format fits.
    let dims = Dimensions { heads: 2, head_dim: 128, conditioning: 256, latent: 64, layers };
    let folder = options.scratch.join(format!("host-{:?}-{}", case.matrices, case.zero_cond));
    weights::write(&folder, device, dims, case.matrices, case.zero_cond)?;
    let precision = Precision {
        device: device.clone(),
        compute: DType::BF16,
        storage: case.storage,
        float8_products: case.float8_products,
        ..Precision::reference()
    };
    let model = Transformer::load(&ModelFiles::Folder(folder.clone()), &precision)?;
    let model = model.repeated(layers);
    model.set_guidance(case.guidance.unwrap_or_default());

    let side = SIDE.div_ceil(options.shrink);
    let grid = Grid { height: side, width: side };
    let random =
        |tokens: usize, width: usize| Tensor::randn(0.0_f32, 1.0, (1, tokens, width), device);
    let texts = TEXT.map(|tokens| -> Result<Conditioning> {
        let hidden_states = random(tokens.div_ceil(options.shrink), dims.conditioning)?;
        Ok(Conditioning { hidden_states: hidden_states.to_dtype(DType::BF16)? })
    });
    let [positive, negative] = texts;
    let negative = case.guidance.map(|_| negative).transpose()?;
    let schedule = schedule(&folder, grid.tokens())?;
    let run = Denoise {
        noise: &random(grid.tokens(), dims.latent)?,
        references: Some(&random(grid.tokens(), dims.latent)?),
        grids: &[grid, grid],
        positive: &positive?,
        negative: negative.as_ref(),
        cfg_scale: 4.0,
        schedule: &schedule,
    };
    let begun = RefCell::new(Instant::now());
    let mut seconds = Vec::with_capacity(STEPS);
    let begin = |_: &Event<'_>| {
        range_begins(device);
        begun.replace(Instant::now());
    };
    run.run(&model, &begin, &CancelToken::new(), &mut |_, _| {
        seconds.push(begun.borrow().elapsed().as_secs_f64());
        range_ends(device);
    })?;
    let mut between: Vec<f64> = seconds.into_iter().skip(1).take(STEPS - 2).collect();
    between.sort_by(f64::total_cmp);
    Ok(between.get(between.len() >> 1).copied().unwrap_or(f64::NAN))
}

fn schedule(folder: &Path, tokens: usize) -> Result<Schedule> {
    let config = folder.join("scheduler");
    fs_err::create_dir_all(&config)?;
    let text = serde_json::json!({ "_class_name": "FlowMatchEulerDiscreteScheduler" }).to_string();
    fs_err::write(config.join("scheduler_config.json"), text)?;
    ScheduleConfig::load(&ModelFiles::Folder(folder.to_owned()))?.schedule(STEPS, tokens)
}

/// Begins a range for a profiler.
#[cfg(feature = "cuda")]
fn range_begins(device: &Device) {
    if device.is_cuda() {
        // Without a profiler there is nothing to begin.
        let _nobody_listens = candle_core::cuda::cudarc::driver::profiler_start();
    }
}

/// Ends it.
#[cfg(feature = "cuda")]
fn range_ends(device: &Device) {
    if device.is_cuda() {
        let _nobody_listens = candle_core::cuda::cudarc::driver::profiler_stop();
    }
}

#[cfg(not(feature = "cuda"))]
fn range_begins(_: &Device) {}

#[cfg(not(feature = "cuda"))]
fn range_ends(_: &Device) {}
