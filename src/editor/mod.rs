//! The one place where the vision-language model and the denoiser meet.

mod ask;
mod assemble;
mod bench;
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
mod plan_sizes;
mod planning;
mod source;
mod stages;

use std::time::Duration;

use image::RgbImage;

pub use self::{
    bench::{BENCH_VERSION, BenchReport, BenchRequest, BenchRow},
    convert::{ConvertOutcome, ConvertRequest, convert},
    inspect::{EditVersion, ModelInfo, PartInfo},
    lora::LoraSource,
    pipeline::Kind,
    planning::PlannerSource,
    source::{ModelParts, ModelSource},
};
use self::{
    inspect::PARTS,
    lora::{LoadedLoras, Loras},
    memo::Memo,
    pipeline::Pipeline,
    plan_sizes::Sizes,
    planning::{ENCODER, PlanWork, PlannerParts},
    stages::Stages,
};
use crate::{
    diffusion::DiffusionModel,
    error::{Error, Result},
    memory::{Budget, Device},
    pixels::Size,
    progress::{CancelToken, Event, Observer, Stage},
    request::{
        AskOutcome, AskRequest, EditOutcome, EditRequest, PlanOutcome, PlanRequest, StageReport,
        WeightShare,
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
    /// A ceiling for host memory.
    pub budget: Budget,
    /// Which model plans, where it is not the editor's own.
    pub planner: PlannerSource,
    /// LoRA files for the transformer; their changes add up.
    pub loras: Vec<LoraSource>,
    /// Keep the model's own schedule, steps and guidance with a Lightning file.
    pub no_lightning_defaults: bool,
    /// Stops the loading of weights.
    pub cancel: CancelToken,
}

impl EngineOptions {
    fn precision(&self) -> Result<Precision> {
        let device = self.device.open()?;
        let compute = Device::compute_type(&device);
        let storage = self.storage.unwrap_or_default();
        let attention = AttentionType::default();
        Ok(Precision { device, compute, storage, attention, cancel: self.cancel.clone() })
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
    pipeline: Pipeline,
    info: ModelInfo,
    vlm: VisionLanguageModel,
    planner: PlannerParts,
    diffusion: DiffusionModel,
    loras: LoadedLoras,
    memo: Memo,
    budget: Budget,
    weights: Vec<WeightShare>,
    load: StageReport,
}

impl Engine {
    /// Checks a model's files and reads its weights into memory.
    ///
    /// # Errors
    /// Files that are missing, damaged or of another kind; a device that cannot be opened; not
    /// enough memory; cancellation.
    pub fn open(
        source: &ModelSource,
        options: &EngineOptions,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let files = source.files()?;
        files.require_parts(&PARTS.map(|(part, _)| part))?;
        let mut pipeline = Pipeline::read(&files)?;
        fit::check_parts(&files)?;
        let loras = Loras::open(&options.loras, !options.no_lightning_defaults)?;
        let lightning = loras.lightning_steps();
        if let Some(steps) = lightning {
            (pipeline.steps, pipeline.cfg_scale) = (steps, 1.0);
        }
        let info = ModelInfo::from_pipeline(&files, &pipeline)?;
        if info.untrained {
            observer.event(&Event::Note(&format!(
                "the model {} has random weights: it shows that everything runs, but the picture \
                 will not follow the prompt; pass --model DIR for a trained one",
                info.name
            )));
        }
        let precision = options.precision()?;
        note_files(&files, observer, &info, &precision);
        let mut weights = estimate::weights(&files, &precision)?;
        weights.extend(loras.share(&precision));
        estimate::check_weights(&weights, &info.name, &precision, options.budget)?;
        let mut stages = Stages::new(observer);
        let (vlm, planner, mut diffusion, loras) = stages.run(Stage::Load, || {
            let (changes, loras) = loras.read(&files, &precision)?;
            let vlm = load_vlm(&files, &precision)?;
            let room = (&precision, options.budget);
            let planner = PlannerParts::load(&options.planner, &files, &vlm, room, observer)?;
            let diffusion = DiffusionModel::load_changed(&files, &precision, changes)?;
            Ok((vlm, planner, diffusion, loras))
        })?;
        if lightning.is_some() {
            diffusion.set_schedule(diffusion.schedule().lightning());
        }
        let load =
            StageReport { stage: Stage::Load, elapsed: Duration::ZERO, peak_resident_bytes: None };
        let load = stages.finish().pop().unwrap_or(load);
        let (budget, memo) = (options.budget, Memo::default());
        weights
            .extend(planner.own_weight_bytes().map(|bytes| WeightShare { part: "planner", bytes }));
        Ok(Self { pipeline, info, vlm, planner, diffusion, loras, memo, budget, weights, load })
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
        self.planner.own_weight_bytes().is_none()
    }

    /// Who holds how much memory for weights. A planner that shares the text encoder holds none.
    #[must_use]
    pub fn weights(&self) -> &[WeightShare] {
        &self.weights
    }

    /// The LoRA files that change the transformer, in the order they were named.
    #[must_use]
    pub fn loras(&self) -> &[LoraReport] {
        &self.loras.reports
    }

    /// Drops what is kept of earlier requests: tokens and latents of their pictures, and their
    /// prompts as the editor reads them. Results do not change, only the time of the next request.
    pub fn forget(&self) {
        self.memo.clear();
    }

    /// Carries out one edit.
    ///
    /// # Errors
    /// A request the model cannot carry out, not enough memory, cancellation, or values that are
    /// not finite.
    pub fn edit(&self, request: &EditRequest, observer: &dyn Observer) -> Result<EditOutcome> {
        edit::run(self, request, observer)
    }

    /// The decomposition agent's reply to a request, word for word: what
    /// [`Score`](crate::plan::Score) compares with an annotation.
    ///
    /// # Errors
    /// A request without text or pictures, a reply that is not finished at the limit of tokens, or
    /// cancellation.
    pub fn decompose(&self, request: &PlanRequest, observer: &dyn Observer) -> Result<String> {
        let pictures = plan_pictures(&self.pipeline, request)?;
        let seen = self.vlm.look(&pictures)?;
        let work = PlanWork::of(request, &pictures, &seen);
        self.planner.decompose(&self.vlm, &work, &mut Stages::new(observer))
    }

    /// Answers a question about pictures with the editor's own vision-language model.
    ///
    /// # Errors
    /// A question that is empty or too long, or cancellation.
    pub fn ask(&self, request: &AskRequest, observer: &dyn Observer) -> Result<AskOutcome> {
        ask::run(&self.vlm, request, observer)
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
        let files = source.files()?;
        let pipeline = Pipeline::read(&files)?;
        let precision = options.precision()?;
        estimate::check_part(&files, ENCODER, "model", &precision, options.budget)?;
        let (vlm, planner) = Stages::new(observer).run(Stage::Load, || {
            let vlm = load_vlm(&files, &precision)?;
            let room = (&precision, options.budget);
            let planner = PlannerParts::load(&options.planner, &files, &vlm, room, observer)?;
            Ok((vlm, planner))
        })?;
        Ok(Self { pipeline, vlm, planner })
    }

    /// Answers a question about pictures.
    ///
    /// # Errors
    /// A question that is empty or too long, or cancellation.
    pub fn ask(&self, request: &AskRequest, observer: &dyn Observer) -> Result<AskOutcome> {
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
        let pictures = plan_pictures(&self.pipeline, request)?;
        let seen = self.vlm.look(&pictures)?;
        let work = PlanWork::of(request, &pictures, &seen);
        let mut stages = Stages::new(observer);
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
    if request.pictures.is_empty() {
        return Err(Error::field("pictures", "none", "at least one"));
    }
    let inputs: Vec<Size> = request.pictures.iter().map(|p| Size::of(&p.rgb)).collect();
    let sizes = Sizes::vision(pipeline, &inputs, request.area, request.vl_area)?;
    let sized = request.pictures.iter().zip(sizes);
    sized.map(|(picture, size)| pass::resized(&picture.rgb, size)).collect()
}

/// What the user should know about the files and what becomes of their types.
fn note_files(
    files: &ModelFiles,
    observer: &dyn Observer,
    info: &ModelInfo,
    precision: &Precision,
) {
    for note in files.notes() {
        observer.event(&Event::Note(note));
    }
    let has = |start: &str| {
        info.parts.iter().flat_map(|part| part.types.keys()).any(|name| name.starts_with(start))
    };
    if has("F8_") && precision.storage == Storage::Compute {
        observer.event(&Event::Note(
            "fp8 weights are kept as bf16, two bytes each; --dtype q8_0 keeps them in 8.5 bits",
        ));
    }
    if has("IQ4_") && !matches!(precision.storage, Storage::Plain(_)) {
        observer.event(&Event::Note("IQ4 weights are kept as Q8_0, in 8.5 bits each"));
    }
}

fn load_vlm(files: &ModelFiles, precision: &Precision) -> Result<VisionLanguageModel> {
    VisionLanguageModel::load(files, ENCODER, precision)
}
