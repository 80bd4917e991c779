//! One token through a language model in few kernels, whose launches are prepared once:
//! `kernels/decode.cu`.

mod build;
mod stored;
mod whole;

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU8, Ordering},
};

use candle_core::{Device, Result, Tensor, bail};

use super::{
    ffi::Output,
    launch::Launch,
    queue::{Readout, Sequence, Starts},
};
use crate::ops::{LinearWeight, PackedLinear};
use build::Builder;
use stored::Stored;

/// Keys of a tile of attention, and the most query heads that share a key head.
const KEYS: usize = 64;
const ATTENTION_ROWS: usize = 16;
/// The most shares that keys are divided into.
const SHARES_MAX: usize = 32;
/// Numbers that one thread moves at once.
const TOGETHER: usize = 8;

/// How the kernels of a token are started on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DecodeStarts {
    /// Not at all: the operations of a whole prompt compute a token too.
    Off,
    /// One by one.
    Single,
    /// Recorded, and started as a whole.
    Recorded,
    /// Recorded; on devices that can, each begins before the one before it has ended.
    Overlapping,
    /// As one kernel, where there is one for the device, types and sizes; otherwise as [`Self::Overlapping`].
    Whole,
}

static STARTS: AtomicU8 = AtomicU8::new(DecodeStarts::Whole as u8);

/// Chooses how tokens are decoded from now on.
pub fn use_decode(starts: DecodeStarts) {
    STARTS.store(starts as u8, Ordering::Relaxed);
}

impl DecodeStarts {
    fn chosen() -> Self {
        let chosen = STARTS.load(Ordering::Relaxed);
        let all = [Self::Off, Self::Single, Self::Recorded, Self::Overlapping];
        all.into_iter().find(|starts| *starts as u8 == chosen).unwrap_or(Self::Whole)
    }
}

/// A decoder's weights and the room for its keys and values.
#[derive(Debug)]
pub struct DecodeModel<'a> {
    /// The embedding `[vocabulary, width]`; `None` where rows come from the host.
    pub embedding: Option<&'a LinearWeight>,
    /// The layers in their order.
    pub layers: Vec<DecodeLayer<'a>>,
    /// The last norm `[width]`.
    pub norm: &'a Tensor,
    /// What makes logits `[vocabulary, width]`.
    pub head: &'a PackedLinear,
    /// Of all norms.
    pub eps: f64,
    /// Query heads, key heads, the width of a head.
    pub heads: [usize; 3],
}

/// A layer's weights and the room for its keys and values.
#[derive(Debug)]
pub struct DecodeLayer<'a> {
    /// The norm before attention `[width]`.
    pub norm: &'a Tensor,
    /// Queries, keys, values.
    pub qkv: [&'a PackedLinear; 3],
    /// After attention.
    pub out: &'a PackedLinear,
    /// The norm before the MLP `[width]`.
    pub mlp_norm: &'a Tensor,
    /// The MLP's gate and what it multiplies.
    pub gate_up: [&'a PackedLinear; 2],
    /// The end of the MLP.
    pub down: &'a PackedLinear,
    /// Room for keys and values `[1, capacity, key heads, width of a head]` in bf16, filled in place.
    pub cache: [&'a Tensor; 2],
}

/// What is decoded.
#[derive(Debug, Clone, Copy)]
pub struct DecodeToken<'a> {
    /// The token's number.
    pub token: u32,
    /// Its row of the embedding, where the plan has no embedding.
    pub row: Option<&'a [f32]>,
    /// Tokens in the cache.
    pub past: usize,
    /// Cosines and sines of its position, half the width of a head each.
    pub angles: [&'a [f32]; 2],
}

/// A prepared pass of one token.
pub struct DecodePlan {
    device: Device,
    sequence: Sequence,
    state: Output,
    /// Where the one kernel's arguments say which token it is; other kernels read it in `state`.
    token_at: Option<usize>,
    /// What is written there for a token: its number, the tokens before it, cosines and sines.
    written: Vec<u64>,
    row: Output,
    logits: Readout,
    capacity: usize,
    embeds: bool,
    is_whole: bool,
    half: usize,
    width: usize,
    /// Of weights, that each launch reads.
    bytes: Vec<usize>,
    /// What the launches' arguments point to.
    _kept: Kept,
}

struct Kept {
    _buffers: Vec<Output>,
    _tensors: Vec<Tensor>,
    _linears: Vec<PackedLinear>,
    _embedding: Option<LinearWeight>,
}

impl std::fmt::Debug for DecodePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecodePlan").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl DecodePlan {
    /// Prepares the pass; `None` where no kernel fits the device, the types or the sizes.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn new(model: &DecodeModel<'_>) -> Result<Option<Self>> {
        Self::started(model, DecodeStarts::chosen())
    }

    /// As [`Self::new`], with kernels that are started as `starts` says.
    pub(super) fn started(model: &DecodeModel<'_>, starts: DecodeStarts) -> Result<Option<Self>> {
        let device = model.norm.device().clone();
        let one_by_one = match starts {
            DecodeStarts::Off => return Ok(None),
            DecodeStarts::Single => Starts::Single,
            DecodeStarts::Recorded => Starts::Recorded,
            DecodeStarts::Overlapping | DecodeStarts::Whole => Starts::Overlapping,
        };
        if !super::runs_on(&device) {
            return Ok(None);
        }
        let Some(sizes) = Sizes::of(model)? else { return Ok(None) };
        let Some(builder) = Builder::new(&device, sizes)? else { return Ok(None) };
        builder.plan(model, one_by_one, starts == DecodeStarts::Whole)
    }

    /// Tokens that the cache has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether it picks rows of the embedding itself.
    #[must_use]
    pub fn embeds(&self) -> bool {
        self.embeds
    }

    /// The kernels of all layers that are of one kind and shape, each kind on its own, for times, at
    /// the place of the last token. What they compute so is of no use.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn parts(&self) -> Result<Vec<DecodePart<'_>>> {
        let mut kinds: Vec<(String, usize, Vec<Launch>)> = Vec::new();
        for (launch, bytes) in self.sequence.launches().iter().zip(&self.bytes) {
            let Launch { kernel, grid: [x, y, _], threads, .. } = launch;
            let name = format!("{kernel}, {x} × {y} blocks of {threads} threads");
            match kinds.iter_mut().find(|(known, ..)| *known == name) {
                Some((_, all, launches)) => {
                    *all += bytes;
                    launches.push(launch.clone());
                }
                None => kinds.push((name, *bytes, vec![launch.clone()])),
            }
        }
        let parts = kinds.into_iter().map(|(name, bytes, launches)| {
            let (device, kernels) = (self.device.clone(), launches.len());
            let starts = if self.is_whole { Starts::Together } else { Starts::Overlapping };
            let sequence = Sequence::new(&device, launches, starts)?;
            Ok(DecodePart { name, kernels, bytes, device, sequence, _of: PhantomData })
        });
        parts.collect()
    }

    /// Bytes of weights that a token's pass reads.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.bytes.iter().sum()
    }

    /// Whether one kernel computes the token.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether the kernels are started as a whole.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.sequence.is_recorded()
    }

    /// Logits of the token after this one, in memory that is written again for the next; this one's key and
    /// value come into the cache.
    ///
    /// # Errors
    /// No room in the cache, inputs of another size, or a failure of the device.
    pub fn logits(&mut self, token: DecodeToken<'_>) -> Result<&mut [f32]> {
        self.start(token)?;
        self.read()
    }

    /// Waits for the logits of the token that was started last.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn read(&mut self) -> Result<&mut [f32]> {
        self.logits.read()
    }

    /// As [`Self::logits`], queued only: for work of the host meanwhile, before [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn start(&mut self, token: DecodeToken<'_>) -> Result<()> {
        let DecodeToken { token, row, past, angles } = token;
        if past >= self.capacity || angles.iter().any(|side| side.len() != self.half) {
            bail!("decode: {past} tokens of {} and angles of another size", self.capacity);
        }
        if let [number, before, rest @ ..] = self.written.as_mut_slice() {
            (*number, *before) = (u64::from(token), past as u64);
            let places = bytemuck::cast_slice_mut::<u64, f32>(rest).iter_mut();
            places.zip(angles.into_iter().flatten()).for_each(|(place, angle)| *place = *angle);
        }
        match self.token_at {
            Some(at) => self.sequence.set(at, &self.written)?,
            // The driver takes up to 64 KB at once, and they arrive behind what is queued: nothing waits.
            None => self.state.write(&self.written)?,
        }
        match row {
            Some(row) if !self.embeds && row.len() == self.width => self.row.write(row)?,
            None if self.embeds => {}
            _ => bail!("decode: a row of the embedding where none is needed, or the other way"),
        }
        self.sequence.run(&self.device)
    }
}

/// Kernels of one kind, of a plan that they use the memory of.
pub struct DecodePart<'a> {
    /// The kernel and its shape.
    pub name: String,
    /// How many there are.
    pub kernels: usize,
    /// Bytes of weights that they read.
    pub bytes: usize,
    device: Device,
    sequence: Sequence,
    _of: PhantomData<&'a DecodePlan>,
}

impl DecodePart<'_> {
    /// Starts them.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn run(&self) -> Result<()> {
        self.sequence.run(&self.device)
    }
}

impl std::fmt::Debug for DecodePart<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecodePart").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    width: usize,
    inner: usize,
    vocab: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
}

impl Sizes {
    /// The sizes where kernels fit them.
    fn of(model: &DecodeModel<'_>) -> Result<Option<Self>> {
        let [heads, kv_heads, head_dim] = model.heads;
        let Some(layer) = model.layers.first() else { return Ok(None) };
        let (Some(gate), Some(head)) = (Stored::of(layer.gate_up[0]), Stored::of(model.head))
        else {
            return Ok(None);
        };
        let (width, capacity) = (model.norm.elem_count(), layer.cache[0].dim(1)?);
        let (inner, vocab) = (gate.outs, head.outs);
        let group = heads.checked_div(kv_heads).unwrap_or(0);
        let fits = matches!(head_dim, 16 | 32 | 64 | 128)
            && (1..=ATTENTION_ROWS).contains(&group)
            && width.is_multiple_of(TOGETHER)
            && inner.is_multiple_of(TOGETHER);
        let sizes = Self { width, inner, vocab, heads, kv_heads, head_dim, capacity };
        Ok(fits.then_some(sizes))
    }

    /// Tokens that a block's share of the keys has.
    fn keys_each(&self) -> usize {
        KEYS * self.capacity.div_ceil(KEYS).div_ceil(SHARES_MAX).max(1)
    }

    /// Of scores.
    fn scale(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a head is narrow")]
        (self.head_dim as f64).sqrt().recip()
    }

    fn shares(&self) -> usize {
        self.capacity.div_ceil(self.keys_each())
    }
}
