//! One model's tensors, in one safetensors file or in several.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::{mmap::Bytes, probe};
use crate::error::{ModelError, Result};

/// Types that are read, as messages list them.
const SUPPORTED: &str = "F32, F16, BF16";

/// Where a tensor is and what it holds.
#[derive(Debug, Clone)]
pub struct TensorEntry {
    /// Type in the file.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    file: usize,
    range: Range<usize>,
}

impl TensorEntry {
    /// Size in the file in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.range.len()
    }
}

struct File {
    name: String,
    bytes: Bytes,
    metadata: BTreeMap<String, String>,
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
    /// Maps one safetensors file.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another kind.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open(vec![(path.display().to_string(), Bytes::map(path)?)])
    }

    pub(super) fn open(sources: Vec<(String, Bytes)>) -> Result<Self> {
        let mut files = Vec::with_capacity(sources.len());
        let mut entries = BTreeMap::new();
        for (name, bytes) in sources {
            let metadata = read_header(files.len(), &name, &bytes, &mut entries)?;
            files.push(File { name, bytes, metadata });
        }
        Ok(Self { files, entries, read: Mutex::default() })
    }

    /// The first file, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.files.first().map_or("", |file| &file.name)
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
    pub fn metadata(&self) -> BTreeMap<&str, &str> {
        let pairs = self.files.iter().flat_map(|file| &file.metadata);
        pairs.map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    /// Size of all tensors in bytes, as stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes() as u64).sum()
    }

    /// Number of values in all tensors.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.entries
            .values()
            .map(|entry| entry.shape.iter().map(|&n| n as u64).product::<u64>())
            .sum()
    }

    /// Gives every tensor the name that `canonical` makes of its own.
    ///
    /// # Errors
    /// Two tensors that get the same name.
    pub fn rename(mut self, canonical: impl Fn(&str) -> String) -> Result<Self> {
        let name = self.name().to_owned();
        let mut renamed = BTreeMap::new();
        for (old, entry) in std::mem::take(&mut self.entries) {
            let new = canonical(&old);
            if renamed.insert(new.clone(), entry).is_some() {
                return Err(ModelError::Corrupt {
                    path: name,
                    found: format!("tensor {new} twice, under two spellings"),
                    expected: "each tensor once".to_owned(),
                    hint: "the file was merged from two models; use the original".to_owned(),
                }
                .into());
            }
        }
        self.entries = renamed;
        Ok(self)
    }

    /// A short digest of names, types, shapes and values: SHA-256 over each tensor's entry and its
    /// first and last 4096 bytes, as hexadecimal digits. It tells models apart without reading
    /// tens of gigabytes.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        const EDGE_BYTES: usize = 4096;
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            hash.update(format!("{name}\0{:?}\0{:?}\0", entry.dtype, entry.shape));
            let bytes = &self.files[entry.file].bytes[entry.range.clone()];
            hash.update(&bytes[..bytes.len().min(EDGE_BYTES)]);
            hash.update(&bytes[bytes.len().saturating_sub(EDGE_BYTES)..]);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A tensor in its stored type, and the note that it was read.
    pub(super) fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(entry) = self.entries.get(name) else {
            let near =
                self.closest(name).map_or_else(String::new, |near| format!(" (closest: {near})"));
            let path = self.name().to_owned();
            return Err(ModelError::TensorMissing { path, tensor: name.to_owned(), near }.into());
        };
        let file = &self.files[entry.file];
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(ModelError::TensorType {
                    path: file.name.clone(),
                    tensor: name.to_owned(),
                    found: format!("{other:?}"),
                    supported: SUPPORTED,
                }
                .into());
            }
        };
        let bytes = &file.bytes[entry.range.clone()];
        let tensor = Tensor::from_raw_buffer(bytes, dtype, &entry.shape, device)?;
        self.mark_read(name);
        Ok(tensor)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    pub(super) fn mark_read(&self, name: &str) {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// The tensors nobody has read.
    #[must_use]
    pub fn unread(&self) -> Vec<&str> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        self.entries.keys().map(String::as_str).filter(|name| !read.contains(*name)).collect()
    }

    /// The name that shares the longest tail with `wanted`.
    fn closest(&self, wanted: &str) -> Option<&str> {
        let shared = |name: &str| {
            name.bytes().rev().zip(wanted.bytes().rev()).take_while(|(a, b)| a == b).count()
        };
        self.entries.keys().map(String::as_str).max_by_key(|name| shared(name))
    }
}

/// Reads one file's header into `entries`; returns the file's metadata.
fn read_header(
    file: usize,
    name: &str,
    bytes: &[u8],
    entries: &mut BTreeMap<String, TensorEntry>,
) -> Result<BTreeMap<String, String>> {
    probe::check_safetensors(name, bytes)?;
    let corrupt = |found: String| {
        let expected = "an intact safetensors file".to_owned();
        let hint = "the file is truncated or damaged; download it again".to_owned();
        crate::Error::from(ModelError::Corrupt { path: name.to_owned(), found, expected, hint })
    };
    let (header_bytes, header) = SafeTensors::read_metadata(bytes)
        .map_err(|error| corrupt(truncation(bytes).unwrap_or_else(|| error.to_string())))?;
    let start = 8 + header_bytes;
    let data_bytes = bytes.len() - start;
    let mut end_max = 0;
    for (tensor, info) in BTreeMap::from_iter(header.tensors()) {
        let (begin, end) = info.data_offsets;
        if end > data_bytes || begin > end {
            return Err(corrupt(format!(
                "tensor {tensor} ends at byte {end} of {data_bytes} bytes of data"
            )));
        }
        end_max = end_max.max(end);
        let entry = TensorEntry {
            dtype: info.dtype,
            shape: info.shape.clone(),
            file,
            range: start + begin..start + end,
        };
        if entries.insert(tensor.clone(), entry).is_some() {
            return Err(corrupt(format!("tensor {tensor} in two shards")));
        }
    }
    if end_max != data_bytes {
        return Err(corrupt(format!("{data_bytes} bytes of data, {end_max} of them in tensors")));
    }
    Ok(header.metadata().clone().into_iter().flatten().collect())
}

/// How a file whose header reads but does not fit its data falls short, where it does.
fn truncation(bytes: &[u8]) -> Option<String> {
    let header_bytes = usize::try_from(u64::from_le_bytes(*bytes.first_chunk::<8>()?)).ok()?;
    let header = bytes.get(8..8_usize.checked_add(header_bytes)?)?;
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    let ends = header.values().filter_map(|entry| entry["data_offsets"][1].as_u64());
    let (listed, found) = (ends.max()?, (bytes.len() - 8 - header_bytes) as u64);
    (found < listed)
        .then(|| format!("{found} bytes of data where the header lists {listed}: it is truncated"))
}
