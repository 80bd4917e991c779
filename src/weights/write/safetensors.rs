//! The header of a safetensors file.

use serde_json::{Map, Value, json};

use super::layout::Listed;

/// What stands before the data, which begin at its end and follow each other without gaps.
pub(super) fn header(texts: &[(String, String)], tensors: &[Listed<'_>]) -> Vec<u8> {
    const MULTIPLE: usize = 8;
    let mut entries = Map::new();
    let texts: Map<String, Value> =
        texts.iter().map(|(key, text)| (key.clone(), Value::from(text.as_str()))).collect();
    entries.insert("__metadata__".to_owned(), Value::Object(texts));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes;
        let entry = json!({
            "dtype": tensor.name_of_type, "shape": tensor.shape, "data_offsets": [start, end],
        });
        entries.insert(tensor.name.to_owned(), entry);
        start = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(MULTIPLE), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}
