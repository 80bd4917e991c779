//! The denoising loop.

use std::time::Instant;

use candle_core::{D, DType, Tensor};

use super::{
    guidance::rescaled_guidance,
    qwen_image::{Conditioning, Grid, ModelInput, Outputs, StepContext, Transformer},
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
        self.check(model)?;
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
                let velocity = self.velocity(model, &tokens, context, cancel)?;
                latents = self.schedule.advance(step, &latents, &velocity)?;
                if step == 0 || step + 1 == of {
                    require_finite(&latents)?;
                }
                record(step, &latents);
            }
        }
        Ok(latents)
    }

    fn velocity(
        &self,
        model: &Transformer,
        tokens: &Tensor,
        context: &StepContext,
        cancel: &CancelToken,
    ) -> Result<Tensor> {
        let predict = |conditioning| {
            let input = ModelInput { tokens, grids: self.grids, conditioning };
            model.forward(&input, context, Outputs::Target, cancel)
        };
        let positive = predict(self.positive)?;
        match self.negative.filter(|_| self.is_guided()) {
            Some(negative) => rescaled_guidance(&positive, &predict(negative)?, self.cfg_scale),
            None => Ok(positive),
        }
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

/// Refuses latents that hold NaN or infinity.
fn require_finite(latents: &Tensor) -> Result<()> {
    // A sum is finite only if all of its token is, and reads far fewer numbers back from a device.
    let sums = latents.abs()?.sum(D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
    if sums.iter().all(|sum| sum.is_finite()) {
        return Ok(());
    }
    let values = latents.flatten_all()?.to_vec1::<f32>()?;
    let count = values.iter().filter(|value| !value.is_finite()).count();
    if count == 0 {
        return Ok(()); // large, but finite
    }
    Err(Error::NotFinite {
        stage: Stage::Denoise.label(),
        count,
        total: values.len(),
        hint: "the weights may be damaged; a wider type of the computation may help, too",
    })
}
