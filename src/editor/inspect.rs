//! What a model folder holds, told from configs and headers without loading weights.

use std::{collections::BTreeMap, path::Path};

use safetensors::Dtype;
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
    weights::{Checkpoint, ModelFiles, Precision, Storage},
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
        let config = config.unwrap_or_default();
        let found = Version::find(&parts, &header, &config, header.name(), &stem(path))?;
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

    /// Why products in fp8 that were asked for are not done so.
    pub(super) fn float8_note(&self, precision: &Precision) -> Option<String> {
        if !precision.float8_products {
            return None;
        }
        let transformer = self.parts.iter().filter(|part| part.name == "transformer");
        let is_float8 = transformer
            .flat_map(|part| part.types.keys())
            .any(|name| name.starts_with(Dtype::F8_E4M3.to_string().as_str()));
        let why = match (is_float8, precision.storage) {
            (false, _) => "the transformer's weights are not fp8 (e4m3)",
            (true, Storage::Compute) if precision.multiplies_float8() => return None,
            (true, Storage::Compute) => {
                "only a GPU of compute capability 9.0 (Hopper) has such products"
            }
            (true, _) => "--dtype keeps the weights in another type",
        };
        Some(format!("--fp8-matmul has no effect: {why}"))
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

#[cfg(all(test, feature = "mini"))]
mod tests {
    use super::*;

    #[test]
    fn products_in_fp8_that_cannot_be_are_explained() {
        let mut info = ModelInfo::read(&ModelSource::Mini).unwrap();
        let asked = Precision { float8_products: true, ..Precision::reference() };
        let note = |info: &ModelInfo, storage| {
            info.float8_note(&Precision { storage, ..asked.clone() }).unwrap()
        };
        assert_eq!(info.float8_note(&Precision::reference()), None);
        assert!(note(&info, Storage::Compute).contains("not fp8"));
        let transformer = info.parts.iter_mut().find(|part| part.name == "transformer").unwrap();
        transformer.types.insert("F8_E4M3".to_owned(), 1);
        assert!(note(&info, Storage::Q8_0).contains("--dtype"));
        assert!(note(&info, Storage::Compute).contains("Hopper"));
    }
}
