//! Which pipeline a folder holds, and what is particular to it.

use serde::Deserialize;

use crate::{
    error::{ModelError, Result},
    weights::ModelFiles,
};

/// System prompt and frame of the user's turn; the template of every Qwen-Image-Edit pipeline.
///
/// Reference: <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/qwenimage/pipeline_qwenimage_edit.py>
const BEFORE_USER: &str = "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then explain how the user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n";
const AFTER_USER: &str = "<|im_end|>\n<|im_start|>assistant\n";
const PICTURE: &str = "<|vision_start|><|image_pad|><|vision_end|>";

/// The area that published checkpoints were trained at, in square pixels.
const AREA_PUBLISHED: u64 = 1024 * 1024;
/// The area at which [`Kind::Plus`] shows pictures to the vision-language model.
const VL_AREA_PLUS: u64 = 384 * 384;

/// Published checkpoints were trained on sentences.
const MERGE_PUBLISHED: &str = ". ";

/// The pipelines that are supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `QwenImageEditPipeline`: one picture.
    Edit,
    /// `QwenImageEditPlusPipeline`: several pictures (2509, and 2511 with `zero_cond_t`).
    Plus,
}

/// A pipeline and its defaults.
#[derive(Debug, Clone)]
pub(crate) struct Pipeline {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) area: u64,
    pub(crate) vl_area: u64,
    pub(crate) steps: usize,
    pub(crate) cfg_scale: f64,
    /// What stands between sub-requests in one prompt.
    pub(crate) merge: String,
    pub(crate) untrained: bool,
}

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
}

/// `pentimento.json`: what a pack of ours says beyond the published layout.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PackSettings {
    format: u32,
    name: String,
    area: Option<u64>,
    vl_area: Option<u64>,
    steps: Option<usize>,
    cfg_scale: Option<f64>,
    merge: Option<String>,
    #[serde(default)]
    untrained: bool,
}

impl Kind {
    /// The class name in model_index.json.
    #[must_use]
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Edit => "QwenImageEditPipeline",
            Self::Plus => "QwenImageEditPlusPipeline",
        }
    }
}

impl Pipeline {
    /// Reads model_index.json, and pentimento.json where there is one.
    pub(crate) fn read(files: &ModelFiles) -> Result<Self> {
        const INDEX: &str = "model_index.json";
        const SETTINGS: &str = "pentimento.json";
        let index: ModelIndex = files.read_json(INDEX)?;
        let class = index.class_name.unwrap_or_else(|| "(no _class_name)".to_owned());
        let kinds = [Kind::Edit, Kind::Plus];
        let Some(kind) = kinds.into_iter().find(|kind| kind.class_name() == class) else {
            let expected = kinds.map(Kind::class_name).join(", ");
            return Err(
                ModelError::Kind { path: files.describe(INDEX), found: class, expected }.into()
            );
        };
        let mut pipeline = Self::published(kind, files);
        if files.exists(SETTINGS) {
            let settings: PackSettings = files.read_json(SETTINGS)?;
            if settings.format != 1 {
                return Err(files.config(SETTINGS, "format", settings.format, 1));
            }
            pipeline.apply(settings);
        }
        Ok(pipeline)
    }

    fn published(kind: Kind, files: &ModelFiles) -> Self {
        let vl_area = match kind {
            Kind::Edit => AREA_PUBLISHED,
            Kind::Plus => VL_AREA_PLUS,
        };
        let (area, steps, cfg_scale, untrained) = (AREA_PUBLISHED, 50, 4.0, false);
        let merge = MERGE_PUBLISHED.to_owned();
        Self { kind, name: files.name(), area, vl_area, steps, cfg_scale, merge, untrained }
    }

    fn apply(&mut self, settings: PackSettings) {
        self.name = settings.name;
        self.area = settings.area.unwrap_or(self.area);
        self.vl_area = settings.vl_area.unwrap_or(self.vl_area);
        self.steps = settings.steps.unwrap_or(self.steps);
        self.cfg_scale = settings.cfg_scale.unwrap_or(self.cfg_scale);
        self.merge = settings.merge.unwrap_or_else(|| std::mem::take(&mut self.merge));
        self.untrained = settings.untrained;
    }

    /// The most pictures a request may hold.
    pub(crate) fn pictures_max(&self) -> usize {
        match self.kind {
            Kind::Edit => 1,
            Kind::Plus => 16,
        }
    }

    /// What the vision-language model reads, with one placeholder for each picture.
    pub(crate) fn text(&self, prompt: &str, pictures: usize) -> String {
        let mut text = String::from(BEFORE_USER);
        for number in 1..=pictures {
            if self.kind == Kind::Plus {
                text.push_str(&format!("Picture {number}: "));
            }
            text.push_str(PICTURE);
        }
        text + prompt + AFTER_USER
    }

    /// Tokens at the start of the hidden states that are not part of the conditioning.
    pub(crate) const TOKENS_DROPPED: usize = 64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_numbered_only_where_the_model_was_trained_so() {
        let files = ModelFiles::Embedded { name: "test", files: &[] };
        let edit = Pipeline::published(Kind::Edit, &files).text("do it", 1);
        assert!(
            edit.contains("user\n<|vision_start|><|image_pad|><|vision_end|>do it<|im_end|>"),
            "{edit}"
        );
        let plus = Pipeline::published(Kind::Plus, &files).text("do it", 2);
        assert!(
            plus.contains(
                "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|>"
            ),
            "{plus}"
        );
    }
}
