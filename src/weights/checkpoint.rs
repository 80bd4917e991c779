//! One model's tensors, in one file or in several, safetensors or GGUF.

mod join;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::{
    cursor::Precision,
    float8::Float8,
    gguf::{self, Metadata, Value},
    mmap::Bytes,
    safetensors_header, scaled,
    stored::{self, SUPPORTED, StoredType},
};
use crate::{
    error::{ModelError, Result},
    ops::{LinearWeight, MatrixBytes},
};

/// Where a tensor is and what it holds.
#[derive(Debug, Clone)]
pub struct TensorEntry {
    /// Type in the file; f32 for a tensor that is put together from several types.
    pub kind: StoredType,
    /// Shape.
    pub shape: Vec<usize>,
    /// What its numbers are multiplied by; one when there is nothing.
    pub(super) scale: Option<f32>,
    pub(super) data: Data,
}

/// Where numbers are.
#[derive(Debug, Clone)]
pub(super) enum Data {
    /// In one piece of a file.
    Bytes { file: usize, range: Range<usize> },
    /// One tensor after the other along the first axis.
    Rows(Vec<TensorEntry>),
    /// Side by side along a new axis.
    Stack { axis: usize, parts: Vec<TensorEntry> },
}

impl TensorEntry {
    /// Size in the file in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::Bytes { range, .. } => range.len(),
            Data::Rows(parts) | Data::Stack { parts, .. } => parts.iter().map(Self::bytes).sum(),
        }
    }

    /// Number of values.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Whether a GPU's kernel multiplies the bytes of the file.
    pub(super) fn is_e4m3(&self) -> bool {
        self.kind == StoredType::Plain(Dtype::F8_E4M3)
    }

    pub(super) fn is_float8(&self) -> bool {
        matches!(self.kind, StoredType::Plain(dtype) if Float8::of(dtype).is_some())
    }

    /// Whether this is a matrix whose rows are whole blocks of so many numbers.
    pub(super) fn has_rows_of(&self, block: usize) -> bool {
        matches!(self.shape.as_slice(), [_, width] if width.is_multiple_of(block))
    }

    /// The type a plain matrix has in memory for computations in `compute`: fp8 stays half as wide.
    pub(super) fn compute_type(&self, compute: DType) -> DType {
        match self.kind {
            StoredType::Plain(dtype) if dtype.bitsize() == 8 => DType::BF16,
            _ => compute,
        }
    }

    /// The quantized type that the matrix `[out, in]` is multiplied in, where there is one and a
    /// row is a whole number of its blocks.
    pub(super) fn multiplied_as(&self) -> Option<GgmlDType> {
        // Candle's products with the types of 32 numbers a block take blocks in pairs; Q8_0 has a
        // product of its own.
        let unit = |dtype: &GgmlDType| match dtype {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 => {
                2 * dtype.block_size()
            }
            _ => dtype.block_size(),
        };
        self.kind.multiplied_as().filter(|dtype| self.has_rows_of(unit(dtype)))
    }

    /// The file and the type of the first piece whose type is not read.
    fn unreadable(&self) -> Option<(usize, StoredType)> {
        match &self.data {
            Data::Bytes { .. } if self.kind.is_read() => None,
            Data::Bytes { file, .. } => Some((*file, self.kind)),
            Data::Rows(parts) | Data::Stack { parts, .. } => {
                parts.iter().find_map(Self::unreadable)
            }
        }
    }

    /// The entry and, below it, those it is put together from that lie in one piece.
    fn pieces(&self) -> Vec<(usize, &Range<usize>)> {
        match &self.data {
            Data::Bytes { file, range } => vec![(*file, range)],
            Data::Rows(parts) | Data::Stack { parts, .. } => {
                parts.iter().flat_map(Self::pieces).collect()
            }
        }
    }
}

struct File {
    name: String,
    bytes: Bytes,
    metadata: Metadata,
    /// Where a GGUF file's values stand.
    spans: gguf::Spans,
}

/// Mapped tensors by name, with a record of which were read.
pub struct Checkpoint {
    files: Vec<File>,
    entries: BTreeMap<String, TensorEntry>,
    read: Mutex<BTreeSet<String>>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("name", &self.name())
            .field("tensors", &self.entries.len())
            .finish()
    }
}

impl Checkpoint {
    /// Maps one safetensors or GGUF file; its first bytes tell which it is.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another kind.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open(vec![(path.display().to_string(), Bytes::map(path)?)])
    }

    /// Maps files that together hold one model.
    ///
    /// # Errors
    /// Files that are missing, damaged, of another kind, or that have tensors of the same name.
    pub fn open_files(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let map = |path: &Path| Ok((path.display().to_string(), Bytes::map(path)?));
        Self::open(paths.iter().map(|path| map(path.as_ref())).collect::<Result<_>>()?)
    }

    pub(super) fn open(sources: Vec<(String, Bytes)>) -> Result<Self> {
        let mut files = Vec::with_capacity(sources.len());
        let mut entries = BTreeMap::new();
        for (name, bytes) in sources {
            let (metadata, spans) = if bytes.starts_with(gguf::MAGIC) {
                read_gguf(files.len(), &name, &bytes, &mut entries)?
            } else {
                let texts = safetensors_header::read(files.len(), &name, &bytes, &mut entries)?;
                let values = texts.into_iter().map(|(key, text)| (key, Value::Text(text)));
                (values.collect(), gguf::Spans::new())
            };
            files.push(File { name, bytes, metadata, spans });
        }
        let mut checkpoint = Self { files, entries, read: Mutex::default() };
        scaled::resolve(&mut checkpoint)?;
        Ok(checkpoint)
    }

    /// The first file, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.files.first().map_or("", |file| &file.name)
    }

    /// Whether the file, or the first of several, is GGUF.
    #[must_use]
    pub fn is_gguf(&self) -> bool {
        self.files.first().is_some_and(|file| file.bytes.starts_with(gguf::MAGIC))
    }

    /// Whether a tensor is there.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// All tensors in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The files' own metadata.
    #[must_use]
    pub fn metadata(&self) -> BTreeMap<&str, &Value> {
        let pairs = self.files.iter().flat_map(|file| &file.metadata);
        pairs.map(|(key, value)| (key.as_str(), value)).collect()
    }

    /// What the metadata say under `key`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.files.iter().find_map(|file| file.metadata.get(key))
    }

    /// The list under `key`, each item through `read`.
    ///
    /// # Errors
    /// A list that is missing, of another kind, or holds an item that `read` does not take.
    pub(crate) fn list<T>(&self, key: &str, read: impl Fn(Value) -> Option<T>) -> Result<Vec<T>> {
        let file = self.files.iter().find(|file| file.metadata.contains_key(key));
        let items = file.and_then(|file| match file.metadata.get(key) {
            Some(Value::Array(array)) => array.items(&file.bytes, read),
            _ => None,
        });
        let found = || self.value(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        items.ok_or_else(|| self.metadata_fault(key, found(), "a list of its kind"))
    }

    /// The error for metadata that are missing or not computed with.
    pub(crate) fn metadata_fault(
        &self,
        key: &str,
        found: impl ToString,
        expected: impl ToString,
    ) -> crate::Error {
        ModelError::Config {
            path: self.name().to_owned(),
            field: key.to_owned(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
        .into()
    }

    /// Size of all tensors in bytes, as stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes() as u64).sum()
    }

    /// Number of values in all tensors.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.entries.values().map(TensorEntry::elements).sum()
    }

    /// A short digest of names, types, shapes and values: SHA-256 over each tensor's entry and its
    /// first and last 4096 bytes, as hexadecimal digits. It tells models apart without reading
    /// tens of gigabytes.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        const EDGE_BYTES: usize = 4096;
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            hash.update(format!("{name}\0{}\0{:?}\0", entry.kind, entry.shape));
            for (file, range) in entry.pieces() {
                let bytes = &self.files[file].bytes[range.clone()];
                hash.update(&bytes[..bytes.len().min(EDGE_BYTES)]);
                hash.update(&bytes[bytes.len().saturating_sub(EDGE_BYTES)..]);
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The metadata of GGUF files as they are written there: type and value, in bytes.
    pub(crate) fn raw_metadata(&self) -> BTreeMap<&str, &[u8]> {
        let spans = self.files.iter().flat_map(|file| {
            file.spans.iter().map(|(key, span)| (key.as_str(), &file.bytes[span.clone()]))
        });
        spans.collect()
    }

    /// The file of `index`, for a walk through the tensors' bytes.
    pub(super) fn file(&self, index: usize) -> (&str, &[u8]) {
        self.files.get(index).map_or(("", &[]), |file| (file.name.as_str(), &file.bytes))
    }

    /// A tensor in a plain type, the stored one where that is plain, and the note that it was read.
    pub(super) fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let entry = self.about_to_read(name)?;
        let tensor = self.plain(name, entry, device)?;
        self.mark_read(name);
        Ok(tensor)
    }

    /// The matrix `[out, in]` in blocks and the note that it was read; `None` where it is not
    /// stored in blocks, or its rows are not whole blocks.
    pub(super) fn load_quantized(&self, name: &str, device: &Device) -> Result<Option<QTensor>> {
        let Some(entry) = self.entries.get(name) else { return Err(self.missing(name)) };
        let Some(dtype) = entry.multiplied_as() else { return Ok(None) };
        self.about_to_read(name)?;
        let blocks = match &entry.data {
            Data::Bytes { .. } => self.blocks(entry),
            Data::Rows(parts) => {
                let rows: Option<Vec<_>> = parts.iter().map(|part| self.blocks(part)).collect();
                rows.map(|rows| Cow::Owned(rows.concat()))
            }
            Data::Stack { .. } => None,
        };
        let Some(blocks) = blocks.filter(|blocks| !blocks.is_empty()) else { return Ok(None) };
        let tensor = stored::quantized(dtype, blocks, &entry.shape, device)?;
        self.mark_read(name);
        Ok(Some(tensor))
    }

    /// The matrix `[out, in]` laid out for the CPU from the bytes of its file, and the note that it was
    /// read; `None` where it is not stored as whole rows of one type, or its blocks are to be widened.
    pub(super) fn load_packed(
        &self,
        name: &str,
        shape: [usize; 2],
        precision: &Precision,
    ) -> Result<Option<LinearWeight>> {
        let Some(entry) = self.entries.get(name) else { return Err(self.missing(name)) };
        let Some(kept) = entry.kept_as(precision) else { return Ok(None) };
        let pieces = match &entry.data {
            Data::Bytes { .. } => vec![self.raw(entry)],
            Data::Rows(parts) => {
                let alike = |part: &TensorEntry| part.kind == entry.kind && part.scale.is_none();
                if !parts.iter().all(alike) {
                    return Ok(None);
                }
                parts.iter().map(|part| self.raw(part)).collect()
            }
            Data::Stack { .. } => return Ok(None),
        };
        let numbers = entry.kind.numbers(entry.scale);
        let Some(matrix) = numbers.and_then(|numbers| MatrixBytes::new(numbers, pieces, shape))
        else {
            return Ok(None);
        };
        self.about_to_read(name)?;
        let weight = LinearWeight::of_file(&matrix, kept)
            .map_err(|error| self.not_quantized(name, &error))?;
        if weight.is_some() {
            self.mark_read(name);
        }
        Ok(weight)
    }

    /// The error for a matrix that cannot be quantized.
    pub(super) fn not_quantized(&self, name: &str, error: &candle_core::Error) -> crate::Error {
        ModelError::Corrupt {
            path: self.name().to_owned(),
            found: format!("tensor {name}, {error}"),
            expected: "finite numbers to quantize".to_owned(),
            hint: "the file is damaged; download it again".to_owned(),
        }
        .into()
    }

    /// The bytes of an fp8 e4m3 tensor in one piece, on `device`, and its scale; `None` for others.
    pub(super) fn load_e4m3(&self, name: &str, device: &Device) -> Result<Option<(Tensor, f64)>> {
        let entry = self.entries.get(name).filter(|entry| entry.is_e4m3());
        let bytes = entry.map_or(&[][..], |entry| self.raw(entry));
        let Some(entry) = entry.filter(|_| !bytes.is_empty()) else { return Ok(None) };
        let bytes = Tensor::from_slice(bytes, bytes.len(), device)?;
        self.mark_read(name);
        Ok(Some((bytes, entry.scale.map_or(1.0, f64::from))))
    }

    /// The blocks of an entry that lies in one piece.
    fn blocks(&self, entry: &TensorEntry) -> Option<Cow<'_, [u8]>> {
        match &entry.data {
            Data::Bytes { file, range } => {
                stored::multiplied(entry.kind, &self.files[*file].bytes[range.clone()])
            }
            _ => None,
        }
    }

    pub(super) fn plain(&self, name: &str, entry: &TensorEntry, device: &Device) -> Result<Tensor> {
        let plain_parts = |parts: &[TensorEntry]| -> Result<Vec<Tensor>> {
            let tensors = parts.iter().map(|part| self.plain(name, part, device));
            let tensors: Vec<Tensor> = tensors.collect::<Result<_>>()?;
            let same = tensors.windows(2).all(|pair| pair[0].dtype() == pair[1].dtype());
            if same {
                return Ok(tensors);
            }
            tensors.iter().map(|tensor| Ok(tensor.to_dtype(DType::F32)?)).collect()
        };
        match &entry.data {
            Data::Bytes { file, range } => {
                let file = &self.files[*file];
                let bytes = &file.bytes[range.clone()];
                stored::decode(entry.kind, bytes, entry.scale, &entry.shape, device)?.ok_or_else(
                    || {
                        ModelError::TensorType {
                            path: file.name.clone(),
                            tensor: name.to_owned(),
                            found: entry.kind.to_string(),
                            supported: SUPPORTED,
                        }
                        .into()
                    },
                )
            }
            Data::Rows(parts) => Ok(Tensor::cat(&plain_parts(parts)?, 0)?),
            Data::Stack { axis, parts } => Ok(Tensor::stack(&plain_parts(parts)?, *axis)?),
        }
    }

    /// The one number of a tensor of any plain type, and the note that it was read; `None` where it
    /// is of another type or holds more numbers.
    pub(super) fn scalar(&self, name: &str) -> Option<f64> {
        let entry = self.entries.get(name)?;
        let value = stored::scalar(entry.kind, self.raw(entry))?;
        self.mark_read(name);
        Some(value * f64::from(entry.scale.unwrap_or(1.0)))
    }

    pub(crate) fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.entries.get(name)
    }

    /// The tensor's shape.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The entries, for a step that gives them scales.
    pub(super) fn entries_mut(&mut self) -> &mut BTreeMap<String, TensorEntry> {
        &mut self.entries
    }

    /// The bytes of an entry that lies in one piece.
    pub(super) fn raw(&self, entry: &TensorEntry) -> &[u8] {
        match &entry.data {
            Data::Bytes { file, range } => &self.files[*file].bytes[range.clone()],
            _ => &[],
        }
    }

    /// Checks that a tensor is there and can be read, and counts it as read.
    pub(super) fn survey(&self, name: &str) -> Result<()> {
        let Some(entry) = self.entries.get(name) else { return Err(self.missing(name)) };
        if let Some((file, kind)) = entry.unreadable() {
            return Err(ModelError::TensorType {
                path: self.files[file].name.clone(),
                tensor: name.to_owned(),
                found: kind.to_string(),
                supported: SUPPORTED,
            }
            .into());
        }
        self.mark_read(name);
        Ok(())
    }

    /// A tensor whose bytes come next.
    fn about_to_read(&self, name: &str) -> Result<&TensorEntry> {
        let Some(entry) = self.entries.get(name) else { return Err(self.missing(name)) };
        for (file, range) in entry.pieces() {
            self.files[file].bytes.will_read(range);
        }
        Ok(entry)
    }

    fn mark_read(&self, name: &str) {
        for (file, range) in self.entries.get(name).map(TensorEntry::pieces).unwrap_or_default() {
            self.files[file].bytes.was_read(range);
        }
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// The tensors nobody has read.
    #[must_use]
    pub fn unread(&self) -> Vec<&str> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        self.entries.keys().map(String::as_str).filter(|name| !read.contains(*name)).collect()
    }

    /// The error for a tensor that is not there.
    pub(super) fn missing(&self, name: &str) -> crate::Error {
        let near =
            self.closest(name).map_or_else(String::new, |near| format!(" (closest: {near})"));
        let path = self.name().to_owned();
        ModelError::TensorMissing { path, tensor: name.to_owned(), near }.into()
    }

    /// The name that shares the longest tail with `wanted`.
    fn closest(&self, wanted: &str) -> Option<&str> {
        let shared = |name: &str| {
            name.bytes().rev().zip(wanted.bytes().rev()).take_while(|(a, b)| a == b).count()
        };
        self.entries.keys().map(String::as_str).max_by_key(|name| shared(name))
    }
}

/// Reads one GGUF file's header into `entries`; returns the file's metadata.
fn read_gguf(
    file: usize,
    name: &str,
    bytes: &[u8],
    entries: &mut BTreeMap<String, TensorEntry>,
) -> Result<(Metadata, gguf::Spans)> {
    let header = gguf::read(name, bytes)?;
    for (tensor, gguf::Tensor { kind, shape, range }) in header.tensors {
        let entry = TensorEntry { kind, shape, scale: None, data: Data::Bytes { file, range } };
        if entries.insert(tensor.clone(), entry).is_some() {
            return Err(ModelError::Corrupt {
                path: name.to_owned(),
                found: format!("tensor {tensor} in two files"),
                expected: "each tensor once".to_owned(),
                hint: "the files belong to different models".to_owned(),
            }
            .into());
        }
    }
    Ok((header.metadata, header.spans))
}
