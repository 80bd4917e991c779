//! Files from different places that together stand for a model folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::{checkpoint::Checkpoint, files::ModelFiles, mmap::Bytes};
use crate::error::{ModelError, Result};

/// A text file of the folder.
#[derive(Debug, Clone)]
enum Text {
    /// Lies at this place.
    File(PathBuf),
    /// Was made from what another file says.
    Made { text: String, origin: String },
}

/// A model folder put together from files: some stand where the user named them, some are made
/// from what those files say, and the rest comes from a folder, where there is one.
#[derive(Debug, Clone, Default)]
pub struct Assembly {
    name: String,
    rest: Option<PathBuf>,
    texts: BTreeMap<String, Text>,
    weights: BTreeMap<&'static str, Vec<PathBuf>>,
    closed: BTreeSet<&'static str>,
    notes: Vec<String>,
}

impl Assembly {
    /// Nothing yet but what is in the folder `rest`.
    pub(crate) fn new(name: String, rest: Option<PathBuf>) -> Self {
        Self { name, rest, ..Self::default() }
    }

    /// The weights of the part `folder`. Nothing else of that part comes from the rest.
    pub(crate) fn put_weights(&mut self, folder: &'static str, files: Vec<PathBuf>) {
        self.weights.insert(folder, files);
        self.close(folder);
    }

    /// Nothing below `folder` comes from the rest.
    pub(crate) fn close(&mut self, folder: &'static str) {
        self.closed.insert(folder);
    }

    /// A text file at `path`, made from `origin`.
    pub(crate) fn put_text(&mut self, path: &str, text: String, origin: impl ToString) {
        let origin = origin.to_string();
        self.texts.insert(path.to_owned(), Text::Made { text, origin });
    }

    /// A text file at `path` that lies at `file`.
    pub(crate) fn put_file(&mut self, path: &str, file: PathBuf) {
        self.texts.insert(path.to_owned(), Text::File(file));
    }

    /// Something the user should know.
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// What the user should know.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The folder for what is not listed, unless `path` lies in a part that has its own.
    fn rest(&self, path: &str) -> Option<&Path> {
        let part = path.split('/').next().unwrap_or_default();
        self.rest.as_deref().filter(|_| !self.closed.contains(part))
    }

    pub(super) fn describe(&self, path: &str) -> String {
        match self.texts.get(path) {
            Some(Text::File(file)) => file.display().to_string(),
            Some(Text::Made { origin, .. }) => format!("{origin} (as {path})"),
            None => match self.rest(path) {
                Some(rest) => rest.join(path).display().to_string(),
                None => format!("{}: {path}", self.name),
            },
        }
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        match self.texts.get(path) {
            Some(Text::File(file)) => file.is_file(),
            Some(Text::Made { .. }) => true,
            None => self.rest(path).is_some_and(|rest| rest.join(path).is_file()),
        }
    }

    /// What stands in the file.
    pub(super) fn text(&self, path: &str) -> Result<String> {
        match self.texts.get(path) {
            Some(Text::Made { text, .. }) => Ok(text.clone()),
            Some(Text::File(file)) => {
                let folder = file.parent().unwrap_or_else(|| Path::new("")).to_owned();
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                Ok(ModelFiles::Folder(folder).read_text(&name)?.into_owned())
            }
            None => match self.rest(path) {
                Some(rest) => Ok(ModelFiles::Folder(rest.to_owned()).read_text(path)?.into_owned()),
                None => Err(self.missing(path)),
            },
        }
    }

    pub(super) fn checkpoint(&self, folder: &str, stem: &str) -> Result<Checkpoint> {
        if let Some(files) = self.weights.get(folder) {
            let map = |file: &PathBuf| Ok((file.display().to_string(), Bytes::map(file)?));
            return Checkpoint::open(files.iter().map(map).collect::<Result<_>>()?);
        }
        match self.rest(folder) {
            Some(rest) => ModelFiles::Folder(rest.to_owned()).checkpoint(folder, stem),
            None => Err(self.missing(folder)),
        }
    }

    /// Those of `parts` that no file was given for and no folder has.
    pub(super) fn missing_parts<'a>(&self, parts: &[&'a str]) -> Vec<&'a str> {
        let there = |part: &str| {
            self.weights.contains_key(part)
                || self.rest(part).is_some_and(|rest| rest.join(part).is_dir())
        };
        parts.iter().copied().filter(|part| !there(part)).collect()
    }

    pub(super) fn missing(&self, path: &str) -> crate::Error {
        self.missing_several(&[path.split('/').next().unwrap_or(path)])
    }

    /// The error for parts that nothing was given for.
    pub(super) fn missing_several(&self, parts: &[&str]) -> crate::Error {
        let give = |part: &&str| match *part {
            "transformer" | "model_index.json" => "--diffusion-model FILE",
            "text_encoder" => "--llm FILE",
            "vae" => "--vae FILE",
            "tokenizer" => "a tokenizer.json beside the language model",
            _ => "a file for it",
        };
        let gifts: Vec<&str> = parts.iter().map(give).collect();
        ModelError::Missing {
            path: format!("{} of {}", parts.join(", "), self.name),
            what: "no file was given for this part of the model".to_owned(),
            hint: format!("pass {}, or --model DIR for the missing parts", gifts.join(", ")),
        }
        .into()
    }
}
