//! How the next token is chosen from its logits.
//!
//! Follows
//! <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/generation/logits_process.py>
//! in arithmetic and order: repetition penalty, temperature, top-k, top-p.

use rand_mt::Mt64;

use super::constraint::Allowed;
use crate::error::{Error, Result};

/// The logit of a token that may not come next: finite, and without a share in any sum.
const FORBIDDEN: f32 = -1e30;

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The likeliest token; the first of several that are equally likely.
    Greedy,
    /// A random token, drawn by probability.
    Random {
        /// Divides the logits: above 1 flatter, below 1 sharper. Above zero.
        temperature: f32,
        /// Only this many of the likeliest tokens can be drawn; `None` for all.
        top_k: Option<usize>,
        /// Only the likeliest tokens whose probabilities add up to this share can be drawn; 1 for
        /// all.
        top_p: f32,
    },
}

impl Sampling {
    /// # Errors
    /// A number outside its range.
    pub fn check(self) -> Result<()> {
        let Self::Random { temperature, top_k, top_p } = self else { return Ok(()) };
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::field("temperature", temperature, "a number above zero"));
        }
        if top_k == Some(0) {
            return Err(Error::field("top_k", 0, "at least 1"));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(Error::field("top_p", top_p, "a share from 0 to 1"));
        }
        Ok(())
    }
}

/// Chooses tokens, one after the other.
#[derive(Debug)]
pub(super) struct Sampler {
    sampling: Sampling,
    repetition_penalty: f32,
    random: Mt64,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling, repetition_penalty: f32, seed: u64) -> Result<Self> {
        sampling.check()?;
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            let expected = "a number above zero";
            return Err(Error::field("repetition_penalty", repetition_penalty, expected));
        }
        Ok(Self { sampling, repetition_penalty, random: Mt64::new(seed) })
    }

    /// The next token after `seen` (prompt and answer so far), one of the `allowed` ones.
    pub(super) fn choose(
        &mut self,
        mut logits: Vec<f32>,
        seen: &[u32],
        allowed: Option<&Allowed>,
    ) -> Result<u32> {
        let count = logits.iter().filter(|logit| !logit.is_finite()).count();
        if count > 0 {
            let hint = "the weights may be damaged, or too large for this type; try --dtype f32";
            return Err(Error::NotFinite { stage: "logits", count, total: logits.len(), hint });
        }
        penalize(&mut logits, seen, self.repetition_penalty);
        if let Some(allowed) = allowed {
            allowed.forbid_others(&mut logits, FORBIDDEN);
        }
        let token = match self.sampling {
            Sampling::Greedy => likeliest(&logits),
            Sampling::Random { temperature, top_k, top_p } => {
                let candidates = candidates(&logits, temperature, top_k, top_p);
                draw(&candidates, self.share())
            }
        };
        Ok(super::positions::small(token))
    }

    /// A random number in `[0, 1)` with 53 bits.
    fn share(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in f64")]
        let bits = (self.random.next_u64() >> 11) as f64;
        bits / (1_u64 << 53) as f64
    }
}

/// Makes tokens that were seen less likely, each once.
fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    #[expect(clippy::float_cmp, reason = "exactly one means no penalty")]
    if penalty == 1.0 {
        return;
    }
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

/// The largest logit's token, the first of equals. Whole chunks are compared at once, for this runs on all
/// of the vocabulary for every token.
fn likeliest(logits: &[f32]) -> usize {
    const LANES: usize = 32;
    let mut largest = [f32::NEG_INFINITY; LANES];
    for chunk in logits.chunks(LANES) {
        for (largest, logit) in largest.iter_mut().zip(chunk) {
            *largest = if *logit > *largest { *logit } else { *largest };
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit >= largest).unwrap_or(0)
}

/// Tokens that can be drawn and their probabilities (not yet adding up to one), likeliest first.
fn candidates(
    logits: &[f32],
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
) -> Vec<(usize, f64)> {
    let mut ranked: Vec<(usize, f64)> =
        logits.iter().map(|logit| f64::from(logit / temperature)).enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    if let Some(last) = top_k.and_then(|k| ranked.get(k.saturating_sub(1))).map(|last| last.1) {
        ranked.retain(|candidate| candidate.1 >= last);
    }
    let max = ranked.first().map_or(0.0, |first| first.1);
    for candidate in &mut ranked {
        candidate.1 = (candidate.1 - max).exp();
    }
    let total: f64 = ranked.iter().map(|candidate| candidate.1).sum();
    // A token goes when it and all less likely ones together have at most `1 - top_p`.
    let mut rest = total;
    let mut keep = 0;
    while keep < ranked.len() && (keep == 0 || rest > (1.0 - f64::from(top_p)) * total) {
        rest -= ranked[keep].1;
        keep += 1;
    }
    ranked.truncate(keep);
    ranked
}

/// The token at `share` of the total probability.
fn draw(candidates: &[(usize, f64)], share: f64) -> usize {
    let total: f64 = candidates.iter().map(|candidate| candidate.1).sum();
    let mut left = share * total;
    for (token, probability) in candidates {
        left -= probability;
        if left < 0.0 {
            return *token;
        }
    }
    candidates.last().map_or(0, |last| last.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 0.0];

    fn tokens(top_k: Option<usize>, top_p: f32) -> Vec<usize> {
        candidates(&LOGITS, 1.0, top_k, top_p).into_iter().map(|(token, _)| token).collect()
    }

    #[test]
    fn candidates_are_limited_by_rank_and_share() {
        assert_eq!(tokens(None, 1.0), [1, 2, 0, 3]);
        assert_eq!(tokens(Some(2), 1.0), [1, 2]);
        assert_eq!(tokens(None, 0.0), [1]);
        // Probabilities are 0.64, 0.24, 0.09 and 0.03.
        assert_eq!(tokens(None, 0.6), [1]);
        assert_eq!(tokens(None, 0.8), [1, 2]);
        assert_eq!(tokens(None, 0.95), [1, 2, 0]);
    }

    #[test]
    fn a_penalty_lowers_seen_tokens_once() {
        let mut logits = vec![2.0, -2.0, 1.0];
        penalize(&mut logits, &[0, 0, 1, 9], 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let sampling = Sampling::Random { temperature: 1.0, top_k: None, top_p: 1.0 };
        let run = |seed| -> Vec<u32> {
            let mut sampler = Sampler::new(sampling, 1.0, seed).unwrap();
            (0..4000).map(|_| sampler.choose(LOGITS.to_vec(), &[], None).unwrap()).collect()
        };
        let drawn = run(7);
        let share = drawn.iter().filter(|token| **token == 1).count();
        assert!((2450..2700).contains(&share), "{share} of 4000, expected about 2576");
        assert_eq!(drawn, run(7));
        assert_ne!(drawn, run(8));
    }

    #[test]
    fn bad_numbers_are_refused() {
        let error = |sampling, penalty| Sampler::new(sampling, penalty, 0).unwrap_err().to_string();
        let random = |temperature, top_k, top_p| Sampling::Random { temperature, top_k, top_p };
        assert!(error(random(0.0, None, 1.0), 1.0).contains("temperature"));
        assert!(error(random(f32::NAN, None, 1.0), 1.0).contains("temperature"));
        assert!(error(random(1.0, Some(0), 1.0), 1.0).contains("top_k"));
        assert!(error(random(1.0, None, 1.5), 1.0).contains("top_p"));
        assert!(error(Sampling::Greedy, 0.0).contains("repetition_penalty"));
        let mut sampler = Sampler::new(Sampling::Greedy, 1.0, 0).unwrap();
        let error = sampler.choose(vec![0.0, f32::NAN], &[], None).unwrap_err();
        assert!(matches!(error, Error::NotFinite { count: 1, total: 2, .. }), "{error}");
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(likeliest(&[0.0, 5.0, 5.0]), 1);
        assert_eq!(likeliest(&[-3.0]), 0);
        let mut many = vec![0.5; 1000];
        many[777] = 0.75;
        many[778] = 0.75;
        many[999] = 0.7;
        assert_eq!(likeliest(&many), 777);
    }
}
