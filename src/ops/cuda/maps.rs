//! Tensor maps: what the copy engine of compute capability 9.0 needs to know of a tensor in memory, to copy tiles and
//! boxes of it by itself.

use candle_core::{Device, Result};
use half::bf16;

/// 8-byte fields of a `TileMap` or a `BoxMap` of the kernels.
pub(super) const TILE_MAP: usize = 16;

/// `[b, n, h, 128]` of bf16 with the heads of a token side by side, from which a kernel copies the rows of a
/// head in tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) address: u64,
    pub(super) batch: usize,
    pub(super) rows: usize,
    pub(super) heads: usize,
    /// Elements between tokens.
    pub(super) stride: usize,
    /// Elements between batch entries.
    pub(super) batch_stride: usize,
    /// Rows of a tile.
    pub(super) tile_rows: usize,
}

impl Tiles {
    /// Elements of a piece of a row, which is as wide as the swizzle.
    pub(super) const PIECE: usize = 64;
    /// Pieces of a head's row.
    pub(super) const PIECES: usize = 2;

    /// Whether the hardware can copy from there: places and distances are multiples of 16 bytes, and
    /// distances below 2⁴⁰ bytes.
    pub(super) fn fit(&self) -> bool {
        const STRIDE_END: usize = 1 << 39;
        let strides = [self.stride, self.batch_stride];
        self.address.is_multiple_of(16)
            && strides.iter().all(|at| (1..STRIDE_END).contains(at) && at.is_multiple_of(8))
    }
}

/// A matrix of which a kernel copies boxes: neighbouring rows, and of each the same bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Boxes {
    pub(super) address: u64,
    pub(super) rows: usize,
    /// Bytes of a row, which is where the next one begins.
    pub(super) row_bytes: usize,
    pub(super) box_rows: usize,
    pub(super) box_bytes: usize,
}

impl Boxes {
    /// Bytes that columns are counted in.
    const WORD: usize = 4;

    /// Words of a row, and of a row of a box.
    fn words(&self) -> [usize; 2] {
        [self.row_bytes, self.box_bytes].map(|bytes| bytes.div_euclid(Self::WORD))
    }

    /// Whether the hardware can copy from there: places and distances are multiples of 16 bytes, and a box has at
    /// most 256 rows and words.
    pub(super) fn fit(&self) -> bool {
        const SIDE: usize = 256;
        const END: usize = 1 << 31;
        self.address.is_multiple_of(16)
            && self.row_bytes.is_multiple_of(16)
            && (1..END).contains(&self.rows)
            && (1..END).contains(&self.row_bytes)
            && self.box_bytes.is_multiple_of(16)
            && (1..=SIDE).contains(&self.box_rows)
            && (1..=SIDE * Self::WORD).contains(&self.box_bytes)
    }
}

/// A `TileMap` of the kernels: what the driver makes of `tiles`, or their description for the emulation.
pub(super) fn tile_map(device: &Device, tiles: &Tiles) -> Result<[u64; TILE_MAP]> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => device::tile_map(tiles),
        _ => {
            let Tiles { batch, rows, heads, stride, batch_stride, tile_rows, .. } = *tiles;
            let bytes = |elements: usize| elements * size_of::<bf16>();
            let counts = [
                rows,
                heads * Tiles::PIECES,
                batch,
                bytes(stride),
                bytes(Tiles::PIECE),
                bytes(batch_stride),
                tile_rows,
                Tiles::PIECES,
            ];
            Ok(described(tiles.address, &counts))
        }
    }
}

/// A `BoxMap` of the kernels, as [`tile_map`].
pub(super) fn box_map(device: &Device, boxes: &Boxes) -> Result<[u64; TILE_MAP]> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => device::box_map(boxes),
        _ => {
            let Boxes { address, rows, row_bytes, box_rows, .. } = *boxes;
            let [row_words, box_words] = boxes.words();
            Ok(described(address, &[row_words, rows, row_bytes, box_words, box_rows]))
        }
    }
}

/// A map's description for the emulation: what it copies from, and its counts in their order.
fn described(address: u64, counts: &[usize]) -> [u64; TILE_MAP] {
    let mut map = [0; TILE_MAP];
    let fields = [address].into_iter().chain(counts.iter().map(|count| *count as u64));
    map.iter_mut().zip(fields).for_each(|(field, value)| *field = value);
    map
}

#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the driver reads arrays and writes a map")]
mod device {
    use candle_core::{
        Error, Result,
        cuda::{WrapErr, cudarc::driver::sys},
    };
    use half::bf16;

    use super::{Boxes, TILE_MAP, Tiles};

    /// What the driver makes of `tiles`: pure arithmetic on the host. Axes: 64 columns, rows, pieces of
    /// 64 columns, batch entries.
    pub(super) fn tile_map(tiles: &Tiles) -> Result<[u64; TILE_MAP]> {
        let bytes = |elements: usize| wide(elements * size_of::<bf16>());
        let piece = Tiles::PIECE;
        let pieces = tiles.heads * Tiles::PIECES;
        map(&Map {
            address: tiles.address,
            element: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            sizes: [wide(piece), wide(tiles.rows), wide(pieces), wide(tiles.batch)],
            strides: [bytes(tiles.stride), bytes(piece), bytes(tiles.batch_stride)],
            tile: [small(piece)?, small(tiles.tile_rows)?, small(Tiles::PIECES)?, 1],
            axes: 4,
            swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            promotion: sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        })
    }

    /// The same of `boxes`. Axes: words, rows.
    pub(super) fn box_map(boxes: &Boxes) -> Result<[u64; TILE_MAP]> {
        let [row_words, box_words] = boxes.words();
        map(&Map {
            address: boxes.address,
            element: sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            sizes: [wide(row_words), wide(boxes.rows), 1, 1],
            strides: [wide(boxes.row_bytes), 0, 0],
            tile: [small(box_words)?, small(boxes.box_rows)?, 1, 1],
            axes: 2,
            swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            // 3 % faster than 256 where only weights are read.
            promotion: sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        })
    }

    fn wide(n: usize) -> u64 {
        n as u64
    }

    fn small(n: usize) -> Result<u32> {
        u32::try_from(n).map_err(Error::wrap)
    }

    /// A tensor map of as many of the axes, strides in bytes.
    struct Map {
        address: u64,
        element: sys::CUtensorMapDataType,
        sizes: [u64; 4],
        strides: [u64; 3],
        tile: [u32; 4],
        axes: u32,
        swizzle: sys::CUtensorMapSwizzle,
        promotion: sys::CUtensorMapL2promotion,
    }

    fn map(of: &Map) -> Result<[u64; TILE_MAP]> {
        let every = [1; 4];
        let address = usize::try_from(of.address).map_err(Error::wrap)?;
        let mut map = sys::CUtensorMap { opaque: [0; TILE_MAP] };
        // SAFETY: the driver reads the four arrays, which have an element for each axis and for each
        // axis but the first, and writes the map, which is aligned by its type. It does not follow the
        // tensor's address.
        let done = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                of.element,
                of.axes,
                std::ptr::with_exposed_provenance_mut(address),
                of.sizes.as_ptr(),
                of.strides.as_ptr(),
                of.tile.as_ptr(),
                every.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                of.swizzle,
                of.promotion,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        done.result().w()?;
        Ok(map.opaque)
    }
}
