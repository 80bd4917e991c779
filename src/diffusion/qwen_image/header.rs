//! What a transformer's weight file says about the model when no config lies beside it.

use serde_json::{Map, Value as Json, json};

use super::config::{self, ZERO_COND_MARK};
use crate::{
    diffusion::config_check::has_all,
    error::{ModelError, Result},
    weights::{Checkpoint, depth, identify},
};

/// Width of a published head, and how it is shared among the axes of a position.
const PUBLISHED_AXES: (usize, [usize; 3]) = (128, [16, 56, 56]);
/// A tensor as long as a head is wide.
const HEAD: &str = "transformer_blocks.0.attn.norm_q.weight";
/// The key under which a weight file carries the model's config.
pub(crate) const CONFIG_KEY: &str = "pentimento.config";
/// Says in a config that was made that tensors have no say in `zero_cond_t` any more.
const DECIDED: &str = "_zero_cond_t_decided";

/// Most names in a message.
const NAMES_MAX: usize = 5;
/// Beginnings of the names of its tensors.
const ROOTS: &[&str] = &[
    "img_in.",
    "txt_in.",
    "txt_norm.",
    "time_text_embed.",
    "transformer_blocks.",
    "norm_out.",
    "proj_out.",
    ZERO_COND_MARK,
];

/// A weight file under the published names.
#[derive(Debug)]
pub(crate) struct Header(Checkpoint);

impl Header {
    /// Checks that a file holds a Qwen-Image transformer.
    ///
    /// # Errors
    /// Another model, by its name where it is known.
    pub(crate) fn new(checkpoint: Checkpoint) -> Result<Self> {
        let found = identify(&checkpoint).unwrap_or("no model that is known");
        let checkpoint = checkpoint.rename(config::canonical_name)?;
        config::refuse_look_alikes(&checkpoint)?;
        if checkpoint.contains("txt_norm.weight") {
            return Ok(Self(checkpoint));
        }
        Err(ModelError::Kind {
            path: checkpoint.name().to_owned(),
            found: found.to_owned(),
            expected: config::EXPECTED.to_owned(),
        }
        .into())
    }

    /// The tensors.
    pub(crate) fn into_checkpoint(self) -> Checkpoint {
        self.0
    }

    /// The file, for messages.
    pub(crate) fn name(&self) -> &str {
        self.0.name()
    }

    /// Checks that the file holds this model only, not others beside it.
    ///
    /// # Errors
    /// [`ModelError::TensorsUnused`] with the first names.
    pub(crate) fn check_alone(&self) -> Result<()> {
        let is_own = |name: &str| ROOTS.iter().any(|root| name.starts_with(root));
        let others: Vec<&str> =
            self.0.tensors().map(|(name, _)| name).filter(|name| !is_own(name)).collect();
        if others.is_empty() {
            return Ok(());
        }
        let names = others[..others.len().min(NAMES_MAX)].join(", ");
        let path = self.0.name().to_owned();
        Err(ModelError::TensorsUnused { path, count: others.len(), names }.into())
    }

    /// Whether the file has the mark of the 2511 version.
    pub(crate) fn is_marked(&self) -> bool {
        self.0.contains(ZERO_COND_MARK)
    }

    /// What the file's metadata call the model.
    pub(crate) fn names(&self) -> Vec<&str> {
        const KEYS: [&str; 6] = [
            "general.name",
            "general.basename",
            "general.finetune",
            "modelspec.title",
            "title",
            "name",
        ];
        KEYS.iter().filter_map(|key| self.0.value(key)?.as_text()).collect()
    }

    /// The config that the file itself carries.
    ///
    /// # Errors
    /// One that is no config of this model.
    pub(crate) fn own_config(&self) -> Result<Option<Map<String, Json>>> {
        let Some(value) = self.0.value(CONFIG_KEY) else { return Ok(None) };
        let config: Option<Map<String, Json>> =
            value.as_text().and_then(|text| serde_json::from_str(text).ok());
        match config.filter(|config| config.get("_class_name") == Some(&config::CLASS.into())) {
            Some(config) => Ok(Some(config)),
            None => {
                let found = value.to_string().chars().take(80).collect::<String>();
                Err(self.0.metadata_fault(CONFIG_KEY, found, format!("a {}", config::CLASS)))
            }
        }
    }

    /// A config of the dimensions that the tensors have.
    ///
    /// # Errors
    /// Tensors that are missing, or heads of a width that no published model has.
    pub(crate) fn config(&self) -> Result<Map<String, Json>> {
        let mut config = self.dimensions()?;
        let (published, axes) = PUBLISHED_AXES;
        let head = self.side(HEAD, 0)?;
        if head != published || !self.side("img_in.weight", 0)?.is_multiple_of(head) {
            return Err(ModelError::TensorShape {
                path: self.0.name().to_owned(),
                tensor: HEAD.to_owned(),
                found: vec![head],
                expected: vec![published],
            }
            .into());
        }
        config.insert("axes_dims_rope".to_owned(), json!(axes));
        Ok(config)
    }

    /// Whether a config is of the dimensions that the tensors have. They do not tell how a head is shared
    /// among the axes of a position.
    pub(crate) fn fits(&self, config: &Map<String, Json>) -> bool {
        self.dimensions().is_ok_and(|dimensions| has_all(config, &dimensions))
    }

    /// What the shapes of the tensors tell of the config.
    fn dimensions(&self) -> Result<Map<String, Json>> {
        let (dim, head) = (self.side("img_in.weight", 0)?, self.side(HEAD, 0)?);
        let area = config::PATCH * config::PATCH;
        let names = self.0.tensors().map(|(name, _)| name);
        let config = json!({
            "_class_name": config::CLASS,
            "patch_size": config::PATCH,
            "in_channels": self.side("img_in.weight", 1)?,
            "out_channels": self.side("proj_out.weight", 0)?.div_euclid(area),
            "num_layers": depth(names, "transformer_blocks.").unwrap_or(0),
            "attention_head_dim": head,
            "num_attention_heads": dim.checked_div(head).unwrap_or(0),
            "joint_attention_dim": self.side("txt_in.weight", 1)?,
        });
        Ok(config.as_object().cloned().unwrap_or_default())
    }

    /// The length of a tensor along an axis.
    fn side(&self, tensor: &str, axis: usize) -> Result<usize> {
        let shape = self.0.shape(tensor).filter(|shape| shape.len() > axis);
        shape.map(|shape| shape[axis]).ok_or_else(|| {
            let (path, near) = (self.0.name().to_owned(), String::new());
            ModelError::TensorMissing { path, tensor: tensor.to_owned(), near }.into()
        })
    }
}

/// Writes the decision between the versions into a config.
pub(crate) fn decide(config: &mut Map<String, Json>, zero_cond_t: bool) {
    config.insert("zero_cond_t".to_owned(), zero_cond_t.into());
    config.insert(DECIDED.to_owned(), true.into());
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn dimensions_follow_from_the_tensors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("transformer.safetensors");
        let shapes: [(&str, &[usize]); 6] = [
            ("txt_norm.weight", &[24]),
            ("img_in.weight", &[256, 64]),
            ("txt_in.weight", &[256, 24]),
            ("proj_out.weight", &[64, 256]),
            ("transformer_blocks.0.attn.norm_q.weight", &[128]),
            ("transformer_blocks.2.attn.norm_q.weight", &[128]),
        ];
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap();
        let tensors: HashMap<_, _> = shapes
            .map(|(name, shape)| (format!("model.diffusion_model.{name}"), zeros(shape)))
            .into();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let header = Header::new(Checkpoint::open_file(&path).unwrap()).unwrap();
        let config = Json::Object(header.config().unwrap());
        for (field, number) in [
            ("in_channels", 64),
            ("out_channels", 16),
            ("num_layers", 3),
            ("num_attention_heads", 2),
            ("attention_head_dim", 128),
            ("joint_attention_dim", 24),
        ] {
            assert_eq!(config[field], number, "{field}");
        }
    }
}
