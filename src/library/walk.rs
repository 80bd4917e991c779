//! Finds files and folders by their names, without opening them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// How deep folders are looked into.
const DEPTH_MAX: usize = 5;
/// Most files and folders that are looked at in one place.
const ENTRIES_MAX: usize = 100_000;
/// What marks a folder as a whole model.
const INDEX: &str = "model_index.json";
/// Endings of weight files.
const ENDINGS: [&str; 3] = ["safetensors", "sft", "gguf"];
/// ComfyUI's folders with weights, below `models/`.
const COMFY_FOLDERS: [&str; 6] =
    ["diffusion_models", "unet", "text_encoders", "clip", "vae", "loras"];

/// Whose way of laying out files a place has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// A folder that was named.
    Folder,
    /// Hugging Face's cache.
    HuggingFace,
    /// ComfyUI's folders.
    ComfyUi,
}

impl Place {
    /// As lists name it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::HuggingFace => "hugging face",
            Self::ComfyUi => "comfyui",
        }
    }
}

/// Where to look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// Folders that were named; one in ComfyUI's layout is looked through as such.
    pub folders: Vec<PathBuf>,
    /// Hugging Face's caches: folders with `models--org--name`.
    pub hubs: Vec<PathBuf>,
    /// ComfyUI's own folders.
    pub comfy: Vec<PathBuf>,
}

impl Places {
    /// All of them, for messages.
    #[must_use]
    pub fn list(&self) -> Vec<&Path> {
        let all = self.folders.iter().chain(&self.hubs).chain(&self.comfy);
        all.map(PathBuf::as_path).collect()
    }
}

/// A weight file or a model's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// How it can be named: `org/name`, or the path below its place.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// In what kind of place.
    pub place: Place,
    /// Whether it is a folder: a whole model, or one sharded part of one.
    pub is_folder: bool,
}

/// Everything in the places, in the order of the places and then of names.
#[must_use]
pub fn walk(places: &Places) -> Vec<Candidate> {
    let mut found = Vec::new();
    for folder in &places.folders {
        match comfy_root(folder) {
            Some(root) => comfy(&root, &mut found),
            None => tree(folder, Place::Folder, &mut found),
        }
    }
    for hub in &places.hubs {
        hugging_face(hub, &mut found);
    }
    for folder in &places.comfy {
        if let Some(root) = comfy_root(folder) {
            comfy(&root, &mut found);
        }
    }
    let mut seen = BTreeSet::new();
    found.retain(|candidate| seen.insert(candidate.path.clone()));
    found
}

/// `models` in ComfyUI's folder, told by the folders in it.
fn comfy_root(folder: &Path) -> Option<PathBuf> {
    let root = folder.join("models");
    COMFY_FOLDERS[..2].iter().any(|name| root.join(name).is_dir()).then_some(root)
}

fn comfy(root: &Path, found: &mut Vec<Candidate>) {
    for name in COMFY_FOLDERS {
        tree(&root.join(name), Place::ComfyUi, found);
    }
}

fn tree(root: &Path, place: Place, found: &mut Vec<Candidate>) {
    let mut left = ENTRIES_MAX;
    let mut here = Vec::new();
    descend(root, DEPTH_MAX, &mut left, &mut here);
    let named = here.into_iter().map(|(path, is_folder)| {
        let below = path.strip_prefix(root).unwrap_or(&path);
        let below = if below.as_os_str().is_empty() { last(root) } else { slashes(below) };
        Candidate { name: below, path, place, is_folder }
    });
    found.extend(named);
}

/// Models' folders and weight files below `folder`, with whether each is a folder. A model's folder
/// is not looked into.
fn descend(folder: &Path, depth: usize, left: &mut usize, found: &mut Vec<(PathBuf, bool)>) {
    if is_model(folder) {
        found.push((folder.to_owned(), true));
        return;
    }
    let sharded = is_sharded(folder);
    if sharded || is_part(folder) {
        found.push((folder.to_owned(), true));
    }
    for path in children(folder, left) {
        let hidden = last(&path).starts_with('.');
        if hidden {
            continue;
        }
        if path.is_dir() {
            if depth > 0 {
                descend(&path, depth - 1, left, found);
            }
        } else if is_weights(&path) && !(sharded && last(&path).contains("-of-")) {
            found.push((path, false));
        }
    }
}

/// `models--org--name/snapshots/REVISION`: the revision that `refs/main` names, or the last.
fn hugging_face(hub: &Path, found: &mut Vec<Candidate>) {
    let mut left = ENTRIES_MAX;
    for repository in children(hub, &mut left) {
        let Some(name) = last(&repository).strip_prefix("models--").map(|it| it.replace("--", "/"))
        else {
            continue;
        };
        let snapshots = repository.join("snapshots");
        let main = fs_err::read_to_string(repository.join("refs/main")).unwrap_or_default();
        // A revision is one name; what is more leads elsewhere.
        let revision = Path::new(main.trim());
        let is_name = revision.file_name() == Some(revision.as_os_str());
        let named = is_name.then(|| snapshots.join(revision)).filter(|it| it.is_dir());
        let other =
            || children(&snapshots, &mut { ENTRIES_MAX }).into_iter().rfind(|it| it.is_dir());
        let snapshot = named.or_else(other);
        let Some(snapshot) = snapshot else { continue };
        let mut here = Vec::new();
        descend(&snapshot, DEPTH_MAX, &mut left, &mut here);
        found.extend(here.into_iter().map(|(path, is_folder)| {
            let below = path.strip_prefix(&snapshot).map(slashes).unwrap_or_default();
            let name = if below.is_empty() { name.clone() } else { format!("{name}/{below}") };
            Candidate { name, path, place: Place::HuggingFace, is_folder }
        }));
    }
}

/// What is in a folder, in the order of names; nothing where it cannot be read.
fn children(folder: &Path, left: &mut usize) -> Vec<PathBuf> {
    let Ok(entries) = fs_err::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> =
        entries.take(*left).filter_map(|entry| Some(entry.ok()?.path())).collect();
    *left = left.saturating_sub(paths.len());
    paths.sort();
    paths
}

fn is_model(folder: &Path) -> bool {
    folder.join(INDEX).is_file()
}

/// What the weights of a part are called in the published layout.
const STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];

/// Whether weights in shards lie in the folder, which is one thing then.
fn is_sharded(folder: &Path) -> bool {
    STEMS.iter().any(|stem| folder.join(format!("{stem}.safetensors.index.json")).is_file())
}

/// Whether the folder is one part of a model with its weights in one file, which has a name of its own
/// as well.
fn is_part(folder: &Path) -> bool {
    let weights = |stem: &&str| folder.join(format!("{stem}.safetensors")).is_file();
    folder.join("config.json").is_file() && STEMS.iter().any(weights)
}

/// A file that is called so, or a link to one that is gone; no pipe and no device.
fn is_weights(path: &Path) -> bool {
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return false;
    }
    let end = path.extension().map(|end| end.to_string_lossy().to_lowercase());
    end.is_some_and(|end| ENDINGS.contains(&end.as_str()))
}

pub(super) fn last(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn slashes(path: &Path) -> String {
    let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}
