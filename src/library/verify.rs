//! Whether files are whole.

use std::{
    io::Read,
    path::{Path, PathBuf},
    time::Instant,
};

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::walk::{Candidate, Places, walk};
use crate::{
    editor::{ModelInfo, ModelSource},
    error::Result,
    progress::{CancelToken, Event, Observer, Stage},
    weights::Checkpoint,
};

/// Bytes that are hashed at a time.
const PIECE_BYTES: usize = 1 << 22;
/// Numbers that are looked at at a time: a multiple of every block.
const CHUNK: usize = 1 << 18;
/// Bytes of a step of the progress.
const STEP_BYTES: u64 = 1 << 20;

/// What was found out about a file or a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Verdict {
    /// The file, or the folder.
    #[serde(serialize_with = "crate::whole_file::lossy_path")]
    pub path: PathBuf,
    /// Its size in bytes, of a folder's weight files together.
    pub bytes: u64,
    /// What is wrong; nothing where all is well.
    pub problems: Vec<String>,
    /// Files whose SHA-256 is their name in Hugging Face's cache, which is what was published.
    pub hashes_match: usize,
    /// Whether all numbers were looked at.
    pub deep: bool,
}

impl Verdict {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Checks a weight file, or all weight files of a folder: what they are, headers against sizes, the
/// contents of files from Hugging Face's cache against their names; with `deep` also that every number
/// is finite.
///
/// # Errors
/// [`Error::Cancelled`](crate::Error::Cancelled); what is wrong with files is no error but part of
/// the verdict.
pub fn verify(
    path: &Path,
    deep: bool,
    cancel: &CancelToken,
    observer: &dyn Observer,
) -> Result<Verdict> {
    let is_model = path.join("model_index.json").is_file();
    let mut problems = Vec::new();
    let files: Vec<PathBuf> = if path.is_dir() {
        let inside = Places { folders: inside(path), ..Places::default() };
        let mut files = Vec::new();
        for candidate in walk(&inside) {
            files.extend(weight_files(&candidate));
        }
        if files.is_empty() {
            problems.push("no weight files in it".to_owned());
        }
        files
    } else {
        vec![path.to_owned()]
    };
    if is_model && let Err(error) = ModelInfo::read(&ModelSource::Folder(path.to_owned())) {
        problems.push(one_line(&error));
    }
    let sizes = files.iter().map(|file| std::fs::metadata(file).map_or(0, |it| it.len()));
    let bytes = sizes.sum();
    let mut hashes_match = 0;
    let mut progress = Progress { observer, start: Instant::now(), done: 0, all: bytes };
    for file in &files {
        let mut check = || -> Result<bool> {
            let checkpoint = Checkpoint::open_file(file)?;
            if deep && let Some(fault) = odd_number(&checkpoint, cancel)? {
                problems.push(format!("{}: {fault}", file.display()));
            }
            let Some(published) = published_hash(file) else { return Ok(false) };
            let found = sha256(file, cancel, &mut progress)?;
            if found != published {
                problems.push(format!(
                    "{}: its SHA-256 is {found}, published was {published}: download it again",
                    file.display()
                ));
            }
            Ok(found == published)
        };
        match check() {
            Ok(matches) => hashes_match += usize::from(matches),
            Err(crate::Error::Cancelled) => return Err(crate::Error::Cancelled),
            Err(error) => problems.push(one_line(&error)),
        }
    }
    problems.dedup();
    Ok(Verdict { path: path.to_owned(), bytes, problems, hashes_match, deep })
}

/// The folders of a model that hold weights: a model's own folder would be found as one thing.
fn inside(path: &Path) -> Vec<PathBuf> {
    if !path.join("model_index.json").is_file() {
        return vec![path.to_owned()];
    }
    let Ok(entries) = fs_err::read_dir(path) else { return Vec::new() };
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|it| it.is_dir()).collect();
    folders.sort();
    folders
}

/// The file itself, or the shards of a folder.
fn weight_files(candidate: &Candidate) -> Vec<PathBuf> {
    if !candidate.is_folder {
        return vec![candidate.path.clone()];
    }
    let Ok(entries) = fs_err::read_dir(&candidate.path) else { return Vec::new() };
    let is_shard = |path: &PathBuf| {
        path.extension().is_some_and(|end| end == "safetensors")
            && super::walk::last(path).contains("-of-")
    };
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_shard).collect();
    files.sort();
    files
}

fn one_line(error: &crate::Error) -> String {
    error.to_string().replace("\nhint: ", "; ")
}

/// The first number that is not finite.
fn odd_number(checkpoint: &Checkpoint, cancel: &CancelToken) -> Result<Option<String>> {
    for (name, entry) in checkpoint.tensors() {
        cancel.check()?;
        if !entry.kind.is_read() {
            continue;
        }
        let count = entry.count();
        let starts: Vec<usize> = (0..count).step_by(CHUNK).collect();
        let odd = starts.into_par_iter().map(|start| -> Result<usize> {
            cancel.check()?;
            let numbers = checkpoint.numbers(name, start..(start + CHUNK).min(count))?;
            Ok(numbers.iter().filter(|x| !x.is_finite()).count())
        });
        let odd: usize = odd.try_reduce(|| 0, |a, b| Ok(a + b))?;
        if odd > 0 {
            return Ok(Some(format!("tensor {name}: {odd} of {count} numbers are not finite")));
        }
    }
    Ok(None)
}

/// The SHA-256 that a file's name in Hugging Face's cache gives: the name of what a snapshot's link
/// points to.
fn published_hash(file: &Path) -> Option<String> {
    const DIGITS: usize = 64;
    let target = std::fs::canonicalize(file).ok()?;
    let in_blobs = target.parent()?.file_name()? == "blobs";
    let name = target.file_name()?.to_str()?.to_lowercase();
    let is_hash = name.len() == DIGITS && name.bytes().all(|digit| digit.is_ascii_hexdigit());
    (in_blobs && is_hash).then_some(name)
}

/// Tells how far the hashes are.
struct Progress<'a> {
    observer: &'a dyn Observer,
    start: Instant,
    done: u64,
    all: u64,
}

impl Progress<'_> {
    fn add(&mut self, bytes: usize) {
        self.done += bytes as u64;
        let steps = |bytes: u64| usize::try_from(bytes.div_ceil(STEP_BYTES)).unwrap_or(usize::MAX);
        let (step, of, elapsed) = (steps(self.done), steps(self.all), self.start.elapsed());
        self.observer.event(&Event::Step { stage: Stage::Verify, step, of, elapsed });
    }
}

fn sha256(path: &Path, cancel: &CancelToken, progress: &mut Progress<'_>) -> Result<String> {
    let mut file = fs_err::File::open(path)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        cancel.check()?;
        let count = file.read(&mut piece)?;
        if count == 0 {
            break;
        }
        hash.update(&piece[..count]);
        progress.add(count);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
