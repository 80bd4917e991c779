//! Answers, one token at a time: by kernels that are prepared once where there are such, otherwise by the
//! operations of a whole prompt.

use candle_core::{DType, Tensor};

use super::{adapter::Call, cache::Cache, language::LanguageModel};
use crate::{
    error::Result,
    layers::Linear,
    ops::{
        self,
        cuda::{DecodePlan, DecodeToken},
    },
};

/// Passes of single tokens over one cache.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    plan: Option<DecodePlan>,
    /// The cache's room when the plan was made, or looked for in vain.
    planned_for: Option<usize>,
    /// Logits that did not come from the plan.
    logits: Vec<f32>,
}

/// Logits on their way.
#[derive(Debug)]
pub(super) enum Pending {
    /// On the host.
    There(Vec<f32>),
    /// The device computes them.
    Queued,
    /// To be computed after this token at this position.
    Asked((u32, u32)),
}

impl Decoder {
    /// Logits after a token at a position, whose key and value come into the cache.
    ///
    /// # Errors
    /// Cancellation, an adapter of another model, or a failure of the device.
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    pub(super) fn logits(
        &mut self,
        model: (&LanguageModel, &Linear),
        token: (u32, u32),
        cache: &mut Cache,
        call: Call<'_>,
    ) -> Result<&mut [f32]> {
        let pending = self.start(model, token, cache, call)?;
        self.finish(pending, model, cache, call)
    }

    /// Waits for logits, or computes them; the next ones take their place. Model, cache and call are those
    /// of [`Self::start`].
    ///
    /// # Errors
    /// Cancellation, an adapter of another model, or a failure of the device.
    pub(super) fn finish(
        &mut self,
        pending: Pending,
        (language, head): (&LanguageModel, &Linear),
        cache: &mut Cache,
        call: Call<'_>,
    ) -> Result<&mut [f32]> {
        self.logits = match (pending, &mut self.plan) {
            (Pending::Queued, Some(plan)) => return Ok(plan.read()?),
            (Pending::Queued, None) => Vec::new(),
            (Pending::There(logits), _) => logits,
            (Pending::Asked((token, at)), _) => ops::on_worker(|| {
                let embedding = language.embed(&[token])?;
                last_logits(head, &language.forward(&embedding, &[[at; 3]], Some(cache), call)?)
            })?,
        };
        Ok(&mut self.logits)
    }

    /// Begins to compute the logits after a token at a position, whose key and value come into the cache, where
    /// that goes on without the host.
    ///
    /// # Errors
    /// Cancellation, an adapter of another model, or a failure of the device.
    pub(super) fn start(
        &mut self,
        (language, head): (&LanguageModel, &Linear),
        (token, at): (u32, u32),
        cache: &mut Cache,
        call: Call<'_>,
    ) -> Result<Pending> {
        if let Some(plan) = self.plan((language, head), cache, call)? {
            call.cancel.check()?;
            let row = match plan.embeds() {
                true => None,
                false => Some(floats(&language.embed(&[token])?)?),
            };
            let [cos, sin] = language.cosines_and_sines([at; 3]);
            let (row, past) = (row.as_deref(), cache.len());
            plan.start(DecodeToken { token, row, past, angles: [&cos, &sin] })?;
            cache.count_one();
            return Ok(Pending::Queued);
        }
        Ok(Pending::Asked((token, at)))
    }

    /// The prepared pass over the cache, in which there is room for a token; `None` where there are no kernels
    /// for it.
    ///
    /// # Errors
    /// A failure of the device.
    pub(super) fn plan(
        &mut self,
        (language, head): (&LanguageModel, &Linear),
        cache: &mut Cache,
        call: Call<'_>,
    ) -> Result<Option<&mut DecodePlan>> {
        if call.adapter.is_some() || !language.may_decode() || !cache.reserve()? {
            return Ok(None);
        }
        if self.planned_for != Some(cache.capacity()) {
            // The old plan's memory goes first.
            self.plan = None;
            self.plan = language.decode_plan(head, cache)?;
            self.planned_for = Some(cache.capacity());
        }
        Ok(self.plan.as_mut())
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
impl super::VisionLanguageModel {
    /// Logits `[1, tokens, vocabulary]` of the last tokens of a prompt, which are text, each read on its own;
    /// and whether all of them took the prepared pass.
    ///
    /// # Errors
    /// A prompt of no more tokens, or a failure of the device.
    pub(crate) fn logits_token_by_token(
        &self,
        inputs: &super::Inputs,
        tokens: usize,
        call: Call<'_>,
    ) -> Result<(Tensor, bool)> {
        let Some(start) = inputs.tokens().len().checked_sub(tokens).filter(|start| *start > 0)
        else {
            let found = inputs.tokens().len();
            return Err(crate::Error::field("prompt", found, format!("more than {tokens} tokens")));
        };
        let body = self.body(call.cancel)?;
        let (language, head) = (&body.language, self.head(&body)?);
        // Less room than it takes, so that it grows.
        let mut cache = language.cache(start + tokens.div_ceil(2));
        self.prefill(&inputs.clone().cut(start), Some(&mut cache), call)?;
        let mut decoder = Decoder::default();
        let mut prepared = true;
        let mut logits = Vec::with_capacity(tokens);
        let rest = inputs.tokens().iter().zip(&inputs.positions().tokens).skip(start);
        for (token, [at, ..]) in rest {
            let token = (*token, *at);
            let row = decoder.logits((language, head), token, &mut cache, call)?;
            let dims = (1, 1, row.len());
            logits.push(Tensor::from_slice(row, dims, &candle_core::Device::Cpu)?);
            prepared &= decoder.plan.is_some();
        }
        Ok((Tensor::cat(&logits, 1)?, prepared)) // (1, tokens, vocabulary)
    }
}

/// Logits after the last token of `hidden: [1, n, width]`, on the host.
pub(super) fn last_logits(head: &Linear, hidden: &Tensor) -> Result<Vec<f32>> {
    let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.contiguous()?;
    floats(&head.forward(&last)?) // (1, 1, vocabulary)
}

fn floats(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}
