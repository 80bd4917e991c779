//! The denoising loop.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use super::{
    finite::require_finite,
    qwen_image::{
        BlockCache, Conditioning, Grid, Outputs, Places, RecordedStep, Requests, StepCache,
        StepContext, StepsRecorded, Transformer,
    },
    schedule::Schedule,
};
use crate::{
    error::{Error, Result},
    memory::Lead,
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
    /// What the host took to queue each step, without the time in which it waited.
    pub host: Vec<Duration>,
    /// Steps that a device started as a whole.
    pub recorded: Option<StepsRecorded>,
    /// Why steps were not recorded, or not to the end.
    pub unrecorded: Option<String>,
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
    /// Inputs that do not fit the model, [`Error::Cancelled`], checked once per block, or once per step where
    /// steps are recorded, [`Error::NotFinite`] after the first or the last step, or a failure of the device.
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
        let begin = Instant::now();
        let _buffers = ops::KeepBuffers::new();
        let of = self.schedule.steps();
        let device = &model.precision().device;
        let mut latents = self.noise.to_device(device)?.to_dtype(DType::F32)?;
        let mut run = Run::new(self, model, cache, cancel)?;
        for (chunk, timesteps) in self.schedule.timesteps().chunks(STEPS_TOGETHER).enumerate() {
            let times: Vec<f32> = timesteps.iter().map(|t| t / TIMESTEP_SCALE).collect();
            let contexts = model.kept_contexts(&times, cancel)?;
            for (i, context) in contexts.iter().enumerate() {
                let step = chunk * STEPS_TOGETHER + i;
                let elapsed = begin.elapsed();
                observer.event(&Event::Step { stage: Stage::Denoise, step, of, elapsed });
                latents = run.step(step, &latents, context)?;
                if step == 0 || step + 1 == of {
                    require_finite(&latents, Stage::Denoise)?;
                }
                // A GPU's queue would be told as work that is done, and could not be cancelled.
                device.synchronize()?;
                run.take_memory();
                record(step, &latents);
            }
        }
        Ok(run.ended(latents))
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

/// A run under way.
struct Run<'a> {
    denoise: &'a Denoise<'a>,
    model: &'a Transformer,
    cancel: &'a CancelToken,
    /// `[1, m, latent_dim]` in float32 where the model computes.
    references: Option<Tensor>,
    cache: Option<StepCache>,
    caches: Option<[BlockCache; 2]>,
    host: Vec<Duration>,
    recorded: Option<RecordedStep<'a>>,
    /// Whether the recorded step has its memory.
    ready: bool,
    unrecorded: Option<String>,
    /// Whether recording a step was tried.
    tried: bool,
}

impl<'a> Run<'a> {
    fn new(
        denoise: &'a Denoise<'a>,
        model: &'a Transformer,
        cache: Option<StepCache>,
        cancel: &'a CancelToken,
    ) -> Result<Self> {
        let device = &model.precision().device;
        Ok(Self {
            denoise,
            model,
            cancel,
            references: match denoise.references {
                Some(references) => Some(references.to_device(device)?.to_dtype(DType::F32)?),
                None => None,
            },
            cache,
            caches: cache.map(|settings| [settings, settings].map(BlockCache::new)),
            host: Vec::with_capacity(denoise.schedule.steps()),
            recorded: None,
            ready: false,
            unrecorded: None,
            tried: false,
        })
    }

    /// Queues one step; returns the latents after it.
    fn step(&mut self, step: usize, latents: &Tensor, context: &StepContext) -> Result<Tensor> {
        let begin = Instant::now();
        if let Some(velocities) = self.as_recorded(latents, context)? {
            let latents = self.advance(step, latents, &velocities)?;
            self.host.push(begin.elapsed());
            return Ok(latents);
        }
        let tokens = match &self.references {
            Some(references) => Tensor::cat(&[latents, references], 1)?, // (1, n + m, c)
            None => latents.clone(),
        };
        let mut lead = self.model.lead();
        let velocities = self.velocities(step, &tokens, context, &mut lead)?;
        let latents = self.advance(step, latents, &velocities)?;
        let took = begin.elapsed();
        self.host.push(took.saturating_sub(lead.waited()));
        self.record(step, took, || Places::like(&tokens, context, &velocities));
        Ok(latents)
    }

    /// The velocities of a recorded step, where there is one. What goes wrong with it is gone when the step is
    /// computed anew, or shows again.
    fn as_recorded(
        &mut self,
        latents: &Tensor,
        context: &StepContext,
    ) -> Result<Option<Vec<Tensor>>> {
        let Some(recorded) = &mut self.recorded else { return Ok(None) };
        match recorded.run(self.model, (latents, context), self.cancel) {
            Ok(velocities) => Ok(Some(velocities)),
            Err(Error::Cancelled) => Err(Error::Cancelled),
            Err(error) => {
                self.give_up(&error);
                Ok(None)
            }
        }
    }

    /// The prediction, and the one for the negative prompt where there is guidance. Both go through
    /// the transformer block by block, so that weights that are not in memory are read once for both.
    fn velocities(
        &mut self,
        step: usize,
        tokens: &Tensor,
        context: &StepContext,
        lead: &mut Lead,
    ) -> Result<Vec<Tensor>> {
        let mut branches = self.requests().branches(tokens);
        let allowed = self.cache.is_some_and(|of| of.allows(step, self.denoise.schedule.steps()));
        for (branch, cache) in branches.iter_mut().zip(self.caches.iter_mut().flatten()) {
            cache.allow(allowed);
            branch.cache = Some(cache);
        }
        self.model.predict(&mut branches, (context, Outputs::Target), lead, self.cancel)
    }

    fn requests(&self) -> Requests<'a> {
        let negative = self.denoise.negative.filter(|_| self.denoise.is_guided());
        let conditionings = [Some(self.denoise.positive), negative];
        Requests {
            grids: self.denoise.grids,
            conditionings: conditionings.into_iter().flatten().collect(),
        }
    }

    fn advance(&self, step: usize, latents: &Tensor, velocities: &[Tensor]) -> Result<Tensor> {
        let Denoise { schedule, cfg_scale, .. } = *self.denoise;
        match velocities {
            [positive, negative] => {
                let negative = Some((negative, cfg_scale));
                Ok(schedule.advance_guided(step, latents, positive, negative)?)
            }
            velocities => Ok(schedule.advance(step, latents, &velocities[0])?),
        }
    }

    /// Records the next steps while the device computes this one, where that is right and worth it.
    fn record(&mut self, step: usize, took: Duration, places: impl FnOnce() -> Result<Places>) {
        if self.tried {
            return;
        }
        let left = (self.denoise.schedule.steps() - step).saturating_sub(1);
        if let Some(against) = self.model.against_recording((left, took), self.caches.is_some()) {
            self.unrecorded.get_or_insert_with(|| against.to_owned());
            return;
        }
        self.tried = true;
        let recorded =
            places().and_then(|places| self.model.record(self.requests(), places, self.cancel));
        match recorded {
            Ok(recorded) => {
                self.recorded = Some(recorded);
                self.unrecorded = None;
            }
            Err(error) => self.give_up(&error),
        }
    }

    /// Lets what was recorded have its memory, when the device has done everything before it.
    fn take_memory(&mut self) {
        if self.ready {
            return;
        }
        let Some(recorded) = &mut self.recorded else { return };
        match recorded.take_memory(self.model) {
            Ok(()) => self.ready = true,
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &Error) {
        let why = error.to_string();
        // What follows the first line is a trace.
        let why = why.lines().next().unwrap_or_default();
        tracing::debug!(why, "steps are not recorded");
        self.recorded = None;
        self.unrecorded = Some(why.to_owned());
    }

    fn ended(self, latents: Tensor) -> Denoised {
        let reused = self.caches.iter().flatten().map(BlockCache::reused).sum();
        let recorded = self.recorded.map(|recorded| recorded.told);
        tracing::debug!(?recorded, unrecorded = ?self.unrecorded, "denoised");
        let Self { host, unrecorded, .. } = self;
        Denoised { latents, reused, host, recorded, unrecorded }
    }
}
