//! What an engine keeps in memory, from one request to the next and within one.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Engine, EngineOptions,
    estimate::{Known, Models, PlanFacts, plan_load},
    pipeline::Pipeline,
    placement::{self, PlacementOptions, Room},
    planning::{ENCODER, PlannerParts},
};
use crate::{
    diffusion::Residency,
    error::{Error, Result},
    memory::{Budget, DeviceMemory, Lease, ladder::is_out_of_memory},
    pixels::{Picture, Size},
    progress::{CancelToken, Stage},
    request::{EditRequest, MemoryPlan, Placement, StageMemory},
    vlm::VisionLanguageModel,
    weights::Precision,
};

/// Who holds memory, besides [`ENCODER`].
pub(super) const TRANSFORMER: &str = "transformer";
pub(super) const PLANNER: &str = "planner";
pub(super) const AUTOENCODER: &str = "vae";

/// Models that have been opened; their large weights come and go.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) pipeline: Pipeline,
    pub(super) vlm: VisionLanguageModel,
    pub(super) planner: PlannerParts,
    pub(super) known: Known,
    pub(super) precision: Precision,
}

impl Opened {
    pub(super) fn models(&self) -> Models<'_> {
        Models {
            pipeline: &self.pipeline,
            vlm: &self.vlm,
            planner: &self.planner,
            known: &self.known,
            precision: &self.precision,
        }
    }

    /// How a request's work would be placed; without a request one picture of the model's area.
    pub(super) fn place(
        &self,
        request: Option<&EditRequest>,
        options: &EngineOptions,
    ) -> Result<MemoryPlan> {
        let room = room(options.budget, options.placement, &self.precision, 0);
        match request {
            Some(request) => placement::place(self.models(), request, room),
            None => placement::place(self.models(), &typical(&self.pipeline)?, room),
        }
    }
}

/// One picture of the model's area and a sentence.
fn typical(pipeline: &Pipeline) -> Result<EditRequest> {
    const SENTENCE: &str = "make it night and take the car away";
    let size = Size::for_area(pipeline.area, Size::new(1, 1))?;
    let picture = Picture::from_rgb(image::RgbImage::new(size.width, size.height));
    Ok(EditRequest::new(picture, SENTENCE))
}

/// What may be taken when `held` bytes are taken already, which may be given up.
fn room(budget: Budget, options: PlacementOptions, precision: &Precision, held: u64) -> Room {
    let device = &precision.device;
    Room {
        options,
        limit: budget.limit(device),
        bytes: budget.room(device).map(|bytes| bytes.saturating_add(held)),
        on_gpu: !device.is_cpu(),
    }
}

/// Refuses weights that do not fit.
pub(super) fn check(
    what: &str,
    needed_bytes: u64,
    (budget, precision): (Budget, &Precision),
) -> Result<()> {
    let room = room(budget, PlacementOptions::default(), precision, 0);
    match room.bytes {
        Some(available_bytes) if needed_bytes > available_bytes => Err(Error::OutOfMemory {
            what: what.to_owned(),
            needed_bytes,
            available_bytes,
            hint: smaller(&room),
        }),
        _ => Ok(()),
    }
}

fn smaller(room: &Room) -> String {
    format!("--dtype q8_0 or --dtype q4_k takes less, or allow more with {}", room.flag())
}

/// What a plan alone takes: the vision-language models and their work.
pub(super) fn plan_alone(
    (vlm, planner): (&VisionLanguageModel, &PlannerParts),
    facts: PlanFacts<'_>,
    (budget, precision): (Budget, &Precision),
) -> Result<MemoryPlan> {
    let load = plan_load((vlm, planner), facts)?;
    let model = planner.model(vlm);
    let own = planner.own_weight_bytes(precision);
    let stage = StageMemory {
        stage: Stage::Plan,
        weights_bytes: own.unwrap_or(0) + vlm.weight_bytes(precision, own.is_none()),
        activation_bytes: model.activation_bytes(load) + model.kept_bytes(load),
    };
    let room = room(budget, PlacementOptions::default(), precision, 0);
    let peak_bytes = stage.in_use_bytes();
    let fits = room.bytes.is_none_or(|bytes| peak_bytes <= bytes);
    Ok(MemoryPlan {
        placement: Placement::RESIDENT,
        stages: vec![stage],
        peak_bytes,
        available_bytes: room.bytes,
        hint: (!fits).then(|| smaller(&room)),
        made_room: Vec::new(),
    })
}

/// What the models' weights hold of a device's memory, and which of them have their turn.
#[derive(Debug)]
pub(super) struct Residence {
    memory: DeviceMemory,
    leases: Mutex<BTreeMap<&'static str, Lease>>,
    placement: Mutex<Placement>,
}

impl Residence {
    pub(super) fn new(memory: DeviceMemory, placement: Placement) -> Self {
        Self { memory, leases: Mutex::default(), placement: Mutex::new(placement) }
    }

    /// Holds so many bytes in the name of `owner` from now on.
    pub(super) fn hold(&self, owner: &'static str, bytes: u64) -> Result<()> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases.get(owner).is_some_and(|lease| lease.bytes() == bytes) {
            return Ok(());
        }
        leases.remove(owner);
        if bytes > 0 {
            leases.insert(owner, self.memory.lease(owner, bytes)?);
        }
        Ok(())
    }

    /// Returns whether `owner` held anything.
    fn let_go(&self, owner: &'static str) -> bool {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner).remove(owner).is_some()
    }

    /// Memory for a piece of work, until the lease is dropped.
    pub(super) fn lease(&self, owner: &'static str, bytes: u64) -> Result<Lease> {
        self.memory.lease(owner, bytes)
    }

    /// Bytes that weights hold now.
    fn held_bytes(&self) -> u64 {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.values().map(Lease::bytes).sum()
    }

    fn bytes_of(&self, owner: &'static str) -> u64 {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.get(owner).map_or(0, Lease::bytes)
    }

    pub(super) fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// How work is placed now.
    pub(super) fn placement(&self) -> Placement {
        *self.placement.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_placement(&self, placement: Placement) {
        *self.placement.lock().unwrap_or_else(PoisonError::into_inner) = placement;
    }
}

impl Engine {
    /// Places a request's work and lets the models hold what that says.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where it cannot fit.
    pub(super) fn settle(&self, request: &EditRequest) -> Result<MemoryPlan> {
        let taken = self.taken_bytes();
        let mut room = room(self.budget, self.placement_options, &self.opened.precision, taken);
        if let Some(memory) = self.residence.memory().room() {
            let bytes = memory.saturating_add(self.residence.held_bytes());
            room.bytes = Some(room.bytes.map_or(bytes, |room| room.min(bytes)));
        }
        let plan = placement::place(self.opened.models(), request, room)?;
        let plan = placement::require(plan, &format!("an edit with {}", self.info.name))?;
        self.follow(plan.placement);
        Ok(plan)
    }

    /// What weights take of the system's memory: less than they hold as long as blocks are still to
    /// be read.
    fn taken_bytes(&self) -> u64 {
        let held = self.residence.held_bytes();
        let transformer = self.diffusion.transformer();
        if transformer.is_filled() {
            return held;
        }
        let (blocks, footprint) = (transformer.blocks_in_memory(), &self.opened.known.transformer);
        let read = footprint.resting(Residency::Streamed { blocks }) - footprint.outside();
        held - self.residence.bytes_of(TRANSFORMER).saturating_sub(read)
    }

    /// Lets the models hold what a placement says from now on.
    pub(super) fn follow(&self, placement: Placement) {
        self.residence.set_placement(placement);
        self.diffusion.transformer().set_residency(placement.transformer);
        self.diffusion.transformer().set_guidance(placement.guidance);
        if placement.take_turns && self.opened.vlm.is_in_memory() {
            self.let_go_of_transformer();
        }
    }

    fn let_go_of_transformer(&self) {
        self.diffusion.transformer().release();
        self.dropped(TRANSFORMER);
    }

    fn let_go_of_encoder(&self) {
        self.opened.vlm.release();
        self.dropped(ENCODER);
    }

    fn let_go_of_planner(&self) {
        self.opened.planner.release();
        self.dropped(PLANNER);
    }

    /// What a model's weights took is the system's again before another model is read.
    fn dropped(&self, owner: &'static str) {
        if self.residence.let_go(owner) {
            self.residence.memory().trim();
        }
    }

    /// The text encoder has its turn.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn before_reading(&self, writes: bool) -> Result<()> {
        if self.residence.placement().take_turns {
            self.let_go_of_transformer();
            self.let_go_of_planner();
        }
        // The head stays once it was read.
        let writes = writes || self.opened.vlm.is_in_memory();
        self.residence.hold(ENCODER, self.opened.vlm.weight_bytes(&self.opened.precision, writes))
    }

    /// The planner has its turn; it is the text encoder or another model.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn before_planning(&self) -> Result<()> {
        let Some(own) = self.opened.planner.own_weight_bytes(&self.opened.precision) else {
            return self.before_reading(true);
        };
        if self.residence.placement().take_turns {
            self.let_go_of_transformer();
            self.let_go_of_encoder();
        }
        self.residence.hold(PLANNER, own)
    }

    /// Whether the transformer's blocks are to be in memory beside the vision-language models and
    /// are not all there yet. Their place is held from the time the engine was opened.
    pub(super) fn has_blocks_to_read(&self) -> bool {
        !self.residence.placement().take_turns && !self.diffusion.transformer().is_filled()
    }

    /// Reads the blocks that are to stay; returns how long it took. Where memory runs out, those that
    /// were read are dropped: room is made when they are used.
    ///
    /// # Errors
    /// Cancellation, or a failure of the device.
    pub(super) fn read_blocks(&self, cancel: &CancelToken) -> Result<Duration> {
        let begin = Instant::now();
        let transformer = self.diffusion.transformer();
        match transformer.fill_on_readers(cancel) {
            Err(error) if is_out_of_memory(&error) => transformer.release(),
            result => result?,
        }
        Ok(begin.elapsed())
    }

    /// The turn of the vision-language models is over.
    pub(super) fn give_up_reading(&self) {
        if self.residence.placement().take_turns {
            self.let_go_of_encoder();
            self.let_go_of_planner();
        }
    }

    /// The transformer has its turn.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn before_denoising(&self) -> Result<()> {
        self.give_up_reading();
        let placement = self.residence.placement();
        let footprint = &self.opened.known.transformer;
        let bytes = footprint.working(placement.transformer) - footprint.outside();
        self.residence.hold(TRANSFORMER, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::editor::ModelSource;

    #[test]
    fn blocks_that_are_not_read_yet_take_nothing() {
        let picture = Picture::from_rgb(image::RgbImage::new(64, 64));
        let request = EditRequest::new(picture, "make it night");
        let options = EngineOptions::default();
        let engine = Engine::open_for(&ModelSource::Mini, &options, &request, &()).unwrap();
        let held = engine.residence.held_bytes();
        let blocks = engine.residence.bytes_of(TRANSFORMER);
        assert!(engine.has_blocks_to_read() && blocks > 0);
        assert!(engine.taken_bytes() < held && engine.taken_bytes() >= held - blocks);
        engine.read_blocks(&CancelToken::new()).unwrap();
        assert_eq!(engine.taken_bytes(), engine.residence.held_bytes());
    }
}
