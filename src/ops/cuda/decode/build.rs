//! The launches of a token's pass: shapes, arguments, and the buffers between them.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    super::{
        few::{SCRATCH_BYTES, Split},
        ffi::{Limits, Output, address, limits},
        launch::{Args, Launch},
        queue::{Readout, Sequence, Starts},
    },
    ATTENTION_ROWS, DecodeLayer, DecodeModel, DecodePlan, KEYS, Kept, Sizes, TOGETHER,
    stored::{Stored, TILE_ROWS},
};
use crate::ops::{LinearWeight, PackedLinear};

/// The places of a warp's ring.
const STAGES: usize = 3;
const WARP: usize = 32;
/// Numbers that the row in shared memory is filled up to.
const PADDED_TO: usize = 512;
/// The most warps of a block of products; of those of queries, keys and values.
const WARPS_MAX: usize = 16;
const QKV_WARPS_MAX: usize = 8;
/// Blocks that a multiprocessor may hold at a time.
const RESIDENT_MAX: usize = 2;
/// Threads of a block of attention.
const ATTENTION_THREADS: usize = 128;
const EMBED_THREADS: usize = 128;
/// The row that a product multiplies.
pub(super) enum Input {
    /// The residual stream with a norm's weight.
    Normed(Tensor),
    /// bf16.
    Narrow(u64),
}

/// Threads, blocks and shared memory of a product.
struct Shape {
    warps: usize,
    blocks: usize,
    stage_bytes: usize,
    shared_bytes: usize,
}

impl Shape {
    /// The shape that keeps the most of a multiprocessor's warps at work; `None` where none fits.
    fn of(matrices: &[&Stored], tiles: usize, limits: Limits, warps_max: usize) -> Option<Self> {
        let first = matrices.first()?;
        let stage_bytes = matrices.iter().map(|matrix| matrix.step().1).max()?;
        let steps = first.depth.div_ceil(first.step().0);
        let padded = first.depth.next_multiple_of(PADDED_TO);
        let fixed = 2 * padded + padded.div_ceil(TILE_ROWS) * 4;
        let bytes = |warps: usize| fixed + warps * (STAGES * stage_bytes + (2 * TILE_ROWS + 1) * 4);
        /// What the system takes of each block's shared memory.
        const RESERVED: usize = 1 << 10;
        let mut best: Option<(usize, Self)> = None;
        for resident in 1..=RESIDENT_MAX {
            let room = limits.shared_bytes_all.checked_div(resident)?.saturating_sub(RESERVED);
            let room = room.min(limits.shared_bytes);
            for warps in (1..=warps_max.min(steps)).filter(|warps| bytes(*warps) <= room) {
                // Warps at work, in thousandths: the last round of steps is not full.
                let work = 1000 * resident * steps;
                let score = work.checked_div(steps.div_ceil(warps)).unwrap_or(0);
                if best.as_ref().is_none_or(|(found, _)| score > *found) {
                    let blocks = tiles.min(resident * limits.multiprocessors);
                    let shared_bytes = bytes(warps);
                    best = Some((score, Self { warps, blocks, stage_bytes, shared_bytes }));
                }
            }
        }
        best.map(|(_, shape)| shape)
    }

    fn launch(&self, kernel: &str, args: Args) -> Launch {
        Launch {
            kernel: kernel.to_owned(),
            grid: [self.blocks, 1, 1],
            threads: self.warps * WARP,
            shared_bytes: self.shared_bytes,
            args,
        }
    }
}

/// A launch of a kernel of `kernels/decode_bytes.cuh`.
fn launch_bytes(kernel: String, split: &Split, args: Args) -> Launch {
    Launch {
        kernel,
        grid: [split.blocks.iter().sum(), 1, 1],
        threads: split.warps * WARP,
        shared_bytes: split.shared_bytes + SCRATCH_BYTES,
        args,
    }
}

/// Buffers that every layer uses, and the launches so far.
pub(super) struct Builder {
    pub(super) device: Device,
    pub(super) sizes: Sizes,
    pub(super) limits: Limits,
    pub(super) eps: f64,
    pub(super) state: Output,
    pub(super) x: Output,
    pub(super) query: Output,
    attended: Output,
    pub(super) inner: Output,
    partial: Output,
    stats: Output,
    arrived: Output,
    pub(super) logits: Readout,
    launches: Vec<Launch>,
    /// Of weights, that each launch reads.
    bytes: Vec<usize>,
    pub(super) tensors: Vec<Tensor>,
    linears: Vec<PackedLinear>,
}

impl Builder {
    pub(super) fn new(device: &Device, sizes: Sizes) -> Result<Option<Self>> {
        let Sizes { width, inner, vocab, heads, kv_heads, head_dim, .. } = sizes;
        let narrow = |count: usize| Output::new(device, &[count], DType::BF16);
        let wide = |count: usize| Output::new(device, &[count], DType::F32);
        let shares = sizes.shares() * kv_heads * ATTENTION_ROWS;
        let mut state = Output::new(device, &[16 + 4 * head_dim], DType::U8)?;
        state.write(&vec![0_u8; 16 + 4 * head_dim])?;
        let mut arrived = wide(kv_heads)?;
        arrived.write(&vec![0_u32; kv_heads])?;
        Ok(Some(Self {
            device: device.clone(),
            sizes,
            limits: limits(device)?,
            eps: 0.0,
            state,
            x: wide(width)?,
            query: narrow(heads * head_dim)?,
            attended: narrow(heads * head_dim)?,
            inner: narrow(inner)?,
            partial: wide(shares * head_dim)?,
            stats: wide(shares * 2)?,
            arrived,
            logits: Readout::new(device, vocab)?,
            launches: Vec::new(),
            bytes: Vec::new(),
            tensors: Vec::new(),
            linears: Vec::new(),
        }))
    }

    pub(super) fn plan(
        mut self,
        model: &DecodeModel<'_>,
        starts: Starts,
        whole: bool,
    ) -> Result<Option<DecodePlan>> {
        self.eps = model.eps;
        let whole = if whole { self.whole(model)? } else { None };
        let embeds = match &whole {
            Some(whole) => whole.embeds,
            None => model.embedding.is_some_and(|embedding| self.embed(embedding).is_some()),
        };
        let is_whole = whole.is_some();
        let token_at = whole.as_ref().map(|whole| whole.token_at);
        let mut buffers = Vec::new();
        if let Some(whole) = whole {
            self.push(whole.weight_bytes, whole.launch);
            buffers.extend(whole.buffers);
        } else {
            let layers = model.layers.iter().try_for_each(|layer| self.layer(layer));
            if layers.and_then(|()| self.head(model)).is_none() {
                return Ok(None);
            }
        }
        let starts = if is_whole { Starts::Together } else { starts };
        let sequence = Sequence::new(&self.device, self.launches, starts)?;
        buffers.extend([
            self.query,
            self.attended,
            self.inner,
            self.partial,
            self.stats,
            self.arrived,
        ]);
        Ok(Some(DecodePlan {
            device: self.device,
            sequence,
            state: self.state,
            token_at,
            written: vec![0; 2 + (self.sizes.head_dim >> 1)],
            row: self.x,
            logits: self.logits,
            capacity: self.sizes.capacity,
            embeds,
            is_whole,
            half: self.sizes.head_dim >> 1,
            width: self.sizes.width,
            bytes: self.bytes,
            _kept: Kept {
                _buffers: buffers,
                _tensors: self.tensors,
                _linears: self.linears,
                _embedding: model.embedding.cloned(),
            },
        }))
    }

    fn push(&mut self, bytes: usize, launch: Launch) {
        self.launches.push(launch);
        self.bytes.push(bytes);
    }

    fn embed(&mut self, embedding: &LinearWeight) -> Option<()> {
        let matrix = embedding.stored_matrix()?;
        let rows = Stored::new(&matrix, None).filter(|rows| rows.depth == self.sizes.width)?;
        let mut args = Args::default();
        args.address(self.state.address());
        rows.push(&mut args);
        args.address(self.x.address()).count(self.sizes.width);
        self.push(
            0,
            Launch {
                kernel: "decode_embed".to_owned(),
                grid: [self.sizes.width.div_ceil(TOGETHER * EMBED_THREADS), 1, 1],
                threads: EMBED_THREADS,
                shared_bytes: 0,
                args,
            },
        );
        Some(())
    }

    fn layer(&mut self, layer: &DecodeLayer<'_>) -> Option<()> {
        self.qkv(layer)?;
        self.attention(layer)?;
        self.add(layer.out, self.attended.address(), self.sizes.heads * self.sizes.head_dim)?;
        self.gate_up(layer)?;
        self.add(layer.down, self.inner.address(), self.sizes.inner)
    }

    /// Keeps what is pointed to.
    pub(super) fn stored(
        &mut self,
        linear: &PackedLinear,
        outs: usize,
        depth: usize,
    ) -> Option<Stored> {
        let stored = Stored::of(linear)?;
        self.linears.push(linear.clone());
        (stored.outs == outs && stored.depth == depth).then_some(stored)
    }

    /// Of queries, keys and values.
    pub(super) fn qkv_matrices(&mut self, layer: &DecodeLayer<'_>) -> Option<[Stored; 3]> {
        let Sizes { width, heads, kv_heads, head_dim, .. } = self.sizes;
        let [q, k, v] = layer.qkv;
        let kv_width = kv_heads * head_dim;
        Some([
            self.stored(q, heads * head_dim, width)?,
            self.stored(k, kv_width, width)?,
            self.stored(v, kv_width, width)?,
        ])
    }

    /// A gate and what it multiplies, of one type and without biases.
    pub(super) fn gate_up_matrices(&mut self, layer: &DecodeLayer<'_>) -> Option<[Stored; 2]> {
        let Sizes { width, inner, .. } = self.sizes;
        let [gate, up] = layer.gate_up;
        let (gate, up) = (self.stored(gate, inner, width)?, self.stored(up, inner, width)?);
        let fits = gate.format == up.format && gate.bias.is_none() && up.bias.is_none();
        fits.then_some([gate, up])
    }

    pub(super) fn norm(&mut self, weight: &Tensor) -> Option<Input> {
        let fits = matches!(weight.dtype(), DType::BF16 | DType::F32)
            && weight.dims() == [self.sizes.width]
            && weight.is_contiguous();
        self.tensors.push(weight.clone());
        fits.then(|| Input::Normed(weight.clone()))
    }

    fn input(&self, input: &Input, depth: usize, shape: &Shape) -> Option<Args> {
        let mut args = Args::default();
        match input {
            Input::Normed(weight) => {
                args.address(self.x.address()).address(0).tensor(Some(weight)).ok()?;
                args.flag(weight.dtype() == DType::F32).number(self.eps);
            }
            Input::Narrow(address) => {
                args.address(0).address(*address).address(0).flag(false).number(0.0);
            }
        }
        args.counts([depth, shape.stage_bytes]);
        Some(args)
    }

    /// A `NormArgs` of the kernels.
    fn normed(&mut self, weight: &Tensor, split: &Split) -> Option<Args> {
        self.norm(weight)?;
        let mut args = Args::default();
        args.address(self.x.address()).tensor(Some(weight)).ok()?;
        args.flag(weight.dtype() == DType::F32).number(self.eps);
        args.counts([self.sizes.width, split.shared_bytes]);
        Some(args)
    }

    fn qkv(&mut self, layer: &DecodeLayer<'_>) -> Option<()> {
        let Sizes { width, heads, kv_heads, head_dim, .. } = self.sizes;
        let matrices = self.qkv_matrices(layer)?;
        let bytes = matrices.iter().map(Stored::size).sum();
        self.tensors.extend(layer.cache.map(Tensor::clone));
        let pairs = matrices.each_ref().map(|matrix| matrix.weights(2));
        if let Some(split) = Split::of(&pairs.each_ref(), true, self.limits) {
            let mut args = self.normed(layer.norm, &split)?;
            let [keys, values] = layer.cache;
            let to = [
                self.query.address(),
                address(self.cache(keys)?).ok()?,
                address(self.cache(values)?).ok()?,
            ];
            for (((matrix, pairs), to), blocks) in
                matrices.iter().zip(&pairs).zip(to).zip(&split.blocks)
            {
                args.address(matrix.bytes).address(matrix.bias.unwrap_or(0)).address(to);
                args.counts([pairs.outs, pairs.number(), *blocks]);
            }
            args.address(self.state.address()).count(head_dim);
            self.push(bytes, launch_bytes("decode_qkv_bytes".to_owned(), &split, args));
            return Some(());
        }
        let tiles = (heads + 2 * kv_heads) * head_dim.div_ceil(TILE_ROWS);
        let shape = Shape::of(&matrices.each_ref(), tiles, self.limits, QKV_WARPS_MAX)?;
        let norm = self.norm(layer.norm)?;
        let mut args = self.input(&norm, width, &shape)?;
        matrices.iter().for_each(|matrix| matrix.push(&mut args));
        for matrix in &matrices {
            args.address(matrix.bias.unwrap_or(0));
        }
        args.address(self.query.address());
        for side in layer.cache {
            args.tensor(Some(self.cache(side)?)).ok()?;
        }
        args.address(self.state.address()).count(head_dim);
        self.push(bytes, shape.launch("decode_qkv", args));
        Some(())
    }

    /// Room for keys or values, where it is as the kernels need it.
    pub(super) fn cache<'a>(&self, side: &'a Tensor) -> Option<&'a Tensor> {
        let Sizes { kv_heads, head_dim, capacity, .. } = self.sizes;
        let fits = side.dtype() == DType::BF16
            && side.dims() == [1, capacity, kv_heads, head_dim]
            && side.is_contiguous();
        fits.then_some(side)
    }

    fn attention(&mut self, layer: &DecodeLayer<'_>) -> Option<()> {
        let Sizes { heads, kv_heads, head_dim, .. } = self.sizes;
        let mut args = Args::default();
        args.address(self.query.address());
        for side in layer.cache {
            args.tensor(Some(side)).ok()?;
        }
        let buffers = [&self.attended, &self.partial, &self.stats, &self.arrived, &self.state];
        for buffer in buffers {
            args.address(buffer.address());
        }
        let group = heads.checked_div(kv_heads)?;
        args.counts([group, kv_heads, self.sizes.keys_each()]);
        args.number(self.sizes.scale());
        let row_bytes = head_dim.max(64) * 2;
        let warps = ATTENTION_THREADS.div_ceil(WARP);
        self.push(
            0,
            Launch {
                kernel: format!("decode_attention_d{head_dim}"),
                grid: [self.sizes.shares(), kv_heads, 1],
                threads: ATTENTION_THREADS,
                shared_bytes: (ATTENTION_ROWS + 2 * KEYS) * row_bytes
                    + warps * ATTENTION_ROWS * 2 * 4,
                args,
            },
        );
        Some(())
    }

    /// Adds the product of a row in bf16 to the residual stream.
    fn add(&mut self, linear: &PackedLinear, row: u64, depth: usize) -> Option<()> {
        let matrix = self.stored(linear, self.sizes.width, depth)?;
        if matrix.bias.is_some() {
            return None;
        }
        let weights = matrix.weights(1);
        if let Some(split) = Split::of(&[&weights], false, self.limits) {
            let mut args = Args::default();
            args.address(row).count(depth).address(matrix.bytes).count(matrix.outs);
            args.address(self.x.address());
            let kernel = format!("decode_add_{}", matrix.format.name());
            self.push(matrix.size(), launch_bytes(kernel, &split, args));
            return Some(());
        }
        let tiles = matrix.outs.div_ceil(TILE_ROWS);
        let shape = Shape::of(&[&matrix], tiles, self.limits, WARPS_MAX)?;
        let mut args = self.input(&Input::Narrow(row), depth, &shape)?;
        matrix.push(&mut args);
        args.address(self.x.address());
        self.push(matrix.size(), shape.launch("decode_add", args));
        Some(())
    }

    fn gate_up(&mut self, layer: &DecodeLayer<'_>) -> Option<()> {
        let Sizes { width, inner, .. } = self.sizes;
        let [gate, up] = self.gate_up_matrices(layer)?;
        // An output is a row of each.
        let weights = gate.weights(1);
        if let Some(split) = Split::of(&[&weights], true, self.limits) {
            let mut args = self.normed(layer.mlp_norm, &split)?;
            args.address(gate.bytes).address(up.bytes).count(inner).address(self.inner.address());
            let kernel = format!("decode_gate_up_{}", gate.format.name());
            self.push(gate.size() + up.size(), launch_bytes(kernel, &split, args));
            return Some(());
        }
        let tiles = inner.div_ceil(TILE_ROWS >> 1);
        let shape = Shape::of(&[&gate], tiles, self.limits, WARPS_MAX)?;
        let norm = self.norm(layer.mlp_norm)?;
        let mut args = self.input(&norm, width, &shape)?;
        gate.push(&mut args);
        args.address(up.bytes).address(self.inner.address());
        self.push(gate.size() + up.size(), shape.launch("decode_gate_up", args));
        Some(())
    }

    fn head(&mut self, model: &DecodeModel<'_>) -> Option<()> {
        let Sizes { width, vocab, .. } = self.sizes;
        let head = self.stored(model.head, vocab, width)?;
        if head.bias.is_some() {
            return None;
        }
        let weights = head.weights(1);
        if let Some(split) = Split::of(&[&weights], false, self.limits) {
            let mut args = self.normed(model.norm, &split)?;
            args.address(head.bytes).count(vocab).address(self.logits.address());
            let kernel = format!("decode_logits_{}", head.format.name());
            self.push(head.size(), launch_bytes(kernel, &split, args));
            return Some(());
        }
        let tiles = vocab.div_ceil(TILE_ROWS);
        let shape = Shape::of(&[&head], tiles, self.limits, WARPS_MAX)?;
        let norm = self.norm(model.norm)?;
        let mut args = self.input(&norm, width, &shape)?;
        head.push(&mut args);
        args.address(self.logits.address());
        self.push(head.size(), shape.launch("decode_logits", args));
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::linear::Format, *};

    const FORMATS: [Format; 5] =
        [Format::Q8_0, Format::Q4K, Format::Q5K, Format::Q6K, Format::Bf16];
    const SIZES: [(usize, usize); 4] =
        [(3584, 3584), (3584, 18_944), (18_944, 3584), (152_064, 3584)];

    /// Multiprocessors, their shared memory and a block's in KiB of several generations.
    fn devices() -> [Limits; 3] {
        [(128, 100, 99), (108, 164, 163), (132, 228, 227)].map(|(multiprocessors, all, block)| {
            Limits {
                multiprocessors,
                shared_bytes: block << 10,
                shared_bytes_all: all << 10,
                is_hopper: block == 227,
            }
        })
    }

    fn matrices() -> impl Iterator<Item = Stored> {
        FORMATS.into_iter().flat_map(|format| {
            SIZES.map(|(outs, depth)| Stored { bytes: 0, format, outs, depth, bias: None })
        })
    }

    /// Products of the published sizes fit blocks of every generation.
    #[test]
    fn shapes_fit_every_device() {
        for (limits, matrix) in
            devices().into_iter().flat_map(|device| matrices().map(move |matrix| (device, matrix)))
        {
            let tiles = matrix.outs.div_ceil(TILE_ROWS);
            for warps in [QKV_WARPS_MAX, WARPS_MAX] {
                let shape = Shape::of(&[&matrix], tiles, limits, warps);
                let name = format!("{:?} {limits:?}", matrix.format);
                let shape = shape.unwrap_or_else(|| panic!("{name}: no shape"));
                assert!(
                    shape.shared_bytes <= limits.shared_bytes,
                    "{name}: {}",
                    shape.shared_bytes
                );
                assert!(shape.blocks > 0 && shape.warps > 1, "{name}: {}", shape.warps);
            }
        }
    }

    /// On Hopper, all matrices of the published sizes but those of Q5_K and bf16 are multiplied by bytes.
    #[test]
    fn bytes_fit_hopper() {
        let [_, _, hopper] = devices();
        for matrix in matrices() {
            let by_bytes = matches!(matrix.format, Format::Q8_0 | Format::Q4K | Format::Q6K);
            for rows in [1, 2] {
                let weights = matrix.weights(rows);
                let split = Split::of(&[&weights], rows > 1, hopper);
                assert_eq!(split.is_some(), by_bytes, "{weights:?}");
                let Some(split) = split else { continue };
                assert!(split.shared_bytes + SCRATCH_BYTES <= hopper.shared_bytes, "{weights:?}");
                assert_eq!(split.blocks, [hopper.multiprocessors], "{weights:?}");
                let wanted = if weights.format == Format::Q6K { 8 } else { 16 };
                // A deep row of Q8_0 leaves room for fewer rings.
                let is_deep = weights.format == Format::Q8_0 && weights.depth > 8192;
                assert!(split.warps >= wanted || is_deep, "{weights:?}: {}", split.warps);
            }
        }
    }
}
