//! What is converted: the part of a model that the inputs hold, under its published names.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::{
    diffusion::{qwen_image::header::Header, vae},
    editor::{
        assemble::{
            assemble, config_beside, stem,
            version::{Version, lender},
        },
        pipeline::{Kind, Pipeline},
        source::ModelParts,
    },
    error::{Error, ModelError, Result},
    vlm,
    weights::{Checkpoint, Family, ModelFiles, family, identify, model_name, shards},
};

/// Names of weights in a part's folder.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
const EXPECTED: &str =
    "a transformer, an autoencoder or a vision-language model of Qwen-Image-Edit";

const UNKNOWN_VERSION: &str = "nothing tells which version of the editor this is, and the new file does \
                               not say either; a --name such as Qwen-Image-Edit-2511 or --model-args \
                               qwen_image_zero_cond_t=true does";

/// A part of a model.
#[derive(Debug)]
pub(super) enum Source {
    Transformer(Transformer),
    VisionLanguage {
        checkpoint: Checkpoint,
        /// Configs and tokenizer.
        files: ModelFiles,
        folder: String,
        name: String,
    },
    Autoencoder {
        checkpoint: Checkpoint,
        name: String,
    },
}

/// The editor's transformer and what is known of its version.
#[derive(Debug)]
pub(super) struct Transformer {
    pub(super) checkpoint: Checkpoint,
    pub(super) config: Option<Map<String, Json>>,
    pub(super) name: String,
    /// Class of its pipeline and `zero_cond_t`; `None` where nothing tells.
    pub(super) version: Option<(Kind, bool)>,
    /// What the user should know about the version.
    pub(super) note: Option<String>,
}

/// What the user says of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hints<'a> {
    /// Whether a transformer is of the 2511 version.
    pub(super) zero_cond_t: Option<bool>,
    /// What it is called.
    pub(super) name: Option<&'a str>,
}

/// Opens the inputs: a part's folder, or the files that together hold one part.
pub(super) fn open(inputs: &[PathBuf], hints: Hints<'_>) -> Result<Source> {
    match inputs {
        [] => Err(Error::field("INPUT", "nothing", "a weight file or the folder of a part")),
        [folder] if folder.is_dir() => open_folder(folder, hints),
        [file] => open_files(&shards(file), hints),
        files => open_files(files, hints),
    }
}

fn open_folder(folder: &Path, hints: Hints<'_>) -> Result<Source> {
    if folder.join("model_index.json").is_file() {
        let parts = ["transformer", "text_encoder", "vae"].map(|part| folder.join(part));
        let expected = format!("one of its parts: {}", list(&parts));
        return Err(Error::field(
            "INPUT",
            format!("{}, a whole model", folder.display()),
            expected,
        ));
    }
    let whole = folder.canonicalize()?;
    let parent = whole.parent().unwrap_or(&whole).to_owned();
    let part = name_of(&whole);
    let files = ModelFiles::Folder(parent.clone());
    let there = |stem: &&&str| {
        let end = ["", ".bf16", ".fp16"];
        end.iter().any(|variant| {
            files.exists(&format!("{part}/{stem}{variant}.safetensors"))
                || files.exists(&format!("{part}/{stem}.safetensors.index{variant}.json"))
        })
    };
    let Some(stem) = STEMS.iter().find(there) else {
        return Err(ModelError::Missing {
            path: folder.join("*.safetensors").display().to_string(),
            what: "the folder holds no weights that are named as published".to_owned(),
            hint: "name the weight file, or a folder such as transformer/ or text_encoder/"
                .to_owned(),
        }
        .into());
    };
    let checkpoint = files.checkpoint(&part, stem)?;
    // A part is named after its model, a model in one folder after itself.
    let is_part = ["transformer", "text_encoder", "vae"].contains(&part.as_str());
    let name = model_name(if is_part { &parent } else { &whole });
    match family(&checkpoint) {
        Some(Family::Transformer) => {
            let config = match files.exists(&format!("{part}/config.json")) {
                true => Some(files.read_json(&format!("{part}/config.json"))?),
                false => None,
            };
            let name = hints.name.map_or(name, str::to_owned);
            let zero_cond_t = hints.zero_cond_t;
            let parts = ModelParts { folder: Some(parent), zero_cond_t, ..ModelParts::default() };
            transformer(checkpoint, config, name, &parts).map(Source::Transformer)
        }
        Some(Family::VisionLanguage) => {
            let checkpoint = vlm::canonical(checkpoint)?;
            Ok(Source::VisionLanguage { checkpoint, files, folder: part, name })
        }
        Some(Family::Autoencoder) => {
            let checkpoint = vae::names::canonical(checkpoint)?;
            Ok(Source::Autoencoder { checkpoint, name })
        }
        _ => Err(unknown(&checkpoint)),
    }
}

fn open_files(files: &[PathBuf], hints: Hints<'_>) -> Result<Source> {
    let checkpoint = Checkpoint::open_files(files)?;
    let Some(first) = files.first() else { return Err(unknown(&checkpoint)) };
    let titles = ["general.name", "modelspec.title"];
    let title = titles.iter().find_map(|key| checkpoint.value(key)?.as_text());
    let name = title.map_or_else(|| stem(first), str::to_owned);
    match family(&checkpoint) {
        Some(Family::Transformer) => {
            let name = hints.name.map_or(name, str::to_owned);
            let config = config_beside(first)?;
            let parts = ModelParts {
                diffusion_model: Some(first.clone()),
                zero_cond_t: hints.zero_cond_t,
                ..ModelParts::default()
            };
            transformer(checkpoint, config, name, &parts).map(Source::Transformer)
        }
        Some(Family::VisionLanguage | Family::Language) => {
            let is_tower = |file: &&PathBuf| {
                Checkpoint::open_file(file)
                    .is_ok_and(|file| family(&file) == Some(Family::VisionTower))
            };
            let mmproj = files.iter().find(is_tower).cloned();
            let llm = files.iter().find(|file| Some(*file) != mmproj.as_ref()).cloned();
            if files.len() > 1 + usize::from(mmproj.is_some()) {
                let expected = "a GGUF language model and its mmproj, or the folder of the shards";
                return Err(Error::field("INPUT", list(files), expected));
            }
            let files = assemble(&ModelParts { llm, mmproj, ..ModelParts::default() })?;
            let folder = "text_encoder".to_owned();
            let checkpoint = vlm::canonical(files.checkpoint(&folder, "model")?)?;
            Ok(Source::VisionLanguage { checkpoint, files, folder, name })
        }
        Some(Family::Autoencoder) => {
            let checkpoint = vae::names::canonical(checkpoint)?;
            Ok(Source::Autoencoder { checkpoint, name })
        }
        _ => Err(unknown(&checkpoint)),
    }
}

fn transformer(
    checkpoint: Checkpoint,
    config: Option<Map<String, Json>>,
    name: String,
    parts: &ModelParts,
) -> Result<Transformer> {
    let header = Header::new(checkpoint)?;
    let config = match config {
        Some(config) => Some(config),
        None => header.own_config()?.or_else(|| header.config().ok()),
    };
    let said = config.clone().unwrap_or_default();
    let mut version = Version::find(parts, &header, &said, header.name(), &name)?;
    header.check_alone()?;
    if let Some(files) = lender(parts) {
        version.kind = Pipeline::read(&files)?.kind;
        version.note = None;
    }
    Ok(Transformer {
        checkpoint: header.into_checkpoint(),
        config,
        name,
        version: version.note.is_none().then_some((version.kind, version.zero_cond_t)),
        note: version.note.map(|_| UNKNOWN_VERSION.to_owned()),
    })
}

fn unknown(checkpoint: &Checkpoint) -> Error {
    let found = match family(checkpoint) {
        Some(Family::Lora) => "low-rank changes (LoRA)",
        _ => identify(checkpoint).unwrap_or("no model that is known"),
    };
    ModelError::Kind {
        path: checkpoint.name().to_owned(),
        found: found.to_owned(),
        expected: EXPECTED.to_owned(),
    }
    .into()
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

/// The last part of a path.
fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_called_as_their_folders_or_repositories() {
        assert_eq!(model_name(Path::new("/models/Edit-2511")), "Edit-2511");
        let snapshot = Path::new("/hub/models--Qwen--Qwen-Image-Edit-2511/snapshots/abc");
        assert_eq!(model_name(snapshot), "Qwen-Image-Edit-2511");
    }

    #[test]
    fn one_shard_stands_for_all() {
        let all = shards(Path::new("a/x-00002-of-00003.safetensors"));
        let expected = [1, 2, 3].map(|i| format!("a/x-0000{i}-of-00003.safetensors"));
        assert_eq!(all, expected.map(PathBuf::from));
        for single in ["a/x.safetensors", "a/x-1-of-2.safetensors", "x-00001-of-00002.gguf"] {
            assert_eq!(shards(Path::new(single)), [PathBuf::from(single)]);
        }
    }
}
