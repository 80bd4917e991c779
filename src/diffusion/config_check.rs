//! What all config files of a model are checked for.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{
    error::{ModelError, Result},
    weights::ModelFiles,
};

/// Whether a config has all of these entries.
pub(crate) fn has_all(config: &Map<String, Value>, entries: &Map<String, Value>) -> bool {
    entries.iter().all(|(key, value)| config.get(key) == Some(value))
}

/// Checks the class a config file is for; a config without a class is taken at its word.
pub(super) fn require_class(
    files: &ModelFiles,
    path: &str,
    found: Option<&str>,
    expected: &str,
) -> Result<()> {
    match found {
        Some(found) if found != expected => Err(ModelError::Kind {
            path: files.describe(path),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
        .into()),
        _ => Ok(()),
    }
}

/// Refuses keys that are not known, because nothing tells whether they change the arithmetic.
/// Keys that begin with `_` are notes, and a key that is null or false turns nothing on;
/// `without_effect` lists further keys that older files carry.
pub(super) fn refuse_unknown_keys(
    files: &ModelFiles,
    path: &str,
    unknown: &BTreeMap<String, Value>,
    without_effect: &[&str],
) -> Result<()> {
    let odd = unknown.iter().find(|(key, value)| {
        let off = matches!(value, Value::Null | Value::Bool(false));
        !(off || key.starts_with('_') || without_effect.contains(&key.as_str()))
    });
    match odd {
        Some((key, value)) => {
            let expected = "no such key: it may change what the model computes";
            Err(files.config(path, key, value, expected))
        }
        None => Ok(()),
    }
}
