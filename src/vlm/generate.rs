//! Answers, token by token.

use serde_json::{Map, Value};

use super::{
    config::{Config, token_list},
    sampling::{Sampler, Sampling},
};
use crate::{
    error::{Error, Result},
    weights::ModelFiles,
};

/// Tokens of an answer unless a caller asks otherwise.
const MAX_NEW_TOKENS: usize = 512;
/// The reference's default when a generation config samples without saying how.
const TOP_K: usize = 50;

/// Settings of text generation that would change the answer and are not computed, each with the
/// value that changes nothing.
const NEUTRAL: &[(&str, f64)] = &[
    ("diversity_penalty", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("min_length", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beam_groups", 1.0),
    ("num_beams", 1.0),
    ("typical_p", 1.0),
];

/// How an answer is generated.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Divides the positive logits of tokens seen before and multiplies the negative ones; 1 for
    /// none.
    pub repetition_penalty: f32,
    /// Seed of random sampling.
    pub seed: u64,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<u32>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// The limit of new tokens, or of the model's positions, was reached.
    Length,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Its tokens, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Its text, without special tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

impl GenerateOptions {
    /// The defaults of a model: `generation_config.json` in `folder` where it is there, otherwise
    /// greedy until the config's end tokens.
    ///
    /// # Errors
    /// A setting outside its range, or one that is not computed.
    pub fn load(files: &ModelFiles, folder: &str, config: &Config) -> Result<Self> {
        let mut options = Self {
            max_new_tokens: MAX_NEW_TOKENS,
            sampling: Sampling::Greedy,
            repetition_penalty: 1.0,
            seed: 0,
            stop_tokens: config.eos_token_ids.clone(),
        };
        let path = format!("{folder}/generation_config.json");
        if !files.exists(&path) {
            return Ok(options);
        }
        let map: Map<String, Value> = files.read_json(&path)?;
        let file = Settings { files, path: &path, map };
        for (key, neutral) in NEUTRAL {
            file.number(key, *neutral, *neutral..=*neutral)?;
        }
        options.repetition_penalty =
            file.number("repetition_penalty", 1.0, f64::MIN_POSITIVE..=1e6)?;
        if file.map.get("do_sample").is_some_and(|flag| flag == true) {
            options.sampling = file.sampling()?;
        }
        if let Some(value) = file.get("eos_token_id") {
            let tokens = token_list(value);
            options.stop_tokens = tokens.ok_or_else(|| file.fault("eos_token_id", "token ids"))?;
        }
        if let Some(value) = file.get("max_new_tokens") {
            let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
            let fault = || file.fault("max_new_tokens", "a whole number above zero");
            options.max_new_tokens = count.filter(|count| *count > 0).ok_or_else(fault)?;
        }
        Ok(options)
    }

    pub(super) fn sampler(&self) -> Result<Sampler> {
        if self.max_new_tokens == 0 {
            return Err(Error::field("max-tokens", 0, "at least 1"));
        }
        Sampler::new(self.sampling, self.repetition_penalty, self.seed)
    }
}

struct Settings<'a> {
    files: &'a ModelFiles,
    path: &'a str,
    map: Map<String, Value>,
}

impl Settings<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn sampling(&self) -> Result<Sampling> {
        let top_k = match self.get("top_k") {
            None => Some(TOP_K),
            Some(value) => {
                let whole = value.as_u64().and_then(|k| usize::try_from(k).ok());
                let k = whole.ok_or_else(|| self.fault("top_k", "a whole number"))?;
                (k > 0).then_some(k)
            }
        };
        Ok(Sampling::Random {
            temperature: self.number("temperature", 1.0, f64::MIN_POSITIVE..=1e6)?,
            top_k,
            top_p: self.number("top_p", 1.0, 0.0..=1.0)?,
        })
    }

    fn number(&self, key: &str, default: f64, range: std::ops::RangeInclusive<f64>) -> Result<f32> {
        let number = self.get(key).map_or(Some(default), Value::as_f64);
        match number.filter(|number| range.contains(number)) {
            #[expect(clippy::cast_possible_truncation, reason = "logits are f32")]
            Some(number) => Ok(number as f32),
            None => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(self.fault(key, &expected))
            }
        }
    }

    fn fault(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        self.files.config(self.path, key, found, expected)
    }
}
