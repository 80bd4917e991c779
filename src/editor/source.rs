//! Where models come from: a folder, single files, or the pack that is part of the program.

use std::path::PathBuf;

use super::assemble::assemble;
use crate::{
    error::{ModelError, Result},
    weights::ModelFiles,
};

/// The files of the miniature pack.
#[cfg(feature = "mini")]
static MINI: &[crate::weights::EmbeddedFile] = {
    use crate::weights::EmbeddedFile;
    include!(concat!(env!("OUT_DIR"), "/mini_files.rs"))
};

/// Where a model comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ModelSource {
    /// The miniature pack compiled into the program (feature `mini`).
    #[default]
    Mini,
    /// A folder in the published layout.
    Folder(PathBuf),
    /// Single files, each safetensors or GGUF.
    Files(ModelParts),
}

/// The files that a model is put together from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelParts {
    /// A folder in the published layout for the parts that have no file of their own.
    pub folder: Option<PathBuf>,
    /// The transformer.
    pub diffusion_model: Option<PathBuf>,
    /// The vision-language model; a GGUF file holds the language model alone.
    pub llm: Option<PathBuf>,
    /// The vision tower of a language model in GGUF; without it it is looked for beside that.
    pub mmproj: Option<PathBuf>,
    /// The autoencoder, under the names of diffusers or of Wan.
    pub vae: Option<PathBuf>,
    /// Whether the transformer is of the 2511 version; without it the files tell.
    pub zero_cond_t: Option<bool>,
}

impl ModelSource {
    /// The files.
    ///
    /// # Errors
    /// A folder that is not there or not in the published layout; files that are missing, damaged
    /// or of another model; the miniature pack in a build without it.
    pub fn files(&self) -> Result<ModelFiles> {
        match self {
            Self::Mini => mini(),
            Self::Files(parts) => assemble(parts),
            Self::Folder(folder) => {
                let files = ModelFiles::Folder(folder.clone());
                if files.exists("model_index.json") {
                    return Ok(files);
                }
                let what = if folder.is_dir() {
                    "a model folder has model_index.json at its top"
                } else if folder.is_file() {
                    "this is a file; single files go to --diffusion-model, --llm and --vae"
                } else {
                    "there is no such folder"
                };
                Err(ModelError::Missing {
                    path: folder.join("model_index.json").display().to_string(),
                    what: what.to_owned(),
                    hint: "pass the folder that holds model_index.json, transformer/, vae/ and \
                           text_encoder/; without --model the miniature pack is used"
                        .to_owned(),
                }
                .into())
            }
        }
    }
}

#[cfg(feature = "mini")]
#[expect(clippy::unnecessary_wraps, reason = "fails in a build without the feature")]
fn mini() -> Result<ModelFiles> {
    Ok(ModelFiles::Embedded { name: "mini", files: MINI })
}

#[cfg(not(feature = "mini"))]
fn mini() -> Result<ModelFiles> {
    Err(ModelError::Missing {
        path: "the miniature pack".to_owned(),
        what: "this build has no feature `mini`".to_owned(),
        hint: "pass a model folder, or build with the feature `mini`".to_owned(),
    }
    .into())
}
