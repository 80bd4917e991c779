//! How much memory a request takes, stage by stage, said before anything is loaded.

use image::RgbImage;

use super::{inspect::PARTS, pipeline::Pipeline, plan_sizes::Sizes, planning::PlannerParts};
use crate::{
    diffusion::{
        LATENTS_PER_TOKEN, Residency,
        qwen_image::{Footprint, TokenCounts},
        vae::{self, Tiling},
    },
    error::{Error, Result},
    pixels::Size,
    plan::PlanOptions,
    progress::Stage,
    request::{EditRequest, Placement, StageMemory, Strategy, WeightShare},
    vlm::{IMAGE_PLACEHOLDER, Load, VisionLanguageModel},
    weights::{ModelFiles, Precision},
};

/// What a model's weights take in memory, part by part.
pub(super) fn weights(
    known: &Known,
    vlm: &VisionLanguageModel,
    precision: &Precision,
) -> Vec<WeightShare> {
    let share = |(part, _): (&'static str, &str)| {
        let bytes = match part {
            "vae" => known.vae_bytes,
            "text_encoder" => vlm.weight_bytes(precision, true),
            _ => known.transformer.resting(Residency::Resident),
        };
        WeightShare { part, bytes }
    };
    PARTS.into_iter().map(share).collect()
}

/// What headers and configs say about the editor's side of a model folder.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) transformer: Footprint,
    pub(super) autoencoder: vae::Config,
    pub(super) vae_bytes: u64,
    pub(super) lora_bytes: u64,
}

impl Known {
    pub(super) fn read(files: &ModelFiles, precision: &Precision, lora_bytes: u64) -> Result<Self> {
        Ok(Self {
            transformer: Footprint::read(files, precision)?,
            autoencoder: vae::Config::load(files)?,
            vae_bytes: vae::weight_bytes(files, precision)?,
            lora_bytes,
        })
    }

    /// The same with matrices in other types.
    pub(super) fn as_kept(&self, precision: &Precision) -> Self {
        Self { transformer: self.transformer.as_kept(precision), ..self.clone() }
    }

    /// Side of a token in pixels.
    pub(super) fn token_px(&self) -> usize {
        LATENTS_PER_TOKEN * self.autoencoder.pixels_per_latent()
    }
}

/// Everything that an estimate is made from.
#[derive(Clone, Copy)]
pub(super) struct Models<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) vlm: &'a VisionLanguageModel,
    pub(super) planner: &'a PlannerParts,
    pub(super) known: &'a Known,
    /// Types in which matrices would be kept.
    pub(super) precision: &'a Precision,
}

/// What a request is made of, in numbers.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    sizes: Sizes,
    tokens: TokenCounts,
    /// The longest that the planner reads and writes; `None` where it does not run.
    plan: Option<Load>,
    encode: Load,
    steps: usize,
    /// Whether the predictions of a step can be one batch.
    can_batch: bool,
    /// Bytes of pictures that are held throughout.
    pictures: u64,
    /// Sets of pictures that the vision-language model looks at, and prompts about them.
    kept: [u64; 2],
}

impl Facts {
    pub(super) fn of(models: Models<'_>, request: &EditRequest) -> Result<Self> {
        let Models { pipeline, vlm, known, .. } = models;
        let side = u32::try_from(known.token_px()).unwrap_or(u32::MAX);
        let sizes = Sizes::plan(pipeline, request, side)?;
        let pictures = request.pictures.len();
        let seen = Seen::of(vlm, &sizes.vision)?;
        let mut read = 0;
        let negative = request.negative_prompt.clone().map(|text| ("negative prompt", text));
        for (field, text) in prompts(request).map(|text| ("prompt", text)).chain(negative) {
            let text = pipeline.text(&text, pictures);
            read = read.max(tokens(vlm, (field, &text), pictures, seen.tokens)?);
        }
        let planned = is_planned(request);
        if planned {
            // What the planner makes of the request is not known yet; it says no more than that.
            read += tokens(vlm, ("prompt", &request.prompt), 0, 0)? + PLAN_TOKENS;
        }
        let work = (request.prompt.as_str(), sizes.vision.as_slice(), &request.planner);
        let plan = match planned {
            true => Some(plan_load((vlm, models.planner), work)?),
            false => None,
        };
        let units = |px: u32| px.div_ceil(side.max(1)) as usize;
        let unit = |size: Size| units(size.height) * units(size.width);
        let text = read.saturating_sub(Pipeline::TOKENS_DROPPED).max(1);
        let several = u64::from(request.strategy == Strategy::Sequential);
        let prompts = 1 + u64::from(request.negative_prompt.is_some());
        Ok(Self {
            tokens: TokenCounts {
                target: unit(sizes.working),
                references: sizes.latent.iter().copied().map(unit).sum(),
                text,
                branches: 1 + usize::from(request.negative_prompt.is_some()),
            },
            plan,
            encode: Load { patches: seen.patches, prompt_tokens: read, answer_tokens: 0 },
            steps: request.steps.unwrap_or(pipeline.steps),
            can_batch: request.negative_prompt.is_some() && request.step_cache.is_none(),
            pictures: request.pictures.iter().map(|picture| held(&picture.rgb)).sum(),
            kept: [1 + several, prompts * (1 + several)],
            sizes,
        })
    }

    /// Whether the predictions of a step can be one batch: there are two, and none ends early.
    pub(super) fn can_batch(&self) -> bool {
        self.can_batch
    }

    /// Most passes' working size.
    pub(super) fn working(&self) -> Size {
        self.sizes.working
    }
}

/// Whether the planner runs before anything is edited.
pub(super) fn is_planned(request: &EditRequest) -> bool {
    request.plan.is_none() && request.strategy != Strategy::Direct
}

/// Threads' scratch, tables, tokens and texts, which no formula counts one by one.
const SMALL_BYTES: u64 = 1 << 20;
/// What the libraries of a GPU work in, once a process.
const GPU_LIBRARIES_BYTES: u64 = 64 << 20;
/// Tokens that a plan's prompt may have beyond the request's.
const PLAN_TOKENS: usize = 32;

/// What the editor may be told.
fn prompts(request: &EditRequest) -> impl Iterator<Item = String> {
    let steps = request.plan.iter().flat_map(|plan| {
        let all: Vec<&str> = plan.steps.iter().map(|step| step.prompt.as_str()).collect();
        [all.join(". ")]
    });
    std::iter::once(request.prompt.clone()).chain(steps)
}

/// Pictures in the numbers of the vision-language model.
struct Seen {
    patches: usize,
    tokens: usize,
}

impl Seen {
    fn of(vlm: &VisionLanguageModel, sizes: &[Size]) -> Result<Self> {
        let mut seen = Self { patches: 0, tokens: 0 };
        for size in sizes {
            let grid = vlm.preprocessor().grid(size.width, size.height)?;
            seen.patches += grid.patches();
            seen.tokens += grid.merged(vlm.config().vision.merge_size).patches();
        }
        Ok(seen)
    }
}

/// Tokens of a field's text with `pictures` placeholders that stand for `picture_tokens` in all.
fn tokens(
    vlm: &VisionLanguageModel,
    (field, text): (&'static str, &str),
    pictures: usize,
    picture_tokens: usize,
) -> Result<usize> {
    let marks = text.matches(IMAGE_PLACEHOLDER).count();
    if marks != pictures {
        // The template has one for each picture, so what is too many came with the request.
        let found = format!("{} × {IMAGE_PLACEHOLDER}", marks.saturating_sub(pictures));
        return Err(Error::field(field, found, "no mark that stands for a picture"));
    }
    Ok(vlm.tokenizer().encode(text)?.len().saturating_sub(pictures) + picture_tokens)
}

/// A request, the sizes of its pictures and the options of the planner.
pub(super) type PlanFacts<'a> = (&'a str, &'a [Size], &'a PlanOptions);

/// The longest that the planner reads and writes.
pub(super) fn plan_load(
    (encoder, planner): (&VisionLanguageModel, &PlannerParts),
    (request, sizes, options): PlanFacts<'_>,
) -> Result<Load> {
    let vlm = planner.model(encoder);
    let seen = Seen::of(vlm, sizes)?;
    let mut prompt_tokens = 0;
    for (text, replies) in planner.readings(encoder, sizes.len(), request)? {
        let read = tokens(vlm, ("prompt", &text), sizes.len(), seen.tokens)?
            + replies * options.tokens_max;
        prompt_tokens = prompt_tokens.max(read);
    }
    let most = vlm.config().text.max_position_embeddings;
    Ok(Load {
        patches: seen.patches,
        prompt_tokens: prompt_tokens.min(most),
        answer_tokens: options.tokens_max.min(most.saturating_sub(prompt_tokens)).max(1),
    })
}

fn held(picture: &RgbImage) -> u64 {
    picture.as_raw().len() as u64
}

impl Models<'_> {
    /// What each stage takes under a placement.
    pub(super) fn stages(self, facts: &Facts, placement: Placement) -> Vec<StageMemory> {
        let Known { transformer, autoencoder, vae_bytes, lora_bytes } = self.known;
        let threads = rayon::current_num_threads();
        let own = self.planner.own_weight_bytes(self.precision).unwrap_or(0);
        let plans = facts.plan.is_some();
        // Who takes turns is read from its file within the stage.
        let turns = placement.take_turns;
        let encoder = self.vlm.weight_bytes(self.precision, plans && own == 0);
        let base = vae_bytes + lora_bytes + transformer.outside();
        let resting = transformer.resting(placement.transformer) - transformer.outside();
        let working = transformer.working(placement.transformer) - transformer.outside();
        let (read, made) = match placement.take_turns {
            true => (base, base),
            false => (base + resting, base + encoder + own),
        };
        let kept = self.vlm.kept_bytes(facts.encode);
        let libraries = if self.precision.device.is_cuda() { GPU_LIBRARIES_BYTES } else { 0 };
        let held =
            SMALL_BYTES + libraries + facts.pictures + kept * facts.kept[0].max(facts.kept[1]);
        let tiling = tiling(placement, autoencoder.pixels_per_latent());
        let sides = |size: Size| [size.height as usize, size.width as usize];
        let encoding = |size| autoencoder.encoding_bytes(sides(size), &tiling, self.precision);
        let encoding = facts.sizes.latent.iter().copied().map(encoding);
        let decoding =
            autoencoder.decoding_bytes(sides(facts.sizes.working), &tiling, self.precision);
        let modulation = transformer.modulation(facts.steps);
        let stage = |stage, weights_bytes, activation_bytes| StageMemory {
            stage,
            weights_bytes,
            activation_bytes: activation_bytes + held,
        };
        let mut stages = Vec::new();
        if let Some(load) = facts.plan {
            let model = self.planner.model(self.vlm);
            let weights = match (placement.take_turns, own) {
                (false, own) => read + encoder + own,
                (true, 0) => read + encoder,
                (true, own) => read + own,
            };
            let work = model.activation_bytes(load) + model.kept_bytes(load);
            // Meanwhile the blocks may still be read.
            let loading = model.loading_bytes(self.precision);
            let work = work + if turns { loading } else { transformer.loading() };
            stages.push(stage(Stage::Plan, weights, work));
        }
        let others = if placement.take_turns { 0 } else { own };
        let encode = self.vlm.activation_bytes(facts.encode);
        let encode = encode + if turns { self.vlm.loading_bytes(self.precision) } else { 0 };
        stages.push(stage(Stage::EncodePrompt, read + encoder + others, encode));
        let waiting = if placement.take_turns { 0 } else { resting };
        stages.push(stage(Stage::EncodePicture, made + waiting, encoding.max().unwrap_or(0)));
        let reads = turns || placement.transformer != Residency::Resident;
        let loading = if reads { transformer.loading() } else { 0 };
        let step = transformer.activations(facts.tokens, placement.guidance, threads)
            + modulation
            + loading;
        stages.push(stage(Stage::Denoise, made + working, step));
        stages.push(stage(Stage::Decode, made + resting, decoding + modulation));
        stages
    }

    /// What opening an engine takes at most under a placement.
    pub(super) fn opening(self, placement: Placement) -> u64 {
        let Known { transformer, vae_bytes, lora_bytes, .. } = self.known;
        let own = self.planner.own_weight_bytes(self.precision);
        let encoder = self.vlm.weight_bytes(self.precision, own.is_none());
        let own_loading = self.planner.model(self.vlm).loading_bytes(self.precision);
        let loading = self.vlm.loading_bytes(self.precision).max(own_loading);
        let base = vae_bytes + lora_bytes;
        match placement.take_turns {
            true => base + transformer.outside() + encoder + loading.max(transformer.loading()),
            false => {
                let weights = transformer.resting(placement.transformer) + encoder;
                base + weights + own.unwrap_or(0) + loading.max(transformer.loading())
            }
        }
    }
}

/// How the autoencoder works under a placement.
pub(super) fn tiling(placement: Placement, unit_px: usize) -> Tiling {
    match placement.tile_px {
        None => Tiling::default(),
        Some(tile_px) => {
            // Half a tile, in whole units of latents.
            let overlap_px = (tile_px >> 1).div_euclid(unit_px.max(1)) * unit_px;
            let overlap_px = overlap_px.min(Tiling::default().overlap_px);
            Tiling { above_pixels: 0, tile_px, overlap_px }
        }
    }
}
