//! A forward pass under way, block by block.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    block::{Block, Streams, recycle},
    cache::BlockCache,
    layout::Layout,
    model::Outputs,
    modulation::BlockContext,
};
use crate::error::Result;

/// What the step does to a block, and to the one after it, if that wants all tokens.
pub(super) type Contexts<'a> = (&'a BlockContext, Option<&'a BlockContext>);

/// A forward pass under way.
pub(super) struct Pass {
    pub(super) layout: Arc<Layout>,
    pub(super) streams: Streams,
    /// Whether a block's input is given back after the block; a cache keeps views of some.
    pub(super) recycles: bool,
    /// The tokens that are denoised after the first block, and what it added to them, where a cache
    /// wants to know.
    pub(super) after_first: Option<[Tensor; 2]>,
    /// The tokens that are denoised after the last block.
    pub(super) finished: Option<Tensor>,
}

impl Pass {
    pub(super) fn advance(&mut self, block: &Block, of: Contexts<'_>) -> Result<()> {
        let after = block.forward(&mut self.streams, &self.layout, of)?;
        let Streams { image, text, .. } = std::mem::replace(&mut self.streams, after);
        if self.recycles {
            recycle([image, text])?;
        }
        Ok(())
    }

    /// The tokens that are denoised: `[b, n, dim]`.
    fn target(&self) -> Result<Tensor> {
        Ok(self.streams.image.narrow(1, 0, self.layout.target_tokens)?)
    }

    /// The first block, after which a cache may know what the others will add.
    pub(super) fn first(
        &mut self,
        block: &Block,
        of: Contexts<'_>,
        cache: Option<&mut BlockCache>,
    ) -> Result<()> {
        let Some(cache) = cache else { return self.advance(block, of) };
        let before = self.target()?;
        self.advance(block, of)?;
        let after = self.target()?;
        let added = (&after - before)?;
        match cache.reuse(&added)? {
            Some(rest) => self.finished = Some((after + rest)?),
            None => self.after_first = Some([after, added]),
        }
        Ok(())
    }

    /// The last block.
    pub(super) fn end(
        &mut self,
        block: &Block,
        context: &BlockContext,
        outputs: Outputs,
        cache: Option<&mut BlockCache>,
    ) -> Result<()> {
        if outputs == Outputs::All {
            return self.advance(block, (context, None));
        }
        let image = block.forward_target(&self.streams, &self.layout, context)?;
        if let (Some(cache), Some([after, added])) = (cache, self.after_first.take()) {
            cache.keep(added, (&image - after)?);
        }
        self.finished = Some(image);
        Ok(())
    }
}
