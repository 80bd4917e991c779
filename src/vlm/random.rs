//! A language model with random weights, for times at published dimensions.

use candle_core::Device;

use super::{
    adapter::Call,
    cache::Cache,
    config::TextConfig,
    decode::{Decoder, last_logits},
    language::LanguageModel,
    sampling::{Sampler, Sampling},
};
use crate::{
    error::Result,
    layers::Linear,
    ops::cuda::{DecodePlan, DecodeToken, StoredMatrix},
    progress::CancelToken,
};

/// A decoder and its head.
#[derive(Debug)]
pub(crate) struct RandomLanguageModel {
    language: LanguageModel,
    head: Linear,
    cancel: CancelToken,
}

/// A sequence that is written token by token.
#[derive(Debug)]
pub(crate) struct Writing {
    cache: Cache,
    decoder: Decoder,
}

impl RandomLanguageModel {
    /// `matrix` makes a random matrix of its sizes `[out, in]`.
    ///
    /// # Errors
    /// A failure of the device.
    pub(crate) fn new(
        config: &TextConfig,
        device: &Device,
        matrix: &mut dyn FnMut([usize; 2]) -> Result<StoredMatrix>,
    ) -> Result<Self> {
        let language = LanguageModel::random(config, device, matrix)?;
        let head = matrix([config.vocab_size, config.hidden_size])?;
        let head = Linear::stored(head, None);
        Ok(Self { language, head, cancel: CancelToken::new() })
    }

    /// Reads a prompt, with room for so many tokens after it; returns the logits after it.
    ///
    /// # Errors
    /// A failure of the device.
    pub(crate) fn read(&self, prompt: &[u32], room: usize) -> Result<(Writing, Vec<f32>)> {
        let mut cache = self.language.cache(prompt.len() + room);
        let embeddings = self.language.embed(prompt)?;
        let positions: Vec<_> = (0..).map(|at| [at; 3]).take(prompt.len()).collect();
        let hidden =
            self.language.forward(&embeddings, &positions, Some(&mut cache), self.call())?;
        let logits = last_logits(&self.head, &hidden)?;
        Ok((Writing { cache, decoder: Decoder::default() }, logits))
    }

    /// Logits after one more token.
    ///
    /// # Errors
    /// A failure of the device.
    pub(crate) fn write<'a>(&self, writing: &'a mut Writing, token: u32) -> Result<&'a mut [f32]> {
        let at = super::positions::small(writing.cache.len());
        let Writing { cache, decoder } = writing;
        decoder.logits((&self.language, &self.head), (token, at), cache, self.call())
    }

    /// The likeliest token after one more.
    ///
    /// # Errors
    /// Logits that are not finite, or a failure of the device.
    pub(crate) fn choose(&self, writing: &mut Writing, token: u32) -> Result<u32> {
        let mut sampler = Sampler::new(Sampling::Greedy, 1.0, 0)?;
        sampler.choose(self.write(writing, token)?, &[], None)
    }

    /// Queues the pass of one more token, without its logits; `false` where it is not prepared.
    ///
    /// # Errors
    /// A failure of the device.
    pub(crate) fn queue(&self, writing: &mut Writing, token: u32) -> Result<bool> {
        let past = writing.cache.len();
        let [cos, sin] = self.language.cosines_and_sines([super::positions::small(past); 3]);
        let angles: [&[f32]; 2] = [&cos, &sin];
        let Some(plan) = self.plan(writing)? else { return Ok(false) };
        plan.start(DecodeToken { token, row: None, past, angles })?;
        writing.cache.count_one();
        Ok(true)
    }

    /// The prepared pass, where there is one.
    ///
    /// # Errors
    /// A failure of the device.
    pub(crate) fn plan<'a>(&self, writing: &'a mut Writing) -> Result<Option<&'a mut DecodePlan>> {
        let Writing { cache, decoder } = writing;
        decoder.plan((&self.language, &self.head), cache, self.call())
    }

    fn call(&self) -> Call<'_> {
        Call { adapter: None, cancel: &self.cancel }
    }
}
