//! `adapter_config.json`: what the tensors of an adapter do not tell, checked.
//!
//! Follows `LoraConfig` in
//! <https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py>.

use std::fmt;

use fancy_regex::Regex;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};

use super::ModelFiles;
use crate::error::Result;

/// Upper end of a rank.
const RANK_MAX: u64 = 1 << 16;

/// Keys that say how the adapter was made, or which modules it has: its tensors tell that.
const IGNORED: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];
/// Values of `init_lora_weights` that leave the base weights as they are.
const INITS: &[&str] = &["gaussian", "eva", "orthogonal"];

/// The scale and the rank of each adapted matrix.
#[derive(Debug, Clone)]
pub(crate) struct AdapterConfig {
    rank: Patterns<usize>,
    alpha: Patterns<f64>,
    rank_stabilised: bool,
}

/// A number for all modules, and others for the modules whose names match.
#[derive(Debug, Clone)]
struct Patterns<T> {
    default: T,
    others: Vec<(Regex, T)>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    rank_pattern: Ordered,
    #[serde(default)]
    alpha_pattern: Ordered,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A JSON object in the order of its file: of patterns that match, the first one counts.
#[derive(Default)]
struct Ordered(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Entries)
    }
}

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Ordered;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("rank_pattern and alpha_pattern as objects of numbers")
    }

    fn visit_unit<E>(self) -> Result<Ordered, E> {
        Ok(Ordered::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Ordered(entries))
    }
}

impl AdapterConfig {
    /// Reads and checks `path`.
    ///
    /// # Errors
    /// A file of another kind, or a field that is missing, outside its range, or asks for
    /// arithmetic that is not done.
    pub(crate) fn load(files: &ModelFiles, path: &str) -> Result<Self> {
        Self::from_json(files, path, &files.read_text(path)?)
    }

    /// Checks `text`, which messages call `path`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub(super) fn from_json(files: &ModelFiles, path: &str, text: &str) -> Result<Self> {
        let raw: RawConfig = files.parse_json(path, text)?;
        let fields = Fields { files, path, map: raw.rest };
        fields.expect("peft_type", &["LORA"])?;
        fields.check_init()?;
        fields.check_neutral()?;
        Ok(Self {
            rank: Patterns {
                default: fields.rank("r", fields.map.get("r"))?,
                others: fields.patterns("rank_pattern", raw.rank_pattern, Fields::rank)?,
            },
            alpha: Patterns {
                default: fields.alpha("lora_alpha", fields.map.get("lora_alpha"))?,
                others: fields.patterns("alpha_pattern", raw.alpha_pattern, Fields::alpha)?,
            },
            rank_stabilised: fields.flag("use_rslora")?,
        })
    }

    /// Rank and scale of a module, by its name in the model that was trained.
    ///
    /// # Errors
    /// A pattern that takes too many steps to match.
    pub(crate) fn rank_and_scale(
        &self,
        files: &ModelFiles,
        path: &str,
        module: &str,
    ) -> Result<(usize, f64)> {
        let slow = |field: &'static str| {
            move |error: String| {
                let found = format!("{error} at {module}");
                files.config(path, field, found, "patterns that match in few steps")
            }
        };
        let rank = self.rank.of(module).map_err(slow("rank_pattern"))?;
        let alpha = self.alpha.of(module).map_err(slow("alpha_pattern"))?;
        #[expect(clippy::cast_precision_loss, reason = "a rank is at most RANK_MAX")]
        let divisor = rank as f64;
        Ok((rank, alpha / if self.rank_stabilised { divisor.sqrt() } else { divisor }))
    }
}

impl<T: Copy> Patterns<T> {
    /// The number of a module; the matcher's message where a pattern takes too many steps.
    fn of(&self, module: &str) -> Result<T, String> {
        for (pattern, value) in &self.others {
            if pattern.is_match(module).map_err(|error| error.to_string())? {
                return Ok(*value);
            }
        }
        Ok(self.default)
    }
}

/// The config's object, with what its errors need.
struct Fields<'a> {
    files: &'a ModelFiles,
    path: &'a str,
    map: Map<String, Value>,
}

impl Fields<'_> {
    fn fault(&self, field: &str, found: Option<&Value>, expected: &str) -> crate::Error {
        let found = found.map_or_else(|| "nothing".to_owned(), ToString::to_string);
        self.files.config(self.path, field, found, expected)
    }

    fn expect(&self, field: &str, expected: &[&str]) -> Result<()> {
        let found = self.map.get(field);
        match found.and_then(Value::as_str) {
            Some(text) if expected.contains(&text) => Ok(()),
            _ => Err(self.fault(field, found, &expected.join(" or "))),
        }
    }

    fn flag(&self, field: &str) -> Result<bool> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            found => Err(self.fault(field, found, "true or false")),
        }
    }

    fn rank(&self, field: &str, found: Option<&Value>) -> Result<usize> {
        let rank = found.and_then(Value::as_u64).filter(|rank| (1..=RANK_MAX).contains(rank));
        rank.and_then(|rank| usize::try_from(rank).ok()).ok_or_else(|| {
            self.fault(field, found, &format!("a whole number from 1 to {RANK_MAX}"))
        })
    }

    fn alpha(&self, field: &str, found: Option<&Value>) -> Result<f64> {
        let alpha = found.and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
        alpha.ok_or_else(|| self.fault(field, found, "a number"))
    }

    /// A pattern matches the end of a module's name, from a dot or from the name's start on.
    fn patterns<T>(
        &self,
        field: &str,
        entries: Ordered,
        read: impl Fn(&Self, &str, Option<&Value>) -> Result<T>,
    ) -> Result<Vec<(Regex, T)>> {
        let pattern = |(pattern, value): (String, Value)| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            let regex = regex.map_err(|error| {
                let found = format!("{pattern:?}: {error}");
                self.files.config(self.path, field, found, "a regular expression")
            })?;
            Ok((regex, read(self, &format!("{field}.{pattern}"), Some(&value))?))
        };
        entries.0.into_iter().map(pattern).collect()
    }

    /// Some ways to start training change the base weights, and the adapter counts on that.
    fn check_init(&self) -> Result<()> {
        match self.map.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Ok(()),
            Some(Value::String(init)) if INITS.contains(&init.as_str()) => Ok(()),
            found => {
                let expected = format!(
                    "true, false, {}: others change the base weights, convert the adapter first",
                    INITS.join(", ")
                );
                Err(self.fault("init_lora_weights", found, &expected))
            }
        }
    }

    /// Every other field must have the value that changes nothing.
    fn check_neutral(&self) -> Result<()> {
        const READ: &[&str] = &["peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"];
        for (field, value) in &self.map {
            let neutral = match value {
                Value::Null | Value::Bool(false) => true,
                Value::String(text) => field == "bias" && text == "none",
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Bool(true) | Value::Number(_) => false,
            };
            if !neutral && !READ.contains(&field.as_str()) && !IGNORED.contains(&field.as_str()) {
                let expected = match field.as_str() {
                    "bias" => "\"none\": only the low-rank change of matrices is computed",
                    _ => "null, false or empty: only plain low-rank adaptation is computed",
                };
                return Err(self.fault(field, Some(value), expected));
            }
        }
        Ok(())
    }
}
