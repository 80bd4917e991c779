//! What a model folder holds, told from configs and headers without loading weights.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    assemble::{
        config_beside, stem,
        version::{Version, version_name},
    },
    pipeline::Pipeline,
    source::{ModelParts, ModelSource},
};
use crate::{
    diffusion::qwen_image::header::Header,
    error::Result,
    weights::{Checkpoint, ModelFiles},
};

/// The folders with weights, and the name of the file in each.
pub(super) const PARTS: [(&str, &str); 3] = [
    ("transformer", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
    ("vae", "diffusion_pytorch_model"),
];

/// What a model folder holds.
///
/// ```
/// let info = pentimento::ModelInfo::read(&pentimento::ModelSource::Mini)?;
/// assert_eq!(info.class, "QwenImageEditPipeline");
/// # Ok::<(), pentimento::Error>(())
/// ```
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ModelInfo {
    /// The pack's or the folder's name.
    pub name: String,
    /// The pipeline class in model_index.json.
    pub class: &'static str,
    /// The published model whose arithmetic it has.
    pub version: &'static str,
    /// Tells models apart: SHA-256 of the parts' fingerprints, as hexadecimal digits.
    pub digest: String,
    /// Whether the weights are random: it runs, but does not do what it is told.
    pub untrained: bool,
    /// Area of the working size in square pixels, unless asked otherwise.
    pub area: u64,
    /// Area of the copies for the vision-language model, unless asked otherwise.
    pub vl_area: u64,
    /// Denoising steps, unless asked otherwise.
    pub steps: usize,
    /// True classifier-free guidance, unless asked otherwise.
    pub cfg_scale: f64,
    /// The models it is made of.
    pub parts: Vec<PartInfo>,
}

/// One model of a folder.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct PartInfo {
    /// Its folder.
    pub name: &'static str,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of values in all tensors.
    pub parameters: u64,
    /// Size of the values in the files in bytes.
    pub stored_bytes: u64,
    /// Tensors of each type.
    pub types: BTreeMap<String, usize>,
}

/// Which published version a transformer in one file is taken for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct EditVersion {
    /// `Qwen-Image-Edit-2511`, for example.
    pub version: &'static str,
    /// Why.
    pub reason: String,
}

impl EditVersion {
    /// What an editor that opens the file with no other hint takes it for.
    ///
    /// # Errors
    /// A file that is missing, damaged or no transformer of the family.
    pub fn of_file(path: &Path) -> Result<Self> {
        let header = Header::new(Checkpoint::open_file(path)?)?;
        let config = match config_beside(path)? {
            Some(config) => Some(config),
            None => header.own_config()?,
        };
        let parts = ModelParts { diffusion_model: Some(path.to_owned()), ..ModelParts::default() };
        let found = Version::find(&parts, &header, &config.unwrap_or_default(), &stem(path))?;
        Ok(Self { version: version_name(found.kind, found.zero_cond_t), reason: found.reason })
    }
}

#[derive(Deserialize)]
struct TransformerFlags {
    #[serde(default)]
    zero_cond_t: bool,
}

impl ModelInfo {
    /// Reads configs and headers.
    ///
    /// # Errors
    /// Files that are missing, damaged or of another kind.
    pub fn read(source: &ModelSource) -> Result<Self> {
        let files = source.files()?;
        Self::from_pipeline(&files, &Pipeline::read(&files)?)
    }

    pub(super) fn from_pipeline(files: &ModelFiles, pipeline: &Pipeline) -> Result<Self> {
        let flags: TransformerFlags = files.read_json("transformer/config.json")?;
        let mut digest = Sha256::new();
        let mut parts = Vec::with_capacity(PARTS.len());
        for (folder, stem) in PARTS {
            let checkpoint = files.checkpoint(folder, stem)?;
            digest.update(checkpoint.fingerprint());
            parts.push(PartInfo::new(folder, &checkpoint));
        }
        Ok(Self {
            name: pipeline.name.clone(),
            class: pipeline.kind.class_name(),
            version: version_name(pipeline.kind, flags.zero_cond_t),
            digest: digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            untrained: pipeline.untrained,
            area: pipeline.area,
            vl_area: pipeline.vl_area,
            steps: pipeline.steps,
            cfg_scale: pipeline.cfg_scale,
            parts,
        })
    }

    /// The first digits of the digest, for a person.
    #[must_use]
    pub fn short_digest(&self) -> &str {
        &self.digest[..16]
    }
}

impl PartInfo {
    fn new(name: &'static str, checkpoint: &Checkpoint) -> Self {
        let mut types = BTreeMap::new();
        for (_, entry) in checkpoint.tensors() {
            *types.entry(entry.kind.to_string()).or_insert(0) += 1;
        }
        Self {
            name,
            tensors: checkpoint.tensors().count(),
            parameters: checkpoint.elements(),
            stored_bytes: checkpoint.stored_bytes(),
            types,
        }
    }
}
