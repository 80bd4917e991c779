//! What tells the scales of a LoRA file whose tensors have no alphas.

use std::{borrow::Cow, path::Path};

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::{
    error::Result,
    weights::{AdapterConfig, Checkpoint, ModelFiles},
};

/// Where diffusers keeps the config in a file's metadata.
const METADATA: &str = "lora_adapter_metadata";
/// Where peft keeps it, beside the file.
const CONFIG: &str = "adapter_config.json";
/// The part of a pipeline's metadata that is about its transformer.
const TRANSFORMER: &str = "transformer.";

/// What peft calls the weights that its config belongs to.
pub(super) const PEFT_NAME: &str = "adapter_model.safetensors";

/// A config, and where it is.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    folder: ModelFiles,
    place: String,
    config: AdapterConfig,
}

/// Where the scales of a file come from.
#[derive(Debug)]
pub(super) enum Source {
    /// Nothing is there.
    Nowhere,
    /// A config that belongs to the file.
    Own(Settings),
    /// A folder with a config that may belong to another file.
    Doubtful(ModelFiles),
}

impl Source {
    /// In the metadata of `checkpoint`, or beside it.
    ///
    /// # Errors
    /// A config of the file that is damaged, or that asks for more than a low-rank change.
    pub(super) fn find(path: &Path, checkpoint: &Checkpoint) -> Result<Self> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = ModelFiles::Folder(folder.to_owned());
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(text) = checkpoint.value(METADATA).and_then(|value| value.as_text()) {
            let place = format!("{file}:{METADATA}");
            let text = of_transformer(text).unwrap_or_else(|| text.to_owned());
            let config = AdapterConfig::from_json(&folder, &place, &text)?;
            return Ok(Self::Own(Settings { folder, place, config }));
        }
        if !folder.exists(CONFIG) {
            return Ok(Self::Nowhere);
        }
        if file == PEFT_NAME {
            Settings::load(&folder).map(Self::Own)
        } else {
            Ok(Self::Doubtful(folder))
        }
    }

    /// Whether a config lies there that may belong to another file.
    pub(super) fn is_doubtful(&self) -> bool {
        matches!(self, Self::Doubtful(_))
    }

    /// The settings for a file that changes `modules`, by their names in the model.
    ///
    /// # Errors
    /// A config that names these modules, but is damaged or asks for more than a low-rank change.
    pub(super) fn for_modules(&self, modules: &[&str]) -> Result<Option<Cow<'_, Settings>>> {
        match self {
            Self::Nowhere => Ok(None),
            Self::Own(settings) => Ok(Some(Cow::Borrowed(settings))),
            Self::Doubtful(folder) if targets_are(folder, modules) => {
                Settings::load(folder).map(|settings| Some(Cow::Owned(settings)))
            }
            Self::Doubtful(_) => Ok(None),
        }
    }
}

impl Settings {
    fn load(folder: &ModelFiles) -> Result<Self> {
        let config = AdapterConfig::load(folder, CONFIG)?;
        Ok(Self { folder: folder.clone(), place: CONFIG.to_owned(), config })
    }

    /// Rank and scale of a module, by its name in the model.
    ///
    /// # Errors
    /// A pattern that takes too many steps to match.
    pub(super) fn rank_and_scale(&self, module: &str) -> Result<(usize, f64)> {
        self.config.rank_and_scale(&self.folder, &self.place, module)
    }
}

/// Whether the config's targets are these modules: a pattern that each of them matches, or a list
/// of ends of their names, each of which some module has. `all-linear` says nothing; peft writes
/// the list instead.
fn targets_are(folder: &ModelFiles, modules: &[&str]) -> bool {
    let config = folder.read_json::<Map<String, Value>>(CONFIG).unwrap_or_default();
    let targets: Option<Vec<&str>> = match config.get("target_modules") {
        Some(Value::String(pattern)) if pattern != "all-linear" => {
            let regex = Regex::new(&format!("^(?:{pattern})$"));
            let fits = |module: &&str| {
                regex.as_ref().is_ok_and(|regex| regex.is_match(module).unwrap_or(false))
            };
            return modules.iter().all(fits);
        }
        Some(Value::Array(list)) => list.iter().map(Value::as_str).collect(),
        _ => None,
    };
    let targets = targets.unwrap_or_default();
    let fits = |target: &str, module: &str| {
        module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    !targets.is_empty()
        && targets.iter().all(|target| modules.iter().any(|module| fits(target, module)))
        && modules.iter().all(|module| targets.iter().any(|target| fits(target, module)))
}

/// The transformer's part of a pipeline's config; `None` where the config is of one model.
fn of_transformer(text: &str) -> Option<String> {
    let all: Map<String, Value> = serde_json::from_str(text).ok()?;
    let own = |(key, value): (String, Value)| Some((key.strip_prefix(TRANSFORMER)?.into(), value));
    let part: Map<String, Value> = all.into_iter().filter_map(own).collect();
    (!part.is_empty()).then(|| Value::Object(part).to_string())
}
