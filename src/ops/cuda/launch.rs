//! What a kernel is started with.

use std::fmt;

use candle_core::{Device, Result, Tensor, bail};

use super::{
    ffi,
    maps::{self, Boxes, TILE_MAP, Tiles},
    tensors::copied,
};

/// A kernel's arguments: one struct of 8-byte fields, in their order.
#[derive(Debug, Clone, Default)]
pub(super) struct Args(pub(super) Vec<u64>);

impl Args {
    /// The first element of `tensor`, or null.
    pub(super) fn tensor(&mut self, tensor: Option<&Tensor>) -> Result<&mut Self> {
        let address = tensor.map(ffi::address).transpose()?;
        Ok(self.address(address.unwrap_or(0)))
    }

    pub(super) fn address(&mut self, address: u64) -> &mut Self {
        self.0.push(address);
        self
    }

    pub(super) fn count(&mut self, count: usize) -> &mut Self {
        // A size fits: memory is addressed with it.
        self.0.push(count as u64);
        self
    }

    pub(super) fn counts<const N: usize>(&mut self, counts: [usize; N]) -> &mut Self {
        for count in counts {
            self.count(count);
        }
        self
    }

    pub(super) fn flag(&mut self, flag: bool) -> &mut Self {
        self.0.push(u64::from(flag));
        self
    }

    pub(super) fn number(&mut self, number: f64) -> &mut Self {
        self.0.push(number.to_bits());
        self
    }

    /// A `TileMap` of `tiles`, or one that is not used; on 64 bytes, as it must lie.
    pub(super) fn tiles(&mut self, device: &Device, tiles: Option<&Tiles>) -> Result<&mut Self> {
        self.aligned();
        match tiles {
            Some(tiles) => self.0.extend(maps::tile_map(device, tiles)?),
            None => self.0.extend([0; TILE_MAP]),
        }
        Ok(self)
    }

    /// A `BoxMap` of `boxes`.
    pub(super) fn boxes(&mut self, device: &Device, boxes: &Boxes) -> Result<()> {
        self.0.extend(maps::box_map(device, boxes)?);
        Ok(())
    }

    /// Fills up to a multiple of 64 bytes, as structs end that hold a `TileMap`.
    pub(super) fn aligned(&mut self) -> &mut Self {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self
    }
}

/// 8-byte fields that the arguments of a kernel may have.
pub(super) const FIELDS_MAX: usize = 128;
/// What a block and a grid may have on every device, and the shared memory of a block on a Hopper.
const THREADS_MAX: usize = 1024;
const GRID_MAX: [usize; 3] = [(1 << 31) - 1, 65_535, 65_535];
pub(super) const SHARED_BYTES_MAX: usize = 227 << 10;

/// One start of a kernel.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    pub(super) kernel: String,
    pub(super) grid: [usize; 3],
    pub(super) threads: usize,
    pub(super) shared_bytes: usize,
    pub(super) args: Args,
}

impl Launch {
    /// Refuses what no device would start, so that it is seen without one.
    pub(super) fn check(&self) -> Result<()> {
        let suits_grid = self.grid.iter().zip(GRID_MAX).all(|(blocks, most)| *blocks <= most);
        let suits = suits_grid
            && (1..=THREADS_MAX).contains(&self.threads)
            && self.shared_bytes <= SHARED_BYTES_MAX
            && self.args.0.len() <= FIELDS_MAX;
        if !suits {
            bail!(
                "{self}: more than a grid of {GRID_MAX:?}, {THREADS_MAX} threads, \
                 {SHARED_BYTES_MAX} bytes of shared memory, or {FIELDS_MAX} fields"
            );
        }
        Ok(())
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, grid, threads, shared_bytes, args } = self;
        let fields = args.0.len();
        write!(
            f,
            "kernel {kernel}, a grid of {grid:?}, {threads} threads, {shared_bytes} bytes of shared \
             memory, {fields} fields"
        )
    }
}

/// `[b, n, h, d]` with the heads of a token side by side, as kernels read it: tokens and batch
/// entries may lie apart.
pub(super) struct Rows {
    pub(super) tensor: Tensor,
    pub(super) rows: usize,
    /// Elements between tokens.
    pub(super) stride: usize,
    /// Elements between batch entries.
    pub(super) batch_stride: usize,
}

impl Rows {
    /// `x` as it lies, or a copy where its heads lie apart or its rows do not start at multiples of
    /// 16 bytes.
    pub(super) fn new(x: &Tensor) -> Result<Self> {
        /// Elements of bf16 that are moved at once.
        const TOGETHER: usize = 8;
        const STRIDE_MAX: usize = 1 << 30;
        let (_, rows, _, d) = x.dims4()?;
        let fits = |x: &Tensor| {
            let (layout, stride) = (x.layout(), x.stride());
            // Strides are 32-bit numbers in the kernels; offsets are not.
            if stride[1] > STRIDE_MAX {
                return false;
            }
            let aligned = [layout.start_offset(), stride[0], stride[1]];
            stride[3] == 1
                && (stride[2] == d || x.dims()[2] == 1)
                && aligned.iter().all(|at| at.is_multiple_of(TOGETHER))
        };
        let tensor = if fits(x) { x.clone() } else { copied(x)? };
        let (stride, batch_stride) = (tensor.stride()[1], tensor.stride()[0]);
        Ok(Self { tensor, rows, stride, batch_stride })
    }

    /// Tiles of `tile_rows` rows of heads of 128 numbers.
    pub(super) fn tiles(&self, tile_rows: usize, [batch, heads]: [usize; 2]) -> Result<Tiles> {
        let Self { tensor, rows, stride, batch_stride } = self;
        let (rows, stride, batch_stride) = (*rows, *stride, *batch_stride);
        Ok(Tiles {
            address: ffi::address(tensor)?,
            batch,
            rows,
            heads,
            stride,
            batch_stride,
            tile_rows,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_no_device_starts() {
        let one = Launch {
            kernel: "some".to_owned(),
            grid: [1 << 20, 65_535, 1],
            threads: THREADS_MAX,
            shared_bytes: SHARED_BYTES_MAX,
            args: Args(vec![0; FIELDS_MAX]),
        };
        assert!(one.check().is_ok());
        let wrong = [
            Launch { grid: [1 << 31, 1, 1], ..one.clone() },
            Launch { grid: [1, 65_536, 1], ..one.clone() },
            Launch { grid: [1, 1, 65_536], ..one.clone() },
            Launch { threads: THREADS_MAX + 1, ..one.clone() },
            Launch { threads: 0, ..one.clone() },
            Launch { shared_bytes: SHARED_BYTES_MAX + 1, ..one.clone() },
            Launch { args: Args(vec![0; FIELDS_MAX + 1]), ..one },
        ];
        for launch in wrong {
            let error = launch.check().unwrap_err().to_string();
            assert!(error.contains("kernel some"), "{error}");
        }
    }
}
