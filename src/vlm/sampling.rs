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
    /// What the logits are afterwards is left open.
    pub(super) fn choose(
        &mut self,
        logits: &mut [f32],
        seen: &[u32],
        allowed: Option<&Allowed>,
    ) -> Result<u32> {
        #[expect(clippy::float_cmp, reason = "exactly one means no penalty")]
        let penalizes = self.repetition_penalty != 1.0;
        let token = match self.sampling {
            Sampling::Greedy if !penalizes => {
                let (token, all_finite) = likeliest(logits, allowed);
                if !all_finite {
                    check_finite(logits)?;
                }
                token
            }
            Sampling::Greedy => {
                check_finite(logits)?;
                penalize(logits, seen, self.repetition_penalty);
                likeliest(logits, allowed).0
            }
            Sampling::Random { temperature, top_k, top_p } => {
                check_finite(logits)?;
                if penalizes {
                    penalize(logits, seen, self.repetition_penalty);
                }
                if let Some(allowed) = allowed {
                    allowed.forbid_others(logits, FORBIDDEN);
                }
                for logit in &mut *logits {
                    *logit /= temperature;
                }
                drawn(logits, top_k, top_p, self.share())
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

fn check_finite(logits: &[f32]) -> Result<()> {
    let count = logits.iter().filter(|logit| !logit.is_finite()).count();
    if count == 0 {
        return Ok(());
    }
    let hint = "the weights may be damaged, or too large for this type; try --dtype f32";
    Err(Error::NotFinite { stage: "logits", count, total: logits.len(), hint })
}

/// Makes tokens that were seen less likely, each once.
fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

/// The largest logit's token, the first of equals, where those that are not allowed count as [`FORBIDDEN`]; and
/// whether all logits are finite. For every token this runs on all of the vocabulary, fresh from the device: they are
/// read once, in whole chunks.
fn likeliest(logits: &[f32], allowed: Option<&Allowed>) -> (usize, bool) {
    /// Words of the logits that the largest one is looked for among, once it is known to be there.
    const WORDS: usize = 128;
    let word = |at: usize| allowed.map_or(u32::MAX, |allowed| allowed.word(at));
    let (mut largest, mut start) = (f32::NEG_INFINITY, 0);
    let mut all_finite = true;
    for (i, block) in logits.chunks(WORDS * Survey::LANES).enumerate() {
        let of_block = Survey::of(block, |at| word(i * WORDS + at));
        all_finite &= of_block.all_finite();
        if of_block.largest() > largest {
            (largest, start) = (of_block.largest(), i * WORDS);
        }
    }
    let chunks = logits.chunks(Survey::LANES).enumerate().skip(start);
    let token = chunks.take(WORDS).find_map(|(at, chunk)| {
        let word = word(at);
        let lane = chunk.iter().enumerate().position(|(lane, logit)| {
            let is_allowed = word >> lane & 1 == 1;
            (if is_allowed { *logit } else { FORBIDDEN }) >= largest
        });
        Some(at * Survey::LANES + lane?)
    });
    (token.unwrap_or(0), all_finite)
}

/// What is looked for among logits, lane by lane.
struct Survey {
    largest: [f32; Survey::LANES],
    /// The highest bit is set where one was not finite.
    bits: [u32; Survey::LANES],
}

impl Survey {
    /// As many as a word of allowed tokens has bits.
    const LANES: usize = 32;

    /// Of logits and the words of those that are allowed.
    fn of(logits: &[f32], word: impl Fn(usize) -> u32) -> Self {
        let mut all = Self { largest: [f32::NEG_INFINITY; Self::LANES], bits: [0; Self::LANES] };
        let (chunks, rest) = logits.as_chunks::<{ Self::LANES }>();
        for (at, chunk) in chunks.iter().enumerate() {
            // Most words allow all of their tokens or none.
            match word(at) {
                u32::MAX => all.add(chunk, |_, logit| logit),
                0 => all.add(chunk, |_, _| FORBIDDEN),
                word => all.add_some(chunk, word),
            }
        }
        all.add_some(rest, word(chunks.len()));
        all
    }

    #[inline(always)]
    fn add(&mut self, logits: &[f32], counts: impl Fn(usize, f32) -> f32) {
        for (lane, logit) in logits.iter().enumerate() {
            let (largest, logit) = (&mut self.largest[lane], *logit);
            // An exponent of ones carries to the highest bit.
            self.bits[lane] |= (logit.to_bits() & 0x7fff_ffff) + 0x0080_0000;
            let logit = counts(lane, logit);
            *largest = if logit > *largest { logit } else { *largest };
        }
    }

    fn add_some(&mut self, logits: &[f32], word: u32) {
        self.add(logits, |lane, logit| if word >> lane & 1 == 1 { logit } else { FORBIDDEN });
    }

    fn largest(&self) -> f32 {
        self.largest.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    fn all_finite(&self) -> bool {
        self.bits.iter().all(|bits| bits >> 31 == 0)
    }
}

/// The token at `share` of the probability that `top_k` and `top_p` leave, likeliest first.
fn drawn(logits: &[f32], top_k: Option<usize>, top_p: f32, share: f64) -> usize {
    let mut ranking = Ranking::new(logits);
    let all = logits.iter().copied().enumerate();
    if let Some(last) = top_k.and_then(|k| ranking.at(k.saturating_sub(1))) {
        // What is as likely as the last one stays, too.
        let rest = all.filter(|(_, logit)| *logit >= logits[last]);
        return draw(&candidates(rest, top_p), share);
    }
    drawn_from_the_upper(logits, ranking, top_p, share)
        .unwrap_or_else(|| draw(&candidates(all, top_p), share))
}

/// [`drawn`] without ranking the less likely tokens, which are most; `None` where the order in which their
/// probabilities are added up might change the token.
fn drawn_from_the_upper(
    logits: &[f32],
    mut ranking: Ranking,
    top_p: f32,
    share: f64,
) -> Option<usize> {
    /// More than what sums of a whole vocabulary differ by in any two orders, as a part of the sum.
    const SLACK: f64 = 1e-9;
    /// Tokens whose logits are so much smaller have no such part, even together.
    const FAR: f64 = 45.0;
    let largest = f64::from(logits[ranking.at(0)?]);
    let weight = |logit: f32| (f64::from(logit) - largest).exp();
    let is_near = |logit: &f32| largest - f64::from(*logit) < FAR;
    let total: f64 = logits.iter().copied().filter(is_near).map(weight).sum();
    let slack = SLACK * total;
    let part = total * if top_p < 1.0 { f64::from(top_p) } else { share };
    let (mut upper, mut sum) = (Vec::new(), 0.0);
    while sum <= part + slack {
        let token = ranking.at(upper.len())?;
        upper.push((token, weight(logits[token])));
        sum += upper.last()?.1;
        let is_clear = sum < part - slack || sum > part + slack;
        is_clear.then_some(())?;
    }
    match top_p < 1.0 {
        true => Some(draw(&upper, share)),
        false => upper.last().map(|last| last.0),
    }
}

/// Tokens by their logits, the likeliest first and of equals the first; sorted as far as anyone asked.
struct Ranking {
    /// In the upper half the logit's bits, so that larger ones come first; in the lower half the token.
    keys: Vec<u64>,
    sorted: usize,
}

impl Ranking {
    fn new(logits: &[f32]) -> Self {
        let key = |(token, logit): (u32, &f32)| {
            let bits = logit.to_bits();
            let descending = if logit.is_sign_negative() { bits } else { bits ^ 0x7fff_ffff };
            u64::from(descending) << 32 | u64::from(token)
        };
        Self { keys: (0..).zip(logits).map(key).collect(), sorted: 0 }
    }

    /// The token of a rank.
    fn at(&mut self, rank: usize) -> Option<usize> {
        while self.sorted <= rank && self.sorted < self.keys.len() {
            let rest = &mut self.keys[self.sorted..];
            let count = rest.len().min(256 + 15 * self.sorted);
            if count < rest.len() {
                rest.select_nth_unstable(count);
            }
            rest[..count].sort_unstable();
            self.sorted += count;
        }
        self.keys.get(rank).and_then(|key| usize::try_from(key & 0xffff_ffff).ok())
    }
}

/// Tokens that can be drawn and their probabilities (not yet adding up to one), likeliest first.
fn candidates(logits: impl Iterator<Item = (usize, f32)>, top_p: f32) -> Vec<(usize, f64)> {
    let mut ranked: Vec<(usize, f64)> =
        logits.map(|(token, logit)| (token, f64::from(logit))).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
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
    use crate::vlm::positions::small;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 0.0];

    /// What [`drawn`] can draw by its definition: everything is sorted.
    fn by_sorting(logits: &[f32], top_k: Option<usize>, top_p: f32) -> Vec<(usize, f64)> {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = top_k.and_then(|k| sorted.get(k - 1)).copied().unwrap_or(f32::NEG_INFINITY);
        candidates(logits.iter().copied().enumerate().filter(|(_, logit)| *logit >= least), top_p)
    }

    fn tokens(top_k: Option<usize>, top_p: f32) -> Vec<usize> {
        by_sorting(&LOGITS, top_k, top_p).into_iter().map(|(token, _)| token).collect()
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
    fn what_is_drawn_is_drawn_from_all_sorted_tokens() {
        let mut random = Mt64::new(3);
        let mut uniform = move || (random.next_u64() >> 40) as f32 / 16_777_216.0;
        let mut quickly = 0;
        for round in 0..240_usize {
            let size = [1_usize, 2, 255, 256, 257, 4096, 9000][round % 7];
            let spread = [0.0, 1e-3, 3.0, 30.0, 300.0][round % 5];
            let mut logits: Vec<f32> = (0..size).map(|_| spread * (uniform() - 0.5)).collect();
            if round % 3 == 0 {
                // Many that are equal, zeros of both signs among them.
                logits.iter_mut().for_each(|logit| *logit = logit.round());
            }
            if round % 4 == 0 {
                logits[size.div_ceil(2)..].fill(FORBIDDEN);
            }
            for (top_k, top_p) in [
                (None, 1.0),
                (None, 0.9),
                (None, 0.5),
                (None, 0.0),
                (Some(1), 1.0),
                (Some(50), 0.8),
                (Some(256), 1.0),
                (Some(size), 0.999),
                (Some(size + 1), 1.0),
            ] {
                let candidates = by_sorting(&logits, top_k, top_p);
                for share in [0.0, 0.5, f64::from(uniform()), f64::from(uniform()), 1.0 - 1e-12] {
                    let case = (round, size, spread, top_k, top_p, share);
                    assert_eq!(
                        drawn(&logits, top_k, top_p, share),
                        draw(&candidates, share),
                        "{case:?}"
                    );
                    let upper = drawn_from_the_upper(&logits, Ranking::new(&logits), top_p, share);
                    quickly += usize::from(upper.is_some());
                }
            }
        }
        assert!(quickly > 8000, "only {quickly} of 10800 without ranking all");
        // Infinite after a tiny temperature.
        for logits in [[f32::INFINITY, 1.0, f32::INFINITY], [f32::NEG_INFINITY; 3]] {
            let expected = draw(&by_sorting(&logits, None, 1.0), 0.5);
            assert_eq!(drawn(&logits, None, 1.0, 0.5), expected);
        }
    }

    #[test]
    fn only_the_upper_tokens_are_sorted() {
        let logits: Vec<f32> =
            (0..9000_u16).map(|i| f32::from(i.wrapping_mul(7919) % 9001)).collect();
        let mut ranking = Ranking::new(&logits);
        let first = ranking.at(0).map(|token| logits[token]);
        assert_eq!((first, ranking.sorted), (logits.iter().copied().reduce(f32::max), 256));
        ranking.at(300);
        assert_eq!(ranking.sorted, 4352);
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
            (0..4000).map(|_| sampler.choose(&mut LOGITS.clone(), &[], None).unwrap()).collect()
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
        let error = sampler.choose(&mut [0.0, f32::NAN], &[], None).unwrap_err();
        assert!(matches!(error, Error::NotFinite { count: 1, total: 2, .. }), "{error}");
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let token = |logits: &[f32]| likeliest(logits, None).0;
        assert_eq!(token(&[0.0, 5.0, 5.0]), 1);
        assert_eq!(token(&[-3.0]), 0);
        assert_eq!(token(&[-0.0, 0.0]), 0);
        for (first, other) in [(777, 778), (777, 9000), (4095, 4096), (8999, 9010), (31, 32)] {
            let mut many = vec![0.5; 9011];
            many[first] = 0.75;
            many[other] = 0.75;
            many[9] = 0.7;
            assert_eq!(token(&many), first);
        }
    }

    /// What [`likeliest`] stands for.
    fn by_definition(logits: &[f32], allowed: Option<&Allowed>) -> (usize, bool) {
        let mut logits = logits.to_vec();
        let all_finite = logits.iter().all(|logit| logit.is_finite());
        for (logit, token) in logits.iter_mut().zip(0..) {
            if allowed.is_some_and(|allowed| !allowed.contains(token)) {
                *logit = FORBIDDEN;
            }
        }
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (logits.iter().position(|logit| *logit >= largest).unwrap_or(0), all_finite)
    }

    /// Finds the same as its definition, and refuses logits that are not finite.
    fn hold(mut logits: Vec<f32>, allowed: Option<&Allowed>, damaged: (usize, f32)) -> usize {
        let expected = by_definition(&logits, allowed);
        assert_eq!(likeliest(&logits, allowed), expected);
        let mut forbidden = logits.clone();
        if let Some(allowed) = allowed {
            allowed.forbid_others(&mut forbidden, FORBIDDEN);
        }
        assert_eq!(by_definition(&forbidden, None).0, expected.0);
        // Wherever one is not finite, allowed or not.
        let Some(logit) = logits.get_mut(damaged.0) else { return 0 };
        *logit = damaged.1;
        assert!(!likeliest(&logits, allowed).1, "{damaged:?} of {}", logits.len());
        let mut sampler = Sampler::new(Sampling::Greedy, 1.0, 0).unwrap();
        let error = sampler.choose(&mut logits, &[], allowed).unwrap_err();
        assert!(matches!(error, Error::NotFinite { count: 1, .. }), "{error}");
        expected.0
    }

    #[test]
    fn greedy_is_its_definition_for_all_sizes_and_constraints() {
        let mut random = Mt64::new(11);
        let mut below = |end: usize| {
            usize::try_from(random.next_u64() >> 16).unwrap().checked_rem(end).unwrap_or(0)
        };
        let mut later = 0;
        let sizes: [usize; 11] = [0, 1, 31, 32, 33, 100, 4095, 4096, 4097, 9000, 12_321];
        for (size, round) in sizes.iter().flat_map(|size| (0..12).map(move |i| (*size, i))) {
            // Few values, so that many are equal, and some below what forbidden ones count as.
            let values = [-0.0_f32, 0.0, 1.5, 1.5, -2.0, -1e30, -3e30, f32::MAX];
            let values = &values[..[8, 5, 2][round % 3]];
            let mut logits: Vec<f32> = (0..size).map(|_| values[below(values.len())]).collect();
            if round % 4 == 1 {
                logits.fill(-2e30);
            }
            // Bits beyond the logits, and logits beyond the bits.
            let bits = [size, size + 40, size >> 1, size.saturating_sub(5)][round % 4];
            let some: Vec<u32> = match round % 5 {
                0 => Vec::new(),
                1 => (0..small(bits)).collect(),
                2 => (0..bits >> 9).map(|_| small(below(bits))).collect(),
                3 => (0..bits).map(|_| small(below(bits))).collect(),
                _ => (small(bits >> 2)..small(bits)).collect(),
            };
            let some = Allowed::of(&some, bits);
            let at = [0, size.saturating_sub(1), below(size)][round % 3];
            let damage = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN][round % 4];
            for allowed in [None, Some(&some)] {
                later += usize::from(hold(logits.clone(), allowed, (at, damage)) > 0);
            }
        }
        assert!(later > 60, "{later}");
    }
}
