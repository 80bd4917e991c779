//! One edit, from the request's pictures to the result.

use candle_core::Tensor;

use super::{Engine, estimate, pipeline::Pipeline, plan_sizes::Sizes, stages::Stages};
use crate::{
    diffusion::{Conditioning, DenoiseOptions, Guidance},
    error::{Error, RequestError, Result},
    pixels::{self, Filter, Picture, Size},
    progress::{Event, Observer, Stage},
    request::{EditOutcome, EditRequest, Rng, Strategy},
};

/// The longest prompt, in tokens: what the reference pipelines were written for
/// (`tokenizer_max_length`).
const PROMPT_TOKENS_MAX: usize = 1024;
/// The most denoising steps: the timesteps that the models were trained on.
const STEPS_MAX: usize = 1000;
/// Guidance beyond this overflows in every published model.
const CFG_SCALE_MAX: f64 = 100.0;

/// A request with every default filled in and every field checked.
struct Checked<'a> {
    request: &'a EditRequest,
    sizes: Sizes,
    steps: usize,
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
    let mut stages = Stages::new(observer);

    // 1. The vision-language model reads the request.
    let (positive, negative) =
        stages.run(Stage::EncodePrompt, || conditioning(engine, &checked))?;
    // 2. The autoencoder turns the pictures into latents.
    let references = stages.run(Stage::EncodePicture, || reference_latents(engine, &checked))?;
    // 3. Noise, the one that the seed stands for.
    let noise = initial_noise(engine, &checked)?;
    // 4. The denoising loop.
    let guidance = negative.map(|conditioning| Guidance { conditioning, scale: checked.cfg_scale });
    let latents = stages.run(Stage::Denoise, || {
        let options = DenoiseOptions { steps: checked.steps, cancel: &request.cancel, observer };
        engine.diffusion.denoise(noise, &references, (&positive, guidance.as_ref()), &options)
    })?;
    // 5. The autoencoder turns the result into a picture.
    let decoded = stages.run(Stage::Decode, || {
        let decoded = engine.diffusion.vae.decode(&latents, &request.cancel)?;
        pixels::rgb_from_tensor(&decoded, "the decoded picture")
    })?;

    let picture = finish(decoded, &checked)?;
    Ok(EditOutcome {
        picture,
        seed: checked.seed,
        steps: checked.steps,
        cfg_scale: if guidance.is_some() { checked.cfg_scale } else { 1.0 },
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
        if !(1..=STEPS_MAX).contains(&steps) {
            return Err(Error::field("steps", steps, format!("1 to {STEPS_MAX}")));
        }
        let cfg_scale = request.cfg_scale.unwrap_or(pipeline.cfg_scale);
        if !(0.0..=CFG_SCALE_MAX).contains(&cfg_scale) {
            return Err(Error::field("cfg-scale", cfg_scale, format!("0 to {CFG_SCALE_MAX}")));
        }
        let sizes = Sizes::plan(pipeline, request, engine.diffusion.token_px())?;
        check_activations(engine, &sizes)?;
        let (negative, notes) = guidance(request, cfg_scale);
        let seed = request.seed.unwrap_or_else(random_seed);
        Ok(Self { request, sizes, steps, cfg_scale, negative, seed, notes })
    }
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
    let tokens = engine.vlm.count_tokens(text)?;
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
        let grid = size.in_units_of(diffusion.token_px())?;
        tokens += grid.width as usize * grid.height as usize;
    }
    let (transformer, autoencoder) = diffusion.widths();
    let widths = estimate::Widths { transformer, autoencoder };
    let tile = diffusion.vae.largest_tile(sizes.working);
    let bytes = estimate::activation_bytes(tokens, tile, widths);
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
    let pictures: Vec<image::RgbImage> = checked
        .request
        .pictures
        .iter()
        .zip(&checked.sizes.vision)
        .map(|(picture, &size)| pixels::resize(&picture.rgb, size, Filter::Lanczos3))
        .collect::<Result<_>>()?;
    let encode = |prompt: &str| -> Result<Conditioning> {
        let text = engine.pipeline.text(prompt, pictures.len());
        let inputs = engine.vlm.prepare(&text, &pictures)?;
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

fn reference_latents(engine: &Engine, checked: &Checked<'_>) -> Result<Vec<Tensor>> {
    let pictures = checked.request.pictures.iter().zip(&checked.sizes.latent);
    pictures
        .map(|(picture, &size)| {
            let resized = pixels::resize(&picture.rgb, size, Filter::Lanczos3)?;
            let tensor = pixels::tensor_from_rgb(&resized, engine.diffusion.device())?;
            engine.diffusion.vae.encode(&tensor, &checked.request.cancel)
        })
        .collect()
}

fn initial_noise(engine: &Engine, checked: &Checked<'_>) -> Result<Tensor> {
    use crate::diffusion::noise;
    let shape = engine.diffusion.vae.latent_shape(checked.sizes.working)?; // (1, c, h, w)
    let count = shape.iter().product();
    let values = match checked.request.rng {
        Rng::Cpu => noise::torch_cpu(checked.seed, count),
        Rng::Cuda => noise::torch_cuda(checked.seed, count),
    };
    Ok(Tensor::from_vec(values, shape.as_slice(), engine.diffusion.device())?)
}

/// Brings the result to the output's size and gives it the input's alpha and ICC profile.
fn finish(decoded: image::RgbImage, checked: &Checked<'_>) -> Result<Picture> {
    let input = &checked.request.pictures[0];
    let rgb = pixels::resize(&decoded, checked.sizes.output, Filter::Lanczos3)?;
    let mut picture = Picture::from_rgb(rgb);
    picture.alpha = match &input.alpha {
        Some(alpha) => Some(pixels::resize_gray(alpha, checked.sizes.output, Filter::Lanczos3)?),
        None => None,
    };
    picture.icc.clone_from(&input.icc);
    Ok(picture)
}

/// A seed from the system's randomness.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) & u64::from(u32::MAX)
}
