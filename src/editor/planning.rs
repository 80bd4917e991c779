//! Which model plans, and how it is asked.

use std::path::{Path, PathBuf};

use image::RgbImage;

use super::{source::ModelSource, stages::Stages};
use crate::{
    error::{Error, ModelError, Result},
    plan::{Decomposition, PlanOptions, Planner, Planning, Prompts},
    progress::{CancelToken, Event, Observer, Stage},
    request::PlanRequest,
    vlm::{Adapter, Call, Seen, VisionLanguageModel, canonical_name},
    weights::{ModelFiles, Precision},
};

/// Where a pipeline's folder has its vision-language model.
pub(super) const ENCODER: &str = "text_encoder";
/// The longest reply that may be asked for, in tokens.
const TOKENS_MAX: usize = 16_384;
/// Temperatures beyond this make every token equally likely.
const TEMPERATURE_MAX: f32 = 100.0;

/// Which model plans. Everything left out is the editor's own: its text encoder plans, and its
/// folder's `prompts/` are what the agents are told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlannerSource {
    /// A folder with another model: a pipeline's, or the model's alone. Where its weights are the
    /// text encoder's, they are loaded once.
    pub model: Option<PathBuf>,
    /// A folder with an adapter (PEFT) of the decomposition agent.
    pub adapter: Option<PathBuf>,
    /// Prompts in sections, see [`Prompts::set_sections`].
    pub prompts: Option<String>,
}

impl PlannerSource {
    /// Whether the planner's weights are those of the text encoder of `source`, so that they are
    /// loaded once; told from headers, nothing is loaded.
    ///
    /// # Errors
    /// Files that are missing or damaged.
    pub fn shares_text_encoder(&self, source: &ModelSource) -> Result<bool> {
        let Some(folder) = &self.model else { return Ok(true) };
        PlannerFolder::open(folder)?.is_encoder_of(&source.files()?)
    }
}

/// A folder with a model that plans.
struct PlannerFolder {
    files: ModelFiles,
    /// The part of it that holds the model.
    part: &'static str,
}

impl PlannerFolder {
    fn open(folder: &Path) -> Result<Self> {
        let files = ModelFiles::Folder(folder.to_owned());
        let parts = [(ENCODER, "text_encoder/config.json"), (".", "config.json")];
        let found = parts.into_iter().find(|(_, config)| files.exists(config));
        let Some((part, _)) = found else {
            return Err(ModelError::Missing {
                path: folder.join("config.json").display().to_string(),
                what: "the planner's model".to_owned(),
                hint: "pass a folder with config.json and weights of a Qwen2.5-VL model, or a \
                       pipeline's folder with text_encoder/"
                    .to_owned(),
            }
            .into());
        };
        Ok(Self { files, part })
    }

    /// Whether the weights are those of the text encoder in `pipeline`, however their tensors are named.
    fn is_encoder_of(&self, pipeline: &ModelFiles) -> Result<bool> {
        Ok(fingerprint(&self.files, self.part)? == fingerprint(pipeline, ENCODER)?)
    }
}

/// The planning side of an engine.
#[derive(Debug)]
pub(super) struct PlannerParts {
    /// A model of its own; otherwise the text encoder plans.
    own: Option<VisionLanguageModel>,
    adapter: Option<Adapter>,
    prompts: Prompts,
}

impl PlannerParts {
    /// Opens what `source` names beside the text encoder `encoder` of `files`; weights of a model
    /// of its own are read when they are needed, or by [`Self::fill`].
    pub(super) fn open(
        source: &PlannerSource,
        files: &ModelFiles,
        encoder: &VisionLanguageModel,
        precision: &Precision,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let mut prompts = Prompts::default();
        let mut own = None;
        let mut prompt_files = files.clone();
        if let Some(folder) = &source.model {
            let planner = PlannerFolder::open(folder)?;
            if planner.is_encoder_of(files)? {
                observer.event(&Event::Note(&format!(
                    "{} has the text encoder's weights, which are loaded once",
                    folder.display()
                )));
            } else {
                own = Some(VisionLanguageModel::open(&planner.files, planner.part, precision)?);
            }
            prompt_files = planner.files;
        }
        read_prompts(&prompt_files, &mut prompts)?;
        if let Some(sections) = &source.prompts {
            prompts.set_sections(sections)?;
        }
        let text = &own.as_ref().unwrap_or(encoder).config().text;
        let adapter = match &source.adapter {
            Some(folder) => {
                let files = ModelFiles::Folder(folder.clone());
                Some(Adapter::load(&files, ".", text, precision)?)
            }
            None => None,
        };
        Ok(Self { own, adapter, prompts })
    }

    /// What a model of its own takes; `None` where the text encoder plans.
    pub(super) fn own_weight_bytes(&self, precision: &Precision) -> Option<u64> {
        self.own.as_ref().map(|own| own.weight_bytes(precision, true))
    }

    /// The model that plans, where that may be the text encoder.
    pub(super) fn model<'a>(&'a self, encoder: &'a VisionLanguageModel) -> &'a VisionLanguageModel {
        self.own.as_ref().unwrap_or(encoder)
    }

    /// Reads the weights of a model of its own.
    pub(super) fn fill(&self, cancel: &CancelToken) -> Result<()> {
        self.own.as_ref().map_or(Ok(()), |own| own.fill(cancel))
    }

    /// Drops the weights of a model of its own, until it plans again.
    pub(super) fn release(&self) {
        if let Some(own) = &self.own {
            own.release();
        }
    }

    /// What the model reads for a request without a decomposition yet, agent by agent, and how many
    /// replies may stand in it besides.
    pub(super) fn readings(
        &self,
        encoder: &VisionLanguageModel,
        pictures: usize,
        request: &str,
    ) -> Result<[(String, usize); 2]> {
        let model = self.model(encoder);
        let decompose = model.chat(&self.prompts.for_decomposition(pictures, request))?;
        let nothing = Decomposition::default();
        let sequence = model.chat(&self.prompts.for_sequencing(pictures, &nothing))?;
        // The decomposition, and for a repair the faulty steps.
        Ok([(decompose, 0), (sequence, 2)])
    }

    /// Plans a request about pictures in the size in which the model sees them; `seen` are the same
    /// pictures as the text encoder has looked at them.
    pub(super) fn plan(
        &self,
        encoder: &VisionLanguageModel,
        work: &PlanWork<'_>,
        stages: &mut Stages<'_>,
    ) -> Result<Planning> {
        let (planner, seen) = self.planner(encoder, work)?;
        stages.run(Stage::Plan, || planner.plan(&seen, work.request))
    }

    /// The decomposition agent's reply, word for word.
    pub(super) fn decompose(
        &self,
        encoder: &VisionLanguageModel,
        work: &PlanWork<'_>,
        stages: &mut Stages<'_>,
    ) -> Result<String> {
        let (planner, seen) = self.planner(encoder, work)?;
        stages.run(Stage::Plan, || planner.reply(&seen, work.request))
    }

    /// The agents, and the pictures as their model has looked at them.
    fn planner<'a>(
        &'a self,
        encoder: &'a VisionLanguageModel,
        work: &PlanWork<'a>,
    ) -> Result<(Planner<'a>, Seen)> {
        check_options(work.options)?;
        let model = self.model(encoder);
        let seen = match &self.own {
            Some(own) => own.look_unless(work.pictures, work.cancel)?,
            None => work.seen.clone(),
        };
        let call = Call { adapter: self.adapter.as_ref(), cancel: work.cancel };
        Ok((Planner { model, prompts: &self.prompts, options: work.options, call }, seen))
    }
}

/// One request to plan.
pub(super) struct PlanWork<'a> {
    pub(super) request: &'a str,
    pub(super) pictures: &'a [RgbImage],
    pub(super) seen: &'a Seen,
    pub(super) options: &'a PlanOptions,
    pub(super) cancel: &'a CancelToken,
}

impl<'a> PlanWork<'a> {
    /// A request's own words and options, with its pictures as the text encoder sees them.
    pub(super) fn of(request: &'a PlanRequest, pictures: &'a [RgbImage], seen: &'a Seen) -> Self {
        let PlanRequest { prompt, planner, cancel, .. } = request;
        Self { request: prompt, pictures, seen, options: planner, cancel }
    }
}

fn check_options(options: &PlanOptions) -> Result<()> {
    let PlanOptions { tokens_max, temperature, .. } = *options;
    if !(1..=TOKENS_MAX).contains(&tokens_max) {
        return Err(Error::field("planner-tokens", tokens_max, format!("1 to {TOKENS_MAX}")));
    }
    if !(0.0..=TEMPERATURE_MAX).contains(&temperature) {
        let expected = format!("0 to {TEMPERATURE_MAX}");
        return Err(Error::field("planner-temperature", temperature, expected));
    }
    Ok(())
}

/// Tells whether two vision-language models have the same weights, however their tensors are named.
fn fingerprint(files: &ModelFiles, part: &str) -> Result<String> {
    Ok(files.checkpoint(part, "model")?.rename(canonical_name)?.fingerprint())
}

/// A model folder may bring the prompts that its model was trained with.
fn read_prompts(files: &ModelFiles, prompts: &mut Prompts) -> Result<()> {
    for name in Prompts::names() {
        let path = format!("prompts/{name}.txt");
        if files.exists(&path) {
            prompts.set(name, &files.read_text(&path)?)?;
        }
    }
    Ok(())
}
