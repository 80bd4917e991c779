//! The editor's LoRA files, and what the distilled ones ask of the schedule.

use std::path::PathBuf;

use crate::{
    diffusion::Transformer,
    error::{Error, Result},
    request::WeightShare,
    weights::{LoraFile, LoraReport, LowRankChanges, ModelFiles, Precision},
};

/// A LoRA file for the transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSource {
    /// The safetensors file.
    pub path: PathBuf,
    /// What its changes are multiplied by; with 0 the model stays as it is, bit for bit.
    pub strength: f64,
}

impl LoraSource {
    /// A file at the strength it was made for.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), strength: 1.0 }
    }
}

/// A file that makes pictures in few steps.
#[derive(Debug)]
struct Lightning {
    file: String,
    steps: usize,
}

/// LoRA files whose headers have been read.
#[derive(Debug)]
pub(super) struct Loras {
    files: Vec<LoraFile>,
    lightning: Option<Lightning>,
}

/// What an engine keeps of its LoRA files.
#[derive(Debug)]
pub(super) struct LoadedLoras {
    pub(super) reports: Vec<LoraReport>,
    lightning: Option<Lightning>,
}

impl Loras {
    /// Opens the files; those that make pictures in few steps are told by their names.
    pub(super) fn open(sources: &[LoraSource], lightning_defaults: bool) -> Result<Self> {
        let files: Vec<LoraFile> = sources
            .iter()
            .map(|source| LoraFile::open(&source.path, source.strength))
            .collect::<Result<_>>()?;
        let mut lightning: Option<Lightning> = None;
        for file in files.iter().filter(|file| lightning_defaults && file.is_on()) {
            let Some(steps) = lightning_steps(&file.name()) else { continue };
            if let Some(first) = lightning.as_ref().filter(|first| first.steps != steps) {
                let found = format!(
                    "{} for {} steps, {} for {steps}",
                    first.file,
                    first.steps,
                    file.name()
                );
                return Err(Error::field("lora", found, "Lightning files for one number of steps"));
            }
            lightning = Some(Lightning { file: file.name(), steps });
        }
        Ok(Self { files, lightning })
    }

    /// The steps that a Lightning file is made for.
    pub(super) fn lightning_steps(&self) -> Option<usize> {
        self.lightning.as_ref().map(|lightning| lightning.steps)
    }

    /// What the files' numbers take in memory.
    pub(super) fn share(&self, precision: &Precision) -> Option<WeightShare> {
        let elements: u64 = self.files.iter().map(LoraFile::elements).sum();
        let bytes = elements * precision.compute.size_in_bytes() as u64;
        (bytes > 0).then_some(WeightShare { part: "lora", bytes })
    }

    /// Matches the files with the transformer of a model folder and reads their numbers.
    pub(super) fn read(
        self,
        files: &ModelFiles,
        precision: &Precision,
    ) -> Result<(LowRankChanges, LoadedLoras)> {
        let (changes, reports) = Transformer::read_loras(files, &self.files, precision)?;
        Ok((changes, LoadedLoras { reports, lightning: self.lightning }))
    }
}

impl LoadedLoras {
    /// What a person should know about an edit of `steps` steps.
    pub(super) fn notes(&self, steps: usize) -> Vec<String> {
        let mut notes = Vec::new();
        for LoraReport { name, skipped, config_ignored, .. } in &self.reports {
            if *config_ignored {
                notes.push(format!(
                    "{name}: nothing says that the adapter_config.json beside it is about this file, \
                     so its scale is 1; if it is, call the file adapter_model.safetensors"
                ));
            }
            if *skipped > 0 {
                notes.push(format!(
                    "{name}: {skipped} tensors for a text encoder are not used, only those of the \
                     transformer"
                ));
            }
        }
        if let Some(Lightning { file, steps: made_for }) = &self.lightning {
            notes.push(format!(
                "{file} is a Lightning file for {made_for} steps: unless asked otherwise, \
                 {made_for} steps without guidance, on its own schedule"
            ));
            if steps != *made_for {
                notes.push(format!("{file} is made for {made_for} steps, not for {steps}"));
            }
        }
        notes
    }
}

/// The steps in the name of a Lightning file: `Lightning` and `4steps`, `8-steps` or the like.
fn lightning_steps(name: &str) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    if !name.contains("lightning") {
        return None;
    }
    let made_for = |(at, _): (usize, &str)| {
        let before = name[..at].trim_end_matches(['-', '_', ' ']);
        let number = before.rsplit(|c: char| !c.is_ascii_digit()).next()?;
        [4, 8].into_iter().find(|steps| number == steps.to_string())
    };
    name.match_indices("step").find_map(made_for)
}

#[cfg(test)]
mod tests {
    use super::lightning_steps;

    #[test]
    fn lightning_files_are_told_by_their_names() {
        for (name, steps) in [
            ("Qwen-Image-Lightning-4steps-V1.0", Some(4)),
            ("Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16", Some(8)),
            ("qwen_image_edit_lightning_4-steps", Some(4)),
            ("Qwen-Image-Lightning-8step", Some(8)),
            ("lightning-14steps", None),
            ("Lightning", None),
            ("Qwen-Image-4steps", None),
            ("Lightning-2509-V1", None),
            ("lightning-steps", None),
        ] {
            assert_eq!(lightning_steps(name), steps, "{name}");
        }
    }
}
