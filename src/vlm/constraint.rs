//! Answers that cannot leave a grammar: llguidance says which tokens may come next.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie},
};

use super::{
    positions::small,
    tokenizer::{Piece, Tokenizer},
};
use crate::error::{Error, Result};

/// A model's tokens as the grammar sees them: the bytes of each.
pub(super) struct Vocabulary {
    factory: ParserFactory,
}

/// What an answer may be, and how far it has come. Used for one answer.
pub struct Constraint {
    matcher: Matcher,
}

impl Vocabulary {
    /// `size` is the number of logits, which may be more than there are tokens.
    pub(super) fn new(tokenizer: &Tokenizer, size: usize, stop_tokens: &[u32]) -> Result<Self> {
        let words: Vec<Vec<u8>> = tokenizer
            .pieces(small(size))
            .into_iter()
            .map(|piece| match piece {
                Piece::Text(bytes) => bytes,
                Piece::Special(name) => {
                    std::iter::once(TokTrie::SPECIAL_TOKEN_MARKER).chain(name).collect()
                }
            })
            .collect();
        let Some(&first_stop) = stop_tokens.first() else {
            return Err(Error::field("stop tokens", "none", "a token that ends an answer"));
        };
        let trie = TokTrie::from(&TokRxInfo::new(small(size), first_stop), &words);
        let trie = trie.with_eos_tokens(stop_tokens);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(refused)?;
        factory.quiet();
        Ok(Self { factory })
    }

    pub(super) fn constraint(&self, grammar: &str) -> Result<Constraint> {
        let grammar = TopLevelGrammar::from_lark(grammar.to_owned());
        let parser = self.factory.create_parser(grammar).map_err(refused)?;
        Ok(Constraint { matcher: Matcher::new(Ok(parser)) })
    }
}

impl Constraint {
    /// The tokens that may come next. The tokens that end an answer are among them wherever what
    /// has been written is a whole answer.
    ///
    /// # Errors
    /// A grammar too large to follow.
    pub fn allowed(&mut self) -> Result<Allowed> {
        Ok(Allowed(self.matcher.compute_mask_or_eos().map_err(refused)?))
    }

    /// Takes the next token of the answer.
    ///
    /// # Errors
    /// A token that was not allowed.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(refused)
    }

    /// Whether the answer is whole and nothing may follow.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

/// Tokens that may come next.
#[derive(Debug, Clone)]
pub struct Allowed(SimpleVob);

impl Allowed {
    #[cfg(test)]
    pub(super) fn of(tokens: &[u32], size: usize) -> Self {
        let mut allowed = SimpleVob::alloc(size);
        tokens.iter().for_each(|token| allowed.allow_token(*token));
        Self(allowed)
    }

    /// Whether this token may come next.
    #[must_use]
    pub fn contains(&self, token: u32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }

    /// Which of 32 tokens from `32 · at` on may come next, the first one's bit lowest.
    pub(super) fn word(&self, at: usize) -> u32 {
        let word = self.0.as_slice().get(at).copied().unwrap_or(0);
        match self.0.len().saturating_sub(32 * at) {
            left @ 0..32 => word & ((1 << left) - 1),
            _ => word,
        }
    }

    /// Gives every other token's logit a value.
    pub(super) fn forbid_others(&self, logits: &mut [f32], value: f32) {
        for (at, logits) in logits.chunks_mut(32).enumerate() {
            // Most words allow all of their tokens or none.
            match self.word(at) {
                u32::MAX => {}
                0 => logits.fill(value),
                word => {
                    let forbidden = |bit: &usize| word >> bit & 1 == 0;
                    for bit in (0..logits.len()).filter(forbidden) {
                        logits[bit] = value;
                    }
                }
            }
        }
    }

    /// The tokens, in their order.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        self.0.iter()
    }
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::field("grammar", error, "a grammar that the answer can follow")
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}
