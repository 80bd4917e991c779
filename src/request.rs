//! What is asked of the engine and what comes back, as plain data.

use std::time::Duration;

use serde::Serialize;

use crate::{
    diffusion::noise::CudaGrid,
    pixels::{Picture, Size},
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
    /// The prompt goes to the editor as it is, in one pass.
    #[default]
    Direct,
}

impl Strategy {
    /// The name in flags, JSON and metadata.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
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
    /// Area of the working size in square pixels; `None` is the model's default.
    pub area: Option<u64>,
    /// Area of the copies that the vision-language model sees; `None` is the model's default.
    pub vl_area: Option<u64>,
    /// How the request is carried out.
    pub strategy: Strategy,
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
}

fn milliseconds<S: serde::Serializer>(elapsed: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(elapsed.as_secs_f64() * 1e3)
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
    /// Guidance used; 1 means none.
    pub cfg_scale: f64,
    /// The size the model worked at.
    pub working_size: Size,
    /// Time and memory, stage by stage.
    pub stages: Vec<StageReport>,
    /// What was done, but not quite as asked.
    pub notes: Vec<String>,
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
