//! What a pass knows of its tokens beside the picture's numbers. Steps of a run share it: it is made when an
//! input is new.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor, TensorId};

use super::{
    batch,
    config::Config,
    model::ModelInput,
    pack::Grid,
    rope::{Rotation, image_rotation, text_rotation},
};
use crate::{error::Result, ops::TextLengths};

/// Layouts that are kept: those of both predictions of guidance.
const KEPT_MAX: usize = 2;

/// Facts about the tokens that all blocks share.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) image: Rotation,
    pub(super) text: Rotation,
    /// Tokens of the picture that is denoised; the references follow.
    pub(super) target_tokens: usize,
    /// Text tokens of each entry of a batch, where they differ; the rest of its rows is padding.
    pub(super) text_lengths: Option<TextLengths>,
    /// The requests as one batch, `[inputs, n_text, conditioning_dim]` in the type of the computation.
    pub(super) texts: Tensor,
}

/// Sizes of the pictures and the requests' hidden states.
type Key = (Vec<Grid>, Vec<TensorId>);

/// The layouts of the last inputs.
#[derive(Debug, Default)]
pub(super) struct Layouts(Mutex<Vec<(Key, Arc<Layout>)>>);

impl Layouts {
    /// The layout of `inputs`, which have been checked and whose grids are the same; `text_tokens` are the
    /// most that one has. It lies on `device`.
    ///
    /// # Errors
    /// More positions than the model has, or a failure of the device.
    pub(super) fn of(
        &self,
        config: &Config,
        inputs: &[ModelInput<'_>],
        text_tokens: usize,
        (device, compute): (&Device, DType),
    ) -> Result<Arc<Layout>> {
        let grids = inputs.first().map_or(&[][..], |input| input.grids);
        let texts = inputs.iter().map(|input| input.conditioning.hidden_states.id()).collect();
        let key: Key = (grids.to_vec(), texts);
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |is: &dyn Fn(&Key) -> bool| {
            let kept = lock();
            kept.iter().find(|(key, _)| is(key)).map(|(_, layout)| Arc::clone(layout))
        };
        if let Some(layout) = known(&|other| *other == key) {
            return Ok(layout);
        }
        let text = text_rotation(config, grids, text_tokens, device)?;
        let image = match known(&|(other, _)| *other == key.0) {
            Some(layout) => layout.image.clone(),
            None => image_rotation(config, grids, device)?,
        };
        let texts = batch::texts(inputs, text_tokens)?;
        let layout = Arc::new(Layout {
            image,
            text,
            target_tokens: grids.first().map_or(0, |grid| grid.tokens()),
            text_lengths: batch::text_lengths(inputs)?.map(TextLengths::new),
            texts: texts.to_device(device)?.to_dtype(compute)?,
        });
        let mut kept = lock();
        if kept.len() == KEPT_MAX {
            kept.remove(0);
        }
        kept.push((key, Arc::clone(&layout)));
        Ok(layout)
    }

    /// Drops what is kept.
    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
