//! Text to tokens and back: byte-level BPE of the Qwen2 family.

use std::collections::BTreeMap;

use serde::Deserialize;
use tokenizers::{
    AddedToken, NormalizerWrapper, SplitDelimiterBehavior, Tokenizer as Bpe,
    decoders::byte_level::ByteLevel,
    models::bpe::BPE,
    normalizers::unicode::NFC,
    pre_tokenizers::{
        PreTokenizerWrapper,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::{
    error::{Error, Result},
    weights::ModelFiles,
};

/// How the Qwen2 tokenizer splits text before merging bytes:
/// <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2/tokenization_qwen2.py>.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Longest text that is looked at, in bytes.
const TEXT_BYTES_MAX: usize = 4 << 20;
/// What stands for bytes that are not UTF-8 (yet).
const REPLACEMENT: char = '\u{fffd}';

/// What a token stands for, as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// A piece of text, which need not be whole characters.
    Text(Vec<u8>),
    /// A token that is not text, as it is written.
    Special(Vec<u8>),
}

/// A vocabulary with its merges and special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer(Bpe);

/// An entry of `added_tokens_decoder` in `tokenizer_config.json`.
#[derive(Deserialize)]
struct AddedEntry {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, AddedEntry>,
}

/// Parts of `tokenizer.json` that the tokenizers crate panics on where they are no sound JSON, so
/// that they are looked at before; the rest of the file is checked for its syntax along the way.
#[derive(Deserialize)]
struct CheckedParts {
    #[serde(default, rename = "normalizer")]
    _normalizer: serde_json::Value,
    #[serde(default, rename = "pre_tokenizer")]
    _pre_tokenizer: serde_json::Value,
    #[serde(default, rename = "post_processor")]
    _post_processor: serde_json::Value,
    #[serde(default, rename = "decoder")]
    _decoder: serde_json::Value,
}

impl Tokenizer {
    /// Reads `tokenizer.json` from the first of `folders` that has one; otherwise `vocab.json`,
    /// `merges.txt` and the added tokens beside them.
    ///
    /// # Errors
    /// No tokenizer in any folder, or files that are damaged or contradict each other.
    pub fn load(files: &ModelFiles, folders: &[&str]) -> Result<Self> {
        for folder in folders {
            let path = format!("{folder}/tokenizer.json");
            if files.exists(&path) {
                return Self::from_json(files, &path);
            }
        }
        for folder in folders {
            if files.exists(&format!("{folder}/vocab.json")) {
                return Self::from_vocabulary(files, folder);
            }
        }
        let folder = folders.first().copied().unwrap_or("tokenizer");
        Err(files.missing(&format!("{folder}/tokenizer.json")))
    }

    fn from_json(files: &ModelFiles, path: &str) -> Result<Self> {
        let text = files.read_text(path)?;
        let _: CheckedParts = files.read_json(path)?;
        let mut bpe = Bpe::from_bytes(text.as_bytes())
            .map_err(|error| files.corrupt(path, &error.to_string(), "a tokenizer"))?;
        bpe.with_padding(None);
        bpe.with_truncation(None)
            .map_err(|error| files.corrupt(path, &error.to_string(), "a tokenizer"))?;
        Ok(Self(bpe))
    }

    fn from_vocabulary(files: &ModelFiles, folder: &str) -> Result<Self> {
        let vocab_path = format!("{folder}/vocab.json");
        let merges_path = format!("{folder}/merges.txt");
        let mut vocab: BTreeMap<String, u32> = files.read_json(&vocab_path)?;
        let merges = merges(files, &merges_path)?;
        let added = added_tokens(files, folder)?;
        for (id, token) in &added {
            if let Some(other) = vocab.insert(token.content.clone(), *id)
                && other != *id
            {
                let found = format!("token {:?} with id {id} and {other}", token.content);
                return Err(files.corrupt(&vocab_path, &found, "one id for each token"));
            }
        }
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .build()
            .map_err(|error| {
                files.corrupt(&merges_path, &error.to_string(), "merges of vocab.json")
            })?;
        let mut tokenizer = Bpe::new(bpe);
        let failed = |error: &dyn std::fmt::Display| {
            files.corrupt(&vocab_path, &error.to_string(), "a Qwen2 vocabulary")
        };
        let split = Split::new(
            SplitPattern::Regex(SPLIT.to_owned()),
            SplitDelimiterBehavior::Isolated,
            false,
        )
        .map_err(|error| failed(&error))?;
        let bytes = ByteLevel::new(false, true, false);
        tokenizer
            .with_normalizer(Some(NormalizerWrapper::from(NFC)))
            .with_pre_tokenizer(Some(Sequence::new(vec![
                PreTokenizerWrapper::from(split),
                PreTokenizerWrapper::from(bytes),
            ])))
            .with_decoder(Some(ByteLevel::default()));
        let (special, plain): (Vec<_>, Vec<_>) =
            added.into_values().partition(|token| token.special);
        tokenizer.add_special_tokens(&special);
        tokenizer.add_tokens(&plain);
        Ok(Self(tokenizer))
    }

    /// The id of a token, given as it is written.
    #[must_use]
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    /// What each of the first `count` ids stands for; nothing for an id without a token.
    pub(super) fn pieces(&self, count: u32) -> Vec<Piece> {
        let added = self.0.get_added_tokens_decoder();
        let bytes = bytes_by_character();
        let piece = |id| {
            if let Some(token) = added.get(&id) {
                let content = token.content.clone().into_bytes();
                return if token.special { Piece::Special(content) } else { Piece::Text(content) };
            }
            let written = self.0.id_to_token(id).unwrap_or_default();
            let text: Option<Vec<u8>> = written.chars().map(|c| bytes.get(&c).copied()).collect();
            Piece::Text(text.unwrap_or_default())
        };
        (0..count).map(piece).collect()
    }

    /// One more than the largest id.
    #[must_use]
    pub fn id_end(&self) -> u32 {
        self.0.get_vocab(true).values().max().map_or(0, |id| id + 1)
    }

    /// Tokens of `text`; special tokens are recognised where they are written out.
    ///
    /// # Errors
    /// A text that is too long to look at.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() > TEXT_BYTES_MAX {
            let expected = format!("at most {TEXT_BYTES_MAX} bytes");
            return Err(Error::field("prompt", format!("{} bytes", text.len()), expected));
        }
        let encoding = self
            .0
            .encode_fast(text, true)
            .map_err(|error| Error::field("prompt", error, "a text that can be tokenized"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `tokens` without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// Never for tokens of this vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = self.0.decode(tokens, true);
        text.map_err(|error| Error::field("tokens", error, "tokens of this vocabulary"))
    }

    /// Turns tokens into text one by one.
    #[must_use]
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, pending: Vec::new() }
    }
}

/// Text that grows token by token; a character is handed out when its last byte has come.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u32>,
}

impl TextStream<'_> {
    /// The text that `token` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.pending.push(token);
        let text = self.tokenizer.decode(&self.pending)?;
        if text.ends_with(REPLACEMENT) {
            return Ok(String::new());
        }
        self.pending.clear();
        Ok(text)
    }

    /// What is left at the end: nothing, or U+FFFD for a character that was cut off.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.tokenizer.decode(&self.pending)
    }
}

/// The byte that each character of a byte-level vocabulary stands for: printable Latin-1 characters
/// stand for themselves, the other bytes follow from U+0100 on.
fn bytes_by_character() -> BTreeMap<char, u8> {
    let plain = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (plain, other): (Vec<u8>, Vec<u8>) = (0..=u8::MAX).partition(plain);
    let later = ('\u{100}'..).zip(other);
    plain.into_iter().map(|byte| (char::from(byte), byte)).chain(later).collect()
}

/// A vocabulary, its merges as they are written, and its added tokens, with whether they are special.
pub(super) type Vocabulary = (BTreeMap<String, u32>, Vec<String>, BTreeMap<u32, (String, bool)>);

/// What `vocab.json`, `merges.txt` and the files beside them say, in the first of `folders` that has
/// them.
///
/// # Errors
/// No such files, or files that are damaged.
pub(super) fn vocabulary_files(files: &ModelFiles, folders: &[&str]) -> Result<Vocabulary> {
    let has = |folder: &&&str| files.exists(&format!("{folder}/vocab.json"));
    let Some(folder) = folders.iter().find(has) else {
        return Err(files.missing("tokenizer/tokenizer.json"));
    };
    let vocabulary = files.read_json(&format!("{folder}/vocab.json"))?;
    let merges = merges(files, &format!("{folder}/merges.txt"))?.into_iter();
    let merges = merges.map(|(left, right)| format!("{left} {right}")).collect();
    let added = added_tokens(files, folder)?.into_iter();
    let added = added.map(|(id, token)| (id, (token.content, token.special))).collect();
    Ok((vocabulary, merges, added))
}

/// `merges.txt`: a pair of tokens on each line.
fn merges(files: &ModelFiles, path: &str) -> Result<Vec<(String, String)>> {
    let text = files.read_text(path)?;
    let mut merges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() || (index == 0 && line.starts_with("#version")) {
            continue;
        }
        match line.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => {
                merges.push((left.to_owned(), right.to_owned()));
            }
            _ => {
                let found = format!("line {}: {line:?}", index + 1);
                return Err(files.corrupt(path, &found, "two tokens on each line"));
            }
        }
    }
    Ok(merges)
}

/// Added tokens by id: from `added_tokens.json`, and with their properties from
/// `tokenizer_config.json`, which counts where both have one.
fn added_tokens(files: &ModelFiles, folder: &str) -> Result<BTreeMap<u32, AddedToken>> {
    let mut added = BTreeMap::new();
    let path = format!("{folder}/added_tokens.json");
    if files.exists(&path) {
        let tokens: BTreeMap<String, u32> = files.read_json(&path)?;
        let token = |(content, id)| (id, AddedToken::from(content, true).normalized(false));
        added.extend(tokens.into_iter().map(token));
    }
    let path = format!("{folder}/tokenizer_config.json");
    if files.exists(&path) {
        let config: TokenizerConfig = files.read_json(&path)?;
        for (id, entry) in config.added_tokens_decoder {
            let token = AddedToken::from(entry.content, entry.special)
                .lstrip(entry.lstrip)
                .rstrip(entry.rstrip)
                .single_word(entry.single_word)
                .normalized(entry.normalized);
            added.insert(id, token);
        }
    }
    Ok(added)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let bytes = bytes_by_character();
        assert_eq!(bytes.len(), 256);
        assert_eq!((bytes[&'A'], bytes[&'Ġ'], bytes[&'Ċ']), (b'A', b' ', b'\n'));
        assert_eq!(bytes[&'\u{143}'], 0xad); // the last of those that follow
    }
}
