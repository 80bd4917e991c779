//! ComfyUI's quantized safetensors: which tensors are scales of others.
//!
//! Two generations are in use. The older marks a file with the tensor `scaled_fp8` and stores
//! `<layer>.scale_weight` and sometimes `<layer>.scale_input`. The newer describes each layer in the
//! tensor `<layer>.comfy_quant` or in the header's `_quantization_metadata` and stores
//! `<layer>.weight_scale` and sometimes `<layer>.input_scale`. The scales of inputs are for products
//! in fp8; activations are never fp8 here, so they are not needed.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    checkpoint::{Checkpoint, TensorEntry},
    gguf::Value,
    stored::StoredType,
};
use crate::error::{ModelError, Result};

const MARK: &str = "scaled_fp8";
const DESCRIPTION: &str = ".comfy_quant";
const HEADER: &str = "_quantization_metadata";
/// Endings of scales of weights.
const WEIGHT_SCALES: [&str; 2] = [".scale_weight", ".weight_scale"];
/// Endings of scales of inputs.
const INPUT_SCALES: [&str; 2] = [".scale_input", ".input_scale"];
/// The formats that are read.
const FORMATS: [&str; 2] = ["float8_e4m3fn", "float8_e5m2"];
/// Pieces of names that tell other ways to quantize; the surest come first.
const SIGNS: [(&str, &str); 6] = [
    (".wscales", "SVDQuant (nunchaku)"),
    (".smooth_factor", "SVDQuant (nunchaku)"),
    (".quant_state.bitsandbytes__", "bitsandbytes' four-bit weights (nf4 or fp4)"),
    (".weight.absmax", "bitsandbytes' quantized weights"),
    (".qzeros", "AWQ's or GPTQ's four-bit weights"),
    (".qweight", "packed four-bit weights (SVDQuant, AWQ or GPTQ)"),
];
/// What to do with a file that is not read.
const OTHER_FILE: &str = "this way to quantize is not read; use the model in GGUF (Q4_K_M is as \
                          small), fp8 or bf16";
/// Longest description of one layer in bytes.
const DESCRIPTION_BYTES_MAX: usize = 1 << 16;

#[derive(Deserialize)]
struct Layer {
    format: String,
}

#[derive(Deserialize)]
struct Layers {
    layers: BTreeMap<String, Layer>,
}

/// Gives fp8 weights their scales and takes the tensors out that are no weights themselves.
///
/// # Errors
/// A format that is not read, by its name; a scale without a weight of eight bits, or of another
/// shape than one number.
pub(super) fn resolve(checkpoint: &mut Checkpoint) -> Result<()> {
    refuse_by_name(checkpoint)?;
    check_header(checkpoint)?;
    let names = |checkpoint: &Checkpoint, ends: &[&str]| -> Vec<String> {
        let fits = |name: &str| ends.iter().any(|end| name.ends_with(end));
        checkpoint
            .tensors()
            .filter(|(name, _)| fits(name))
            .map(|(name, _)| name.to_owned())
            .collect()
    };
    let mut described = Vec::new();
    for name in names(checkpoint, &[DESCRIPTION]) {
        let text = match checkpoint.entry(&name) {
            Some(entry) => checkpoint.raw(entry),
            None => continue,
        };
        let layer: Option<Layer> = (text.len() <= DESCRIPTION_BYTES_MAX)
            .then(|| serde_json::from_slice(text).ok())
            .flatten();
        let format =
            layer.map_or_else(|| "a description that is no JSON".to_owned(), |layer| layer.format);
        check_format(checkpoint, &name, &format)?;
        described.extend(name.strip_suffix(DESCRIPTION).map(|layer| format!("{layer}.weight")));
        checkpoint.entries_mut().remove(&name);
    }
    let scales = names(checkpoint, &WEIGHT_SCALES);
    for name in &scales {
        let layer = WEIGHT_SCALES.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        let scale = weight_scale(checkpoint, name)?;
        let weight = checkpoint.entries_mut().get_mut(&format!("{layer}.weight"));
        match weight.filter(|weight| weight.is_float8() && weight.scale.is_none()) {
            Some(weight) => weight.scale = Some(scale),
            None => return Err(fault(checkpoint, name, "one scale for a weight of type F8")),
        }
        checkpoint.entries_mut().remove(name);
    }
    let unscaled = described.iter().find(|weight| {
        let entry = checkpoint.entry(weight);
        entry.is_some_and(|weight| weight.is_float8() && weight.scale.is_none())
    });
    if let Some(weight) = unscaled {
        return Err(fault(checkpoint, weight, "its weight_scale beside it"));
    }
    for name in names(checkpoint, &INPUT_SCALES) {
        let layer = INPUT_SCALES.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        if checkpoint.entry(&format!("{layer}.weight")).is_some_and(TensorEntry::is_float8) {
            checkpoint.entries_mut().remove(&name);
        }
    }
    let is_mark = |name: &str| name == MARK || name.ends_with(&format!(".{MARK}"));
    checkpoint.entries_mut().retain(|name, _| !is_mark(name));
    Ok(())
}

fn check_header(checkpoint: &Checkpoint) -> Result<()> {
    let Some(Value::Text(text)) = checkpoint.value(HEADER) else { return Ok(()) };
    let layers: Layers = serde_json::from_str(text)
        .map_err(|error| checkpoint.metadata_fault(HEADER, error, "layers with their formats"))?;
    layers.layers.iter().try_for_each(|(name, layer)| check_format(checkpoint, name, &layer.format))
}

fn check_format(checkpoint: &Checkpoint, name: &str, format: &str) -> Result<()> {
    if FORMATS.contains(&format) {
        return Ok(());
    }
    Err(ModelError::Corrupt {
        path: checkpoint.name().to_owned(),
        found: format!("tensor {name} of ComfyUI's format {format:?}"),
        expected: FORMATS.join(" or "),
        hint: OTHER_FILE.to_owned(),
    }
    .into())
}

/// Refuses ways to quantize that are told by the names of tensors.
fn refuse_by_name(checkpoint: &Checkpoint) -> Result<()> {
    for (sign, kind) in SIGNS {
        let found = checkpoint.tensors().find(|(name, _)| name.contains(sign));
        if let Some((name, _)) = found {
            return Err(ModelError::Corrupt {
                path: checkpoint.name().to_owned(),
                found: format!("tensor {name}, a part of {kind}"),
                expected: "plain, fp8 or GGUF's quantized weights".to_owned(),
                hint: OTHER_FILE.to_owned(),
            }
            .into());
        }
    }
    Ok(())
}

/// The one number of a scale.
fn weight_scale(checkpoint: &Checkpoint, name: &str) -> Result<f32> {
    const EXPECTED: &str = "one finite number of type F32";
    let Some(entry) = checkpoint.entry(name) else { return Err(fault(checkpoint, name, EXPECTED)) };
    let scale = match (entry.kind, checkpoint.raw(entry)) {
        (StoredType::Plain(safetensors::Dtype::F32), &[a, b, c, d]) => {
            f32::from_le_bytes([a, b, c, d])
        }
        _ => f32::NAN,
    };
    if scale.is_finite() { Ok(scale) } else { Err(fault(checkpoint, name, EXPECTED)) }
}

fn fault(checkpoint: &Checkpoint, name: &str, expected: &str) -> crate::Error {
    let found = checkpoint.entry(name).map_or_else(String::new, |entry| {
        format!("of type {} and shape {:?}", entry.kind, entry.shape)
    });
    ModelError::Corrupt {
        path: checkpoint.name().to_owned(),
        found: format!("tensor {name} {found}"),
        expected: expected.to_owned(),
        hint: "this way of scaling is not read; use another file of the model".to_owned(),
    }
    .into()
}
