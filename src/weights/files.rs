//! The files of a model in the published folder layout: on disk, or compiled into the program.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::de::DeserializeOwned;

use super::{assembly::Assembly, checkpoint::Checkpoint, mmap::Bytes};
use crate::error::{ModelError, Result};

/// One file that is part of the program.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedFile {
    /// Path inside the model folder, with `/`.
    pub path: &'static str,
    /// Contents.
    pub bytes: &'static [u8],
}

/// Where a model's files are.
#[derive(Debug, Clone)]
pub enum ModelFiles {
    /// A folder on disk.
    Folder(PathBuf),
    /// Files compiled into the program.
    Embedded {
        /// The pack's name, for messages.
        name: &'static str,
        /// Its files.
        files: &'static [EmbeddedFile],
    },
    /// Files from different places.
    Assembled(Arc<Assembly>),
}

/// Largest text file (config, tokenizer) that is read, in bytes.
const TEXT_BYTES_MAX: u64 = 256 << 20;

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// What a model's folder is called; a snapshot in Hugging Face's cache is called as its repository.
pub(crate) fn model_name(folder: &Path) -> String {
    let name = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
    let repository = || {
        let snapshots = folder.parent().filter(|it| it.ends_with("snapshots"))?;
        Some(name(snapshots.parent()?)?.strip_prefix("models--")?.split("--").last()?.to_owned())
    };
    repository().or_else(|| name(folder)).unwrap_or_else(|| "model".to_owned())
}

/// All shards of which `file` is one, in their order, or the file alone.
pub(crate) fn shards(file: &Path) -> Vec<PathBuf> {
    /// More than any model has.
    const SHARDS_MAX: usize = 1000;
    let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
    let parsed = || {
        let (start, end) = name.rsplit_once("-of-")?;
        let (start, index) = start.rsplit_once('-')?;
        let (count, ending) = end.split_once('.')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        let count: usize = (is_number(index) && is_number(count)).then(|| count.parse().ok())??;
        let shard = |i: usize| file.with_file_name(format!("{start}-{i:05}-of-{end}"));
        let all = (1..=count.min(SHARDS_MAX)).map(shard).collect();
        (ending == "safetensors").then_some(all)
    };
    parsed().unwrap_or_else(|| vec![file.to_owned()])
}

impl ModelFiles {
    /// How a file is called in messages.
    #[must_use]
    pub fn describe(&self, path: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(path).display().to_string(),
            Self::Embedded { name, .. } => format!("{name}:{path}"),
            Self::Assembled(assembly) => assembly.describe(path),
        }
    }

    /// Whether a file is there.
    #[must_use]
    pub fn exists(&self, path: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(path).is_file(),
            Self::Embedded { files, .. } => files.iter().any(|file| file.path == path),
            Self::Assembled(assembly) => assembly.exists(path),
        }
    }

    /// The first of `paths` that is there.
    #[must_use]
    pub fn first<'a>(&self, paths: &[&'a str]) -> Option<&'a str> {
        paths.iter().copied().find(|path| self.exists(path))
    }

    /// A text file.
    ///
    /// # Errors
    /// A file that is missing, too large or not UTF-8.
    pub fn read_text(&self, path: &str) -> Result<Cow<'static, str>> {
        match self {
            Self::Folder(folder) => {
                let file = folder.join(path);
                if !file.is_file() {
                    return Err(self.missing(path));
                }
                let found_bytes = fs_err::metadata(&file)?.len();
                if found_bytes > TEXT_BYTES_MAX {
                    let found = format!("{found_bytes} bytes");
                    let expected = format!("a text file of at most {TEXT_BYTES_MAX} bytes");
                    return Err(self.corrupt(path, &found, &expected));
                }
                match String::from_utf8(fs_err::read(&file)?) {
                    Ok(text) => Ok(Cow::Owned(text)),
                    Err(error) => Err(self.corrupt(path, &error.to_string(), "UTF-8 text")),
                }
            }
            Self::Embedded { .. } => match std::str::from_utf8(self.embedded(path)?) {
                Ok(text) => Ok(Cow::Borrowed(text)),
                Err(error) => Err(self.corrupt(path, &error.to_string(), "UTF-8 text")),
            },
            Self::Assembled(assembly) => Ok(Cow::Owned(assembly.text(path)?)),
        }
    }

    /// A JSON file that holds an object.
    ///
    /// # Errors
    /// A file that is missing or does not hold a `T`.
    pub fn read_json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.parse_json(path, &self.read_text(path)?)
    }

    /// What `text` holds, which messages call `path`.
    pub(crate) fn parse_json<T: DeserializeOwned>(&self, path: &str, text: &str) -> Result<T> {
        // A list would pass for the fields in their order.
        if text.trim_start().starts_with('[') {
            return Err(self.corrupt(path, "a list", "a JSON object"));
        }
        serde_json::from_str(text)
            .map_err(|error| self.corrupt(path, &error.to_string(), "a JSON file of its kind"))
    }

    /// The weights in `folder`: `<stem>.safetensors`, or the shards that
    /// `<stem>.safetensors.index.json` lists; a `.fp16` or `.bf16` variant when only that is there.
    ///
    /// # Errors
    /// Files that are missing, damaged or contradict each other.
    pub fn checkpoint(&self, folder: &str, stem: &str) -> Result<Checkpoint> {
        if let Self::Assembled(assembly) = self {
            return assembly.checkpoint(folder, stem);
        }
        for variant in ["", ".bf16", ".fp16"] {
            let single = format!("{folder}/{stem}{variant}.safetensors");
            if self.exists(&single) {
                return Checkpoint::open(vec![(self.describe(&single), self.map(&single)?)]);
            }
            let index = format!("{folder}/{stem}.safetensors.index{variant}.json");
            if self.exists(&index) {
                return self.sharded(folder, &index);
            }
        }
        Err(self.missing(&format!("{folder}/{stem}.safetensors")))
    }

    fn sharded(&self, folder: &str, index_path: &str) -> Result<Checkpoint> {
        let index: ShardIndex = self.read_json(index_path)?;
        let mut shards: Vec<&str> = index.weight_map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        if shards.is_empty() {
            return Err(self.corrupt(index_path, "no tensors", "the shards of the weights"));
        }
        let mut files = Vec::with_capacity(shards.len());
        for shard in shards {
            if shard.contains(['/', '\\']) || shard.starts_with('.') {
                return Err(self.corrupt(index_path, &format!("shard {shard:?}"), "a file name"));
            }
            let path = format!("{folder}/{shard}");
            files.push((self.describe(&path), self.map(&path)?));
        }
        let checkpoint = Checkpoint::open(files)?;
        for name in index.weight_map.keys() {
            if !checkpoint.contains(name) {
                let found = format!("tensor {name} listed but in no shard");
                return Err(self.corrupt(index_path, &found, "every listed tensor in a shard"));
            }
        }
        Ok(checkpoint)
    }

    fn map(&self, path: &str) -> Result<Bytes> {
        match self {
            Self::Folder(folder) => {
                let file = folder.join(path);
                if !file.is_file() {
                    return Err(self.missing(path));
                }
                Bytes::map(&file)
            }
            _ => Ok(Bytes::Static(self.embedded(path)?)),
        }
    }

    fn embedded(&self, path: &str) -> Result<&'static [u8]> {
        let Self::Embedded { files, .. } = self else { return Err(self.missing(path)) };
        match files.iter().find(|file| file.path == path) {
            Some(file) => Ok(file.bytes),
            None => Err(self.missing(path)),
        }
    }

    /// Checks that there are weights for each of `parts`, so that a message can name all that are
    /// missing at once.
    ///
    /// # Errors
    /// [`ModelError::Missing`] with the parts.
    pub fn require_parts(&self, parts: &[&str]) -> Result<()> {
        let Self::Assembled(assembly) = self else { return Ok(()) };
        match assembly.missing_parts(parts).as_slice() {
            [] => Ok(()),
            missing => Err(assembly.missing_several(missing)),
        }
    }

    /// The model's name: the folder's or the pack's.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Folder(folder) => {
                model_name(&folder.canonicalize().unwrap_or_else(|_| folder.clone()))
            }
            Self::Embedded { name, .. } => (*name).to_owned(),
            Self::Assembled(assembly) => assembly.name().to_owned(),
        }
    }

    /// What the user should know about how the files were put together.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        match self {
            Self::Assembled(assembly) => assembly.notes(),
            _ => &[],
        }
    }

    /// The error for a file that is not there.
    pub(crate) fn missing(&self, path: &str) -> crate::Error {
        if let Self::Assembled(assembly) = self {
            return assembly.missing(path);
        }
        ModelError::Missing {
            path: self.describe(path),
            what: "part of the published folder layout".to_owned(),
            hint: "download the whole folder, with model_index.json at its top".to_owned(),
        }
        .into()
    }

    /// The error for a file whose contents are not as expected.
    pub(crate) fn corrupt(&self, path: &str, found: &str, expected: &str) -> crate::Error {
        ModelError::Corrupt {
            path: self.describe(path),
            found: found.to_owned(),
            expected: expected.to_owned(),
            hint: "download the file again".to_owned(),
        }
        .into()
    }

    /// The error for a config field that the engine does not compute.
    pub(crate) fn config(
        &self,
        path: &str,
        field: &str,
        found: impl ToString,
        expected: impl ToString,
    ) -> crate::Error {
        ModelError::Config {
            path: self.describe(path),
            field: field.to_owned(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
        .into()
    }
}
