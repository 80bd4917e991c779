//! Writes a layout chunk by chunk: one batch is made on all threads while the one before goes to
//! disk and through the hash.

use std::{collections::BTreeMap, io::Write, ops::Range, path::Path};

use ::safetensors::Dtype;
use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{
    encode::{self, FP8_MAX, Fault},
    gguf,
    layout::{Content, Item, Layout, Listed, Part, WriteFormat},
    safetensors,
    types::WriteType,
};
use crate::{
    error::{Error, ModelError, RequestError, Result},
    progress::CancelToken,
    weights::{Checkpoint, stored::StoredType},
    whole_file::{Overwrite, Refused, WholeFile, failed},
};

/// Numbers of a chunk: a multiple of every block.
const CHUNK: usize = 1 << 18;
/// Chunks of a batch for each thread.
const CHUNKS_PER_THREAD: usize = 2;
/// Most chunks of a batch: bounds memory on machines with many threads, to about 64 MiB of f32 that
/// come in, and half as much again that go out.
const CHUNKS_MAX: usize = 64;

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct WrittenFile {
    /// Where it is.
    #[serde(serialize_with = "crate::whole_file::lossy_path")]
    pub path: std::path::PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of all its bytes, as hexadecimal digits.
    pub sha256: String,
    /// What tells it from other checkpoints; see [`Checkpoint::fingerprint`].
    pub fingerprint: String,
    /// Tensors of each type.
    pub types: BTreeMap<String, usize>,
}

/// A file that is complete and read back, but has no name yet.
#[derive(Debug)]
pub(crate) struct Staged {
    file: WholeFile,
    written: WrittenFile,
}

impl Staged {
    /// Gives the file its name.
    ///
    /// # Errors
    /// A file of that name that appeared meanwhile, or a system that refuses.
    pub(crate) fn finish(self) -> Result<WrittenFile> {
        let Self { file, written } = self;
        file.put_in_place().map_err(|refused| output_error(&written.path, refused))?;
        Ok(written)
    }
}

/// Checks before any work that `path` can be written.
///
/// # Errors
/// A folder that is missing or not writable, a file that exists and may not be replaced.
pub(crate) fn check_output(path: &Path, overwrite: Overwrite) -> Result<()> {
    WholeFile::create(path, overwrite).map(drop).map_err(|refused| output_error(path, refused))
}

fn output_error(path: &Path, refused: Refused) -> Error {
    let (reason, hint) = match refused {
        Refused::Exists => ("it already exists".to_owned(), "choose another name or pass --force"),
        Refused::Failed { reason, hint } => (reason, hint),
    };
    let (path, hint) = (path.to_owned(), hint.to_owned());
    RequestError::Output { path, reason, hint }.into()
}

/// Writes `layout` beside `path` and reads the result's header back; `progress` hears how many
/// numbers are done.
///
/// # Errors
/// Numbers that the wanted type cannot hold, tensors that cannot be read, a system that refuses, or
/// [`Error::Cancelled`]. Nothing is left behind then.
pub(crate) fn stage(
    checkpoint: &Checkpoint,
    layout: &Layout,
    (path, overwrite): (&Path, Overwrite),
    cancel: &CancelToken,
    progress: &mut dyn FnMut(u64),
) -> Result<Staged> {
    let file = WholeFile::create(path, overwrite).map_err(|refused| output_error(path, refused))?;
    let listed: Vec<Listed<'_>> =
        layout.items.iter().map(|item| listed(checkpoint, item)).collect::<Result<_>>()?;
    let header = match layout.format {
        WriteFormat::Gguf => gguf::header(&layout.keys, &listed),
        WriteFormat::Safetensors => safetensors::header(&layout.texts, &listed),
    };
    let mut sink = Sink { file, hash: Sha256::new(), bytes: 0, path };
    sink.write(&[header])?;
    let mut work = Work { checkpoint, layout, cancel, item: 0, at: 0, scales: BTreeMap::new() };
    let mut ready: Vec<Vec<u8>> = Vec::new();
    loop {
        cancel.check()?;
        let batch = work.next_batch()?;
        let made = || batch.par_iter().map(|chunk| chunk.bytes(checkpoint, cancel)).collect();
        let (made, written): (Result<Vec<Vec<u8>>>, Result<()>) =
            rayon::join(made, || sink.write(&ready));
        written?;
        ready = made?;
        progress(batch.iter().map(|chunk| chunk.range.len() as u64).sum());
        if batch.is_empty() {
            break;
        }
    }
    sink.finish(layout)
}

/// Where bytes go.
struct Sink<'a> {
    file: WholeFile,
    hash: Sha256,
    bytes: u64,
    path: &'a Path,
}

impl Sink<'_> {
    fn write(&mut self, pieces: &[Vec<u8>]) -> Result<()> {
        for piece in pieces {
            self.file.write_all(piece).map_err(|error| output_error(self.path, failed(&error)))?;
            self.hash.update(piece);
            self.bytes += piece.len() as u64;
        }
        Ok(())
    }

    fn finish(mut self, layout: &Layout) -> Result<Staged> {
        self.file.flush()?;
        let checkpoint = Checkpoint::open_file(self.file.path())?;
        let mut types = BTreeMap::new();
        for (_, entry) in checkpoint.tensors() {
            *types.entry(entry.kind.to_string()).or_insert(0) += 1;
        }
        // Scales and descriptions become part of the tensors they are for.
        let tensors = layout.items.iter().filter(|item| match &item.content {
            Content::Scale(_) => false,
            Content::Bytes { kind: (name, _), .. } => *name != "U8",
            _ => true,
        });
        if let Some(item) = tensors.clone().find(|item| {
            checkpoint.shape(&item.name) != Some(&item.shape[..]) && !item.shape.is_empty()
        }) {
            return Err(ModelError::Corrupt {
                path: self.path.display().to_string(),
                found: format!("tensor {} other than it was written", item.name),
                expected: "what was written".to_owned(),
                hint: "the disk or the memory may be faulty".to_owned(),
            }
            .into());
        }
        let written = WrittenFile {
            path: self.path.to_owned(),
            bytes: self.bytes,
            sha256: self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            fingerprint: checkpoint.fingerprint(),
            types,
        };
        Ok(Staged { file: self.file, written })
    }
}

/// The entry of a tensor in the header.
fn listed<'a>(checkpoint: &Checkpoint, item: &'a Item) -> Result<Listed<'a>> {
    let entry = |name_of_type, id, bytes| Listed {
        name: &item.name,
        shape: &item.shape,
        name_of_type,
        id,
        bytes,
    };
    let count: usize = item.shape.iter().product();
    Ok(match &item.content {
        Content::Numbers { kind, .. } => {
            let name = match kind {
                WriteType::F16 => "F16",
                WriteType::Bf16 => "BF16",
                WriteType::Fp8 => "F8_E4M3",
                _ => "F32",
            };
            entry(name, kind.gguf_id().unwrap_or(0), kind.bytes_of(count))
        }
        Content::Copied { source, .. } => {
            let Some(stored) = checkpoint.entry(source) else {
                return Err(checkpoint.missing(source));
            };
            let id = crate::weights::gguf::type_id(stored.kind).unwrap_or(0);
            let (block, size) = stored.kind.block();
            let bytes = count.checked_div(block).unwrap_or(0).saturating_mul(size);
            let name = match stored.kind {
                StoredType::Plain(Dtype::F16) => "F16",
                StoredType::Plain(Dtype::BF16) => "BF16",
                StoredType::Plain(Dtype::F8_E4M3) => "F8_E4M3",
                _ => "F32",
            };
            entry(name, id, bytes)
        }
        Content::Scale(_) => entry("F32", 0, 4),
        Content::Bytes { kind: (name, id), bytes } => entry(name, *id, bytes.len()),
    })
}

/// Walks through the items and hands out chunks.
struct Work<'a> {
    checkpoint: &'a Checkpoint,
    layout: &'a Layout,
    cancel: &'a CancelToken,
    item: usize,
    at: usize,
    scales: BTreeMap<&'a str, f32>,
}

/// A stretch of an item's numbers.
struct Chunk<'a> {
    item: &'a Item,
    range: Range<usize>,
    scale: f32,
    /// Zeros behind it.
    padding: usize,
}

impl<'a> Work<'a> {
    fn next_batch(&mut self) -> Result<Vec<Chunk<'a>>> {
        let chunks = (CHUNKS_PER_THREAD * rayon::current_num_threads()).min(CHUNKS_MAX);
        let mut batch = Vec::new();
        let mut numbers = 0;
        while numbers < chunks * CHUNK {
            let Some(item) = self.layout.items.get(self.item) else { break };
            let count = item.shape.iter().product::<usize>();
            if self.at == 0 {
                self.prepare(item, count)?;
            }
            let end = (self.at + CHUNK).min(count);
            let scale = match &item.content {
                Content::Scale(of) => self.scales.get(of.as_str()),
                _ => self.scales.get(item.name.as_str()),
            };
            let scale = scale.copied().unwrap_or(1.0);
            let last = end == count;
            let padding = match self.layout.format {
                WriteFormat::Gguf if last => gguf::padding(listed(self.checkpoint, item)?.bytes),
                _ => 0,
            };
            batch.push(Chunk { item, range: self.at..end, scale, padding });
            numbers += end - self.at;
            (self.item, self.at) = if last { (self.item + 1, 0) } else { (self.item, end) };
        }
        Ok(batch)
    }

    /// Looks for the scale of an fp8 tensor, in a walk of its own.
    fn prepare(&mut self, item: &'a Item, count: usize) -> Result<()> {
        let Content::Numbers { kind: WriteType::Fp8, .. } = &item.content else { return Ok(()) };
        let starts: Vec<usize> = (0..count).step_by(CHUNK).collect();
        let largest = starts.into_par_iter().map(|start| {
            self.cancel.check()?;
            let range = start..(start + CHUNK).min(count);
            let numbers = numbers_of(self.checkpoint, item, range)?;
            Ok::<f32, Error>(numbers.iter().fold(0.0_f32, |max, x| max.max(x.abs())))
        });
        let largest = largest.try_reduce(|| 0.0, |a, b| Ok(f32::max(a, b)))?;
        let scale = if largest > 0.0 { largest / FP8_MAX } else { 1.0 };
        self.scales.insert(&item.name, scale);
        Ok(())
    }
}

impl Chunk<'_> {
    fn bytes(&self, checkpoint: &Checkpoint, cancel: &CancelToken) -> Result<Vec<u8>> {
        cancel.check()?;
        let mut bytes = match &self.item.content {
            Content::Numbers { kind, .. } => {
                let numbers = numbers_of(checkpoint, self.item, self.range.clone())?;
                if let Some(fault) = encode::fault(*kind, &numbers) {
                    return Err(fault_error(checkpoint, self.item, *kind, fault));
                }
                encode::encode(*kind, numbers, self.scale)?
            }
            Content::Copied { source, part } => {
                let range = shifted(checkpoint, source, part, self.range.clone())?;
                let copied = checkpoint.stored_bytes_of(source, &range);
                copied.ok_or_else(|| checkpoint.missing(source))?.to_vec()
            }
            Content::Scale(_) => self.scale.to_le_bytes().to_vec(),
            Content::Bytes { bytes, .. } => bytes.clone(),
        };
        bytes.resize(bytes.len() + self.padding, 0);
        Ok(bytes)
    }
}

/// Where the numbers `range` of a part stand in its whole.
fn shifted(
    checkpoint: &Checkpoint,
    source: &str,
    part: &Part,
    range: Range<usize>,
) -> Result<Range<usize>> {
    let Part::Rows(rows) = part else { return Ok(range) };
    let Some(shape) = checkpoint.shape(source) else { return Err(checkpoint.missing(source)) };
    let before = rows.start * shape.iter().skip(1).product::<usize>();
    Ok(range.start + before..range.end + before)
}

fn numbers_of(checkpoint: &Checkpoint, item: &Item, range: Range<usize>) -> Result<Vec<f32>> {
    let Content::Numbers { source, part, .. } = &item.content else { return Ok(Vec::new()) };
    let &Part::Slice { axis, index } = part else {
        return checkpoint.numbers(source, shifted(checkpoint, source, part, range)?);
    };
    let Some(shape) = checkpoint.shape(source) else { return Err(checkpoint.missing(source)) };
    let whole = checkpoint.numbers(source, 0..shape.iter().product())?;
    let inner: usize = shape.iter().skip(axis + 1).product();
    let along = shape.get(axis).copied().unwrap_or(1);
    // Runs of `inner` numbers, one of every `along`.
    let taken = whole.chunks_exact(inner.max(1)).skip(index).step_by(along.max(1)).flatten();
    Ok(taken.copied().skip(range.start).take(range.len()).collect())
}

fn fault_error(checkpoint: &Checkpoint, item: &Item, kind: WriteType, fault: Fault) -> Error {
    let (found, expected, hint) = match fault {
        Fault::NotFinite(number) => (
            format!("tensor {} holds {number}", item.name),
            "finite numbers".to_owned(),
            "the file is damaged, or was made from numbers too large for its type".to_owned(),
        ),
        Fault::Range(number) => (
            format!("tensor {} holds numbers up to {number}", item.name),
            format!("numbers up to 65504, the largest of f16, for {kind}"),
            format!(
                "write this tensor in a wider type: --tensor-type-rules \"^{}$=bf16\"",
                item.name
            ),
        ),
    };
    ModelError::Corrupt { path: checkpoint.name().to_owned(), found, expected, hint }.into()
}
