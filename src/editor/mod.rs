//! The one place where the vision-language model and the denoiser meet.

mod ask;
mod assemble;
mod bench;
mod beside;
mod checked;
mod convert;
mod edit;
mod estimate;
mod fit;
mod inspect;
mod lora;
mod memo;
mod pass;
mod pipeline;
mod placement;
mod plan_sizes;
mod planning;
mod record;
mod residence;
mod source;
mod stages;

use std::collections::BTreeMap;

use image::RgbImage;

pub use self::{
    bench::{BENCH_VERSION, BenchReport, BenchRequest, BenchRow},
    convert::{ConvertOutcome, ConvertRequest, convert},
    inspect::{EditVersion, ModelInfo, PartInfo},
    lora::LoraSource,
    pipeline::Kind,
    placement::PlacementOptions,
    planning::PlannerSource,
    source::{ModelParts, ModelSource},
};
use self::{
    estimate::Known,
    inspect::PARTS,
    lora::{LoadedLoras, Loras},
    memo::Memo,
    pipeline::Pipeline,
    plan_sizes::Sizes,
    planning::{ENCODER, PlanWork, PlannerParts},
    residence::{Opened, Residence},
    stages::Stages,
};
use crate::{
    diffusion::{DiffusionModel, StepRecording, at_work, schedule::ScheduleConfig},
    error::{Error, Result},
    memory::{self, Budget, Device, DeviceMemory, Holding},
    pixels::Size,
    progress::{CancelToken, Event, Observer, Stage},
    request::{
        AskOutcome, AskRequest, EditOutcome, EditRequest, MemoryPlan, PlanOutcome, PlanRequest,
        StageReport, WeightShare,
    },
    vlm::VisionLanguageModel,
    weights::{AttentionType, LoraReport, ModelFiles, Precision, Storage},
};

/// Where and how a model runs.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// The device of the computation.
    pub device: Device,
    /// How the matrices of linear layers are kept in memory; `None` is the type of the computation.
    pub storage: Option<Storage>,
    /// Round activations to fp8 where the transformer's weights are fp8 and the GPU multiplies such
    /// numbers: faster, with an error of some 2 % of each prediction. A note says where it cannot be done.
    pub float8_products: bool,
    /// Ceilings for the memory of host and GPU.
    pub budget: Budget,
    /// Ways to save memory that are wanted whatever fits.
    pub placement: PlacementOptions,
    /// Which model plans, where it is not the editor's own.
    pub planner: PlannerSource,
    /// LoRA files for the transformer; their changes add up.
    pub loras: Vec<LoraSource>,
    /// Keep the model's own schedule, steps and guidance with a Lightning file.
    pub no_lightning_defaults: bool,
    /// Whose memory is taken, where it is shared with others or simulated; `None` is that of the
    /// device.
    pub memory: Option<DeviceMemory>,
    /// Stops the loading of weights.
    pub cancel: CancelToken,
}

impl EngineOptions {
    fn precision(&self, observer: &dyn Observer) -> Result<Precision> {
        let (device, note) = self.device.open_noting()?;
        if let Some(note) = note {
            observer.event(&Event::Note(&note));
        }
        let compute = Device::compute_type(&device);
        let storage = self.storage.unwrap_or_default();
        let attention = AttentionType::default();
        let (float8_products, cancel) = (self.float8_products, self.cancel.clone());
        Ok(Precision { device, compute, storage, attention, float8_products, cancel })
    }
}

/// A model in memory, ready for requests.
///
/// ```
/// use pentimento::{Engine, EngineOptions, EditRequest, ModelSource, pixels::Picture};
///
/// let engine = Engine::open(&ModelSource::Mini, &EngineOptions::default(), &())?;
/// let picture = Picture::from_rgb(image::RgbImage::from_pixel(64, 64, image::Rgb([90, 140, 200])));
/// let mut request = EditRequest::new(picture, "make it night");
/// request.seed = Some(1);
/// request.steps = Some(2);
/// let outcome = engine.edit(&request, &())?;
/// assert_eq!(outcome.plan.unwrap().steps.len(), 1);
/// assert_eq!(outcome.picture.rgb.dimensions(), (64, 64));
/// assert_eq!(outcome.seed, 1);
/// # Ok::<(), pentimento::Error>(())
/// ```
#[derive(Debug)]
pub struct Engine {
    opened: Opened,
    info: ModelInfo,
    diffusion: DiffusionModel,
    loras: LoadedLoras,
    memo: Memo,
    budget: Budget,
    placement_options: PlacementOptions,
    residence: Residence,
    weights: Vec<WeightShare>,
    load: StageReport,
}

impl Engine {
    /// Checks a model's files and reads its weights into memory, as far as they are to stay there
    /// for edits of a picture of the model's own area.
    ///
    /// # Errors
    /// Files that are missing, damaged or of another kind; a device that cannot be opened; not
    /// enough memory; cancellation.
    pub fn open(
        source: &ModelSource,
        options: &EngineOptions,
        observer: &dyn Observer,
    ) -> Result<Self> {
        Self::open_placed(source, options, None, observer)
    }

    /// As [`Self::open`], for `request` to come first: what stays in memory is chosen for it. Where it
    /// is to be planned, the transformer's blocks are left for [`Self::edit`], which reads them while
    /// the planner writes.
    ///
    /// # Errors
    /// As [`Self::open`]; a request that cannot be carried out.
    pub fn open_for(
        source: &ModelSource,
        options: &EngineOptions,
        request: &EditRequest,
        observer: &dyn Observer,
    ) -> Result<Self> {
        Self::open_placed(source, options, Some(request), observer)
    }

    /// What a request would take in memory and how it would be placed, told without loading
    /// anything large.
    ///
    /// # Errors
    /// As [`Self::open_for`], but not for memory: see [`MemoryPlan::fits`].
    pub fn memory(
        source: &ModelSource,
        options: &EngineOptions,
        request: &EditRequest,
        observer: &dyn Observer,
    ) -> Result<MemoryPlan> {
        let _at_work = at_work();
        let files = source.files()?;
        let loras = Loras::open(&options.loras, !options.no_lightning_defaults)?;
        let precision = options.precision(observer)?;
        open_models(&files, options, &loras, precision, observer)?.place(Some(request), options)
    }

    fn open_placed(
        source: &ModelSource,
        options: &EngineOptions,
        request: Option<&EditRequest>,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let _at_work = at_work();
        let files = source.files()?;
        let loras = Loras::open(&options.loras, !options.no_lightning_defaults)?;
        let precision = options.precision(observer)?;
        let opened = open_models(&files, options, &loras, precision, observer)?;
        let mut schedule = ScheduleConfig::load(&files)?;
        if loras.lightning_steps().is_some() {
            schedule = schedule.lightning();
        }
        if let Some(request) = request {
            checked::check_before_loading(&opened.pipeline, &schedule, request)?;
        }
        let info = ModelInfo::from_pipeline(&files, &opened.pipeline)?;
        note_files(&files, observer, &info, &opened.precision);
        let what = format!("an edit with {}", info.name);
        let placement = placement::require(opened.place(request, options)?, &what)?.placement;
        let Opened { vlm, planner, known, precision, .. } = &opened;
        let mut weights = estimate::weights(known, vlm, precision);
        weights.extend(loras.share(precision));
        let own = planner.own_weight_bytes(precision);
        weights.extend(own.map(|bytes| WeightShare { part: "planner", bytes }));
        let memory = match &options.memory {
            Some(memory) => memory.clone(),
            None => memory::device_pool(&precision.device, options.budget)?,
        };
        let residence = Residence::new(memory, placement);
        let mut stages = Stages::new(observer, &precision.device);
        let (diffusion, loras) = stages.run(Stage::Load, || {
            let (changes, loras) = loras.read(&files, precision)?;
            let base = known.vae_bytes + known.lora_bytes + known.transformer.outside();
            residence.hold(residence::AUTOENCODER, base)?;
            let residency = placement.transformer;
            let diffusion = DiffusionModel::open(&files, schedule, precision, changes, residency)?;
            diffusion.transformer().set_memory_limit(options.budget.vram);
            diffusion.transformer().set_step_recording(StepRecording::OnDevice);
            // What has the first turn; the others follow when it is over.
            if own.is_none() || !placement.take_turns {
                residence.hold(ENCODER, vlm.weight_bytes(precision, true))?;
                vlm.fill(&precision.cancel)?;
            }
            if !placement.take_turns {
                residence.hold(residence::PLANNER, own.unwrap_or(0))?;
                planner.fill(&precision.cancel)?;
                let working = known.transformer.working(residency) - known.transformer.outside();
                residence.hold(residence::TRANSFORMER, working)?;
                if !request.is_some_and(estimate::is_planned) {
                    diffusion.transformer().fill(&precision.cancel)?;
                }
            }
            Ok((diffusion, loras))
        })?;
        let load = stages.finish().pop();
        Ok(Self {
            opened,
            info,
            diffusion,
            loras,
            memo: Memo::default(),
            budget: options.budget,
            placement_options: options.placement,
            residence,
            weights,
            load: load.unwrap_or_else(|| StageReport::of_nothing(Stage::Load)),
        })
    }

    /// What was opened.
    #[must_use]
    pub fn model(&self) -> &ModelInfo {
        &self.info
    }

    /// Time and memory that opening took.
    #[must_use]
    pub fn load_report(&self) -> StageReport {
        self.load
    }

    /// Whether the text encoder plans as well, so that its weights are in memory once.
    #[must_use]
    pub fn planner_is_shared(&self) -> bool {
        self.opened.planner.own_weight_bytes(&self.opened.precision).is_none()
    }

    /// Who holds how much memory for weights. A planner that shares the text encoder holds none.
    #[must_use]
    pub fn weights(&self) -> &[WeightShare] {
        &self.weights
    }

    /// Who holds how much memory now and held at most, with the work of the last requests.
    #[must_use]
    pub fn holdings(&self) -> BTreeMap<&'static str, Holding> {
        self.residence.memory().holdings()
    }

    /// The LoRA files that change the transformer, in the order they were named.
    #[must_use]
    pub fn loras(&self) -> &[LoraReport] {
        &self.loras.reports
    }

    /// Drops what is kept of earlier requests: tokens and latents of their pictures, and their
    /// prompts as the editor reads them. Results do not change, only the time of the next request.
    pub fn forget(&self) {
        let _at_work = at_work();
        self.memo.clear();
        self.diffusion.transformer().forget();
    }

    /// Carries out one edit.
    ///
    /// # Errors
    /// A request the model cannot carry out, not enough memory, cancellation, or values that are
    /// not finite.
    pub fn edit(&self, request: &EditRequest, observer: &dyn Observer) -> Result<EditOutcome> {
        let _at_work = at_work();
        edit::run(self, request, observer)
    }

    /// The decomposition agent's reply to a request, word for word: what
    /// [`Score`](crate::plan::Score) compares with an annotation.
    ///
    /// # Errors
    /// A request without text or pictures, a reply that is not finished at the limit of tokens, or
    /// cancellation.
    pub fn decompose(&self, request: &PlanRequest, observer: &dyn Observer) -> Result<String> {
        let _at_work = at_work();
        let pictures = plan_pictures(&self.opened.pipeline, request)?;
        let seen = self.opened.vlm.look_unless(&pictures, &request.cancel)?;
        let work = PlanWork::of(request, &pictures, &seen);
        self.before_planning()?;
        let mut stages = Stages::new(observer, &self.opened.precision.device);
        self.opened.planner.decompose(&self.opened.vlm, &work, &mut stages)
    }

    /// Answers a question about pictures with the editor's own vision-language model.
    ///
    /// # Errors
    /// A question that is empty or too long, or cancellation.
    pub fn ask(&self, request: &AskRequest, observer: &dyn Observer) -> Result<AskOutcome> {
        let _at_work = at_work();
        self.before_reading(true)?;
        ask::run(&self.opened.vlm, request, observer)
    }
}

/// A model folder's vision-language model alone, for questions and plans; it loads nothing of the
/// editor.
///
/// ```
/// use pentimento::{Assistant, AskRequest, EngineOptions, ModelSource, pixels::Picture};
///
/// let assistant = Assistant::open(&ModelSource::Mini, &EngineOptions::default(), &())?;
/// let picture = Picture::from_rgb(image::RgbImage::from_pixel(64, 64, image::Rgb([90, 140, 200])));
/// let mut request = AskRequest::new(vec![picture], "what is in the picture?");
/// request.tokens_max = 4;
/// let outcome = assistant.ask(&request, &())?;
/// assert!(outcome.answer_tokens <= 4);
/// # Ok::<(), pentimento::Error>(())
/// ```
#[derive(Debug)]
pub struct Assistant {
    pipeline: Pipeline,
    vlm: VisionLanguageModel,
    planner: PlannerParts,
}

impl Assistant {
    /// Reads the vision-language model of a folder into memory.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn open(
        source: &ModelSource,
        options: &EngineOptions,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let _at_work = at_work();
        let files = source.files()?;
        let pipeline = Pipeline::read(&files)?;
        let precision = options.precision(observer)?;
        let (vlm, planner) = open_readers(&files, options, &precision, observer)?;
        let own = planner.own_weight_bytes(&precision);
        let bytes = own.unwrap_or(0) + vlm.weight_bytes(&precision, own.is_none());
        let what = format!("the vision-language model of {}", pipeline.name);
        residence::check(&what, bytes, (options.budget, &precision))?;
        Stages::new(observer, &precision.device).run(Stage::Load, || {
            vlm.fill(&precision.cancel)?;
            planner.fill(&precision.cancel)
        })?;
        Ok(Self { pipeline, vlm, planner })
    }

    /// What a plan would take in memory, told without loading anything large.
    ///
    /// # Errors
    /// As [`Self::open`], but not for memory; a request that cannot be planned.
    pub fn memory(
        source: &ModelSource,
        options: &EngineOptions,
        request: &PlanRequest,
        observer: &dyn Observer,
    ) -> Result<MemoryPlan> {
        let _at_work = at_work();
        let files = source.files()?;
        let pipeline = Pipeline::read(&files)?;
        let precision = options.precision(observer)?;
        let (vlm, planner) = open_readers(&files, options, &precision, observer)?;
        let sizes = plan_sizes(&pipeline, request)?;
        let work = (request.prompt.as_str(), sizes.as_slice(), &request.planner);
        residence::plan_alone((&vlm, &planner), work, (options.budget, &precision))
    }

    /// Answers a question about pictures.
    ///
    /// # Errors
    /// A question that is empty or too long, or cancellation.
    pub fn ask(&self, request: &AskRequest, observer: &dyn Observer) -> Result<AskOutcome> {
        let _at_work = at_work();
        ask::run(&self.vlm, request, observer)
    }

    /// Plans an edit: the plan that [`Engine::edit`] would carry out.
    ///
    /// ```
    /// use pentimento::{Assistant, EngineOptions, ModelSource, PlanRequest, pixels::Picture};
    ///
    /// let assistant = Assistant::open(&ModelSource::Mini, &EngineOptions::default(), &())?;
    /// let picture = Picture::from_rgb(image::RgbImage::from_pixel(64, 64, image::Rgb([90, 140, 200])));
    /// let request = PlanRequest::new(vec![picture], "make it night");
    /// let outcome = assistant.plan(&request, &())?;
    /// assert_eq!(outcome.plan.steps[0].goal, "night");
    /// # Ok::<(), pentimento::Error>(())
    /// ```
    ///
    /// # Errors
    /// A request without text or pictures, a reply that is not finished at the limit of tokens, or
    /// cancellation.
    pub fn plan(&self, request: &PlanRequest, observer: &dyn Observer) -> Result<PlanOutcome> {
        let _at_work = at_work();
        let pictures = plan_pictures(&self.pipeline, request)?;
        let seen = self.vlm.look_unless(&pictures, &request.cancel)?;
        let work = PlanWork::of(request, &pictures, &seen);
        let mut stages = Stages::new(observer, self.vlm.device());
        let planning = self.planner.plan(&self.vlm, &work, &mut stages)?;
        observer.event(&Event::Planned(&planning.plan));
        Ok(PlanOutcome {
            plan: planning.plan,
            planned_by: planning.planned_by,
            reply: planning.reply,
            tokens: planning.tokens,
            stages: stages.finish(),
        })
    }
}

/// A request's pictures in the size in which the planner sees them.
fn plan_pictures(pipeline: &Pipeline, request: &PlanRequest) -> Result<Vec<RgbImage>> {
    let sized = request.pictures.iter().zip(plan_sizes(pipeline, request)?);
    sized.map(|(picture, size)| pass::resized(&picture.rgb, size, &request.cancel)).collect()
}

fn plan_sizes(pipeline: &Pipeline, request: &PlanRequest) -> Result<Vec<Size>> {
    if request.pictures.is_empty() {
        return Err(Error::field("pictures", "none", "at least one"));
    }
    let inputs: Vec<Size> = request.pictures.iter().map(|p| Size::of(&p.rgb)).collect();
    Sizes::vision(pipeline, &inputs, request.area, request.vl_area)
}

/// Opens the models of a folder without reading large weights.
fn open_models(
    files: &ModelFiles,
    options: &EngineOptions,
    loras: &Loras,
    precision: Precision,
    observer: &dyn Observer,
) -> Result<Opened> {
    files.require_parts(&PARTS.map(|(part, _)| part))?;
    let mut pipeline = Pipeline::read(files)?;
    fit::check_parts(files)?;
    if let Some(steps) = loras.lightning_steps() {
        (pipeline.steps, pipeline.cfg_scale) = (steps, 1.0);
    }
    let lora_bytes = loras.share(&precision).map_or(0, |share| share.bytes);
    let known = Known::read(files, &precision, lora_bytes)?;
    let (vlm, planner) = open_readers(files, options, &precision, observer)?;
    Ok(Opened { pipeline, vlm, planner, known, precision })
}

/// Opens the text encoder and the planner.
fn open_readers(
    files: &ModelFiles,
    options: &EngineOptions,
    precision: &Precision,
    observer: &dyn Observer,
) -> Result<(VisionLanguageModel, PlannerParts)> {
    let vlm = VisionLanguageModel::open(files, ENCODER, precision)?;
    let planner = PlannerParts::open(&options.planner, files, &vlm, precision, observer)?;
    Ok((vlm, planner))
}

/// What the user should know about the files and what becomes of their types.
fn note_files(
    files: &ModelFiles,
    observer: &dyn Observer,
    info: &ModelInfo,
    precision: &Precision,
) {
    if info.untrained {
        observer.event(&Event::Note(&format!(
            "the model {} has random weights: it shows that everything runs, but the picture \
             will not follow the prompt; pass --model DIR for a trained one",
            info.name
        )));
    }
    for note in files.notes() {
        observer.event(&Event::Note(note));
    }
    if let Some(note) = info.float8_note(precision) {
        observer.event(&Event::Note(&note));
    }
    let has = |start: &str| {
        info.parts.iter().flat_map(|part| part.types.keys()).any(|name| name.starts_with(start))
    };
    // On the CPU both stay as they are stored.
    if precision.device.is_cpu() {
        return;
    }
    if has("F8_E5M2") && precision.storage == Storage::Compute {
        observer.event(&Event::Note(
            "fp8 weights in e5m2 are kept as bf16, two bytes each; --dtype q8_0 keeps them in 8.5 bits",
        ));
    }
    if has("IQ4_") && !matches!(precision.storage, Storage::Plain(_)) {
        observer.event(&Event::Note("IQ4 weights are kept as Q8_0, in 8.5 bits each"));
    }
}
