//! Whole models: the reference checkpoints' transformers in bf16, against the reference's float32 numbers.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::report::{Finding, Row};
use crate::{
    diffusion::{
        Conditioning, Grid, Transformer,
        qwen_image::{ModelInput, Outputs},
    },
    error::{Error, Result},
    progress::CancelToken,
    weights::{ModelFiles, Precision, Storage},
};

/// The transformer of every checkpoint in `folder` that has weights of its own.
pub(super) fn check(device: &Device, folder: &Path) -> Vec<Row> {
    let mut folders: Vec<_> = match fs_err::read_dir(folder) {
        Ok(entries) => {
            entries.filter_map(std::result::Result::ok).map(|entry| entry.path()).collect()
        }
        Err(error) => {
            return vec![row("references".to_owned(), Finding::Failed(error.to_string()))];
        }
    };
    folders.sort();
    let mut rows = Vec::new();
    for folder in folders.iter().filter(|folder| folder.join("cases/cases.safetensors").is_file()) {
        for storage in [Storage::Compute, Storage::Q8_0] {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let finding = match transformer(device, folder, storage) {
                Ok(finding) => finding,
                Err(error) => Finding::Failed(error.to_string()),
            };
            rows.push(row(format!("transformer of {name}, {storage:?}"), finding));
        }
    }
    rows
}

fn row(name: String, finding: Finding) -> Row {
    Row { part: "models", name, finding }
}

/// The error against the reference, and twice that of the same model in bf16 by plain operations.
fn transformer(device: &Device, folder: &Path, storage: Storage) -> Result<Finding> {
    let cases =
        candle_core::safetensors::load(folder.join("cases/cases.safetensors"), &Device::Cpu)?;
    let facts: serde_json::Value =
        ModelFiles::Folder(folder.to_owned()).read_json("cases/cases.json")?;
    let case = |name: &str| {
        cases
            .get(name)
            .cloned()
            .ok_or_else(|| Error::field("cases", name, "a tensor of the reference"))
    };
    let grids =
        grids(&facts).ok_or_else(|| Error::field("cases.json", "dit", "grids of pictures"))?;
    let (tokens, expected) = (case("dit.hidden_states")?, case("dit.out.0.37")?);
    let conditioning = Conditioning { hidden_states: case("dit.encoder_hidden_states")? };
    let files = ModelFiles::Folder(folder.to_owned());
    let forward = |device: &Device, storage| -> Result<Tensor> {
        let compute = DType::BF16;
        let precision =
            Precision { device: device.clone(), compute, storage, ..Precision::reference() };
        let model = Transformer::load(&files, &precision)?;
        let input = ModelInput { tokens: &tokens, grids: &grids, conditioning: &conditioning };
        let cancel = CancelToken::new();
        let context = model.contexts(&[0.37], &cancel)?;
        let Some(context) = context.first() else { return Ok(tokens.clone()) };
        model.forward(&input, context, Outputs::All, &cancel)
    };
    let plain = plainly(|| forward(&Device::Cpu, storage))?;
    let found = forward(device, storage)?.to_device(&Device::Cpu)?;
    Ok(Finding::Checked {
        value: distance(&found, &expected)?,
        limit: 2.0 * distance(&plain, &expected)?,
    })
}

/// Without the emulation, which would run for tensors on the CPU.
fn plainly<T>(work: impl FnOnce() -> T) -> T {
    crate::ops::cuda::not_emulated(work)
}

fn grids(facts: &serde_json::Value) -> Option<Vec<Grid>> {
    let shapes = facts.get("dit.img_shapes")?.as_array()?;
    let size = |value: Option<&serde_json::Value>| {
        value.and_then(serde_json::Value::as_u64).and_then(|size| usize::try_from(size).ok())
    };
    let grid = |shape: &serde_json::Value| {
        let shape = shape.as_array()?;
        Some(Grid { height: size(shape.get(1))?, width: size(shape.get(2))? })
    };
    shapes.iter().map(grid).collect()
}

/// Root of the mean square of the difference, as a share of that of `expected`.
fn distance(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let mean_square = |x: &Tensor| -> Result<f64> {
        Ok(x.to_dtype(DType::F64)?.sqr()?.mean_all()?.to_scalar::<f64>()?)
    };
    let difference = (found.to_dtype(DType::F64)? - expected.to_dtype(DType::F64)?)?;
    Ok((mean_square(&difference)? / mean_square(expected)?).sqrt())
}
