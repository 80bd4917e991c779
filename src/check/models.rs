//! Whole models: those of the reference checkpoints in bf16, against the reference's float32 numbers.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};

use super::report::{Finding, Row};
use crate::{
    diffusion::{
        Conditioning, Grid, GuidancePass, Transformer,
        qwen_image::{Branch, ModelInput, Outputs},
        vae::{Autoencoder, Tiling},
    },
    error::{Error, Result},
    ops::cuda::{launches, runs_on},
    progress::CancelToken,
    vlm::{Inputs, VisionLanguageModel},
    weights::{ModelFiles, Precision, Storage},
};

/// What is computed of a checkpoint: on a device, with matrices kept in a type.
type Model = fn(&Device, &Path, Storage) -> Result<Computed>;

/// What a model gave, and what the reference gave.
struct Computed {
    found: Tensor,
    expected: Tensor,
}

/// Each with a recorded tensor that it needs. A checkpoint that shares a model and its numbers with
/// another does not record them again.
const MODELS: [(&str, &str, Model); 6] = [
    ("transformer", "dit.out.0.37", transformer),
    ("transformer, padded in a batch of two,", "dit.out.0.37", transformer_in_batch),
    ("encoder of pictures", "vae.image", encoder),
    ("decoder of pictures", "vae.image", decoder),
    ("language model", "vl.hidden_last", language_model),
    ("language model, token by token,", "vl.logits", token_by_token),
];

/// The models of every checkpoint in `folder`.
pub(super) fn check(device: &Device, folder: &Path) -> Vec<Row> {
    let mut folders: Vec<_> = match fs_err::read_dir(folder) {
        Ok(entries) => {
            entries.filter_map(std::result::Result::ok).map(|entry| entry.path()).collect()
        }
        Err(error) => {
            return vec![row("references".to_owned(), Finding::failed(&error))];
        }
    };
    folders.sort();
    let mut rows = Vec::new();
    for folder in folders.iter().filter(|folder| folder.join("cases/cases.safetensors").is_file()) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let cases = match Cases::open(folder) {
            Ok(cases) => cases,
            Err(error) => {
                rows.push(row(format!("cases of {name}"), Finding::failed(&error)));
                continue;
            }
        };
        for (what, _, model) in MODELS.iter().filter(|(_, needed, _)| cases.has(needed)) {
            for storage in [Storage::Compute, Storage::Q8_0] {
                let finding = compared(device, folder, (*model, storage))
                    .unwrap_or_else(|error| Finding::failed(&error));
                rows.push(row(format!("{what} of {name}, {storage:?}"), finding));
            }
        }
    }
    rows
}

fn row(name: String, finding: Finding) -> Row {
    Row { part: "models".into(), name, finding }
}

/// The error against the reference, and twice that of the same model in bf16 by plain operations.
fn compared(device: &Device, folder: &Path, (model, storage): (Model, Storage)) -> Result<Finding> {
    let plain =
        crate::ops::cuda::not_emulated(|| model(&Device::Cpu, folder, storage))?.distance()?;
    let before = launches();
    let value = model(device, folder, storage)?.distance()?;
    if launches() == before {
        return Ok(Finding::Failed("no kernel ran".to_owned()));
    }
    Ok(Finding::Checked { value, limit: 2.0 * plain })
}

fn precision(device: &Device, storage: Storage) -> Precision {
    let compute = DType::BF16;
    Precision { device: device.clone(), compute, storage, ..Precision::reference() }
}

/// The recorded tensors of a checkpoint.
struct Cases(HashMap<String, Tensor>);

impl Cases {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("cases/cases.safetensors");
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn get(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::field("cases", name, "a tensor of the reference");
        self.0.get(name).cloned().ok_or_else(missing)
    }
}

fn facts(folder: &Path) -> Result<serde_json::Value> {
    ModelFiles::Folder(folder.to_owned()).read_json("cases/cases.json")
}

fn transformer(device: &Device, folder: &Path, storage: Storage) -> Result<Computed> {
    predicted(device, folder, storage, false)
}

/// Beside a request that is twice as long.
fn transformer_in_batch(device: &Device, folder: &Path, storage: Storage) -> Result<Computed> {
    predicted(device, folder, storage, true)
}

fn predicted(device: &Device, folder: &Path, storage: Storage, batch: bool) -> Result<Computed> {
    let cases = Cases::open(folder)?;
    let grids = grids(&facts(folder)?)
        .ok_or_else(|| Error::field("cases.json", "dit.img_shapes", "grids of pictures"))?;
    let tokens = cases.get("dit.hidden_states")?;
    let conditioning = Conditioning { hidden_states: cases.get("dit.encoder_hidden_states")? };
    let files = ModelFiles::Folder(folder.to_owned());
    let model = Transformer::load(&files, &precision(device, storage))?;
    let input = ModelInput { tokens: &tokens, grids: &grids, conditioning: &conditioning };
    let cancel = CancelToken::new();
    let contexts = model.contexts(&[0.37], &cancel)?;
    let Some(context) = contexts.first() else {
        return Err(Error::field("timesteps", 0, "one context"));
    };
    let mut branches = vec![Branch { input, cache: None }];
    let states = &conditioning.hidden_states;
    let longer = Conditioning { hidden_states: Tensor::cat(&[states, states], 1)? };
    if batch {
        model.set_guidance(GuidancePass::OneBatch);
        let input = ModelInput { conditioning: &longer, ..input };
        branches.push(Branch { input, cache: None });
    }
    let found = model.forward_each(&mut branches, context, Outputs::All, &cancel)?;
    Ok(Computed { found: found[0].clone(), expected: cases.get("dit.out.0.37")? })
}

fn encoder(device: &Device, folder: &Path, storage: Storage) -> Result<Computed> {
    let cases = Cases::open(folder)?;
    let files = ModelFiles::Folder(folder.to_owned());
    let model = Autoencoder::load(&files, &precision(device, storage))?;
    let picture = cases.get("vae.image")?.squeeze(2)?;
    let found = model.encode(&picture, &Tiling::OFF, &CancelToken::new())?;
    let exact = Autoencoder::load(&files, &Precision::reference())?;
    let expected = exact.encode(&picture, &Tiling::OFF, &CancelToken::new())?;
    Ok(Computed { found, expected })
}

fn decoder(device: &Device, folder: &Path, storage: Storage) -> Result<Computed> {
    let cases = Cases::open(folder)?;
    let files = ModelFiles::Folder(folder.to_owned());
    let exact = Autoencoder::load(&files, &Precision::reference())?;
    let picture = cases.get("vae.image")?.squeeze(2)?;
    let latents = exact.encode(&picture, &Tiling::OFF, &CancelToken::new())?;
    let expected = exact.decode(&latents, &Tiling::OFF, &CancelToken::new())?;
    let model = Autoencoder::load(&files, &precision(device, storage))?;
    let found = model.decode(&latents.to_device(device)?, &Tiling::OFF, &CancelToken::new())?;
    Ok(Computed { found, expected })
}

fn language_model(device: &Device, folder: &Path, storage: Storage) -> Result<Computed> {
    let (model, inputs) = asked(device, folder, storage)?;
    let found = model.hidden_states(&inputs, &CancelToken::new())?;
    Ok(Computed { found, expected: Cases::open(folder)?.get("vl.hidden_last")? })
}

/// The language model and a prompt with a picture.
fn asked(
    device: &Device,
    folder: &Path,
    storage: Storage,
) -> Result<(VisionLanguageModel, Inputs)> {
    let facts = facts(folder)?;
    let text = facts.get("vl.text").and_then(serde_json::Value::as_str).unwrap_or_default();
    let files = ModelFiles::Folder(folder.to_owned());
    let model = VisionLanguageModel::load(&files, "text_encoder", &precision(device, storage))?;
    let path = folder.join("cases/vl.png");
    let picture = image::open(&path).map_err(candle_core::Error::wrap)?.into_rgb8();
    let inputs = model.prepare(text, &[picture])?;
    Ok((model, inputs))
}

/// The logits of the prompt's last tokens, each read on its own.
fn token_by_token(device: &Device, folder: &Path, storage: Storage) -> Result<Computed> {
    const TOKENS: usize = 12;
    let (model, inputs) = asked(device, folder, storage)?;
    let cancel = CancelToken::new();
    let (found, prepared) = model.logits_token_by_token(&inputs, TOKENS, (&cancel).into())?;
    // Plain matrices in host memory are laid out for the CPU.
    let expected = device.is_cuda() || (runs_on(device) && storage == Storage::Q8_0);
    if prepared != expected {
        return Err(Error::field("prepared pass", prepared, expected));
    }
    let all = Cases::open(folder)?.get("vl.logits")?;
    Ok(Computed { found, expected: all.narrow(1, all.dim(1)? - TOKENS, TOKENS)? })
}

impl Computed {
    /// Root of the mean square of the difference, as a share of that of what is expected.
    fn distance(&self) -> Result<f64> {
        let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all();
        let mean_square =
            |x: &Tensor| -> Result<f64> { Ok(x.sqr()?.mean_all()?.to_scalar::<f64>()?) };
        let (found, expected) = (wide(&self.found)?, wide(&self.expected)?);
        Ok((mean_square(&(found - &expected)?)? / mean_square(&expected)?).sqrt())
    }
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
