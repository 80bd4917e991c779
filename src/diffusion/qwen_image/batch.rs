//! The two predictions of guidance: one after the other in each block, or as one batch.

use candle_core::{DType, Result as TensorResult, Tensor};
use serde::Serialize;

use super::model::{Branch, ModelInput};

/// How the predictions of a step go through the blocks.
///
/// Both ways read a block's weights once. As one batch they are fewer and larger operations, which is
/// what a GPU wants, and twice the activations; prompts differ in length, so the shorter one is padded
/// and the padding is never attended to. One after the other each has the memory of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GuidancePass {
    /// One after the other, block by block.
    #[default]
    InTurn,
    /// As one batch.
    OneBatch,
}

/// Whether branches can be one batch: none may end early, and all have pictures of the same sizes.
pub(super) fn fit_together(branches: &[Branch<'_>]) -> bool {
    let alike = |other: &Branch<'_>| {
        let first = branches[0].input;
        other.input.grids == first.grids && other.input.tokens.dims() == first.tokens.dims()
    };
    branches.len() > 1
        && branches.iter().all(|branch| branch.cache.is_none())
        && branches.iter().all(alike)
}

/// The inputs' text lengths, where they differ.
pub(super) fn text_lengths(inputs: &[ModelInput<'_>]) -> TensorResult<Option<Vec<usize>>> {
    let lengths = inputs.iter().map(|input| input.conditioning.hidden_states.dim(1));
    let lengths = lengths.collect::<TensorResult<Vec<usize>>>()?;
    let differ = lengths.windows(2).any(|pair| pair[0] != pair[1]);
    Ok(differ.then_some(lengths))
}

/// All texts as one batch, each filled up with zeros to `text_tokens`: `[inputs, text_tokens, dim]`.
pub(super) fn texts(inputs: &[ModelInput<'_>], text_tokens: usize) -> TensorResult<Tensor> {
    let padded = |input: &ModelInput<'_>| {
        let hidden = &input.conditioning.hidden_states;
        let missing = text_tokens - hidden.dim(1)?;
        if missing == 0 { Ok(hidden.clone()) } else { hidden.pad_with_zeros(1, 0, missing) }
    };
    stacked(&inputs.iter().map(padded).collect::<TensorResult<Vec<_>>>()?)
}

/// All pictures' tokens as one batch: `[inputs, n, latent_dim]`.
pub(super) fn images(inputs: &[ModelInput<'_>]) -> TensorResult<Tensor> {
    stacked(&inputs.iter().map(|input| input.tokens.clone()).collect::<Vec<_>>())
}

fn stacked(entries: &[Tensor]) -> TensorResult<Tensor> {
    match entries {
        [one] => Ok(one.clone()),
        entries => Tensor::cat(entries, 0), // (inputs, ..)
    }
}

/// The entries of a batch one by one, `[1, n, c]` each, in float32.
pub(super) fn entries(batch: &Tensor) -> TensorResult<Vec<Tensor>> {
    let batch = batch.to_dtype(DType::F32)?;
    match batch.dim(0)? {
        1 => Ok(vec![batch]),
        b => (0..b).map(|i| batch.narrow(0, i, 1)).collect(),
    }
}
