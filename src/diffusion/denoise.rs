//! The denoising loop.

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::{
    finite::require_finite,
    qwen_image::{
        BlockCache, Branch, Conditioning, Grid, ModelInput, Outputs, StepCache, StepContext,
        Transformer,
    },
    schedule::Schedule,
};
use crate::{
    error::{Error, Result},
    ops,
    progress::{CancelToken, Event, Observer, Stage},
};

/// Steps whose modulation is computed together: enough to read its weights seldom, few enough that
/// the vectors stay small beside the model.
const STEPS_TOGETHER: usize = 8;
/// The model sees timesteps on a scale of 1, whatever the schedule was trained on.
const TIMESTEP_SCALE: f32 = 1000.0;

/// What is denoised, and under which conditions.
#[derive(Debug, Clone, Copy)]
pub struct Denoise<'a> {
    /// `[1, n, latent_dim]`: noise to begin with.
    pub noise: &'a Tensor,
    /// `[1, m, latent_dim]`: the references' tokens, one picture after the other.
    pub references: Option<&'a Tensor>,
    /// Size of each picture in tokens: the one that is denoised, then the references.
    pub grids: &'a [Grid],
    /// What is asked for.
    pub positive: &'a Conditioning,
    /// What to stay away from. Guidance needs it and a `cfg_scale` above 1; otherwise the model
    /// runs once per step.
    pub negative: Option<&'a Conditioning>,
    /// Strength of the guidance.
    pub cfg_scale: f64,
    /// The levels of noise.
    pub schedule: &'a Schedule,
}

/// The result of a run, and how it came about.
#[derive(Debug)]
pub struct Denoised {
    /// The last latents, `[1, n, latent_dim]` in float32.
    pub latents: Tensor,
    /// Predictions, one a step or two with guidance, that ended after the first block.
    pub reused: usize,
}

impl Denoise<'_> {
    /// Whether both predictions are made and combined.
    #[must_use]
    pub fn is_guided(&self) -> bool {
        self.negative.is_some() && self.cfg_scale > 1.0
    }

    /// Runs all steps; `record` receives the number of each step (from 0) and the latents after it.
    /// Returns the last latents, `[1, n, latent_dim]` in float32.
    ///
    /// Reference: the numbered part 6 of the pipelines,
    /// <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py#L799-L871>.
    ///
    /// # Errors
    /// Inputs that do not fit the model, [`Error::Cancelled`], checked once per block,
    /// [`Error::NotFinite`] after the first or the last step, or a failure of the device.
    pub fn run(
        &self,
        model: &Transformer,
        observer: &dyn Observer,
        cancel: &CancelToken,
        record: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Tensor> {
        Ok(self.run_cached(model, None, observer, cancel, record)?.latents)
    }

    /// As [`Self::run`]; with a cache, steps that differ little are left out.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_cached(
        &self,
        model: &Transformer,
        cache: Option<StepCache>,
        observer: &dyn Observer,
        cancel: &CancelToken,
        record: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Denoised> {
        self.check(model)?;
        let mut caches = cache.map(|settings| [settings, settings].map(BlockCache::new));
        let begin = Instant::now();
        let _buffers = ops::KeepBuffers::new();
        let of = self.schedule.steps();
        let device = &model.precision().device;
        let mut latents = self.noise.to_device(device)?.to_dtype(DType::F32)?;
        let references = match self.references {
            Some(references) => Some(references.to_device(device)?.to_dtype(DType::F32)?),
            None => None,
        };
        for (chunk, timesteps) in self.schedule.timesteps().chunks(STEPS_TOGETHER).enumerate() {
            let times: Vec<f32> = timesteps.iter().map(|t| t / TIMESTEP_SCALE).collect();
            let contexts = model.kept_contexts(&times, cancel)?;
            for (i, context) in contexts.iter().enumerate() {
                let step = chunk * STEPS_TOGETHER + i;
                let elapsed = begin.elapsed();
                observer.event(&Event::Step { stage: Stage::Denoise, step, of, elapsed });
                let tokens = match &references {
                    Some(references) => Tensor::cat(&[&latents, references], 1)?, // (1, n + m, c)
                    None => latents.clone(),
                };
                for branch in caches.iter_mut().flatten() {
                    branch.allow(cache.is_some_and(|cache| cache.allows(step, of)));
                }
                let velocities =
                    self.velocities(model, &tokens, context, caches.as_mut(), cancel)?;
                latents = match velocities.as_slice() {
                    [positive, negative] => {
                        let negative = Some((negative, self.cfg_scale));
                        self.schedule.advance_guided(step, &latents, positive, negative)?
                    }
                    velocities => self.schedule.advance(step, &latents, &velocities[0])?,
                };
                if step == 0 || step + 1 == of {
                    require_finite(&latents, Stage::Denoise)?;
                }
                // A GPU's queue would be told as work that is done, and could not be cancelled.
                device.synchronize()?;
                record(step, &latents);
            }
        }
        let reused = caches.iter().flatten().map(BlockCache::reused).sum();
        Ok(Denoised { latents, reused })
    }

    /// The prediction, and the one for the negative prompt where there is guidance. Both go through
    /// the transformer block by block, so that weights that are not in memory are read once for both.
    fn velocities(
        &self,
        model: &Transformer,
        tokens: &Tensor,
        context: &StepContext,
        caches: Option<&mut [BlockCache; 2]>,
        cancel: &CancelToken,
    ) -> Result<Vec<Tensor>> {
        let negative = self.negative.filter(|_| self.is_guided());
        let caches = caches.map(|[positive, negative]| (Some(positive), Some(negative)));
        let (first, second) = caches.unwrap_or_default();
        let branch = |conditioning, cache| {
            let input = ModelInput { tokens, grids: self.grids, conditioning };
            Branch { input, cache }
        };
        let mut branches = vec![branch(self.positive, first)];
        branches.extend(negative.map(|negative| branch(negative, second)));
        model.forward_each(&mut branches, context, Outputs::Target, cancel)
    }

    fn check(&self, model: &Transformer) -> Result<()> {
        if !self.cfg_scale.is_finite() {
            return Err(Error::field("cfg-scale", self.cfg_scale, "a finite number"));
        }
        let tokens = self.grids.first().map_or(0, |grid| grid.tokens());
        let expected = [1, tokens, model.config().latent_dim];
        if self.noise.dims() != expected {
            let found = format!("{:?}", self.noise.dims());
            return Err(Error::field("noise", found, format!("{expected:?}")));
        }
        Ok(())
    }
}
