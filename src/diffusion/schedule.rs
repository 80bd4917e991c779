//! The noise levels of a denoising run: the flow-matching Euler schedule.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::Deserialize;
use serde_json::Value;

use super::config_check::{refuse_unknown_keys, require_class};
use crate::{
    error::{Error, Result},
    ops,
    weights::ModelFiles,
};

/// Where the config lies in a model folder.
const CONFIG: &str = "scheduler/scheduler_config.json";
/// The most steps of one run: the schedules are trained on as many levels.
pub const STEPS_MAX: usize = 1000;

#[derive(Debug, Deserialize)]
struct RawConfig {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    #[serde(default = "default_train_timesteps")]
    num_train_timesteps: u32,
    #[serde(default = "one")]
    shift: f64,
    #[serde(default)]
    use_dynamic_shifting: bool,
    #[serde(default = "default_base_shift")]
    base_shift: Option<f64>,
    #[serde(default = "default_max_shift")]
    max_shift: Option<f64>,
    #[serde(default = "default_base_tokens")]
    base_image_seq_len: f64,
    #[serde(default = "default_max_tokens")]
    max_image_seq_len: f64,
    #[serde(default)]
    invert_sigmas: bool,
    shift_terminal: Option<f64>,
    #[serde(default)]
    use_karras_sigmas: bool,
    #[serde(default)]
    use_exponential_sigmas: bool,
    #[serde(default)]
    use_beta_sigmas: bool,
    time_shift_type: Option<String>,
    #[serde(default)]
    stochastic_sampling: bool,
    #[serde(flatten)]
    unknown: BTreeMap<String, Value>,
}

fn default_train_timesteps() -> u32 {
    1000
}
fn one() -> f64 {
    1.0
}
#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn default_base_shift() -> Option<f64> {
    Some(0.5)
}
#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn default_max_shift() -> Option<f64> {
    Some(1.15)
}
fn default_base_tokens() -> f64 {
    256.0
}
fn default_max_tokens() -> f64 {
    4096.0
}

/// How noise levels move towards the noisy end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shift {
    /// By the same factor for all pictures.
    Static(f64),
    /// By the number of image tokens, which decides `mu`.
    Dynamic { curve: DynamicShift, kind: TimeShift },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum TimeShift {
    Exponential,
    Linear,
}

/// `mu` is a straight line over the number of image tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
struct DynamicShift {
    base_tokens: f64,
    max_tokens: f64,
    base_shift: f64,
    max_shift: f64,
}

/// What the shifted levels are spread over again.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spacing {
    Shifted,
    Karras,
    Exponential,
}

/// A scheduler's config, checked.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py>.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleConfig {
    train_timesteps: u32,
    shift: Shift,
    shift_terminal: Option<f64>,
    spacing: Spacing,
    invert: bool,
}

impl ScheduleConfig {
    /// Reads `scheduler/scheduler_config.json`.
    ///
    /// # Errors
    /// A file that is missing or damaged, another scheduler, or a field whose value changes the
    /// arithmetic to something that is not computed here.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let raw: RawConfig = files.read_json(CONFIG)?;
        let refuse = |field: &str, found: &dyn ToString, expected: &str| {
            Err(files.config(CONFIG, field, found.to_string(), expected))
        };
        require_class(files, CONFIG, raw.class_name.as_deref(), "FlowMatchEulerDiscreteScheduler")?;
        refuse_unknown_keys(files, CONFIG, &raw.unknown, &[])?;
        if raw.use_beta_sigmas {
            return refuse("use_beta_sigmas", &true, "false");
        }
        if raw.stochastic_sampling {
            return refuse("stochastic_sampling", &true, "false");
        }
        if raw.use_karras_sigmas && raw.use_exponential_sigmas {
            return refuse("use_karras_sigmas", &true, "false beside use_exponential_sigmas");
        }
        if raw.num_train_timesteps == 0 {
            return refuse("num_train_timesteps", &0, "at least 1");
        }
        if let Some(terminal) = raw.shift_terminal
            && !(0.0..1.0).contains(&terminal)
        {
            return refuse("shift_terminal", &terminal, "null, or from 0 to below 1");
        }
        let spacing = match (raw.use_karras_sigmas, raw.use_exponential_sigmas) {
            (true, _) => Spacing::Karras,
            (_, true) => Spacing::Exponential,
            _ => Spacing::Shifted,
        };
        Ok(Self {
            train_timesteps: raw.num_train_timesteps,
            shift: shift_of(files, &raw)?,
            // The reference takes 0 for "none".
            shift_terminal: raw.shift_terminal.filter(|&terminal| terminal > 0.0),
            spacing,
            invert: raw.invert_sigmas,
        })
    }

    /// The schedule that the Lightning LoRA files were distilled with, on this schedule's scale of
    /// timesteps: shifted by the same `mu` = ln 3 for pictures of all sizes, down to a level that
    /// nothing stretches. They are made for 4 or 8 steps without guidance.
    ///
    /// Reference: `scheduler_config` in
    /// <https://github.com/ModelTC/Qwen-Image-Lightning/blob/main/generate_with_diffusers.py>.
    #[must_use]
    pub fn lightning(&self) -> Self {
        let mu = 3.0_f64.ln();
        let curve = DynamicShift {
            base_tokens: default_base_tokens(),
            max_tokens: default_max_tokens(),
            base_shift: mu,
            max_shift: mu,
        };
        Self {
            train_timesteps: self.train_timesteps,
            shift: Shift::Dynamic { curve, kind: TimeShift::Exponential },
            shift_terminal: None,
            spacing: Spacing::Shifted,
            invert: false,
        }
    }

    /// The levels of a run of `steps` steps over a picture of `image_tokens` tokens (without the
    /// references).
    ///
    /// # Errors
    /// No steps, more than [`STEPS_MAX`], or so few that the reference divides by zero.
    pub fn schedule(&self, steps: usize, image_tokens: usize) -> Result<Schedule> {
        self.check_steps(steps)?;
        let mut sigmas: Vec<f32> = even_levels(steps);
        self.apply_shift(&mut sigmas, image_tokens);
        if let Some(terminal) = self.shift_terminal {
            stretch_to_terminal(&mut sigmas, terminal);
        }
        let mut sigmas = respace(sigmas, self.spacing);
        if self.invert {
            sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - *sigma);
        }
        if !sigmas.iter().all(|sigma| sigma.is_finite()) {
            return Err(Error::field("steps", steps, "a number of steps with finite noise levels"));
        }
        let scale = f32_of(f64::from(self.train_timesteps));
        let timesteps = sigmas.iter().map(|sigma| sigma * scale).collect();
        sigmas.push(if self.invert { 1.0 } else { 0.0 });
        Ok(Schedule { sigmas, timesteps })
    }

    /// Whether a run can have `steps` steps.
    ///
    /// # Errors
    /// As [`Self::schedule`].
    pub fn check_steps(&self, steps: usize) -> Result<()> {
        // With one step the level is 1, and a stretch towards a terminal value divides by zero.
        let steps_min = if self.shift_terminal.is_some() { 2 } else { 1 };
        if (steps_min..=STEPS_MAX).contains(&steps) {
            return Ok(());
        }
        Err(Error::field("steps", steps, format!("{steps_min} to {STEPS_MAX}")))
    }

    fn apply_shift(&self, sigmas: &mut [f32], image_tokens: usize) {
        match self.shift {
            Shift::Static(shift) => {
                let (factor, rest) = (f32_of(shift), f32_of(shift - 1.0));
                for sigma in sigmas {
                    *sigma = factor * *sigma / (1.0 + rest * *sigma);
                }
            }
            Shift::Dynamic { curve, kind } => {
                let mu = curve.mu(image_tokens);
                let factor = match kind {
                    TimeShift::Exponential => f32_of(mu.exp()),
                    TimeShift::Linear => f32_of(mu),
                };
                for sigma in sigmas {
                    *sigma = factor / (factor + (1.0 / *sigma - 1.0));
                }
            }
        }
    }
}

impl DynamicShift {
    /// Reference: `calculate_shift` of the pipelines.
    fn mu(&self, image_tokens: usize) -> f64 {
        let slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens);
        let start = self.base_shift - slope * self.base_tokens;
        image_tokens as f64 * slope + start
    }
}

fn shift_of(files: &ModelFiles, raw: &RawConfig) -> Result<Shift> {
    let kind = match raw.time_shift_type.as_deref() {
        None | Some("exponential") => TimeShift::Exponential,
        Some("linear") => TimeShift::Linear,
        Some(other) => {
            return Err(files.config(CONFIG, "time_shift_type", other, "exponential or linear"));
        }
    };
    if !raw.use_dynamic_shifting {
        if !(raw.shift.is_finite() && raw.shift > 0.0) {
            return Err(files.config(CONFIG, "shift", raw.shift, "a number above 0"));
        }
        return Ok(Shift::Static(raw.shift));
    }
    let number = |field: &str, value: Option<f64>| match value {
        Some(value) if value.is_finite() => Ok(value),
        Some(value) => Err(files.config(CONFIG, field, value, "a finite number")),
        None => Err(files.config(CONFIG, field, "null", "a number beside use_dynamic_shifting")),
    };
    let curve = DynamicShift {
        base_tokens: number("base_image_seq_len", Some(raw.base_image_seq_len))?,
        max_tokens: number("max_image_seq_len", Some(raw.max_image_seq_len))?,
        base_shift: number("base_shift", raw.base_shift)?,
        max_shift: number("max_shift", raw.max_shift)?,
    };
    if curve.max_tokens <= curve.base_tokens {
        let expected = format!("more than base_image_seq_len = {}", curve.base_tokens);
        return Err(files.config(CONFIG, "max_image_seq_len", curve.max_tokens, expected));
    }
    Ok(Shift::Dynamic { curve, kind })
}

/// `numpy.linspace(1.0, 1 / steps, steps)` in float32.
fn even_levels(steps: usize) -> Vec<f32> {
    let last = 1.0 / steps as f64;
    let gap = (last - 1.0) / (steps.max(2) - 1) as f64;
    let mut levels: Vec<f32> = (0..steps).map(|i| f32_of(i as f64 * gap + 1.0)).collect();
    if let Some(level) = levels.last_mut()
        && steps > 1
    {
        *level = f32_of(last);
    }
    levels
}

/// Stretches the levels so that the last one is `terminal`.
fn stretch_to_terminal(sigmas: &mut [f32], terminal: f64) {
    let Some(&last) = sigmas.last() else { return };
    let scale = (1.0 - last) / f32_of(1.0 - terminal);
    for sigma in sigmas {
        *sigma = 1.0 - (1.0 - *sigma) / scale;
    }
}

/// Spreads the levels between the first and the last one anew, in float64.
fn respace(sigmas: Vec<f32>, spacing: Spacing) -> Vec<f32> {
    const RHO: f64 = 7.0;
    let (Some(&first), Some(&last)) = (sigmas.first(), sigmas.last()) else { return sigmas };
    let (max, min) = (f64::from(first), f64::from(last));
    let ramp = |start: f64, end: f64, i: usize| match sigmas.len() {
        1 => start,
        count if i + 1 == count => end,
        count => start + i as f64 * ((end - start) / (count - 1) as f64),
    };
    let level = |i: usize| match spacing {
        Spacing::Shifted => f64::from(sigmas[i]),
        Spacing::Karras => {
            let (max, min) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
            (max + ramp(0.0, 1.0, i) * (min - max)).powf(RHO)
        }
        Spacing::Exponential => ramp(max.ln(), min.ln(), i).exp(),
    };
    (0..sigmas.len()).map(|i| f32_of(level(i))).collect()
}

/// The levels of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
}

impl Schedule {
    /// Number of steps.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// The share of noise before each step, and after the last.
    #[must_use]
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The same levels on the scale of training steps, 1000 to 0; one per step.
    #[must_use]
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// One Euler step: the latents after step `step` (from 0), from those before it and the
    /// velocity that the model predicts there. All `[b, n, c]` in float32.
    ///
    /// # Errors
    /// A step that is not there, shapes that differ, or a failure of the device.
    pub fn advance(&self, step: usize, latents: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        self.advance_guided(step, latents, velocity, None)
    }

    /// [`Self::advance`] by the guided velocity of a positive and a negative prediction with their
    /// scale: [`ops::guided_step`].
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn advance_guided(
        &self,
        step: usize,
        latents: &Tensor,
        positive: &Tensor,
        negative: Option<(&Tensor, f64)>,
    ) -> Result<Tensor> {
        let Some([sigma, next]) = self.sigmas.get(step..).and_then(|rest| rest.first_chunk())
        else {
            return Err(Error::field("step", step, format!("below {}", self.steps())));
        };
        let distance = next - sigma;
        Ok(ops::guided_step(latents, positive, negative, f64::from(distance))?)
    }
}

/// The nearest float32: the reference keeps levels in float32 and constants in float64.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
fn f32_of(x: f64) -> f32 {
    x as f32
}
