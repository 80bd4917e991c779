//! What a file or a folder is, told from headers and configs.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::walk::{Candidate, Place};
use crate::{
    editor::{EditVersion, ModelInfo, ModelSource},
    error::{ModelError, Result},
    weights::{Checkpoint, Family, ModelFiles, family, identify},
};

/// What stands in a list.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Entry {
    /// How it can be named.
    pub name: String,
    /// Where it is.
    #[serde(serialize_with = "crate::whole_file::lossy_path")]
    pub path: PathBuf,
    /// In what kind of place.
    pub place: Place,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// What a weight file is for; nothing for a whole model's folder.
    pub family: Option<Family>,
    /// What it is, in words.
    pub model: String,
    /// The editor's published version and why it is taken for that.
    pub version: Option<EditVersion>,
    /// Tensors of each type.
    pub types: BTreeMap<String, usize>,
    /// Size in bytes.
    pub bytes: u64,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// Reads the headers of what was found; what cannot be read says so in [`Entry::problem`].
#[must_use]
pub fn describe(candidate: &Candidate) -> Entry {
    let mut entry = Entry {
        name: candidate.name.clone(),
        path: candidate.path.clone(),
        place: candidate.place,
        is_folder: candidate.is_folder,
        family: None,
        model: String::new(),
        version: None,
        types: BTreeMap::new(),
        bytes: 0,
        problem: None,
    };
    let read = match candidate.is_folder {
        true if candidate.path.join("model_index.json").is_file() => whole(&mut entry),
        true => part(&candidate.path).and_then(|checkpoint| weights(&mut entry, &checkpoint)),
        false => file(&mut entry),
    };
    if let Err(error) = read {
        let text = error.to_string();
        entry.problem = Some(text.lines().next().unwrap_or_default().to_owned());
    }
    entry
}

fn whole(entry: &mut Entry) -> Result<()> {
    let info = ModelInfo::read(&ModelSource::Folder(entry.path.clone()))?;
    entry.model = format!("{} (whole)", info.version);
    for part in info.parts {
        entry.bytes += part.stored_bytes;
        for (kind, count) in part.types {
            *entry.types.entry(kind).or_default() += count;
        }
    }
    Ok(())
}

/// The weights of one part's folder, such as `transformer/`, in shards or in one file.
///
/// # Errors
/// Weights that are missing or damaged.
pub fn part(folder: &Path) -> Result<Checkpoint> {
    let whole = folder.canonicalize()?;
    let files = ModelFiles::Folder(whole.parent().unwrap_or(&whole).to_owned());
    let name = super::walk::last(&whole);
    let stems = ["model", "diffusion_pytorch_model"];
    let mut first = None;
    for stem in stems {
        match files.checkpoint(&name, stem) {
            Ok(checkpoint) => return Ok(checkpoint),
            // A shard that is missing says more than a file of the other name.
            Err(error) => {
                let is_other = matches!(&error, crate::Error::Model(ModelError::Missing { path, .. }) if path.ends_with(&format!("{stem}.safetensors")));
                if first.is_none() || !is_other {
                    first = Some(error);
                }
            }
        }
    }
    Err(first.unwrap_or_else(|| files.missing(&name)))
}

fn file(entry: &mut Entry) -> Result<()> {
    entry.bytes = fs_err::metadata(&entry.path)?.len();
    let checkpoint = Checkpoint::open_file(&entry.path)?;
    weights(entry, &checkpoint)
}

fn weights(entry: &mut Entry, checkpoint: &Checkpoint) -> Result<()> {
    if entry.bytes == 0 {
        entry.bytes = checkpoint.stored_bytes();
    }
    for (_, tensor) in checkpoint.tensors() {
        *entry.types.entry(tensor.kind.to_string()).or_default() += 1;
    }
    entry.family = family(checkpoint);
    entry.model = match entry.family {
        Some(Family::Lora) => "LoRA".to_owned(),
        _ => identify(checkpoint).unwrap_or("unknown").to_owned(),
    };
    if entry.family == Some(Family::Transformer) && !entry.is_folder {
        entry.version = Some(EditVersion::of_file(&entry.path)?);
    }
    if let Some((name, tensor)) = checkpoint.tensors().find(|(_, tensor)| !tensor.kind.is_read()) {
        entry.problem = Some(format!("tensor {name} has type {}, which is not read", tensor.kind));
    }
    Ok(())
}
