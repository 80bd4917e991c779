//! From what a person calls a model to where it is.

use std::path::{Path, PathBuf};

use super::walk::{Candidate, Places, last, walk};
use crate::{
    error::{Error, ModelError, Result},
    weights::{Checkpoint, Family, family},
};

/// What a name should stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want<'a> {
    /// A whole model's folder.
    Folder,
    /// The folder of a whole model, or of one model alone with its config.
    ModelOrPart,
    /// A weight file of one of these families.
    File(&'a [Family]),
    /// Anything.
    Any,
}

/// The path of `text`: itself where something is there or where it is plainly a path; otherwise
/// what the places have under this name. A name is `org/name`, the path below a place, or the last
/// part of either, with or without the ending; small and capital letters are the same.
///
/// # Errors
/// Nothing of that name, with the places that were looked through; or several of that name, with
/// their paths.
pub fn resolve(
    flag: &'static str,
    text: &Path,
    want: Want<'_>,
    places: &Places,
) -> Result<PathBuf> {
    let written = text.to_string_lossy();
    let is_path = text.is_absolute() || written.starts_with(['.', '~']) || written.contains('\\');
    if is_path || text.exists() {
        return Ok(text.to_owned());
    }
    let wanted = written.to_lowercase();
    let all = walk(places);
    let named: Vec<&Candidate> = all.iter().filter(|it| is_named(it, &wanted)).collect();
    let mut fitting: Vec<&Candidate> = named.iter().copied().filter(|it| fits(it, want)).collect();
    // A name in full comes before one that only ends like it.
    if let Some(exact) = fitting.iter().position(|it| it.name.to_lowercase() == wanted) {
        fitting = vec![fitting[exact]];
    }
    match fitting.as_slice() {
        [only] => Ok(only.path.clone()),
        [] => Err(missing(&written, want, &named, places)),
        several => {
            let paths: Vec<String> =
                several.iter().map(|it| it.path.display().to_string()).collect();
            let found = format!("{written}, which is the name of {}", paths.join(" and "));
            Err(Error::field(flag, found, "the path of one of them"))
        }
    }
}

fn is_named(candidate: &Candidate, wanted: &str) -> bool {
    let name = candidate.name.to_lowercase();
    let file = last(&candidate.path).to_lowercase();
    let without_ending = |name: &str| {
        let ends = [".safetensors", ".sft", ".gguf"];
        ends.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_owned()
    };
    name == wanted
        || without_ending(&name) == wanted
        || name.rsplit('/').next() == Some(wanted)
        || (!candidate.is_folder && (file == wanted || without_ending(&file) == wanted))
}

fn fits(candidate: &Candidate, want: Want<'_>) -> bool {
    let is_model = candidate.path.join("model_index.json").is_file();
    match want {
        Want::Any => true,
        Want::Folder => candidate.is_folder && is_model,
        Want::ModelOrPart => {
            candidate.is_folder && (is_model || candidate.path.join("config.json").is_file())
        }
        Want::File(_) if candidate.is_folder => false,
        Want::File(families) => {
            let found = Checkpoint::open_file(&candidate.path).ok();
            found.and_then(|file| family(&file)).is_some_and(|found| families.contains(&found))
        }
    }
}

fn missing(name: &str, want: Want<'_>, named: &[&Candidate], places: &Places) -> Error {
    let wanted = match want {
        Want::Folder | Want::ModelOrPart => "a model folder".to_owned(),
        Want::Any => "a model or a file".to_owned(),
        Want::File(families) => {
            let labels: Vec<&str> = families.iter().map(|family| family.label()).collect();
            format!("a weight file ({})", labels.join(" or "))
        }
    };
    let looked: Vec<String> =
        places.list().iter().map(|place| place.display().to_string()).collect();
    let looked = match looked.is_empty() {
        true => "only".to_owned(),
        false => format!("and in {}", looked.join(", ")),
    };
    let what = match named.first() {
        None => format!("{wanted} of this name; looked here {looked}"),
        Some(other) => {
            format!("{wanted} of this name; {} is {}", other.path.display(), kind_of(other))
        }
    };
    ModelError::Missing {
        path: name.to_owned(),
        what,
        hint: "`pentimento models list` shows what there is; --models-dir DIR adds a place"
            .to_owned(),
    }
    .into()
}

/// What something of the right name and the wrong kind is.
fn kind_of(candidate: &Candidate) -> &'static str {
    if candidate.is_folder {
        return "a folder";
    }
    let opened = Checkpoint::open_file(&candidate.path).ok();
    opened.as_ref().and_then(family).map_or("another file", Family::label)
}
