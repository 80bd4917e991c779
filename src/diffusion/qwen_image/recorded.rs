//! A step's prediction, recorded once on a device and started as a whole for later steps.
//!
//! What is recorded reads and writes at fixed places: the tokens, the vectors of the step's modulation, and the
//! velocities. A step puts its own there first. Weights and what a pass knows of its tokens are kept alive as long
//! as the recording, which holds their addresses.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use candle_core::Tensor;

use super::{
    block::Block,
    layout::Layout,
    model::{Branch, Conditioning, ModelInput, Outputs, Transformer},
    modulation::StepContext,
    pack::Grid,
};
use crate::{
    error::{Error, Result},
    memory::{self, Budget, Limit},
    ops::cuda::{self, Recorded, Recording},
    progress::CancelToken,
};

/// A step that takes longer is not recorded: what was started as a whole cannot be cancelled.
const STEP_MAX: Duration = Duration::from_secs(1);
/// Steps for which recording one pays.
const STEPS_MIN: usize = 2;
/// What the device's default pool keeps for what lies between recorded steps, when it gives back what others
/// left: latents, and the modulation of further steps.
const BETWEEN_BYTES: u64 = 64 << 20;

/// Whether steps of the denoising loop are recorded on the device and started as a whole. What they compute is
/// the same, bit for bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StepRecording {
    /// Never.
    #[default]
    Off,
    /// Where the device records, all weights are in memory, no cache leaves out steps, and a step is short. Other
    /// threads must not queue work on the device meanwhile, unless they [said so](crate::diffusion::at_work), as an
    /// [`Engine`](crate::Engine) does.
    OnDevice,
    /// As `OnDevice`, and a device that does not record computes at the fixed places that a recording would have:
    /// for tests.
    Rehearsed,
}

/// What a model's steps are recorded by.
#[derive(Debug, Default)]
pub(super) struct Recorder(Mutex<(StepRecording, Limit)>);

impl Recorder {
    fn get(&self) -> (StepRecording, Limit) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut (StepRecording, Limit))) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What recorded steps were, and what recording them took.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepsRecorded {
    /// Steps that were started as a whole.
    pub steps: usize,
    /// What a step is.
    pub what: Recorded,
    /// Time to record one, while the device computes another.
    pub recording: Duration,
    /// Time to prepare what was recorded.
    pub preparing: Duration,
    /// Time for the device to give back what other steps left, and to take memory for recorded ones.
    pub taking_memory: Duration,
    /// The most bytes that graphs held before.
    pub early_bytes: u64,
    /// What the host took to start them, all together.
    pub starting: Duration,
}

/// What is asked for in each step.
#[derive(Debug, Clone)]
pub(crate) struct Requests<'a> {
    pub(crate) grids: &'a [Grid],
    pub(crate) conditionings: Vec<&'a Conditioning>,
}

impl<'a> Requests<'a> {
    /// One branch for each request.
    pub(crate) fn branches<'b>(&self, tokens: &'b Tensor) -> Vec<Branch<'b>>
    where
        'a: 'b,
    {
        let branch = |conditioning: &&'a Conditioning| {
            let input = ModelInput { tokens, grids: self.grids, conditioning };
            Branch { input, cache: None }
        };
        self.conditionings.iter().map(branch).collect()
    }
}

/// Where a recorded step reads and writes.
#[derive(Debug)]
pub(crate) struct Places {
    /// `[1, n + m, latent_dim]` in float32; the references stay.
    tokens: Tensor,
    context: StepContext,
    /// `[1, n, latent_dim]` in float32 for each request.
    velocities: Vec<Tensor>,
}

impl Places {
    /// Places for what a step had and made, filled with it.
    pub(crate) fn like(
        tokens: &Tensor,
        context: &StepContext,
        velocities: &[Tensor],
    ) -> Result<Self> {
        // As what is recorded does, so that its kernel is loaded by then.
        let place = |velocity: &Tensor| {
            let place = velocity.zeros_like()?;
            place.slice_set(velocity, 0, 0)?;
            Ok(place)
        };
        let velocities = velocities.iter().map(place);
        Ok(Self {
            tokens: tokens.force_contiguous()?,
            context: context.place()?,
            velocities: velocities.collect::<candle_core::Result<_>>()?,
        })
    }

    fn take(&self, latents: &Tensor, context: &StepContext) -> Result<()> {
        self.tokens.slice_set(latents, 1, 0)?;
        Ok(self.context.take(context)?)
    }
}

/// What decides whether a step is worth recording.
#[derive(Debug, Clone, Copy)]
struct Circumstances {
    /// Steps after this one.
    steps_left: usize,
    /// What this one took.
    took: Duration,
    /// Whether a cache may end a step in the middle.
    cached: bool,
    /// Whether all weights are in memory.
    whole: bool,
}

impl Circumstances {
    /// Why not.
    fn against(self) -> Option<&'static str> {
        match self {
            Self { cached: true, .. } => Some("a cache may end a step in the middle"),
            Self { whole: false, .. } => Some("weights are not all in memory"),
            Self { steps_left, .. } if steps_left < STEPS_MIN => Some("few steps are left"),
            Self { took, .. } if took > STEP_MAX => Some("a step takes long"),
            _ => None,
        }
    }
}

/// Whether so many bytes fit what is left; what nobody knows does.
fn fits(room: Option<u64>, bytes: u64) -> bool {
    room.is_none_or(|room| bytes <= room)
}

/// A step that was recorded.
pub(crate) struct RecordedStep<'a> {
    /// Dropped before what it has the addresses of; `None` where the device does not record.
    recording: Option<Recording>,
    requests: Requests<'a>,
    places: Places,
    blocks: Vec<Arc<Block>>,
    _layouts: Vec<Arc<Layout>>,
    prepared: bool,
    pub(crate) told: StepsRecorded,
}

impl Transformer {
    /// Chooses whether steps are recorded from now on.
    pub fn set_step_recording(&self, recording: StepRecording) {
        self.recorder.set(|(choice, _)| *choice = recording);
    }

    /// Sets the ceiling of the device's memory that recorded steps keep to.
    pub fn set_memory_limit(&self, limit: Limit) {
        self.recorder.set(|(_, of)| *of = limit);
    }

    /// Why the next steps cannot be recorded, after one that took so long; `None` where they can.
    pub(crate) fn against_recording(
        &self,
        (steps_left, took): (usize, Duration),
        cached: bool,
    ) -> Option<&'static str> {
        let here = match self.recorder.get().0 {
            StepRecording::Off => false,
            StepRecording::OnDevice => cuda::records(&self.precision().device),
            StepRecording::Rehearsed => true,
        };
        if !here {
            return Some("this device does not record");
        }
        let whole = self.whole().is_some();
        Circumstances { steps_left, took, cached, whole }.against()
    }

    /// Records the prediction of a step at `places`, after one like it was made; nothing runs yet.
    ///
    /// # Errors
    /// Work that cannot be recorded, or a failure of the device.
    pub(crate) fn record<'a>(
        &self,
        requests: Requests<'a>,
        places: Places,
        cancel: &CancelToken,
    ) -> Result<RecordedStep<'a>> {
        let begin = Instant::now();
        let blocks = self.whole().ok_or_else(|| declined("weights are not all in memory"))?;
        let layouts = self.layouts_of(&requests, &places.tokens)?;
        let device = &self.precision().device;
        let recording = match cuda::records(device) {
            true => Some(Recording::of(device, || {
                let predicted = self.predict_at(&places, &requests, &blocks, cancel);
                predicted.map_err(candle_core::Error::wrap)
            })?),
            false => None,
        };
        let what = recording.as_ref().map(Recording::what).unwrap_or_default();
        let told = StepsRecorded { what, recording: begin.elapsed(), ..StepsRecorded::default() };
        let mut made = RecordedStep {
            recording,
            requests,
            places,
            blocks,
            _layouts: layouts,
            prepared: false,
            told,
        };
        // The device still computes. Should it take memory for this, both fit.
        if fits(self.room(), what.bytes) {
            made.prepare()?;
            made.told.early_bytes = memory::recorded_bytes(device);
        }
        Ok(made)
    }

    /// Bytes that recorded steps may still take.
    fn room(&self) -> Option<u64> {
        let budget = Budget { vram: self.recorder.get().1, ..Budget::default() };
        budget.room(&self.precision().device)
    }

    /// What a pass knows of its tokens, of all requests alone and as one batch.
    fn layouts_of(&self, requests: &Requests<'_>, tokens: &Tensor) -> Result<Vec<Arc<Layout>>> {
        let branches = requests.branches(tokens);
        let inputs: Vec<ModelInput<'_>> = branches.iter().map(|branch| branch.input).collect();
        if self.goes_in_one_batch(&branches) {
            return Ok(vec![self.layout(&inputs)?]);
        }
        inputs.iter().map(|input| self.layout(std::slice::from_ref(input))).collect()
    }

    /// Predicts what is asked for at `places`.
    fn predict_at(
        &self,
        places: &Places,
        requests: &Requests<'_>,
        blocks: &[Arc<Block>],
        cancel: &CancelToken,
    ) -> Result<()> {
        let mut branches = requests.branches(&places.tokens);
        let of = (&places.context, Outputs::Target);
        let made = self.predict_with(blocks, &mut branches, of, cancel)?;
        for (place, velocity) in places.velocities.iter().zip(&made) {
            place.slice_set(velocity, 0, 0)?;
        }
        Ok(())
    }
}

impl RecordedStep<'_> {
    fn prepare(&mut self) -> Result<()> {
        let begin = Instant::now();
        if let Some(recording) = &mut self.recording {
            recording.prepare()?;
        }
        self.prepared = true;
        self.told.preparing = begin.elapsed();
        Ok(())
    }

    /// Takes the memory, of which a device gives back what other steps left. To be called when the device
    /// has done all.
    ///
    /// # Errors
    /// No room in the budget or on the device, or a failure of the device.
    pub(crate) fn take_memory(&mut self, model: &Transformer) -> Result<()> {
        let begin = Instant::now();
        let device = &model.precision().device;
        // What a step takes is not held twice.
        if self.recording.is_some() {
            memory::trim_device(device, BETWEEN_BYTES);
        }
        if !self.prepared {
            if !fits(model.room(), self.told.what.bytes) {
                return Err(declined("there is no room for it"));
            }
            self.prepare()?;
        }
        if let Some(recording) = &self.recording {
            recording.take_memory()?;
        }
        self.told.taking_memory = begin.elapsed();
        Ok(())
    }

    /// The velocities for the requests; the next step's are at the same places.
    ///
    /// # Errors
    /// [`Error::Cancelled`], checked before the step, or a failure of the device.
    pub(crate) fn run(
        &mut self,
        model: &Transformer,
        (latents, context): (&Tensor, &StepContext),
        cancel: &CancelToken,
    ) -> Result<Vec<Tensor>> {
        cancel.check()?;
        self.places.take(latents, context)?;
        let begin = Instant::now();
        match &self.recording {
            Some(recording) => recording.start()?,
            None => model.predict_at(&self.places, &self.requests, &self.blocks, cancel)?,
        }
        self.told.starting += begin.elapsed();
        self.told.steps += 1;
        Ok(self.places.velocities.clone())
    }
}

fn declined(why: &str) -> Error {
    candle_core::Error::msg(why).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_recorded_where_it_is_right_and_worth_it() {
        let good =
            Circumstances { steps_left: STEPS_MIN, took: STEP_MAX, cached: false, whole: true };
        assert_eq!(good.against(), None);
        let others = [
            Circumstances { steps_left: STEPS_MIN - 1, ..good },
            Circumstances { took: STEP_MAX + Duration::from_millis(1), ..good },
            Circumstances { cached: true, ..good },
            Circumstances { whole: false, ..good },
        ];
        let reasons: std::collections::BTreeSet<_> =
            others.iter().map(|other| other.against().unwrap()).collect();
        assert_eq!(reasons.len(), others.len());
    }

    #[test]
    fn what_is_recorded_keeps_to_the_budget() {
        assert!(fits(None, u64::MAX) && fits(Some(7), 7) && !fits(Some(7), 8));
    }
}
