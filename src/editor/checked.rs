//! A request with every default filled in and every field checked.

use super::{Engine, pipeline::Pipeline, plan_sizes::Sizes};
use crate::{
    diffusion::{
        Grid,
        noise::NoiseSource,
        schedule::{Schedule, ScheduleConfig},
    },
    error::{Error, RequestError, Result},
    pixels::Size,
    request::{EditRequest, Rng, Strategy},
};

/// The longest prompt, in tokens: what the reference pipelines were written for
/// (`tokenizer_max_length`).
const PROMPT_TOKENS_MAX: usize = 1024;
/// Guidance beyond this overflows in every published model.
const CFG_SCALE_MAX: f64 = 100.0;

/// A request that can be carried out.
pub(super) struct Checked<'a> {
    pub(super) request: &'a EditRequest,
    pub(super) sizes: Sizes,
    pub(super) schedule: Schedule,
    pub(super) cfg_scale: f64,
    /// The negative prompt, where guidance runs.
    pub(super) negative: Option<&'a str>,
    pub(super) seed: u64,
    pub(super) notes: Vec<String>,
}

impl<'a> Checked<'a> {
    pub(super) fn new(engine: &Engine, request: &'a EditRequest) -> Result<Self> {
        let pipeline = &engine.opened.pipeline;
        check_before_loading(pipeline, engine.diffusion.schedule(), request)?;
        check_length(engine, "prompt", &request.prompt)?;
        check_length(
            engine,
            "negative prompt",
            request.negative_prompt.as_deref().unwrap_or_default(),
        )?;
        let steps = request.steps.unwrap_or(pipeline.steps);
        let cfg_scale = request.cfg_scale.unwrap_or(pipeline.cfg_scale);
        let sizes = Sizes::plan(pipeline, request, token_px(engine)?)?;
        let grid = grid(engine, sizes.working)?;
        let schedule = engine.diffusion.schedule().schedule(steps, grid.tokens())?;
        let (negative, mut notes) = guidance(request, cfg_scale);
        notes.extend(engine.loras.notes(steps));
        let seed = request.seed.unwrap_or_else(random_seed);
        Ok(Self { request, sizes, schedule, cfg_scale, negative, seed, notes })
    }

    pub(super) fn noise_source(&self) -> NoiseSource {
        match self.request.rng {
            Rng::Cpu => NoiseSource::Cpu,
            Rng::Cuda(grid) => NoiseSource::Cuda(grid),
        }
    }
}

/// What can be found wrong with a request before any weights are read.
pub(super) fn check_before_loading(
    pipeline: &Pipeline,
    schedule: &ScheduleConfig,
    request: &EditRequest,
) -> Result<()> {
    check_pictures(pipeline, request)?;
    check_plan(request)?;
    let cfg_scale = request.cfg_scale.unwrap_or(pipeline.cfg_scale);
    if !(0.0..=CFG_SCALE_MAX).contains(&cfg_scale) {
        return Err(Error::field("cfg-scale", cfg_scale, format!("0 to {CFG_SCALE_MAX}")));
    }
    schedule.check_steps(request.steps.unwrap_or(pipeline.steps))
}

/// What the editor is told must fit its text encoder.
pub(super) fn check_length(engine: &Engine, field: &'static str, text: &str) -> Result<()> {
    let tokens = engine.opened.vlm.tokenizer().encode(text)?.len();
    if tokens > PROMPT_TOKENS_MAX {
        let found = format!("{tokens} tokens ({} characters)", text.chars().count());
        return Err(Error::field(field, found, format!("at most {PROMPT_TOKENS_MAX} tokens")));
    }
    Ok(())
}

/// Side of a token in pixels.
fn token_px(engine: &Engine) -> Result<u32> {
    let side = engine.diffusion.pixels_per_token();
    u32::try_from(side).map_err(|error| {
        Error::field("token side", format!("{side}: {error}"), "a number of pixels")
    })
}

pub(super) fn grid(engine: &Engine, size: Size) -> Result<Grid> {
    engine.diffusion.grid(size.height as usize, size.width as usize)
}

fn check_pictures(pipeline: &Pipeline, request: &EditRequest) -> Result<()> {
    let (found, most) = (request.pictures.len(), pipeline.pictures_max());
    if found == 0 {
        return Err(Error::field("pictures", "none", "at least one"));
    }
    if found > most {
        return Err(RequestError::Unsupported {
            model: format!("{} ({})", pipeline.name, pipeline.kind.class_name()),
            what: format!("{found} pictures, at most {most}"),
            hint: "QwenImageEditPlusPipeline models (2509, 2511) take several pictures".to_owned(),
        }
        .into());
    }
    Ok(())
}

/// A request says what should change, or how.
fn check_plan(request: &EditRequest) -> Result<()> {
    match &request.plan {
        Some(_) if request.strategy == Strategy::Direct => {
            Err(Error::field("strategy", "direct", "single or sequential, as there is a plan"))
        }
        Some(plan) => plan.check(),
        None if request.prompt.trim().is_empty() => {
            Err(Error::field("prompt", "nothing", "a sentence that says what should change"))
        }
        None => Ok(()),
    }
}

/// Whether guidance runs, as in diffusers: with a negative prompt, which may be empty, and a scale
/// above 1.
fn guidance(request: &EditRequest, cfg_scale: f64) -> (Option<&str>, Vec<String>) {
    let note = |text: &str| vec![text.to_owned()];
    match request.negative_prompt.as_deref() {
        Some(negative) if cfg_scale > 1.0 => (Some(negative), Vec::new()),
        Some(_) => {
            (None, note("the negative prompt is not used: guidance needs a --cfg-scale above 1"))
        }
        None if request.cfg_scale.is_some_and(|scale| scale > 1.0) => (
            None,
            note("--cfg-scale is not used: guidance needs a negative prompt, which may be \" \""),
        ),
        None if cfg_scale > 1.0 => (
            None,
            note(
                "no guidance, as no negative prompt is given; -n \" \" turns it on and doubles the work",
            ),
        ),
        None => (None, Vec::new()),
    }
}

/// A seed from the system's randomness.
pub(super) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) & u64::from(u32::MAX)
}
