//! LoRA files: low-rank changes of a model's matrices, matched with the model by their names.
//!
//! Names and scales follow the loaders of diffusers and ComfyUI. A file is read in two steps: its
//! header when it is opened, its numbers when it is matched with a model. Every tensor is used,
//! skipped by a rule that has a name, or an error.

mod names;
mod settings;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::Serialize;

use self::{
    names::{Modules, Reading, Role},
    settings::{PEFT_NAME, Settings, Source},
};
use super::{Checkpoint, Precision, Weights, model_name};
use crate::{
    error::{Error, ModelError, Result},
    ops::{LinearWeight, PackedLinear},
};

/// Names in one message.
const NAMES_MAX: usize = 8;
/// What the files that are read hold, for messages.
const EXPECTED: &str = "pairs of low-rank factors, with or without alphas";

/// What peft and diffusers call the file that they save.
const SAVED_NAMES: [&str; 2] = [PEFT_NAME, "pytorch_lora_weights.safetensors"];

/// A LoRA file whose header has been read.
#[derive(Debug)]
pub struct LoraFile {
    path: PathBuf,
    strength: f64,
    /// In float32 on the host, which holds every number of the file exactly.
    weights: Weights,
    settings: Source,
}

/// What became of a LoRA file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LoraReport {
    /// The file's name without its ending, or its folder's: see [`LoraFile::name`].
    pub name: String,
    /// What its changes are multiplied by; with 0 the model stays as it is, bit for bit.
    pub strength: f64,
    /// Matrices of the model that it changes.
    pub modules: usize,
    /// Tensors that change a text encoder, which are not read.
    pub skipped: usize,
    /// Whether an `adapter_config.json` beside the file was not used, since nothing says that it
    /// belongs to it; changes without alphas then have the scale 1.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub config_ignored: bool,
}

/// `scale · up · down`, to be added to a matrix. Clones share the factors, so a layer that is loaded
/// again takes no further memory for its changes.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// `[rank, width_in]`.
    pub(crate) down: PackedLinear,
    /// `[width_out, rank]`.
    pub(crate) up: PackedLinear,
    pub(crate) scale: f64,
}

/// The changes of a model's matrices, which their layers take when they are loaded.
#[derive(Debug, Default)]
pub struct LowRankChanges {
    modules: BTreeMap<String, Vec<Change>>,
    taken: Mutex<BTreeSet<String>>,
}

/// Name and shape of the tensors that a file has for one module.
type Parts<'a> = BTreeMap<Role, (&'a str, &'a [usize])>;

/// A module's change before its numbers are read: its factors by name and shape.
#[derive(Debug)]
struct Planned<'a> {
    down: (&'a str, [usize; 2]),
    up: (&'a str, [usize; 2]),
    scale: f64,
}

/// The changes of a file before their numbers are read, by module.
struct Plan<'a> {
    changes: BTreeMap<&'a str, Planned<'a>>,
    config_ignored: bool,
}

impl LoraFile {
    /// Reads the header of a safetensors file, and what tells its alphas: the file's metadata, or
    /// `adapter_config.json` beside it. A file that peft did not name may lie beside the config of
    /// another one: its config counts when its `target_modules` are the file's modules. `path` may be
    /// the folder of a file that peft or diffusers named.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another kind; settings that ask for more than a
    /// low-rank change; a strength that is not finite.
    pub fn open(path: &Path, strength: f64) -> Result<Self> {
        if !strength.is_finite() {
            return Err(Error::field("lora strength", strength, "a finite number"));
        }
        let in_folder = SAVED_NAMES.iter().map(|name| path.join(name)).find(|file| file.is_file());
        let path = in_folder.as_deref().unwrap_or(path);
        if path.is_dir() {
            return Err(ModelError::Missing {
                path: path.display().to_string(),
                what: format!("this is a folder without {}", SAVED_NAMES.join(" or ")),
                hint: "pass the LoRA's safetensors file".to_owned(),
            }
            .into());
        }
        let checkpoint = Checkpoint::open_file(path)?;
        let settings = Source::find(path, &checkpoint)?;
        let weights = Weights::new(checkpoint, Precision::reference());
        Ok(Self { path: path.to_owned(), strength, weights, settings })
    }

    /// The file's name without its ending; its folder's where all are called like it.
    #[must_use]
    pub fn name(&self) -> String {
        let usual = |name: &OsStr| SAVED_NAMES.iter().any(|saved| name == *saved);
        let folder = self.path.file_name().filter(|name| usual(name)).and(self.path.parent());
        match folder.and_then(|folder| folder.canonicalize().ok()) {
            Some(folder) => model_name(&folder),
            None => self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        }
    }

    /// What the model's outputs are changed by, times this.
    #[must_use]
    pub fn strength(&self) -> f64 {
        self.strength
    }

    /// Whether the file changes anything.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.strength != 0.0
    }

    /// Number of values that are kept in memory.
    #[must_use]
    pub fn elements(&self) -> u64 {
        if self.is_on() { self.weights.checkpoint().elements() } else { 0 }
    }

    fn corrupt(&self, found: String, expected: impl Into<String>, hint: &str) -> Error {
        let (path, expected, hint) =
            (self.path.display().to_string(), expected.into(), hint.to_owned());
        ModelError::Corrupt { path, found, expected, hint }.into()
    }

    fn shape_fault(&self, tensor: &str, found: &[usize], expected: &[usize]) -> Error {
        ModelError::TensorShape {
            path: self.path.display().to_string(),
            tensor: tensor.to_owned(),
            found: found.to_vec(),
            expected: expected.to_vec(),
        }
        .into()
    }

    /// The parts of every module's change, by the module's name in the file, and the number of
    /// tensors for text encoders.
    fn parts(&self) -> Result<(BTreeMap<&str, Parts<'_>>, usize)> {
        let mut modules: BTreeMap<&str, Parts<'_>> = BTreeMap::new();
        let mut skipped = 0;
        for (name, entry) in self.weights.checkpoint().tensors() {
            match names::read(name) {
                Reading::TextEncoder => skipped += 1,
                Reading::Other(what) => {
                    let hint = "convert the file to a plain LoRA, or leave it out";
                    return Err(self.corrupt(format!("tensor {name}, {what}"), EXPECTED, hint));
                }
                Reading::Part { module, role } => {
                    let parts = modules.entry(module).or_default();
                    if let Some((first, _)) = parts.insert(role, (name, &entry.shape)) {
                        return Err(self.twice(first, name));
                    }
                }
            }
        }
        Ok((modules, skipped))
    }

    fn twice(&self, first: &str, second: &str) -> Error {
        let hint = "the file was merged from two; use the originals";
        self.corrupt(format!("{first} and {second} for the same place"), "each once", hint)
    }

    /// Refuses files with modules that are not the model's, and files without modules.
    fn check_modules(&self, parts: &BTreeMap<&str, Parts<'_>>, model: &Modules) -> Result<()> {
        let unmatched: Vec<&str> =
            parts.keys().copied().filter(|name| model.find(name).is_none()).collect();
        if unmatched.is_empty() && !parts.is_empty() {
            return Ok(());
        }
        let mut found = "no modules of the transformer".to_owned();
        if !unmatched.is_empty() {
            let names = unmatched[..unmatched.len().min(NAMES_MAX)].join(", ");
            let more = if unmatched.len() > NAMES_MAX { ", …" } else { "" };
            let (count, all) = (unmatched.len(), parts.len());
            found = format!("{count} of {all} modules are not the model's: {names}{more}");
        }
        if let Some(what) = unmatched.iter().find_map(|name| names::foreign(name)) {
            found = format!("{found} ({what})");
        }
        let expected = format!("modules of the transformer, such as {}", model.example());
        Err(self.corrupt(found, expected, "the file was made for another model"))
    }

    /// The changes that the file's tensors say, checked against the model.
    fn planned<'a>(
        &'a self,
        all_parts: &BTreeMap<&'a str, Parts<'a>>,
        model: &'a Modules,
    ) -> Result<Plan<'a>> {
        self.check_modules(all_parts, model)?;
        let found = |name: &&str| model.find(name); // checked above
        let modules: Vec<(&str, [usize; 2])> = all_parts.keys().filter_map(found).collect();
        let all_alphas = all_parts.values().all(|parts| parts.contains_key(&Role::Alpha));
        let names: Vec<&str> = modules.iter().map(|(module, _)| *module).collect();
        let settings = if all_alphas { None } else { self.settings.for_modules(&names)? };
        let mut changes: BTreeMap<&str, Planned<'_>> = BTreeMap::new();
        for ((module, widths), parts) in modules.into_iter().zip(all_parts.values()) {
            let planned = self.planned_one(module, widths, parts, settings.as_deref())?;
            if let Some(first) = changes.insert(module, planned) {
                return Err(self.twice(first.down.0, parts[&Role::Down].0));
            }
        }
        let config_ignored = !all_alphas && settings.is_none() && self.settings.is_doubtful();
        Ok(Plan { changes, config_ignored })
    }

    fn planned_one<'a>(
        &self,
        module: &str,
        [width_out, width_in]: [usize; 2],
        parts: &Parts<'a>,
        settings: Option<&Settings>,
    ) -> Result<Planned<'a>> {
        let (Some(&down), Some(&up)) = (parts.get(&Role::Down), parts.get(&Role::Up)) else {
            let there: Vec<&str> = parts.values().map(|(name, _)| *name).collect();
            let found = format!("{} without the other factor", there.join(" and "));
            let hint = "the file is damaged or of another kind; download it again";
            return Err(self.corrupt(found, EXPECTED, hint));
        };
        let rank = down.1.first().copied().unwrap_or_default().max(1);
        for ((name, shape), expected) in [(down, [rank, width_in]), (up, [width_out, rank])] {
            if shape != expected {
                return Err(self.shape_fault(name, shape, &expected));
            }
        }
        let scale = match (parts.get(&Role::Alpha), settings) {
            (Some(&(name, shape)), _) => self.alpha(name, shape)? / as_number(rank),
            (None, Some(settings)) => {
                let (listed, scale) = settings.rank_and_scale(module)?;
                if listed != rank {
                    return Err(self.shape_fault(down.0, down.1, &[listed, width_in]));
                }
                scale
            }
            (None, None) => 1.0,
        };
        let (down, up) = ((down.0, [rank, width_in]), (up.0, [width_out, rank]));
        Ok(Planned { down, up, scale: scale * self.strength })
    }

    /// An alpha is a number of any type: tools write whole numbers, too.
    fn alpha(&self, name: &str, shape: &[usize]) -> Result<f64> {
        if !matches!(shape, [] | [1]) {
            return Err(self.shape_fault(name, shape, &[]));
        }
        match self.weights.checkpoint().scalar(name) {
            Some(alpha) if alpha.is_finite() => Ok(alpha),
            Some(alpha) => {
                let hint = "the file is damaged; download it again";
                Err(self.corrupt(format!("tensor {name} is {alpha}"), "a finite number", hint))
            }
            None => Err(ModelError::TensorType {
                path: self.path.display().to_string(),
                tensor: name.to_owned(),
                found: self
                    .weights
                    .checkpoint()
                    .entry(name)
                    .map_or_else(String::new, |entry| entry.kind.to_string()),
                supported: "floats and whole numbers",
            }
            .into()),
        }
    }
}

impl LowRankChanges {
    /// Matches files with the matrices of `model`, which has its own names, and reads their
    /// numbers; one report for each file. Several changes of a matrix add up.
    ///
    /// # Errors
    /// Tensors that are no part of a low-rank change, modules that the model does not have, files
    /// without modules, shapes that do not fit, or cancellation.
    pub fn read(
        files: &[LoraFile],
        model: &Checkpoint,
        precision: &Precision,
    ) -> Result<(Self, Vec<LoraReport>)> {
        let model = Modules::of(model);
        let mut changed: BTreeMap<String, Vec<Change>> = BTreeMap::new();
        let mut reports = Vec::with_capacity(files.len());
        for file in files {
            let (parts, skipped) = file.parts()?;
            let Plan { changes, config_ignored } = file.planned(&parts, &model)?;
            reports.push(LoraReport {
                name: file.name(),
                strength: file.strength,
                modules: changes.len(),
                skipped,
                config_ignored,
            });
            for (module, planned) in changes.into_iter().filter(|_| file.is_on()) {
                precision.cancel.check()?;
                let factor = |(name, shape): (&str, [usize; 2])| {
                    let tensor = file.weights.tensor(name, &shape)?.to_dtype(precision.compute)?;
                    let tensor = tensor.to_device(&precision.device)?;
                    Result::<_>::Ok(PackedLinear::new(LinearWeight::Dense(tensor), None)?)
                };
                let (down, up) = (factor(planned.down)?, factor(planned.up)?);
                let change = Change { down, up, scale: planned.scale };
                changed.entry(module.to_owned()).or_default().push(change);
            }
        }
        Ok((Self { modules: changed, taken: Mutex::default() }, reports))
    }

    /// The changes of `module`, and the note that they were taken.
    pub(crate) fn take(&self, module: &str) -> Vec<Change> {
        let Some(changes) = self.modules.get(module) else { return Vec::new() };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(module.to_owned());
        changes.clone()
    }

    /// Fails when a matrix was not loaded as a layer that takes changes. Call it when the whole
    /// model is loaded.
    ///
    /// # Errors
    /// [`ModelError::TensorsUnused`] with the first names.
    pub fn finish(&self) -> Result<()> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<&str> =
            self.modules.keys().map(String::as_str).filter(|name| !taken.contains(*name)).collect();
        if left.is_empty() {
            return Ok(());
        }
        let names = left[..left.len().min(NAMES_MAX)].join(", ");
        let (path, count) = ("LoRA".to_owned(), left.len());
        Err(ModelError::TensorsUnused { path, count, names }.into())
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rank is a side of a tensor in memory")]
fn as_number(rank: usize) -> f64 {
    rank as f64
}
