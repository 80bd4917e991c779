//! The one place where the vision-language model and the denoiser meet.

mod ask;
mod assemble;
mod edit;
mod estimate;
mod inspect;
mod pipeline;
mod plan_sizes;
mod source;
mod stages;

use std::time::Duration;

pub use self::{
    inspect::{ModelInfo, PartInfo},
    pipeline::Kind,
    source::{ModelParts, ModelSource},
};
use self::{pipeline::Pipeline, stages::Stages};
use crate::{
    diffusion::DiffusionModel,
    error::Result,
    memory::{Budget, Device},
    progress::{CancelToken, Event, Observer, Stage},
    request::{AskOutcome, AskRequest, EditOutcome, EditRequest, StageReport},
    vlm::VisionLanguageModel,
    weights::{ModelFiles, Precision, Storage},
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
    /// Stops the loading of weights.
    pub cancel: CancelToken,
}

impl EngineOptions {
    fn precision(&self) -> Result<Precision> {
        let device = self.device.open()?;
        let compute = Device::compute_type(&device);
        let storage = self.storage.unwrap_or_default();
        Ok(Precision { device, compute, storage, cancel: self.cancel.clone() })
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
/// assert_eq!(outcome.picture.rgb.dimensions(), (64, 64));
/// assert_eq!(outcome.seed, 1);
/// # Ok::<(), pentimento::Error>(())
/// ```
#[derive(Debug)]
pub struct Engine {
    pipeline: Pipeline,
    info: ModelInfo,
    vlm: VisionLanguageModel,
    diffusion: DiffusionModel,
    budget: Budget,
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
        let pipeline = Pipeline::read(&files)?;
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
        estimate::check_weights(&files, &info.name, &precision, options.budget)?;
        let mut stages = Stages::new(observer);
        let (vlm, diffusion) = stages.run(Stage::Load, || {
            let vlm = load_vlm(&files, &precision)?;
            Ok((vlm, DiffusionModel::load(&files, &precision)?))
        })?;
        let load =
            StageReport { stage: Stage::Load, elapsed: Duration::ZERO, peak_resident_bytes: None };
        let load = stages.finish().pop().unwrap_or(load);
        Ok(Self { pipeline, info, vlm, diffusion, budget: options.budget, load })
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

    /// Carries out one edit.
    ///
    /// # Errors
    /// A request the model cannot carry out, not enough memory, cancellation, or values that are
    /// not finite.
    pub fn edit(&self, request: &EditRequest, observer: &dyn Observer) -> Result<EditOutcome> {
        edit::run(self, request, observer)
    }

    /// Answers a question about pictures with the editor's own vision-language model.
    ///
    /// # Errors
    /// A question that is empty or too long, or cancellation.
    pub fn ask(&self, request: &AskRequest, observer: &dyn Observer) -> Result<AskOutcome> {
        ask::run(&self.vlm, request, observer)
    }
}

/// A vision-language model alone, for questions; it loads nothing of the editor.
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
    vlm: VisionLanguageModel,
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
        let precision = options.precision()?;
        estimate::check_part(&files, "text_encoder", "model", &precision, options.budget)?;
        let vlm = Stages::new(observer).run(Stage::Load, || load_vlm(&files, &precision))?;
        Ok(Self { vlm })
    }

    /// Answers a question about pictures.
    ///
    /// # Errors
    /// A question that is empty or too long, or cancellation.
    pub fn ask(&self, request: &AskRequest, observer: &dyn Observer) -> Result<AskOutcome> {
        ask::run(&self.vlm, request, observer)
    }
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
    VisionLanguageModel::load(files, "text_encoder", precision)
}
