//! A low-rank adapter of the language model, as `peft` saves it: switched on call by call.

use std::collections::BTreeMap;

use super::config::TextConfig;
use crate::{
    error::{Error, ModelError, Result},
    layers::LowRank,
    progress::CancelToken,
    weights::{AdapterConfig, Checkpoint, ModelFiles, Precision, Weights},
};

/// What `peft` puts before every name of the model.
const PREFIX: &str = "base_model.model.";
/// Where the decoder's layers are in the models that adapters are trained on.
const LAYERS: &[&str] =
    &["model.layers.", "model.language_model.layers.", "language_model.model.layers."];
/// Where the vision tower is.
const VISION: &[&str] = &["visual.", "model.visual."];
/// The two factors of a matrix's change, in the spellings of files and of states in memory.
const FACTORS: &[[&str; 2]] = &[["lora_A", "lora_B"], ["lora_A.default", "lora_B.default"]];
const STEM: &str = "adapter_model";

/// How one call of the model runs.
///
/// A [`CancelToken`] alone stands for a call of the plain model.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The adapter of the language model; `None` computes with the plain model, bit for bit.
    pub adapter: Option<&'a Adapter>,
    /// Stops the call.
    pub cancel: &'a CancelToken,
}

impl<'a> From<&'a CancelToken> for Call<'a> {
    fn from(cancel: &'a CancelToken) -> Self {
        Self { adapter: None, cancel }
    }
}

/// A low-rank adapter of the language model.
///
/// It changes what a layer's matrix makes of `x` to `W x + scale · B A x`. `W` is shared with the
/// plain model and may be quantized; nothing is merged into it.
#[derive(Debug, Clone)]
pub struct Adapter {
    text: TextConfig,
    layers: Vec<LayerAdapter>,
}

/// The changes of one layer's matrices, where there are any.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerAdapter {
    pub(super) q_proj: Option<LowRank>,
    pub(super) k_proj: Option<LowRank>,
    pub(super) v_proj: Option<LowRank>,
    pub(super) o_proj: Option<LowRank>,
    pub(super) gate_proj: Option<LowRank>,
    pub(super) up_proj: Option<LowRank>,
    pub(super) down_proj: Option<LowRank>,
}

/// The matrices of a layer, below its name.
const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl Adapter {
    /// Reads `adapter_config.json` and `adapter_model.safetensors` in `folder` (`.` where they are
    /// at the top) for a language model of these dimensions.
    ///
    /// # Errors
    /// Files that are missing or damaged, settings that ask for more than a low-rank change of the
    /// decoder's matrices, and tensors that do not belong to them or have another shape.
    pub fn load(
        files: &ModelFiles,
        folder: &str,
        text: &TextConfig,
        precision: &Precision,
    ) -> Result<Self> {
        let config_path = format!("{folder}/adapter_config.json");
        if !files.exists(&config_path) {
            return Err(missing(files, &config_path, "the adapter's settings"));
        }
        let config = AdapterConfig::load(files, &config_path)?;
        let weights_path = format!("{folder}/{STEM}.safetensors");
        if !files.exists(&weights_path) {
            return Err(missing(files, &weights_path, "the adapter's tensors"));
        }
        let checkpoint = files.checkpoint(folder, STEM)?;
        check_tower(&checkpoint)?;
        let places = places(&checkpoint);
        let weights = Weights::new(checkpoint, precision.clone());
        let mut layers = vec![LayerAdapter::default(); text.layers];
        for (&(layer, module), &(ref path, factors)) in &places {
            let Some(layer) = layers.get_mut(layer) else { continue };
            let name = path.strip_prefix(PREFIX).unwrap_or(path);
            let (rank, scale) = config.rank_and_scale(files, &config_path, name)?;
            let (place, widths) = layer.place(module, text);
            *place = Some(LowRank::load(&weights.pp(path), factors, widths, rank, scale)?);
        }
        weights.finish(&[])?;
        if places.is_empty() {
            let expected = format!("{PREFIX}{}0.{}.lora_A.weight …", LAYERS[1], MODULES[0]);
            return Err(files.corrupt(&weights_path, "no tensors", &expected));
        }
        Ok(Self { text: text.clone(), layers })
    }

    /// How many matrices it changes.
    #[must_use]
    pub fn matrices(&self) -> usize {
        self.layers.iter().map(LayerAdapter::matrices).sum()
    }

    /// The changes of a layer, for a language model of these dimensions.
    pub(super) fn check(&self, text: &TextConfig) -> Result<&[LayerAdapter]> {
        if self.text == *text {
            return Ok(&self.layers);
        }
        let sizes =
            |text: &TextConfig| format!("{} layers of width {}", text.layers, text.hidden_size);
        let expected = format!("one that was loaded for this model of {}", sizes(text));
        Err(Error::field("adapter", format!("for {}", sizes(&self.text)), expected))
    }
}

impl LayerAdapter {
    /// The place of a module's change, and the module's widths `[out, in]`.
    fn place(&mut self, module: usize, text: &TextConfig) -> (&mut Option<LowRank>, [usize; 2]) {
        let (width, inner) = (text.hidden_size, text.intermediate_size);
        let kv_width = text.kv_heads * text.head_dim;
        match module {
            0 => (&mut self.q_proj, [width, width]),
            1 => (&mut self.k_proj, [kv_width, width]),
            2 => (&mut self.v_proj, [kv_width, width]),
            3 => (&mut self.o_proj, [width, width]),
            4 => (&mut self.gate_proj, [inner, width]),
            5 => (&mut self.up_proj, [inner, width]),
            _ => (&mut self.down_proj, [width, inner]),
        }
    }

    fn matrices(&self) -> usize {
        let attention = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        let mlp = [&self.gate_proj, &self.up_proj, &self.down_proj];
        attention.into_iter().chain(mlp).flatten().count()
    }
}

/// The file's name of each adapted module, by layer and position in [`MODULES`], and how its two
/// factors are called. Names that are no factor of a module stay unread.
fn places(checkpoint: &Checkpoint) -> BTreeMap<(usize, usize), (String, [&'static str; 2])> {
    let mut places = BTreeMap::new();
    for (name, _) in checkpoint.tensors() {
        let Some((layer, module, path, factors)) = place(name) else { continue };
        places.entry((layer, module)).or_insert_with(|| (path.to_owned(), factors));
    }
    places
}

/// Layer, position in [`MODULES`], path and factors of a tensor's name.
fn place(name: &str) -> Option<(usize, usize, &str, [&'static str; 2])> {
    let stem = name.strip_suffix(".weight")?;
    let (path, factors) = FACTORS.iter().find_map(|factors| {
        let path = factors.iter().find_map(|factor| stem.strip_suffix(factor))?;
        Some((path.strip_suffix('.')?, *factors))
    })?;
    let inside = path.strip_prefix(PREFIX)?;
    let inside = LAYERS.iter().find_map(|start| inside.strip_prefix(start))?;
    let (layer, module) = inside.split_once('.')?;
    let module = MODULES.iter().position(|known| *known == module)?;
    Some((layer.parse().ok()?, module, path, factors))
}

/// The vision tower's output is computed once and serves every role of the model.
fn check_tower(checkpoint: &Checkpoint) -> Result<()> {
    let of_tower = |name: &str| {
        let inside = name.strip_prefix(PREFIX).unwrap_or(name);
        VISION.iter().any(|start| inside.starts_with(start))
    };
    let Some((name, _)) = checkpoint.tensors().find(|(name, _)| of_tower(name)) else {
        return Ok(());
    };
    Err(ModelError::Corrupt {
        path: checkpoint.name().to_owned(),
        found: format!("tensor {name}, which adapts the vision tower"),
        expected:
            "tensors of the language model only: the vision tower's output is shared between \
                   roles"
                .to_owned(),
        hint: "name the modules to train by a pattern such as \
               .*language_model.*\\.(q|k|v|o|gate|up|down)_proj"
            .to_owned(),
    }
    .into())
}

fn missing(files: &ModelFiles, path: &str, what: &str) -> Error {
    ModelError::Missing {
        path: files.describe(path),
        what: what.to_owned(),
        hint: "an adapter is a folder as peft saves it: adapter_config.json and \
               adapter_model.safetensors"
            .to_owned(),
    }
    .into()
}
