//! The whole transformer, from tokens of latents to their velocity.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::Tensor;

use super::{
    batch::{self, GuidancePass},
    block::{Block, Streams, recycle},
    cache::BlockCache,
    config::{self, Config},
    layout::{Layout, Layouts},
    modulation::{BlockProjections, StepContext, StepContexts, TimeEmbedding},
    pack::Grid,
    pass::Pass,
    recorded::Recorder,
    store::{Store, readers},
};
use crate::{
    error::{Error, Result},
    layers::{Linear, RmsNorm},
    memory::Lead,
    ops,
    progress::CancelToken,
    weights::{
        Checkpoint, LoraFile, LoraReport, LowRankChanges, ModelFiles, Precision, Storage, Weights,
    },
};

const EPS: f64 = 1e-6;
/// Blocks that are queued on a device before the first of them is done: so soon a step can be cancelled.
/// Queueing one takes a small part of computing it.
const BLOCKS_AHEAD: usize = 8;
/// Modulation that is kept for the next pass takes at most this many bytes.
pub(super) const KEPT_BYTES_MAX: usize = 256 << 20;
/// Modulation vectors of one block, at most: target, references and text, six each.
const VECTORS_PER_BLOCK: usize = 18;

/// What the request says, as the encoder's last hidden states.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// `[1, n_text, conditioning_dim]`.
    pub hidden_states: Tensor,
}

/// The tokens of one forward pass.
#[derive(Debug, Clone, Copy)]
pub struct ModelInput<'a> {
    /// `[1, n, latent_dim]`: the noisy picture's tokens, then those of the references.
    pub tokens: &'a Tensor,
    /// Size of each picture in tokens, in their order; the first is denoised.
    pub grids: &'a [Grid],
    /// The request.
    pub conditioning: &'a Conditioning,
}

/// One of several inputs of a step.
#[derive(Debug)]
pub struct Branch<'a> {
    /// Its tokens and its request.
    pub input: ModelInput<'a>,
    /// What it keeps from step to step, for [`Outputs::Target`] only.
    pub cache: Option<&'a mut BlockCache>,
}

/// Which tokens the velocity is computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outputs {
    /// Those of the picture that is denoised: all that a pipeline needs, and less work.
    Target,
    /// The references' as well.
    All,
}

/// The Qwen-Image transformer.
///
/// Reference: `QwenImageTransformer2DModel` at
/// <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/transformers/transformer_qwenimage.py#L765-L1016>.
#[derive(Debug)]
pub struct Transformer {
    config: Config,
    precision: Precision,
    time_embedding: TimeEmbedding,
    text_norm: RmsNorm,
    text_in: Linear,
    image_in: Linear,
    blocks: Store<Block>,
    /// The blocks' projections of the time embedding: a third of the weights, used once a schedule.
    projections: Store<BlockProjections>,
    norm_out: Linear,
    proj_out: Linear,
    kept: Mutex<Vec<Kept>>,
    layouts: Layouts,
    /// Whether inputs that fit together go through the blocks as one batch.
    in_batches: AtomicBool,
    pub(super) recorder: Recorder,
}

/// Which of the transformer's weights stay in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// All of them.
    #[default]
    Resident,
    /// The leading `blocks` stay. The others, and the projections of the modulation of all blocks,
    /// are read from their file when their turn comes, one ahead of the computation.
    Streamed {
        /// Blocks that stay.
        blocks: usize,
    },
}

/// Modulation of earlier timesteps.
#[derive(Debug)]
struct Kept {
    timesteps: Vec<f32>,
    contexts: Arc<Vec<StepContext>>,
}

impl Transformer {
    /// Reads `transformer/` of a model folder.
    ///
    /// # Errors
    /// Files that are missing or damaged, a config that is not supported, another model's weights,
    /// or tensors that are missing, left over or of another shape.
    pub fn load(files: &ModelFiles, precision: &Precision) -> Result<Self> {
        Self::load_changed(files, precision, LowRankChanges::default())
    }

    /// Reads LoRA files for the transformer of a model folder; one report for each.
    ///
    /// # Errors
    /// Files that do not fit the transformer, see [`LowRankChanges::read`], or as [`Self::load`].
    pub fn read_loras(
        files: &ModelFiles,
        loras: &[LoraFile],
        precision: &Precision,
    ) -> Result<(LowRankChanges, Vec<LoraReport>)> {
        LowRankChanges::read(loras, &checkpoint(files)?, precision)
    }

    /// As [`Self::load`], with `changes` that were read for the same folder: what a changed
    /// matrix makes of `x` is `W x + scale · up · down · x`, and nothing is merged into `W`.
    ///
    /// # Errors
    /// As [`Self::load`], or changes that are left over.
    pub fn load_changed(
        files: &ModelFiles,
        precision: &Precision,
        changes: LowRankChanges,
    ) -> Result<Self> {
        let model = Self::open(files, precision, changes, Residency::Resident)?;
        model.fill(&precision.cancel)?;
        Ok(model)
    }

    /// As [`Self::load_changed`], but only the weights outside the blocks are read. All blocks are
    /// checked by the files' headers; they are read when they are first used, or by [`Self::fill`].
    ///
    /// # Errors
    /// As [`Self::load_changed`].
    pub fn open(
        files: &ModelFiles,
        precision: &Precision,
        changes: LowRankChanges,
        residency: Residency,
    ) -> Result<Self> {
        let mut config = Config::load(files)?;
        let checkpoint = checkpoint(files)?;
        let changes = Arc::new(changes);
        config.zero_cond_t |= !config.decided && checkpoint.contains(config::ZERO_COND_MARK);
        let weights =
            Weights::new(checkpoint, precision.clone()).with_changes(Arc::clone(&changes));
        let ends = weights.with_storage(ends_storage(precision.storage));
        let (dim, time) = (config.dim(), ends.pp("time_text_embed.timestep_embedder"));
        let (blocks, projections) = residency.counts(config.layers);
        let model = Self {
            time_embedding: TimeEmbedding::load(&time, dim)?,
            text_norm: RmsNorm::load(&weights.pp("txt_norm"), config.conditioning_dim, EPS)?,
            text_in: Linear::load(&ends.pp("txt_in"), config.conditioning_dim, dim)?,
            image_in: Linear::load(&ends.pp("img_in"), config.latent_dim, dim)?,
            blocks: parts(&weights, &config, blocks, Block::load)?,
            projections: parts(&weights, &config, projections, BlockProjections::load)?,
            norm_out: Linear::load(&ends.pp("norm_out.linear"), dim, 2 * dim)?,
            proj_out: Linear::load(&ends.pp("proj_out"), dim, config.latent_dim)?,
            precision: precision.clone(),
            config,
            kept: Mutex::new(Vec::new()),
            layouts: Layouts::default(),
            in_batches: AtomicBool::new(false),
            recorder: Recorder::default(),
        };
        // The mark carries no numbers: that it is there is all it says.
        weights.finish(&[config::ZERO_COND_MARK])?;
        changes.finish()?;
        Ok(model)
    }

    /// The same model with its blocks repeated in turn up to `layers`: what a deep model takes can be
    /// measured with the weights of a shallow one.
    #[must_use]
    pub fn repeated(self, layers: usize) -> Self {
        let config = Config { layers, ..self.config };
        let blocks = self.blocks.repeated(layers);
        let projections = self.projections.repeated(layers);
        Self { blocks, projections, config, ..self }
    }

    /// Reads the weights that are to stay in memory.
    ///
    /// # Errors
    /// [`Error::Cancelled`], or a failure of the device.
    pub fn fill(&self, cancel: &CancelToken) -> Result<()> {
        self.blocks.fill(cancel)?;
        self.projections.fill(cancel)
    }

    /// [`Self::fill`] on threads of its own, so that it takes none from a computation beside it and
    /// does not wait for one.
    ///
    /// # Errors
    /// As [`Self::fill`].
    pub fn fill_on_readers(&self, cancel: &CancelToken) -> Result<()> {
        readers().install(|| self.fill(cancel))
    }

    /// Lets more or fewer weights stay in memory from now on. What the model computes is the same,
    /// bit for bit.
    pub fn set_residency(&self, residency: Residency) {
        let (blocks, projections) = residency.counts(self.config.layers);
        self.blocks.set_stay(blocks);
        self.projections.set_stay(projections);
    }

    /// Whether all weights that are to stay are in memory.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        self.blocks.is_filled() && self.projections.is_filled()
    }

    /// Lets the predictions of guidance go through the blocks in this way from now on. In one batch
    /// they are those of two passes but for rounding, since products of more rows may sum in another
    /// order.
    pub fn set_guidance(&self, pass: GuidancePass) {
        self.in_batches.store(pass == GuidancePass::OneBatch, Ordering::Relaxed);
    }

    /// All blocks, where they and all that they are modulated with are in memory.
    pub(super) fn whole(&self) -> Option<Vec<Arc<Block>>> {
        self.projections.whole().and_then(|_| self.blocks.whole())
    }

    /// Drops the blocks from memory, for another model's sake; they are read again when they are
    /// next used.
    pub fn release(&self) {
        self.blocks.release();
        self.projections.release();
        self.layouts.clear();
    }

    /// Blocks that are in memory now.
    #[must_use]
    pub fn blocks_in_memory(&self) -> usize {
        self.blocks.in_memory()
    }

    /// Drops what is kept of earlier timesteps and inputs.
    pub fn forget(&self) {
        self.layouts.clear();
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The model's dimensions.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the model computes, and in which type.
    #[must_use]
    pub fn precision(&self) -> &Precision {
        &self.precision
    }

    /// [`Self::contexts`], computed once for the same timesteps as long as what is kept stays
    /// small: the passes of a request, and most requests, have one schedule.
    ///
    /// # Errors
    /// As [`Self::contexts`].
    pub fn kept_contexts(
        &self,
        timesteps: &[f32],
        cancel: &CancelToken,
    ) -> Result<Arc<Vec<StepContext>>> {
        let same = |kept: &&Kept| {
            let known = kept.timesteps.iter().map(|t| t.to_bits());
            known.eq(timesteps.iter().map(|t| t.to_bits()))
        };
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = lock().iter().find(same) {
            return Ok(Arc::clone(&kept.contexts));
        }
        let contexts = Arc::new(self.contexts(timesteps, cancel)?);
        let step_bytes = VECTORS_PER_BLOCK
            * self.config.layers
            * self.config.dim()
            * self.precision.compute.size_in_bytes();
        let mut kept = lock();
        let steps: usize = kept.iter().map(|kept| kept.timesteps.len()).sum();
        if (steps + timesteps.len()) * step_bytes > KEPT_BYTES_MAX {
            kept.clear();
        }
        if timesteps.len() * step_bytes <= KEPT_BYTES_MAX {
            let (timesteps, contexts) = (timesteps.to_vec(), Arc::clone(&contexts));
            kept.push(Kept { timesteps, contexts });
        }
        Ok(contexts)
    }

    /// What depends on the steps only, for `timesteps` on the scale from 0 to 1, one context each.
    /// The projections, a third of the model's weights, are read once for all of them; a context
    /// takes `(18 or 12) · layers · dim` numbers.
    ///
    /// # Errors
    /// [`Error::Cancelled`], checked once per block, or a failure of the device.
    pub fn contexts(&self, timesteps: &[f32], cancel: &CancelToken) -> Result<Vec<StepContext>> {
        let Precision { device, compute, .. } = &self.precision;
        let mut times = timesteps.to_vec();
        if self.config.zero_cond_t {
            times.push(0.0); // what references are modulated with
        }
        let embedding = self.time_embedding.forward(&times, *compute, device)?;
        let embedding = ops::silu(&embedding)?; // (steps (+ 1), dim)
        let out = self.norm_out.forward(&embedding)?; // (steps (+ 1), 2·dim)
        let contexts = StepContexts::new(&self.config, &out.narrow(0, 0, timesteps.len())?)?;
        self.projections.each(cancel, |index, projections| {
            contexts.add(index, projections, &embedding)?;
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(contexts.steps()?)
    }

    /// The velocity of the picture's tokens, `[1, n, latent_dim]` in float32.
    ///
    /// # Errors
    /// Tokens that do not fit the grids or the model, [`Error::Cancelled`], checked once per
    /// block, or a failure of the device.
    pub fn forward(
        &self,
        input: &ModelInput<'_>,
        step: &StepContext,
        outputs: Outputs,
        cancel: &CancelToken,
    ) -> Result<Tensor> {
        let mut branch = [Branch { input: *input, cache: None }];
        let mut velocities = self.forward_each(&mut branch, step, outputs, cancel)?;
        Ok(velocities.swap_remove(0)) // one for each branch
    }

    /// [`Self::forward`] for several inputs of one step: each block's weights are looked at once for
    /// all of them. The results are those of as many calls: bit for bit in turn, but for rounding in
    /// one batch (see [`Self::set_guidance`]), which inputs with caches or with pictures of other sizes
    /// never are. A branch with a cache may end early.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_each(
        &self,
        branches: &mut [Branch<'_>],
        step: &StepContext,
        outputs: Outputs,
        cancel: &CancelToken,
    ) -> Result<Vec<Tensor>> {
        self.predict(branches, (step, outputs), &mut self.lead(), cancel)
    }

    /// How far the host runs ahead of the device in one prediction.
    pub(crate) fn lead(&self) -> Lead {
        Lead::new(&self.precision.device, BLOCKS_AHEAD)
    }

    /// [`Self::forward_each`], with the host's lead over the device.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(crate) fn predict(
        &self,
        branches: &mut [Branch<'_>],
        of: (&StepContext, Outputs),
        lead: &mut Lead,
        cancel: &CancelToken,
    ) -> Result<Vec<Tensor>> {
        self.predict_by(branches, of, lead, cancel, |work| self.blocks.each(cancel, work))
    }

    /// As [`Self::predict`], with blocks that are in memory.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(super) fn predict_with(
        &self,
        blocks: &[Arc<Block>],
        branches: &mut [Branch<'_>],
        of: (&StepContext, Outputs),
        cancel: &CancelToken,
    ) -> Result<Vec<Tensor>> {
        self.predict_by(branches, of, &mut Lead::unlimited(), cancel, |work| {
            for (index, block) in blocks.iter().enumerate() {
                if work(index, block)?.is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    /// As [`Self::predict`]; `each_block` does work with every block in turn.
    fn predict_by(
        &self,
        branches: &mut [Branch<'_>],
        (step, outputs): (&StepContext, Outputs),
        lead: &mut Lead,
        cancel: &CancelToken,
        each_block: impl FnOnce(&mut dyn FnMut(usize, &Block) -> Result<ControlFlow<()>>) -> Result<()>,
    ) -> Result<Vec<Tensor>> {
        let _buffers = ops::KeepBuffers::new();
        let inputs: Vec<ModelInput<'_>> = branches.iter().map(|branch| branch.input).collect();
        let mut passes = if self.goes_in_one_batch(branches) {
            vec![self.begin(&inputs, true)?] // its caches are the first branch's, which has none
        } else {
            let begun = branches.iter().map(|branch| {
                self.begin(std::slice::from_ref(&branch.input), branch.cache.is_none())
            });
            begun.collect::<Result<_>>()?
        };
        let last = self.config.layers.saturating_sub(1);
        each_block(&mut |index, block| {
            let context = &step.blocks[index];
            // The last block of all wants the rows that it attends to apart from those that are denoised.
            let wants_all = index + 1 < last || outputs == Outputs::All;
            let of = (context, step.blocks.get(index + 1).filter(|_| wants_all));
            for (pass, branch) in passes.iter_mut().zip(branches.iter_mut()) {
                if pass.finished.is_some() {
                    continue;
                }
                cancel.check()?;
                let cache = branch.cache.as_deref_mut().filter(|_| outputs == Outputs::Target);
                match index {
                    _ if index == last => pass.end(block, context, outputs, cache)?,
                    0 => pass.first(block, of, cache)?,
                    _ => pass.advance(block, of)?,
                }
            }
            lead.queued()?;
            // Blocks that nobody needs are not read either.
            let all_finished = passes.iter().all(|pass| pass.finished.is_some());
            Ok(if all_finished { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let mut velocities = Vec::with_capacity(inputs.len());
        for pass in passes {
            velocities.extend(batch::entries(&self.velocity(pass, step)?)?);
        }
        Ok(velocities)
    }

    /// Whether these go through the blocks together.
    pub(super) fn goes_in_one_batch(&self, branches: &[Branch<'_>]) -> bool {
        self.in_batches.load(Ordering::Relaxed) && batch::fit_together(branches)
    }

    /// Begins a pass of all `inputs` as one batch.
    fn begin(&self, inputs: &[ModelInput<'_>], recycles: bool) -> Result<Pass> {
        let layout = self.layout(inputs)?;
        let Precision { device, compute, .. } = &self.precision;
        let image = batch::images(inputs)?.to_device(device)?.to_dtype(*compute)?;
        let streams = Streams {
            image: self.image_in.forward(&image)?,
            text: self.text_in.forward(&self.text_norm.forward(&layout.texts)?)?,
            normed: None,
        };
        Ok(Pass { layout, streams, recycles, after_first: None, finished: None })
    }

    /// `[inputs, n, latent_dim]`.
    fn velocity(&self, pass: Pass, step: &StepContext) -> Result<Tensor> {
        let Pass { finished, streams: Streams { image, text, .. }, recycles, .. } = pass;
        let last = finished.as_ref().unwrap_or(&image);
        let normed = ops::modulated_layer_norm(last, &step.scale_out, &step.shift_out, EPS)?;
        let velocity = self.proj_out.forward(&normed)?;
        recycle([normed])?;
        if recycles {
            recycle(finished.into_iter().chain([image, text]))?;
        }
        Ok(velocity)
    }

    /// Checks the inputs' shapes and places their tokens; their grids are the same.
    pub(super) fn layout(&self, inputs: &[ModelInput<'_>]) -> Result<Arc<Layout>> {
        let mut text_tokens = 0;
        for input in inputs {
            text_tokens = text_tokens.max(self.check(input)?);
        }
        let Precision { device, compute, .. } = &self.precision;
        self.layouts.of(&self.config, inputs, text_tokens, (device, *compute))
    }

    /// Checks the input's shapes; returns the number of its text tokens.
    fn check(&self, input: &ModelInput<'_>) -> Result<usize> {
        let tokens: usize = input.grids.iter().map(|grid| grid.tokens()).sum();
        let expected = [1, tokens, self.config.latent_dim];
        if input.tokens.dims() != expected || tokens == 0 {
            let found = format!("{:?}", input.tokens.dims());
            return Err(Error::field("latents", found, format!("{expected:?} with tokens")));
        }
        let text = input.conditioning.hidden_states.dims();
        let (1, text_tokens, dim) = input.conditioning.hidden_states.dims3()? else {
            return Err(Error::field("conditioning", format!("{text:?}"), "a batch of one"));
        };
        if text_tokens == 0 || dim != self.config.conditioning_dim {
            let expected = format!("[1, at least 1, {}]", self.config.conditioning_dim);
            return Err(Error::field("conditioning", format!("{text:?}"), expected));
        }
        Ok(text_tokens)
    }
}

/// How matrices outside the blocks are kept: not in blocks unless their file has them so. What is lost
/// there reaches every number of the output, and they are a five-hundredth of the weights. A
/// converted file keeps the same ones (`export`).
pub(super) fn ends_storage(storage: Storage) -> Storage {
    match storage {
        Storage::Q8_0 | Storage::Q4K => Storage::Compute,
        other => other,
    }
}

impl Residency {
    /// How many blocks, and how many blocks' projections, stay in a model of `layers` blocks.
    fn counts(self, layers: usize) -> (usize, usize) {
        match self {
            Self::Resident => (layers, layers),
            Self::Streamed { blocks } => (blocks.min(layers), 0),
        }
    }
}

/// Parts of all blocks, of which the leading `stay` are to stay in memory. The first is read, the
/// others are checked to be like it.
fn parts<T: Send + Sync + 'static>(
    weights: &Weights,
    config: &Config,
    stay: usize,
    load: fn(&Weights, &Config) -> Result<T>,
) -> Result<Store<T>> {
    let weights = weights.pp("transformer_blocks");
    let (first, pattern) = weights.pp(0).pattern_of(|weights| load(weights, config))?;
    (1..config.layers).try_for_each(|index| weights.pp(index).check_alike(&pattern))?;
    let config = config.clone();
    let store = Store::new(config.layers, stay, move |index, cancel: &CancelToken| {
        load(&weights.with_cancel(cancel).pp(index), &config)
    });
    store.offer(0, first);
    Ok(store)
}

/// The transformer's tensors under the published names.
pub(super) fn checkpoint(files: &ModelFiles) -> Result<Checkpoint> {
    let checkpoint = files.checkpoint("transformer", "diffusion_pytorch_model")?;
    let checkpoint = checkpoint.rename(config::canonical_name)?;
    config::refuse_look_alikes(&checkpoint)?;
    Ok(checkpoint)
}
