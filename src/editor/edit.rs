//! One edit, from the request's pictures to the result.

use candle_core::Tensor;
use image::RgbImage;

use super::{Engine, estimate, pipeline::Pipeline, plan_sizes::Sizes, stages::Stages};
use crate::{
    diffusion::{Conditioning, Denoise, Grid, noise::NoiseSource, schedule::Schedule, vae::Tiling},
    error::{Error, RequestError, Result},
    pixels::{self, Filter, Picture, Size},
    progress::{Event, Observer, Stage},
    request::{EditOutcome, EditRequest, Rng, Strategy},
};

/// The longest prompt, in tokens: what the reference pipelines were written for
/// (`tokenizer_max_length`).
const PROMPT_TOKENS_MAX: usize = 1024;
/// Guidance beyond this overflows in every published model.
const CFG_SCALE_MAX: f64 = 100.0;

/// A request with every default filled in and every field checked.
struct Checked<'a> {
    request: &'a EditRequest,
    sizes: Sizes,
    schedule: Schedule,
    cfg_scale: f64,
    /// The negative prompt, where guidance runs.
    negative: Option<&'a str>,
    seed: u64,
    notes: Vec<String>,
}

pub(super) fn run(
    engine: &Engine,
    request: &EditRequest,
    observer: &dyn Observer,
) -> Result<EditOutcome> {
    let Strategy::Direct = request.strategy;
    let checked = Checked::new(engine, request)?;
    for note in &checked.notes {
        observer.event(&Event::Note(note));
    }
    let diffusion = &engine.diffusion;
    let (cancel, tiling) = (&request.cancel, Tiling::default());
    let mut stages = Stages::new(observer);

    // 1. The vision-language model reads the request.
    let (positive, negative) =
        stages.run(Stage::EncodePrompt, || conditioning(engine, &checked))?;
    // 2. The autoencoder turns the pictures into latents.
    let (references, grids) =
        stages.run(Stage::EncodePicture, || reference_tokens(engine, &checked, &tiling))?;
    // 3. Noise, the one that the seed stands for.
    let noise = diffusion.initial_noise(checked.noise_source(), checked.seed, grids[0])?;
    // 4. The denoising loop.
    let latents = stages.run_steps(Stage::Denoise, || {
        let denoise = Denoise {
            noise: &noise,
            references: Some(&references),
            grids: &grids,
            positive: &positive,
            negative: negative.as_ref(),
            cfg_scale: checked.cfg_scale,
            schedule: &checked.schedule,
        };
        denoise.run(diffusion.transformer(), observer, cancel, &mut |_, _| {})
    })?;
    // 5. The autoencoder turns the result into a picture.
    let decoded = stages.run(Stage::Decode, || {
        let decoded = diffusion.picture(&latents, grids[0], &tiling, cancel)?;
        pixels::rgb_from_tensor(&decoded, Stage::Decode.label())
    })?;

    Ok(EditOutcome {
        picture: finish(&decoded, &checked)?,
        seed: checked.seed,
        steps: checked.schedule.steps(),
        cfg_scale: if negative.is_some() { checked.cfg_scale } else { 1.0 },
        working_size: checked.sizes.working,
        stages: stages.finish(),
        notes: checked.notes,
    })
}

impl<'a> Checked<'a> {
    fn new(engine: &Engine, request: &'a EditRequest) -> Result<Self> {
        let pipeline = &engine.pipeline;
        check_pictures(pipeline, request)?;
        if request.prompt.trim().is_empty() {
            return Err(Error::field(
                "prompt",
                "nothing",
                "a sentence that says what should change",
            ));
        }
        check_length(engine, "prompt", &request.prompt)?;
        check_length(
            engine,
            "negative prompt",
            request.negative_prompt.as_deref().unwrap_or_default(),
        )?;
        let steps = request.steps.unwrap_or(pipeline.steps);
        let cfg_scale = request.cfg_scale.unwrap_or(pipeline.cfg_scale);
        if !(0.0..=CFG_SCALE_MAX).contains(&cfg_scale) {
            return Err(Error::field("cfg-scale", cfg_scale, format!("0 to {CFG_SCALE_MAX}")));
        }
        let sizes = Sizes::plan(pipeline, request, token_px(engine)?)?;
        let grid = grid(engine, sizes.working)?;
        let schedule = engine.diffusion.schedule().schedule(steps, grid.tokens())?;
        check_activations(engine, &sizes)?;
        let (negative, notes) = guidance(request, cfg_scale);
        let seed = request.seed.unwrap_or_else(random_seed);
        Ok(Self { request, sizes, schedule, cfg_scale, negative, seed, notes })
    }

    fn noise_source(&self) -> NoiseSource {
        match self.request.rng {
            Rng::Cpu => NoiseSource::Cpu,
            Rng::Cuda(grid) => NoiseSource::Cuda(grid),
        }
    }
}

/// Side of a token in pixels.
fn token_px(engine: &Engine) -> Result<u32> {
    let side = engine.diffusion.pixels_per_token();
    u32::try_from(side).map_err(|error| {
        Error::field("token side", format!("{side}: {error}"), "a number of pixels")
    })
}

fn grid(engine: &Engine, size: Size) -> Result<Grid> {
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

fn check_length(engine: &Engine, field: &'static str, text: &str) -> Result<()> {
    let tokens = engine.vlm.tokenizer().encode(text)?.len();
    if tokens > PROMPT_TOKENS_MAX {
        let found = format!("{tokens} tokens ({} characters)", text.chars().count());
        return Err(Error::field(field, found, format!("at most {PROMPT_TOKENS_MAX} tokens")));
    }
    Ok(())
}

fn check_activations(engine: &Engine, sizes: &Sizes) -> Result<()> {
    let diffusion = &engine.diffusion;
    let mut tokens = PROMPT_TOKENS_MAX;
    for &size in std::iter::once(&sizes.working).chain(&sizes.latent) {
        tokens += grid(engine, size)?.tokens();
    }
    let widths = estimate::Widths {
        transformer: diffusion.transformer().config().dim(),
        autoencoder: diffusion.autoencoder().config().base_dim,
    };
    let largest = sizes.latent.iter().map(|size| size.pixels()).max().unwrap_or(0);
    let bytes = estimate::activation_bytes(tokens, largest, widths);
    let what = format!("the activations at {}", sizes.working);
    engine.budget.check(&what, bytes, "choose a smaller --area, or -W and -H")
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

fn conditioning(
    engine: &Engine,
    checked: &Checked<'_>,
) -> Result<(Conditioning, Option<Conditioning>)> {
    let pictures: Vec<RgbImage> = checked
        .request
        .pictures
        .iter()
        .zip(&checked.sizes.vision)
        .map(|(picture, &size)| resized(picture, size))
        .collect::<Result<_>>()?;
    let encode = |prompt: &str| -> Result<Conditioning> {
        let text = engine.pipeline.text(prompt, pictures.len());
        // What the reference pipelines compute with; see `with_sequential_positions`.
        let inputs = engine.vlm.prepare(&text, &pictures)?.with_sequential_positions();
        let hidden = engine.vlm.hidden_states(&inputs, &checked.request.cancel)?; // (1, n, dim)
        let dropped = Pipeline::TOKENS_DROPPED;
        let kept = hidden.dim(1)?.saturating_sub(dropped);
        if kept == 0 {
            let found = format!("{} tokens with its template", hidden.dim(1)?);
            return Err(Error::field("prompt", found, format!("more than {dropped}")));
        }
        Ok(Conditioning { hidden_states: hidden.narrow(1, dropped, kept)? })
    };
    Ok((encode(&checked.request.prompt)?, checked.negative.map(encode).transpose()?))
}

/// The pictures' tokens one after the other, and the grids of the denoised picture and of each.
fn reference_tokens(
    engine: &Engine,
    checked: &Checked<'_>,
    tiling: &Tiling,
) -> Result<(Tensor, Vec<Grid>)> {
    let mut grids = vec![grid(engine, checked.sizes.working)?];
    let mut tokens = Vec::with_capacity(checked.request.pictures.len());
    for (picture, &size) in checked.request.pictures.iter().zip(&checked.sizes.latent) {
        let device = &engine.diffusion.transformer().precision().device;
        let picture = pixels::tensor_from_rgb(&resized(picture, size)?, device)?;
        let (of_picture, grid) =
            engine.diffusion.reference_tokens(&picture, tiling, &checked.request.cancel)?;
        tokens.push(of_picture);
        grids.push(grid);
    }
    Ok((Tensor::cat(&tokens, 1)?, grids))
}

fn resized(picture: &Picture, size: Size) -> Result<RgbImage> {
    pixels::resize(&picture.rgb, size.width, size.height, Filter::Lanczos3)
}

/// Brings the result to the output's size and gives it the input's alpha and ICC profile.
fn finish(decoded: &RgbImage, checked: &Checked<'_>) -> Result<Picture> {
    let input = &checked.request.pictures[0];
    let Size { width, height } = checked.sizes.output;
    let mut picture = Picture::from_rgb(pixels::resize(decoded, width, height, Filter::Lanczos3)?);
    picture.alpha = match &input.alpha {
        Some(alpha) => Some(pixels::resize_gray(alpha, width, height, Filter::Lanczos3)?),
        None => None,
    };
    picture.icc.clone_from(&input.icc);
    Ok(picture)
}

/// A seed from the system's randomness.
pub(super) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) & u64::from(u32::MAX)
}
