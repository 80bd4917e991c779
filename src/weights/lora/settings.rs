//! What tells the scales of a LoRA file whose tensors have no alphas.

use std::path::Path;

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

/// A config, and where it is.
#[derive(Debug)]
pub(super) struct Settings {
    folder: ModelFiles,
    place: String,
    config: AdapterConfig,
}

impl Settings {
    /// In the metadata of `checkpoint`, or beside it; `None` where there is no config.
    ///
    /// # Errors
    /// A config that is damaged, or that asks for more than a low-rank change.
    pub(super) fn find(path: &Path, checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = ModelFiles::Folder(folder.to_owned());
        if let Some(text) = checkpoint.value(METADATA).and_then(|value| value.as_text()) {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let place = format!("{file}:{METADATA}");
            let text = of_transformer(text).unwrap_or_else(|| text.to_owned());
            let config = AdapterConfig::from_json(&folder, &place, &text)?;
            return Ok(Some(Self { folder, place, config }));
        }
        if !folder.exists(CONFIG) {
            return Ok(None);
        }
        let config = AdapterConfig::load(&folder, CONFIG)?;
        Ok(Some(Self { folder, place: CONFIG.to_owned(), config }))
    }

    /// Rank and scale of a module, by its name in the model.
    ///
    /// # Errors
    /// A pattern that takes too many steps to match.
    pub(super) fn rank_and_scale(&self, module: &str) -> Result<(usize, f64)> {
        self.config.rank_and_scale(&self.folder, &self.place, module)
    }
}

/// The transformer's part of a pipeline's config; `None` where the config is of one model.
fn of_transformer(text: &str) -> Option<String> {
    let all: Map<String, Value> = serde_json::from_str(text).ok()?;
    let own = |(key, value): (String, Value)| Some((key.strip_prefix(TRANSFORMER)?.into(), value));
    let part: Map<String, Value> = all.into_iter().filter_map(own).collect();
    (!part.is_empty()).then(|| Value::Object(part).to_string())
}
