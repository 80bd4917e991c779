//! The model's dimensions, read from `config.json` and checked before any weight is touched.

use serde_json::{Map, Value};

use super::config_keys as keys;
use crate::{
    error::{ModelError, Result},
    weights::ModelFiles,
};

/// The class name in `architectures` and the value of `model_type`.
const CLASS: &str = "Qwen2_5_VLForConditionalGeneration";
const MODEL_TYPE: &str = "qwen2_5_vl";
/// Upper end of any size in a config: keeps products of a few sizes far from overflow.
const SIZE_MAX: u64 = 1 << 24;
/// Upper end of a number of layers.
const LAYERS_MAX: u64 = 1 << 12;

/// What `config.json` says, checked.
///
/// Follows
/// <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_5_vl/configuration_qwen2_5_vl.py>.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The language model.
    pub text: TextConfig,
    /// The vision tower.
    pub vision: VisionConfig,
    /// The token that stands for one merged patch of a picture.
    pub image_token_id: u32,
    /// Tokens that end a generation, unless a generation config names others.
    pub eos_token_ids: Vec<u32>,
    /// Whether logits are computed with the embedding matrix.
    pub tie_word_embeddings: bool,
}

/// Dimensions of the language model.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How many frequencies each section has; section `i` turns with axis `i % 3` of the position.
    /// The sum is half of `head_dim`.
    pub mrope_section: Vec<usize>,
    /// Most tokens in a sequence.
    pub max_position_embeddings: usize,
}

/// Dimensions of the vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Number of blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head; a multiple of four.
    pub head_dim: usize,
    /// Colour channels of a patch.
    pub channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames in a patch; a still picture is repeated that often.
    pub temporal_patch_size: usize,
    /// Side of the square of patches that becomes one token.
    pub merge_size: usize,
    /// Side of an attention window in pixels.
    pub window_size: usize,
    /// Blocks that attend to the whole picture.
    pub full_attention_blocks: Vec<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

impl VisionConfig {
    /// Numbers in a patch.
    #[must_use]
    pub fn patch_dim(&self) -> usize {
        self.channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that become one token.
    #[must_use]
    pub fn merge_unit(&self) -> usize {
        self.merge_size * self.merge_size
    }

    /// Side of an attention window in tokens.
    #[must_use]
    #[expect(clippy::integer_division, reason = "the reference rounds a window down to tokens")]
    pub fn window_tokens(&self) -> usize {
        self.window_size / self.merge_size / self.patch_size
    }
}

impl Config {
    /// Reads and checks `path`, in the nested form or in the older flat one.
    ///
    /// # Errors
    /// A file of another model, a field that is missing or contradicts another, or a key that is
    /// not known to leave the arithmetic unchanged.
    pub fn load(files: &ModelFiles, path: &str) -> Result<Self> {
        let mut root: Map<String, Value> = files.read_json(path)?;
        check_class(files, path, &root)?;
        let vision = match root.remove("vision_config") {
            Some(Value::Object(vision)) => vision,
            _ => return Err(files.config(path, "vision_config", "nothing", "an object")),
        };
        let text = match root.remove("text_config") {
            Some(Value::Object(text)) => text,
            _ => keys::take_text(&mut root),
        };
        keys::check(files, path, "", &root, keys::ROOT)?;
        let top = Section { files, path, name: "", map: root };
        let text = Section { files, path, name: "text_config.", map: text };
        let vision = Section { files, path, name: "vision_config.", map: vision };
        let text_config = TextConfig::parse(&text)?;
        let vision_config = VisionConfig::parse(&vision, text_config.hidden_size)?;
        let image_token_id = top.token("image_token_id", text_config.vocab_size)?;
        let tie_word_embeddings =
            top.flag("tie_word_embeddings")? || text.flag("tie_word_embeddings")?;
        Ok(Self {
            image_token_id,
            eos_token_ids: text.tokens("eos_token_id")?,
            tie_word_embeddings,
            text: text_config,
            vision: vision_config,
        })
    }
}

fn check_class(files: &ModelFiles, path: &str, root: &Map<String, Value>) -> Result<()> {
    let kind = |found: &str| -> Result<()> {
        let (path, expected) = (files.describe(path), CLASS.to_owned());
        Err(ModelError::Kind { path, found: found.to_owned(), expected }.into())
    };
    let class = root.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let model_type = root.get("model_type").and_then(Value::as_str);
    match (class, model_type) {
        (Some(class), _) if class != CLASS => kind(class),
        (_, Some(other)) if other != MODEL_TYPE => kind(other),
        (None, None) => kind("(neither architectures nor model_type is given)"),
        _ => Ok(()),
    }
}

impl TextConfig {
    fn parse(section: &Section<'_>) -> Result<Self> {
        section.check_keys(keys::TEXT)?;
        section.expect_text("hidden_act", "silu")?;
        section.check_full_attention()?;
        let hidden_size = section.size("hidden_size")?;
        let heads = section.size("num_attention_heads")?;
        let kv_heads = section.size_or("num_key_value_heads", heads)?;
        let head_dim =
            section.quotient("hidden_size", hidden_size, "num_attention_heads", heads)?;
        section.quotient("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
        if section.size_or("head_dim", head_dim)? != head_dim {
            return Err(section.fault("head_dim", head_dim));
        }
        let (rope_theta, mrope_section) = section.text_rope(head_dim)?;
        Ok(Self {
            vocab_size: section.size("vocab_size")?,
            hidden_size,
            intermediate_size: section.size("intermediate_size")?,
            layers: section.size_up_to("num_hidden_layers", LAYERS_MAX)?,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: section.number_or("rms_norm_eps", 1e-5)?,
            rope_theta,
            mrope_section,
            max_position_embeddings: section.size_or("max_position_embeddings", 32_768)?,
        })
    }
}

impl VisionConfig {
    fn parse(section: &Section<'_>, text_hidden_size: usize) -> Result<Self> {
        section.check_keys(keys::VISION)?;
        section.expect_text("hidden_act", "silu")?;
        let hidden_size = section.size("hidden_size")?;
        let heads = section.size("num_heads")?;
        let head_dim = section.quotient("hidden_size", hidden_size, "num_heads", heads)?;
        section.quotient("head width", head_dim, "rotary axes × 2", 4)?;
        let config = Self {
            depth: section.size_up_to("depth", LAYERS_MAX)?,
            hidden_size,
            intermediate_size: section.size("intermediate_size")?,
            heads,
            head_dim,
            channels: section.size_or("in_channels", 3)?,
            patch_size: section.size_or("patch_size", 14)?,
            temporal_patch_size: section.size_or("temporal_patch_size", 2)?,
            merge_size: section.size_or("spatial_merge_size", 2)?,
            window_size: section.size_or("window_size", 112)?,
            full_attention_blocks: section.indexes("fullatt_block_indexes", &[7, 15, 23, 31])?,
            rope_theta: section.vision_rope()?,
        };
        if config.channels != 3 {
            return Err(section.fault("in_channels", "3: pictures are RGB"));
        }
        for (key, same) in [("in_chans", 3), ("spatial_patch_size", config.patch_size)] {
            if section.size_or(key, same)? != same {
                return Err(section.fault(key, same));
            }
        }
        if section.size_or("out_hidden_size", text_hidden_size)? != text_hidden_size {
            let expected = format!("{text_hidden_size}, the language model's hidden_size");
            return Err(section.fault("out_hidden_size", expected));
        }
        if config.window_tokens() == 0 {
            let token = config.patch_size * config.merge_size;
            return Err(section.fault("window_size", format!("at least one token of {token} px")));
        }
        Ok(config)
    }
}

/// One object of the config, with what its errors need.
struct Section<'a> {
    files: &'a ModelFiles,
    path: &'a str,
    /// Prefix of field names in messages.
    name: &'static str,
    map: Map<String, Value>,
}

impl Section<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The error for the value that `key` has.
    fn fault(&self, key: &str, expected: impl ToString) -> crate::Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        self.files.config(self.path, &format!("{}{key}", self.name), found, expected)
    }

    fn check_keys(&self, known: &[&str]) -> Result<()> {
        keys::check(self.files, self.path, self.name, &self.map, known)
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.size_up_to(key, SIZE_MAX)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_none() { Ok(default) } else { self.size(key) }
    }

    fn size_up_to(&self, key: &str, max: u64) -> Result<usize> {
        self.get(key)
            .and_then(Value::as_u64)
            .filter(|size| (1..=max).contains(size))
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| self.fault(key, format!("a whole number from 1 to {max}")))
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| self.fault(key, "a number above zero"))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.fault(key, "true or false")),
        }
    }

    fn expect_text(&self, key: &str, expected: &str) -> Result<()> {
        match self.get(key) {
            Some(found) if found != expected => Err(self.fault(key, expected)),
            _ => Ok(()),
        }
    }

    fn indexes(&self, key: &str, default: &[usize]) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else { return Ok(default.to_vec()) };
        whole_numbers(value).ok_or_else(|| self.fault(key, "a list of whole numbers"))
    }

    fn token(&self, key: &str, vocab_size: usize) -> Result<u32> {
        let id = self.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        id.filter(|id| (*id as usize) < vocab_size)
            .ok_or_else(|| self.fault(key, format!("a token below {vocab_size}")))
    }

    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        token_list(value).ok_or_else(|| self.fault(key, "a token or a list of tokens"))
    }

    /// `whole / parts`, which must be exact.
    fn quotient(&self, key: &str, whole: usize, divisor: &str, parts: usize) -> Result<usize> {
        match (whole.checked_rem(parts), whole.checked_div(parts)) {
            (Some(0), Some(quotient)) => Ok(quotient),
            _ => {
                let expected = format!("a multiple of {divisor} {parts}");
                Err(self.files.config(self.path, &format!("{}{key}", self.name), whole, expected))
            }
        }
    }

    /// Sliding-window layers are part of the config's vocabulary, but no published model has one.
    fn check_full_attention(&self) -> Result<()> {
        if let Some(types) = self.get("layer_types") {
            let full = |list: &Vec<Value>| list.iter().all(|kind| kind == "full_attention");
            return match types.as_array() {
                Some(list) if full(list) => Ok(()),
                _ => Err(self.fault("layer_types", "full_attention in every layer")),
            };
        }
        let layers = self.size_up_to("num_hidden_layers", LAYERS_MAX)?;
        let sliding = self.flag("use_sliding_window")? && self.get("sliding_window").is_some();
        let first_sliding = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(80);
        if sliding && first_sliding < layers as u64 {
            return Err(self.fault("use_sliding_window", "false"));
        }
        Ok(())
    }

    /// Base and sections of the language model's rotary embedding.
    fn text_rope(&self, head_dim: usize) -> Result<(f64, Vec<usize>)> {
        let key =
            if self.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
        let rope = match self.get(key) {
            None => Map::new(),
            Some(Value::Object(rope)) => rope.clone(),
            Some(_) => return Err(self.fault(key, "an object")),
        };
        let rope = Section { map: rope, name: "rope_parameters.", ..*self };
        rope.check_keys(keys::ROPE)?;
        for key in ["rope_type", "type"] {
            if rope.get(key).is_some_and(|kind| kind != "default" && kind != "mrope") {
                return Err(rope.fault(key, "default or mrope"));
            }
        }
        let theta = rope.number_or("rope_theta", self.number_or("rope_theta", 1e6)?)?;
        let sections = rope.indexes("mrope_section", &[16, 24, 24])?;
        let half: usize = sections.iter().fold(0, |sum, &n| sum.saturating_add(n));
        if half.saturating_mul(2) != head_dim {
            let expected = format!("sections that add up to half of the head width {head_dim}");
            let found = format!("{sections:?}");
            return Err(self.files.config(self.path, "mrope_section", found, expected));
        }
        Ok((theta, sections))
    }

    /// Base of the vision tower's rotary embedding.
    fn vision_rope(&self) -> Result<f64> {
        let rope = match self.get("rope_parameters") {
            None => return Ok(10_000.0),
            Some(Value::Object(rope)) => rope.clone(),
            Some(_) => return Err(self.fault("rope_parameters", "an object")),
        };
        let rope = Section { map: rope, name: "vision_config.rope_parameters.", ..*self };
        rope.check_keys(&["rope_theta", "rope_type"])?;
        rope.expect_text("rope_type", "axial")?;
        rope.number_or("rope_theta", 10_000.0)
    }
}

fn whole_numbers(value: &Value) -> Option<Vec<usize>> {
    let number = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
    value.as_array()?.iter().map(number).collect()
}

/// One token or a list of tokens.
pub(super) fn token_list(value: &Value) -> Option<Vec<u32>> {
    let token = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().map(token).collect(),
        single => Some(vec![token(single)?]),
    }
}
