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
        Conditioning, Denoise, Denoised, Grid, GuidancePass, StepRecording, Transformer,
        schedule::{Schedule, ScheduleConfig},
    },
    error::Result,
    progress::{CancelToken, Event},
    weights::{ModelFiles, Precision, Storage},
};

const PART: &str = "host";
/// Layers of the two models that are compared.
const LAYERS: [usize; 2] = [4, 24];
/// Layers of a model whose steps are recorded: those of the published one.
const RECORDED_LAYERS: usize = 60;
/// The first one warms up, and the first and the last read numbers back to see whether they are finite.
const STEPS: usize = 6;
/// A 1024 × 1024 picture and a reference of the same size.
const SIDE: usize = 64;
/// Tokens of the request, and of what to stay away from.
const TEXT: [usize; 2] = [512, 384];

/// What a model is, and how it is run.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) matrices: Matrices,
    pub(super) storage: Storage,
    pub(super) float8_products: bool,
    /// Whether references are modulated as free of noise.
    pub(super) zero_cond: bool,
    pub(super) guidance: Option<GuidancePass>,
}

pub(super) const BF16: Case = Case {
    name: "bf16",
    matrices: Matrices::Bf16,
    storage: Storage::Compute,
    float8_products: false,
    zero_cond: false,
    guidance: None,
};
pub(super) const CASES: [Case; 9] = [
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
        let [few, many] = LAYERS;
        let runs = [
            (few, StepRecording::Off),
            (many, StepRecording::Off),
            (RECORDED_LAYERS, StepRecording::OnDevice),
        ];
        let of_case = |case| runs.map(|run| row(device, options, case, run));
        CASES.iter().flat_map(of_case).collect()
    })
}

/// The host's time of the steps between the first and the last.
fn row(
    device: &Device,
    options: &Options,
    case: &Case,
    (layers, recording): (usize, StepRecording),
) -> Row {
    let layers = layers.div_ceil(options.shrink);
    let recorded = recording == StepRecording::OnDevice;
    let name = if recorded { "narrow layers recorded" } else { "narrow layers" };
    let name = format!("{layers} {name}, {}", case.name);
    let run = Narrow::new(device, options, case, layers).and_then(|model| model.run(recording));
    let finding = match run {
        Ok(Seen { denoised: Denoised { recorded: None, unrecorded, .. }, .. }) if recorded => {
            Finding::LeftOut(unrecorded.unwrap_or_default())
        }
        Ok(seen) => {
            let seconds = median(seen.denoised.host.iter().map(|of| of.as_secs_f64()));
            Finding::Timed { seconds, rate: 1.0 / seconds, unit: "steps/s".into() }
        }
        Err(error) => Finding::failed(&error),
    };
    Row { part: PART.into(), name, finding }
}

/// The median of what the steps between the first and the last took.
pub(super) fn median(seconds: impl Iterator<Item = f64>) -> f64 {
    let mut between: Vec<f64> = seconds.skip(1).take(STEPS - 2).collect();
    between.sort_by(f64::total_cmp);
    between.get(between.len() >> 1).copied().unwrap_or(f64::NAN)
}

/// A model and what it is to denoise.
pub(super) struct Narrow<'a> {
    device: &'a Device,
    model: Transformer,
    grid: Grid,
    /// Of the picture that is denoised, and of its reference.
    noise: [Tensor; 2],
    positive: Conditioning,
    negative: Option<Conditioning>,
    schedule: Schedule,
}

/// What came of a run.
pub(super) struct Seen {
    pub(super) denoised: Denoised,
    /// Latents after each step, on the host.
    pub(super) latents: Vec<Tensor>,
    /// How long each step took with all waits.
    pub(super) seconds: Vec<f64>,
}

impl<'a> Narrow<'a> {
    /// The smallest width that every format fits.
    pub(super) fn new(
        device: &'a Device,
        options: &Options,
        case: &Case,
        layers: usize,
    ) -> Result<Self> {
        let dims = Dimensions { heads: 2, head_dim: 128, conditioning: 256, latent: 64, layers };
        Self::of(device, options, case, (dims, "host"))
    }

    /// A model of these dimensions.
    pub(super) fn of(
        device: &'a Device,
        options: &Options,
        case: &Case,
        (dims, name): (Dimensions, &str),
    ) -> Result<Self> {
        let folder = format!("{name}-{:?}-{}", case.matrices, case.zero_cond);
        let folder = options.scratch.join(folder);
        weights::write(&folder, device, dims, case.matrices, case.zero_cond)?;
        let precision = Precision {
            device: device.clone(),
            compute: DType::BF16,
            storage: case.storage,
            float8_products: case.float8_products,
            ..Precision::reference()
        };
        let model = Transformer::load(&ModelFiles::Folder(folder.clone()), &precision)?;
        let model = model.repeated(dims.layers);
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
        let picture = || random(grid.tokens(), dims.latent);
        Ok(Self {
            device,
            model,
            grid,
            noise: [picture()?, picture()?],
            positive: positive?,
            negative: case.guidance.map(|_| negative).transpose()?,
            schedule: schedule(&folder, grid.tokens())?,
        })
    }

    pub(super) fn run(&self, recording: StepRecording) -> Result<Seen> {
        self.model.set_step_recording(recording);
        let [noise, reference] = &self.noise;
        let run = Denoise {
            noise,
            references: Some(reference),
            grids: &[self.grid, self.grid],
            positive: &self.positive,
            negative: self.negative.as_ref(),
            cfg_scale: 4.0,
            schedule: &self.schedule,
        };
        let begun = RefCell::new(Instant::now());
        let begin = |_: &Event<'_>| {
            range_begins(self.device);
            begun.replace(Instant::now());
        };
        let (mut seconds, mut latents) = (Vec::new(), Vec::new());
        let mut read = Ok(());
        let cancel = CancelToken::new();
        let denoised = run.run_cached(&self.model, None, &begin, &cancel, &mut |_, after| {
            seconds.push(begun.borrow().elapsed().as_secs_f64());
            range_ends(self.device);
            match after.to_device(&Device::Cpu) {
                Ok(after) => latents.push(after),
                Err(error) => read = Err(error),
            }
        })?;
        read?;
        Ok(Seen { denoised, latents, seconds })
    }
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
pub(super) fn range_begins(device: &Device) {
    if device.is_cuda() {
        // Without a profiler there is nothing to begin.
        let _nobody_listens = candle_core::cuda::cudarc::driver::profiler_start();
    }
}

/// Ends it.
#[cfg(feature = "cuda")]
pub(super) fn range_ends(device: &Device) {
    if device.is_cuda() {
        let _nobody_listens = candle_core::cuda::cudarc::driver::profiler_stop();
    }
}

#[cfg(not(feature = "cuda"))]
pub(super) fn range_begins(_: &Device) {}

#[cfg(not(feature = "cuda"))]
pub(super) fn range_ends(_: &Device) {}
