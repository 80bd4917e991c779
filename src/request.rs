//! What is asked of the engine and what comes back, as plain data.

use std::time::Duration;

use serde::Serialize;

use crate::{
    diffusion::{GuidancePass, Residency, StepCache, noise::CudaGrid},
    memory::{DevicePeak, Rung},
    pixels::{Picture, Size},
    plan::{Plan, PlanOptions, PlannedBy},
    progress::{CancelToken, Stage},
};

/// Whose random numbers a seed draws.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rng {
    /// What `torch.Generator("cpu").manual_seed(seed)` draws; the same picture on every machine.
    #[default]
    Cpu,
    /// What `torch.Generator("cuda").manual_seed(seed)` draws. Where the noise has more values than
    /// the device has threads, the device matters: [`CudaGrid::of_device`].
    Cuda(CudaGrid),
}

impl Rng {
    /// The name in flags, JSON and metadata.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }
}

/// How a request is carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Strategy {
    /// The planner takes the request apart; all sub-requests go to the editor as one prompt, in one
    /// pass.
    #[default]
    Single,
    /// The planner takes the request apart; each sub-request is a pass on the result of the one
    /// before.
    Sequential,
    /// The prompt goes to the editor as it is, in one pass, without the planner.
    Direct,
    /// As [`Self::Direct`] where the request turns out to be one step, as [`Self::Single`]
    /// otherwise.
    Auto,
}

impl Strategy {
    /// The name in flags, JSON and metadata.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Sequential => "sequential",
            Self::Direct => "direct",
            Self::Auto => "auto",
        }
    }
}

/// What a pass of [`Strategy::Sequential`] gets from the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HandOver {
    /// The latents as they are: nothing is decoded and encoded in between.
    #[default]
    Latents,
    /// The picture, which is encoded again.
    Pixels,
}

impl HandOver {
    /// The name in flags and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Latents => "latents",
            Self::Pixels => "pixels",
        }
    }
}

/// One edit: the pictures, the sentence, and what differs from the model's defaults.
#[derive(Debug, Clone)]
pub struct EditRequest {
    /// The picture to edit, and more pictures that the prompt refers to as `Picture 2`, ….
    pub pictures: Vec<Picture>,
    /// What should change.
    pub prompt: String,
    /// What should not appear. Guidance runs only when this is given (it may be empty) and
    /// `cfg_scale` is above 1, as in diffusers.
    pub negative_prompt: Option<String>,
    /// Denoising steps; `None` is the model's default.
    pub steps: Option<usize>,
    /// Seed of the noise; `None` draws one, which the outcome reports.
    pub seed: Option<u64>,
    /// Whose random numbers the seed draws.
    pub rng: Rng,
    /// True classifier-free guidance; `None` is the model's default.
    pub cfg_scale: Option<f64>,
    /// Width of the working size and of the output in pixels; `None` follows the input.
    pub width: Option<u32>,
    /// Height of the working size and of the output in pixels; `None` follows the input.
    pub height: Option<u32>,
    /// Area of the working size in square pixels; `None` is the model's default. Beside `width` or `height`
    /// it is the area at which the editor is shown the pictures, as in diffusers; without it, the edited
    /// picture has the working size there.
    pub area: Option<u64>,
    /// Area of the copies that the vision-language model sees; `None` is the model's default.
    pub vl_area: Option<u64>,
    /// How the request is carried out.
    pub strategy: Strategy,
    /// A plan to carry out instead of one that the planner makes; the prompt may then be empty.
    pub plan: Option<Plan>,
    /// How the planner writes.
    pub planner: PlanOptions,
    /// What one pass of several gets from the one before.
    pub hand_over: HandOver,
    /// Leaves out most of the steps that differ little from the one before; the picture changes.
    pub step_cache: Option<StepCache>,
    /// Stops the request.
    pub cancel: CancelToken,
}

impl EditRequest {
    /// A request with the model's defaults.
    #[must_use]
    pub fn new(picture: Picture, prompt: impl Into<String>) -> Self {
        Self {
            pictures: vec![picture],
            prompt: prompt.into(),
            negative_prompt: None,
            steps: None,
            seed: None,
            rng: Rng::default(),
            cfg_scale: None,
            width: None,
            height: None,
            area: None,
            vl_area: None,
            strategy: Strategy::default(),
            plan: None,
            planner: PlanOptions::default(),
            hand_over: HandOver::default(),
            step_cache: None,
            cancel: CancelToken::new(),
        }
    }
}

/// Time and memory of one stage.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StageReport {
    /// The stage.
    pub stage: Stage,
    /// How long it took.
    #[serde(rename = "elapsed_ms", serialize_with = "milliseconds")]
    pub elapsed: Duration,
    /// The highest resident memory of the process up to the end of the stage in bytes, where the
    /// system says.
    pub peak_resident_bytes: Option<u64>,
    /// The most of a GPU's memory up to the end of the stage.
    #[serde(flatten)]
    pub device: Option<DevicePeak>,
}

impl StageReport {
    /// Of a stage that had nothing to do.
    pub(crate) fn of_nothing(stage: Stage) -> Self {
        Self { stage, elapsed: Duration::ZERO, peak_resident_bytes: None, device: None }
    }
}

fn milliseconds<S: serde::Serializer>(elapsed: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(elapsed.as_secs_f64() * 1e3)
}

/// Which weights stay in memory, and how the autoencoder works: the first of these ways that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// Whether the vision-language model and the transformer take turns in memory: the one is
    /// dropped before the other is read from its file (again).
    pub take_turns: bool,
    /// Which of the transformer's weights stay while it has its turn.
    pub transformer: Residency,
    /// How the two predictions of guidance go through the transformer, where there are two.
    pub guidance: GuidancePass,
    /// Side of the tiles that the autoencoder works in, in pixels; `None` leaves it to
    /// [`Tiling::default`](crate::diffusion::vae::Tiling).
    pub tile_px: Option<usize>,
}

impl Placement {
    /// Everything stays.
    pub const RESIDENT: Self = Self {
        take_turns: false,
        transformer: Residency::Resident,
        guidance: GuidancePass::InTurn,
        tile_px: None,
    };
}

/// Memory that one stage of a request takes at most, in bytes, where the computation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StageMemory {
    /// The stage.
    pub stage: Stage,
    /// Weights that are in memory.
    pub weights_bytes: u64,
    /// Everything else: activations, keys and values, pictures, what is kept for later.
    pub activation_bytes: u64,
}

impl StageMemory {
    /// Both together.
    #[must_use]
    pub fn in_use_bytes(&self) -> u64 {
        self.weights_bytes + self.activation_bytes
    }
}

/// How a request's work is placed in memory, and what it takes, said before anything is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// The way that was chosen, or the smallest where none fits.
    pub placement: Placement,
    /// The stages in their order.
    pub stages: Vec<StageMemory>,
    /// The most that is in use at a time, in bytes.
    pub peak_bytes: u64,
    /// What may be used, in bytes, where that is known.
    pub available_bytes: Option<u64>,
    /// What would fit instead, where this does not.
    pub hint: Option<String>,
    /// What was done besides when memory ran out all the same.
    pub made_room: Vec<Rung>,
}

impl MemoryPlan {
    /// Whether it fits.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.hint.is_none()
    }
}

/// What the weights of one part of an engine take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightShare {
    /// `transformer`, `text_encoder`, `vae`, `lora` where there is one, or `planner` where it has
    /// weights of its own.
    pub part: &'static str,
    /// Bytes in memory, by the number of values and the type they are kept in.
    pub bytes: u64,
}

/// An edited picture, and how it came about.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EditOutcome {
    /// The result, with the input's alpha and ICC profile.
    pub picture: Picture,
    /// The seed used.
    pub seed: u64,
    /// Denoising steps made.
    pub steps: usize,
    /// Predictions, one a step or two with guidance, that a step cache ended after the first block;
    /// over all passes.
    pub reused: usize,
    /// Guidance used; 1 means none.
    pub cfg_scale: f64,
    /// The size the model worked at.
    pub working_size: Size,
    /// How the request was carried out: never [`Strategy::Auto`].
    pub strategy: Strategy,
    /// The plan that was carried out, if there was one.
    pub plan: Option<Plan>,
    /// Who ordered the plan's steps; `None` for a plan that came with the request.
    pub planned_by: Option<PlannedBy>,
    /// What the editor was told, pass by pass.
    pub prompts: Vec<String>,
    /// Time and memory, stage by stage.
    pub stages: Vec<StageReport>,
    /// How the work was placed in memory.
    pub memory: MemoryPlan,
    /// What was done, but not quite as asked.
    pub notes: Vec<String>,
}

/// A request to plan, without the editor.
#[derive(Debug, Clone)]
pub struct PlanRequest {
    /// The picture to edit, and more pictures that the prompt refers to.
    pub pictures: Vec<Picture>,
    /// What should change.
    pub prompt: String,
    /// Area of the working size in square pixels; `None` is the model's default.
    pub area: Option<u64>,
    /// Area of the copies that the vision-language model sees; `None` is the model's default.
    pub vl_area: Option<u64>,
    /// How the planner writes.
    pub planner: PlanOptions,
    /// Stops the request.
    pub cancel: CancelToken,
}

impl PlanRequest {
    /// A request with the model's defaults.
    #[must_use]
    pub fn new(pictures: Vec<Picture>, prompt: impl Into<String>) -> Self {
        Self {
            pictures,
            prompt: prompt.into(),
            area: None,
            vl_area: None,
            planner: PlanOptions::default(),
            cancel: CancelToken::new(),
        }
    }
}

/// A plan, and how it came about.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PlanOutcome {
    /// The plan.
    pub plan: Plan,
    /// Who ordered its steps.
    pub planned_by: PlannedBy,
    /// The decomposition agent's reply, word for word.
    pub reply: String,
    /// Tokens that both agents wrote.
    pub tokens: usize,
    /// Time and memory, stage by stage.
    pub stages: Vec<StageReport>,
}

/// A question about pictures.
#[derive(Debug, Clone)]
pub struct AskRequest {
    /// The pictures, in the order they are spoken of.
    pub pictures: Vec<Picture>,
    /// The question.
    pub question: String,
    /// The longest answer in tokens.
    pub tokens_max: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f64,
    /// Seed of the sampling, where the temperature is above 0; `None` draws one.
    pub seed: Option<u64>,
    /// Stops the request.
    pub cancel: CancelToken,
}

impl AskRequest {
    /// A question with a greedy answer of at most 256 tokens.
    #[must_use]
    pub fn new(pictures: Vec<Picture>, question: impl Into<String>) -> Self {
        let question = question.into();
        let cancel = CancelToken::new();
        Self { pictures, question, tokens_max: 256, temperature: 0.0, seed: None, cancel }
    }
}

/// An answer.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct AskOutcome {
    /// The text.
    pub answer: String,
    /// Tokens in the prompt, pictures included.
    pub prompt_tokens: usize,
    /// Tokens in the answer.
    pub answer_tokens: usize,
    /// Whether the answer ended by itself rather than at the limit.
    pub finished: bool,
    /// Time and memory, stage by stage.
    pub stages: Vec<StageReport>,
}
