//! A token's pass as one kernel: `kernels/decode_whole.cu`. Its blocks, one a multiprocessor, wait for each other
//! between products, and weights are asked for across the ends of products.

use candle_core::{DType, Result, Tensor};

use super::{
    super::{
        few::{Bytes, Split, sums_bytes},
        ffi::{Limits, Output, address},
        launch::{Args, Launch},
        linear::Format,
        maps::{Boxes, TILE_MAP},
    },
    DecodeLayer, DecodeModel, Sizes,
    build::Builder,
    stored::Stored,
};
use crate::ops::PackedLinear;

/// Warps that multiply, and those that bring weights.
const WARPS: usize = 8;
const BRINGING: usize = 4;
const THREADS: usize = 32 * (WARPS + BRINGING);
/// The most query heads that share a key head, and the most shares of keys.
const GROUP: usize = 8;
const SHARES: usize = 8;
/// The widest head, and fields of the arguments that say which token it is: its number, the tokens before it, and
/// cosines and sines of its position.
const HEAD: usize = 128;
const TOKEN_FIELDS: usize = 2 + (HEAD >> 1);
/// Depth of a block of weights, and outputs of a tile.
const PIECE: usize = 256;
const TILE: usize = 16;
/// Bytes of a `WholeShare`, of a norm's sums, and of the rings' barriers.
const SHARE_BYTES: usize = 100;
const SCRATCH: usize = 128;
const BARRIERS: usize = 1024;
/// Where copies of the machine end.
const ALIGNMENT: usize = 128;
/// Places of a ring, of which each warp that brings has one: a warp takes units that are three apart, and three more
/// are on their way, see `WholeRing::wait_for_place`.
const SLOTS: std::ops::RangeInclusive<usize> = 6..=16;
/// Bytes of a `BoxMap`.
const MAP_BYTES: u64 = (TILE_MAP * size_of::<u64>()) as u64;
/// Matrices of a product.
const MATRICES: usize = 3;

/// The launch, and what it needs.
pub(super) struct Whole {
    pub(super) launch: Launch,
    /// Where its arguments say which token it is.
    pub(super) token_at: usize,
    pub(super) embeds: bool,
    pub(super) weight_bytes: usize,
    pub(super) buffers: Vec<Output>,
}

/// How a format is multiplied.
struct Unit {
    /// Blocks of 256 numbers.
    blocks: usize,
    /// Bytes of a row of it in a ring.
    row_bytes: usize,
    /// Whether these are the row's bytes from one unit to the next, so that they can come as columns of a box.
    in_columns: bool,
}

impl Unit {
    fn of(format: Format) -> Option<Self> {
        let (blocks, row_bytes, in_columns) = match format {
            Format::Q4K => (2, 288, true),
            Format::Q6K => (1, 224, false),
            Format::Q8_0 => (1, 272, true),
            Format::Q5K | Format::F8E4M3 | Format::Bf16 => return None,
        };
        Some(Self { blocks, row_bytes, in_columns })
    }
}

/// What follows a product's sums.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Qkv,
    Attended,
    GateUp,
    Down,
    Logits,
}

/// A matrix of a product, as `WholeMatrix`.
struct Part {
    stored: Stored,
    /// Of `up`.
    second: u64,
    to: u64,
    /// Outputs, or pairs of them.
    outs: usize,
    blocks: usize,
}

impl Part {
    /// Outputs of a tile: as even as the largest share of a block can be cut into tiles of at most `most`.
    fn tile_outs(&self, most: usize) -> usize {
        let share = self.outs.div_ceil(self.blocks.max(1));
        share.div_ceil(share.div_ceil(most).max(1)).max(1)
    }
}

/// What a product does, its depth, whether its norm's weight is of float32, and of each matrix outputs, blocks,
/// outputs of a tile and the format.
type Shape = (Kind, usize, bool, Vec<[usize; 4]>);

/// The number of each product's shape, in the order in which they occur, and whether it is the first of that shape.
fn shapes(products: &[Product<'_>]) -> Vec<(usize, bool)> {
    let mut found: Vec<Shape> = Vec::new();
    let number = |product: &Product<'_>| {
        let shape = product.shape();
        let at = found.iter().position(|other| *other == shape);
        at.map_or_else(
            || {
                found.push(shape);
                (found.len() - 1, true)
            },
            |at| (at, false),
        )
    };
    products.iter().map(number).collect()
}

/// The row that a product multiplies.
enum Row<'a> {
    /// The residual stream with a norm's weight.
    Normed(&'a Tensor),
    /// What attention comes to.
    Attended,
    /// bf16.
    Plain(u64),
}

/// A product of all blocks, as `WholeProduct`.
struct Product<'a> {
    kind: Kind,
    row: Row<'a>,
    parts: Vec<Part>,
}

impl Product<'_> {
    /// Outputs of a tile at most.
    fn tile(&self) -> usize {
        if matches!(self.kind, Kind::Qkv | Kind::GateUp) { TILE >> 1 } else { TILE }
    }

    fn depth(&self) -> usize {
        self.parts.first().map_or(0, |part| part.stored.depth)
    }

    /// Whether the kernel takes it.
    fn fits(&self, width: usize, cache: [usize; 2], limits: Limits) -> bool {
        let depth = self.depth();
        let suits = |part: &Part| {
            let weights = part.stored.weights(if self.kind == Kind::Qkv { 2 } else { 1 });
            let biased = part.stored.bias.is_some();
            Bytes::of(weights.format, true, depth)
                .is_some_and(|bytes| bytes.take(&weights, part.blocks, limits))
                && weights.depth == depth
                && (!biased || self.kind == Kind::Qkv)
                && u32::try_from(part.stored.size()).is_ok()
        };
        let normed = matches!(self.row, Row::Normed(_));
        let mut caches = self.parts.iter().filter_map(|part| self.cache_boxes(part, cache));
        depth > 0
            && self.parts.iter().all(suits)
            && caches.all(|boxes| boxes.fit())
            && (!normed || depth == width)
    }

    /// What products have in common that blocks share out alike.
    fn shape(&self) -> Shape {
        let is_float = matches!(self.row, Row::Normed(weight) if weight.dtype() == DType::F32);
        let part = |part: &Part| {
            [part.outs, part.blocks, part.tile_outs(self.tile()), part.stored.weights(1).number()]
        };
        (self.kind, self.depth(), is_float, self.parts.iter().map(part).collect())
    }

    /// Shared memory of the row, where its sums begin.
    fn row_bytes(&self) -> Option<usize> {
        let of = |part: &Part| Some(Bytes::of(part.stored.format, true, self.depth())?.x_bytes);
        let bytes = self.parts.iter().filter_map(of).max()?;
        Some(self.depth().div_ceil(PIECE) * bytes)
    }

    /// Shared memory of the sums of the largest share.
    fn sums_bytes(&self) -> usize {
        let of = |part: &Part| {
            let tile = part.tile_outs(self.tile());
            let blocks = Unit::of(part.stored.format).map_or(1, |unit| unit.blocks);
            let units = self.depth().div_ceil(PIECE).div_ceil(blocks);
            sums_bytes([part.outs, part.blocks], [tile, units], WARPS)
        };
        self.parts.iter().map(of).max().unwrap_or(0)
    }

    /// Boxes of a tile's rows and a unit's columns of each matrix, `None` where rows are copied one by one; and of a
    /// gate's other matrix, or of a cache of so many tokens and with heads of that width.
    fn boxes(&self, part: &Part, cache: [usize; 2]) -> [Option<Boxes>; 2] {
        let second = self.cache_boxes(part, cache);
        let unit = Unit::of(part.stored.format).filter(|unit| unit.in_columns);
        let Some(unit) = unit else { return [None, second] };
        let of = |address: u64, rows: usize| {
            let boxes = Boxes {
                address,
                rows,
                row_bytes: part.stored.row_bytes(),
                box_rows: part.tile_outs(self.tile()),
                box_bytes: unit.row_bytes,
            };
            boxes.fit().then_some(boxes)
        };
        let first = of(part.stored.bytes, part.stored.outs);
        match (self.kind, part.second) {
            // Pairs in a head are rows of the same matrix.
            (Kind::Qkv, _) | (_, 0) => [first, second],
            (_, other) => match of(other, part.stored.outs) {
                Some(second) => [first, Some(second)],
                None => [None, None],
            },
        }
    }

    /// Boxes of keys or values of a head, of those parts that have a cache.
    fn cache_boxes(&self, part: &Part, [rows, head_dim]: [usize; 2]) -> Option<Boxes> {
        let boxes = Boxes {
            address: part.to,
            rows,
            row_bytes: 2 * part.outs * size_of::<half::bf16>(),
            box_rows: TILE,
            box_bytes: head_dim * size_of::<half::bf16>(),
        };
        (self.kind == Kind::Qkv && part.to != 0).then_some(boxes)
    }

    /// `maps` holds what [`Self::boxes`] came to; `shape` is the number of its shape and whether it is the first of it.
    fn push(
        &self,
        args: &mut Args,
        (shape, is_first): (usize, bool),
        maps: &mut impl Iterator<Item = u64>,
    ) -> Result<()> {
        let kind = match self.kind {
            Kind::Qkv => 0,
            Kind::Attended => 1,
            Kind::GateUp => 2,
            Kind::Down => 3,
            Kind::Logits => 4,
        };
        args.counts([kind, self.depth(), shape]).flag(is_first);
        args.count(self.row_bytes().unwrap_or(0));
        match self.row {
            Row::Normed(weight) => {
                args.tensor(Some(weight))?.flag(weight.dtype() == DType::F32).address(0)
            }
            Row::Attended => args.address(0).flag(false).address(0),
            Row::Plain(row) => args.address(0).flag(false).address(row),
        };
        for part in &self.parts {
            let format = part.stored.weights(1).number();
            args.address(part.stored.bytes).address(part.second);
            args.address(part.stored.bias.unwrap_or(0)).address(part.to);
            args.counts([part.outs, format, part.blocks, part.tile_outs(self.tile())]);
            (0..2).for_each(|_| _ = args.address(maps.next().unwrap_or(0)));
        }
        for _ in self.parts.len()..MATRICES {
            args.counts([0; 10]);
        }
        Ok(())
    }
}

/// Places in a block's shared memory.
struct Places {
    scratch: usize,
    angles: usize,
    shares: usize,
    shapes: usize,
    barriers: usize,
    rings: usize,
    slot_bytes: usize,
    slots: usize,
    end: usize,
}

impl Places {
    /// `None` where there is no room for the rings.
    fn of(
        products: &[Product<'_>],
        shapes: &[(usize, bool)],
        [attention_bytes, keys_bytes]: [usize; 2],
        limits: Limits,
    ) -> Option<Self> {
        let parts = || products.iter().flat_map(|product| &product.parts);
        let with_sums = |product: &Product<'_>| Some(product.row_bytes()? + product.sums_bytes());
        let row = products.iter().filter_map(with_sums).max()?;
        let slot_bytes = parts()
            .filter_map(|part| Some(TILE * Unit::of(part.stored.format)?.row_bytes))
            .max()?
            .max(keys_bytes);
        let scratch = row.max(attention_bytes).next_multiple_of(ALIGNMENT);
        let angles = scratch + SCRATCH;
        let shares = angles + HEAD * size_of::<f32>();
        let shape_count = shapes.iter().filter(|(_, is_first)| *is_first).count();
        let shapes_at = shares + shape_count * SHARE_BYTES;
        let shape_bytes = products.len() * size_of::<u16>();
        let barriers = (shapes_at + shape_bytes).next_multiple_of(ALIGNMENT);
        let rings = barriers + BARRIERS;
        let room = limits.shared_bytes.checked_sub(rings)?;
        let slots = room.checked_div(BRINGING * slot_bytes)?.min(*SLOTS.end());
        let end = rings + BRINGING * slots * slot_bytes;
        SLOTS.contains(&slots).then_some(Self {
            scratch,
            angles,
            shares,
            shapes: shapes_at,
            barriers,
            rings,
            slot_bytes,
            slots,
            end,
        })
    }
}

impl Builder {
    /// The pass as one kernel; `None` where it does not fit the device, the types or the sizes.
    pub(super) fn whole(&mut self, model: &DecodeModel<'_>) -> Result<Option<Whole>> {
        let group = self.sizes.heads.checked_div(self.sizes.kv_heads);
        let fits =
            matches!(self.sizes.head_dim, 64 | 128) && group.is_some_and(|group| group <= GROUP);
        if !self.limits.is_hopper || !fits {
            return Ok(None);
        }
        let Some(products) = self.products(model) else { return Ok(None) };
        let Sizes { heads, kv_heads, head_dim, .. } = self.sizes;
        // Sums of warps, with their maxima and sums, the token's own scores, and rows that are handed on.
        let rows = (GROUP + 2) * ((head_dim >> 1) + 4);
        let attention_floats = WARPS * GROUP * (head_dim + 2) + GROUP + rows;
        // Keys or values of a warp in a ring.
        let keys_bytes = TILE * head_dim * size_of::<half::bf16>();
        let attention_bytes = [attention_floats * size_of::<f32>(), keys_bytes];
        let shapes = shapes(&products);
        let Some(places) = Places::of(&products, &shapes, attention_bytes, self.limits) else {
            return Ok(None);
        };
        let embedding = model.embedding.and_then(|embedding| {
            let rows = Stored::new(&embedding.stored_matrix()?, None)?;
            (rows.depth == self.sizes.width).then_some(rows)
        });
        let (maps, addresses) = self.maps(&products)?;
        let mut table = Args::default();
        let mut addresses = addresses.into_iter();
        let mut each = products.iter().zip(shapes);
        each.try_for_each(|(product, shape)| product.push(&mut table, shape, &mut addresses))?;
        let stored = self.stored_args(&table)?;
        let mut arrived = Output::new(&self.device, &[size_of::<u64>()], DType::U8)?;
        arrived.write(&[0_u64])?;
        let mut args = Args::default();
        args.address(stored.address()).count(products.len());
        match &embedding {
            Some(rows) => rows.push(&mut args),
            None => {
                args.address(0).counts([0, 0]);
            }
        }
        args.address(self.x.address()).count(self.sizes.width).number(self.eps);
        args.address(self.logits.address()).address(arrived.address());
        let shares = [kv_heads, SHARES, GROUP];
        let partial =
            Output::new(&self.device, &[shares.iter().product::<usize>() * head_dim], DType::BF16)?;
        let stats = Output::new(&self.device, &[shares.iter().product::<usize>() * 2], DType::F32)?;
        let no_tags = vec![0_u64; (heads + 2 * kv_heads) * (head_dim >> 1)];
        let mut handed = Output::new(&self.device, &[size_of_val(&no_tags[..])], DType::U8)?;
        handed.write(&no_tags)?;
        args.address(handed.address()).address(partial.address()).address(stats.address());
        args.counts([heads.checked_div(kv_heads).unwrap_or(0), kv_heads]);
        args.number(self.sizes.scale());
        let Places { scratch, angles, shares, shapes, barriers, rings, .. } = places;
        args.counts([scratch, angles, shares, shapes, barriers, rings]);
        args.counts([places.slot_bytes, places.slots]);
        let token_at = args.0.len();
        args.counts([0; TOKEN_FIELDS]);
        let sizes = products
            .iter()
            .flat_map(|product| &product.parts)
            .map(|part| part.stored.size() * if part.second == 0 { 1 } else { 2 });
        Ok(Some(Whole {
            token_at,
            embeds: embedding.is_some(),
            weight_bytes: sizes.sum(),
            launch: Launch {
                kernel: format!("decode_whole_d{}", self.sizes.head_dim),
                grid: [self.limits.multiprocessors, 1, 1],
                threads: THREADS,
                shared_bytes: places.end,
                args,
            },
            buffers: vec![stored, maps, arrived, handed, partial, stats],
        }))
    }

    /// What the copies of boxes need, in device memory, and the place of each, 0 where there is none.
    fn maps(&self, products: &[Product<'_>]) -> Result<(Output, Vec<u64>)> {
        let Sizes { capacity, head_dim, .. } = self.sizes;
        let mut maps = Args::default();
        let parts = || {
            products
                .iter()
                .flat_map(|product| product.parts.iter().map(move |part| (product, part)))
        };
        let boxes: Vec<_> =
            parts().flat_map(|(product, part)| product.boxes(part, [capacity, head_dim])).collect();
        boxes.iter().flatten().try_for_each(|boxes| maps.boxes(&self.device, boxes))?;
        let stored = self.stored_args(&maps)?;
        let mut next = stored.address();
        let places = boxes.iter().map(|boxes| {
            let place = if boxes.is_some() { next } else { 0 };
            next += if boxes.is_some() { MAP_BYTES } else { 0 };
            place
        });
        let places = places.collect();
        Ok((stored, places))
    }

    /// `args` in device memory.
    fn stored_args(&self, args: &Args) -> Result<Output> {
        let bytes: &[u8] = bytemuck::cast_slice(&args.0);
        let mut stored = Output::new(&self.device, &[bytes.len().max(1)], DType::U8)?;
        stored.write(bytes)?;
        Ok(stored)
    }

    /// All products in their order.
    fn products<'a>(&mut self, model: &'a DecodeModel<'a>) -> Option<Vec<Product<'a>>> {
        let mut products = Vec::new();
        for layer in &model.layers {
            products.extend(self.products_of(layer)?);
        }
        let (width, vocab) = (self.sizes.width, self.sizes.vocab);
        let head = self.part(model.head, [vocab, width], 0)?;
        self.norm(model.norm)?;
        let row = Row::Normed(model.norm);
        products.push(Product { kind: Kind::Logits, row, parts: vec![head] });
        let (limits, cache) = (self.limits, [self.sizes.capacity, self.sizes.head_dim]);
        products.iter().all(|product| product.fits(width, cache, limits)).then_some(products)
    }

    fn products_of<'a>(&mut self, layer: &DecodeLayer<'a>) -> Option<[Product<'a>; 4]> {
        let (width, inner) = (self.sizes.width, self.sizes.inner);
        let queries = self.sizes.heads * self.sizes.head_dim;
        self.norm(layer.norm)?;
        self.norm(layer.mlp_norm)?;
        let qkv = self.qkv_parts(layer)?;
        let out = self.part(layer.out, [width, queries], self.x.address())?;
        let [gate, up] = self.gate_up_matrices(layer)?;
        let gate = Part { second: up.bytes, ..self.shared(gate, self.inner.address()) };
        let down = self.part(layer.down, [width, inner], self.x.address())?;
        let gated = self.inner.address();
        let product = |kind, row, parts| Product { kind, row, parts };
        Some([
            product(Kind::Qkv, Row::Normed(layer.norm), qkv),
            product(Kind::Attended, Row::Attended, vec![out]),
            product(Kind::GateUp, Row::Normed(layer.mlp_norm), vec![gate]),
            product(Kind::Down, Row::Plain(gated), vec![down]),
        ])
    }

    /// A matrix that all blocks share.
    fn part(&mut self, linear: &PackedLinear, [outs, depth]: [usize; 2], to: u64) -> Option<Part> {
        let stored = self.stored(linear, outs, depth)?;
        Some(self.shared(stored, to))
    }

    fn shared(&self, stored: Stored, to: u64) -> Part {
        let outs = stored.outs;
        Part { blocks: self.limits.multiprocessors.min(outs), stored, second: 0, to, outs }
    }

    /// Queries, keys and values, each with blocks of its own.
    fn qkv_parts(&mut self, layer: &DecodeLayer<'_>) -> Option<Vec<Part>> {
        let cache = [self.cache(layer.cache[0])?, self.cache(layer.cache[1])?];
        let to = [0, address(cache[0]).ok()?, address(cache[1]).ok()?];
        self.tensors.extend(layer.cache.map(Tensor::clone));
        let stored = self.qkv_matrices(layer)?;
        let pairs: Vec<_> = stored.iter().map(|stored| stored.weights(2)).collect();
        let split = Split::of(&pairs.iter().collect::<Vec<_>>(), true, self.limits)?;
        let mut blocks = split.blocks;
        // Each has at least one, which may be too many in all.
        while blocks.iter().sum::<usize>() > self.limits.multiprocessors {
            let largest = blocks.iter_mut().max().filter(|blocks| **blocks > 1)?;
            *largest -= 1;
        }
        let parts = stored.into_iter().zip(to).zip(blocks);
        let part = |((stored, to), blocks): ((Stored, u64), usize)| {
            let outs = stored.outs >> 1;
            Part { stored, second: 0, to, outs, blocks }
        };
        Some(parts.map(part).collect())
    }
}
