//! The header of a safetensors file: where its tensors are.

use std::collections::BTreeMap;

use safetensors::SafeTensors;

use super::{
    checkpoint::{Data, TensorEntry},
    probe,
    stored::StoredType,
};
use crate::error::{ModelError, Result};

/// Reads one file's header into `entries`; returns the file's metadata.
pub(super) fn read(
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
            kind: StoredType::Plain(info.dtype),
            shape: info.shape.clone(),
            scale: None,
            data: Data::Bytes { file, range: start + begin..start + end },
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
