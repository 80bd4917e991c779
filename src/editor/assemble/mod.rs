//! Puts a model together from single files: weights of any of the known kinds, and the configs that
//! a folder would have beside them.

mod mmproj;
pub(super) mod version;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value as Json, json};

use self::version::Version;
use super::{pipeline::Kind, source::ModelParts};
use crate::{
    diffusion::{
        config_check::has_all,
        qwen_image::{self, header},
        vae,
    },
    error::{Error, ModelError, Result},
    vlm,
    weights::{Assembly, Checkpoint, ModelFiles, shards},
};

/// Class of the language model's config.
const LANGUAGE_MODEL: &str = "Qwen2_5_VLForConditionalGeneration";
/// Settings of the pictures that the language model sees.
const PREPROCESSOR: &str = "preprocessor_config.json";
/// The transformer's config.
const TRANSFORMER_CONFIG: &str = "transformer/config.json";
/// The autoencoder's config.
const VAE_CONFIG: &str = "vae/config.json";
/// Files of a tokenizer beside a language model, in the tokenizer's folder.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// The files of the model that `parts` name.
///
/// # Errors
/// Files that are missing, damaged, of another model, or that do not belong together.
pub(super) fn assemble(parts: &ModelParts) -> Result<ModelFiles> {
    let given = [&parts.diffusion_model, &parts.llm, &parts.vae];
    let first = given.into_iter().flatten().next();
    let name =
        first.or(parts.folder.as_ref()).map_or_else(|| "model".to_owned(), |path| stem(path));
    let mut assembly = Assembly::new(name, parts.folder.clone());
    transformer(parts, &mut assembly)?;
    match &parts.llm {
        Some(llm) => language_model(parts, llm, &mut assembly)?,
        None if parts.mmproj.is_some() => {
            return Err(Error::field("--mmproj", "a file", "--llm FILE beside it"));
        }
        None => {}
    }
    if let Some(path) = &parts.vae {
        let checkpoint = vae::names::canonical(Checkpoint::open_file(path)?)?;
        match beside(path, "config.json").filter(|file| is_of_class(file, vae::CLASS)) {
            Some(file) => assembly.put_file(VAE_CONFIG, file),
            None => {
                // Tensors do not tell the statistics of latents.
                let dimensions = vae::names::config(&checkpoint)?;
                match folders_config(parts, VAE_CONFIG, |config| {
                    dimensions.as_object().is_some_and(|told| has_all(config, told))
                }) {
                    Some(file) => assembly.put_file(VAE_CONFIG, file),
                    None => assembly.put_text(VAE_CONFIG, dimensions.to_string(), path.display()),
                }
            }
        }
        assembly.put_weights("vae", vec![path.clone()]);
    }
    const SCHEDULER: &str = "scheduler/scheduler_config.json";
    if !folder_has(parts, SCHEDULER) {
        assembly.put_text(SCHEDULER, scheduler(), "the published scheduler");
    }
    Ok(ModelFiles::Assembled(Arc::new(assembly)))
}

/// The scheduler's config, which all three published versions share.
fn scheduler() -> String {
    json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": true,
    })
    .to_string()
}

/// The transformer, and what follows from its version.
fn transformer(parts: &ModelParts, assembly: &mut Assembly) -> Result<()> {
    const CONFIG: &str = TRANSFORMER_CONFIG;
    let Some(path) = &parts.diffusion_model else {
        // The folder's own transformer, which a flag may declare to be of another version.
        if let (Some(zero_cond_t), Some(folder)) = (parts.zero_cond_t, &parts.folder) {
            let mut config: Map<String, Json> =
                ModelFiles::Folder(folder.clone()).read_json(CONFIG)?;
            header::decide(&mut config, zero_cond_t);
            let origin = folder.join(CONFIG).display().to_string();
            assembly.put_text(CONFIG, Json::Object(config).to_string(), origin);
        } else if parts.zero_cond_t.is_some() {
            let expected = "--diffusion-model FILE or --model DIR";
            return Err(Error::field("--model-args", "qwen_image_zero_cond_t", expected));
        }
        if parts.folder.is_none() {
            // A language model alone, for questions and plans: it sees pictures as the newest do.
            let index = json!({ "_class_name": Kind::Plus.class_name() }).to_string();
            assembly.put_text("model_index.json", index, "no transformer");
        }
        return Ok(());
    };
    let files = shards(path);
    let header = header::Header::new(Checkpoint::open_files(&files)?)?;
    let (mut config, origin) = transformer_config(parts, &header, path)?;
    let origin = origin.display().to_string();
    let version = Version::find(parts, &header, &config, &origin, &stem(path))?;
    header::decide(&mut config, version.zero_cond_t);
    if let Some(note) = version.note {
        assembly.note(note);
    }
    assembly.put_text(CONFIG, Json::Object(config).to_string(), &origin);
    let index = json!({ "_class_name": version.kind.class_name() }).to_string();
    assembly.put_text("model_index.json", index, &origin);
    // A pack's settings are those of the pack's own transformer.
    assembly.close("pentimento.json");
    assembly.put_weights("transformer", files);
    Ok(())
}

/// The config of a transformer in one file, and where it comes from: beside the file, in it, from the folder
/// that lends the rest where its dimensions are those of the tensors, or from the tensors.
fn transformer_config(
    parts: &ModelParts,
    header: &header::Header,
    path: &Path,
) -> Result<(Map<String, Json>, PathBuf)> {
    if let Some(file) = config_file(path) {
        return Ok((json_beside(&file)?, file));
    }
    if let Some(config) = header.own_config()? {
        return Ok((config, path.to_owned()));
    }
    if let Some(file) = folders_config(parts, TRANSFORMER_CONFIG, |config| header.fits(config)) {
        let mut config = json_beside(&file)?;
        // Versions have equal dimensions; which one the file is, is decided by other signs.
        config.remove("zero_cond_t");
        return Ok((config, file));
    }
    Ok((header.config()?, path.to_owned()))
}

fn config_file(path: &Path) -> Option<PathBuf> {
    beside(path, "config.json").filter(|file| is_of_class(file, qwen_image::CLASS))
}

/// The config that lies beside a transformer's file.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn config_beside(path: &Path) -> Result<Option<Map<String, Json>>> {
    config_file(path).as_deref().map(json_beside).transpose()
}

/// The vision-language model with its tokenizer and the settings of its pictures.
fn language_model(parts: &ModelParts, llm: &Path, assembly: &mut Assembly) -> Result<()> {
    const CONFIG: &str = "text_encoder/config.json";
    let files = shards(llm);
    let checkpoint = Checkpoint::open_files(&files)?;
    let preprocessor = if checkpoint.is_gguf() {
        vlm::gguf::architecture(&checkpoint)?;
        let mmproj = match &parts.mmproj {
            Some(path) => path.clone(),
            None => mmproj::find(llm)?,
        };
        let vision = Checkpoint::open_file(&mmproj)?;
        let texts = vlm::gguf::texts(&checkpoint, &vision)?;
        let origin = format!("{} and {}", llm.display(), mmproj.display());
        assembly.put_text(CONFIG, texts.config, origin);
        assembly.put_weights("text_encoder", vec![llm.to_owned(), mmproj]);
        texts.preprocessor
    } else {
        if let Some(mmproj) = &parts.mmproj {
            let expected = "a GGUF file as --llm; a safetensors file holds the vision tower itself";
            return Err(Error::field("--mmproj", mmproj.display(), expected));
        }
        match beside(llm, "config.json").filter(|file| is_of_class(file, LANGUAGE_MODEL)) {
            Some(file) => assembly.put_file(CONFIG, file),
            None => match folders_config(parts, CONFIG, |it| vlm::published::fits(it, &checkpoint))
            {
                Some(file) => assembly.put_file(CONFIG, file),
                None => assembly.put_text(CONFIG, published(&checkpoint)?, llm.display()),
            },
        }
        assembly.put_weights("text_encoder", files);
        vlm::published::preprocessor()
    };
    if let Some(file) = beside(llm, "generation_config.json") {
        assembly.put_file("text_encoder/generation_config.json", file);
    }
    tokenizer(llm, &checkpoint, assembly)?;
    let processor = format!("processor/{PREPROCESSOR}");
    let in_folder =
        [&processor, "processor/processor_config.json"].iter().any(|path| folder_has(parts, path));
    match beside(llm, PREPROCESSOR) {
        Some(file) => assembly.put_file(&processor, file),
        None if in_folder => {}
        None => assembly.put_text(&processor, preprocessor, llm.display()),
    }
    Ok(())
}

/// The tokenizer beside the language model, or in its metadata; otherwise the folder's.
fn tokenizer(llm: &Path, checkpoint: &Checkpoint, assembly: &mut Assembly) -> Result<()> {
    if beside(llm, "tokenizer.json").or_else(|| beside(llm, "vocab.json")).is_some() {
        assembly.close("tokenizer");
        for name in TOKENIZER_FILES {
            if let Some(file) = beside(llm, name) {
                assembly.put_file(&format!("tokenizer/{name}"), file);
            }
        }
    } else if checkpoint.is_gguf() {
        let texts = vlm::gguf::tokenizer_texts(checkpoint)?;
        assembly.close("tokenizer");
        let mut put = |name: &str, text: String| {
            assembly.put_text(&format!("tokenizer/{name}"), text, llm.display());
        };
        put("vocab.json", texts.vocabulary);
        put("merges.txt", texts.merges);
        put("tokenizer_config.json", texts.config);
        if let Some(template) = texts.chat_template {
            put("chat_template.jinja", template);
        }
    }
    Ok(())
}

/// The config of the published model that a file without one has the size of.
fn published(checkpoint: &Checkpoint) -> Result<String> {
    vlm::published::config(checkpoint).ok_or_else(|| {
        ModelError::Kind {
            path: checkpoint.name().to_owned(),
            found: "another model or size, without a config.json beside it".to_owned(),
            expected: "Qwen2.5-VL 7B, Qwen2.5-VL 3B".to_owned(),
        }
        .into()
    })
}

/// The config at `path` of the folder that lends the rest, where it fits the file that was named.
fn folders_config(
    parts: &ModelParts,
    path: &str,
    fits: impl FnOnce(&Map<String, Json>) -> bool,
) -> Option<PathBuf> {
    let file = parts.folder.as_ref()?.join(path);
    json_beside(&file).ok().filter(fits).map(|_| file)
}

fn folder_has(parts: &ModelParts, path: &str) -> bool {
    parts.folder.as_ref().is_some_and(|folder| folder.join(path).is_file())
}

/// A file of this name in the folder of `path`.
fn beside(path: &Path, name: &str) -> Option<PathBuf> {
    let file = path.with_file_name(name);
    file.is_file().then_some(file)
}

fn json_beside(file: &Path) -> Result<Map<String, Json>> {
    let folder = file.parent().unwrap_or_else(|| Path::new("")).to_owned();
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    ModelFiles::Folder(folder).read_json(&name)
}

/// Whether a config is of this class: another model's config may lie in the same folder.
fn is_of_class(file: &Path, class: &str) -> bool {
    json_beside(file).is_ok_and(|config| {
        let names =
            [config.get("_class_name"), config.get("architectures").and_then(|list| list.get(0))];
        names.into_iter().flatten().any(|name| name == class)
    })
}

/// A file's name without its ending.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
