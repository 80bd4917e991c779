//! How a matrix is multiplied, chosen once when it is laid out.

use super::{
    BlockFormat, PanelRows, Unpacked,
    activations::{Needs, Rounding, TileBlocks},
    instructions::Instructions,
};
#[cfg(target_arch = "x86_64")]
use super::{
    TILE_ROWS, avx2,
    format::{FewBits, PanelBlock},
    six_rows, x86,
};

/// How a matrix is multiplied: by its format and the machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) format: BlockFormat,
    pub(super) instructions: Instructions,
    tile: TileKernel,
}

/// What multiplies a tile of rows with a panel of outputs. Where that is made for six rows, a single
/// one is multiplied by [`Instructions::add_tile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TileKernel {
    /// Bytes of any format: [`Instructions::add_tile`].
    Unpacked,
    /// Q8_0 as it is stored, of which only scales are unpacked, with AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Stored,
    /// Six rows by weights with a scale for each half of a block, with AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Halves,
    /// Six rows by centered weights, some of them two by two, with AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Pairs(FewBits),
    /// As [`Self::Pairs`], with all minimums of a super-block at once.
    #[cfg(target_arch = "x86_64")]
    SuperPairs(FewBits),
    /// Weights of so few bits that several products fit into 16 bits, with AVX2.
    #[cfg(target_arch = "x86_64")]
    ShortSums(FewBits),
}

impl TileKernel {
    #[cfg(target_arch = "x86_64")]
    fn new(format: BlockFormat, instructions: Instructions) -> Self {
        match (instructions, format.few_bits()) {
            (Instructions::Avx512Vnni, Some(bits)) if format.has_super_blocks() => {
                Self::SuperPairs(bits)
            }
            (Instructions::Avx512Vnni, Some(bits)) => Self::Pairs(bits),
            (Instructions::Avx512Vnni, None) if format == BlockFormat::Q8_0 => Self::Stored,
            (Instructions::Avx512Vnni, None) if format.groups().0 == 2 => Self::Halves,
            (Instructions::Avx2, Some(bits)) => Self::ShortSums(bits),
            (Instructions::Avx512Vnni | Instructions::Avx2, None)
            | (Instructions::AvxVnni | Instructions::Plain, _) => Self::Unpacked,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn new(_: BlockFormat, _: Instructions) -> Self {
        Self::Unpacked
    }
}

impl Kernel {
    pub(super) fn new(format: BlockFormat, instructions: Instructions) -> Self {
        Self { format, instructions, tile: TileKernel::new(format, instructions) }
    }

    /// How rows are to be rounded.
    pub(super) fn rounding(self) -> Rounding {
        let (limit, shift) = match self.tile {
            #[cfg(target_arch = "x86_64")]
            TileKernel::Pairs(bits) | TileKernel::SuperPairs(bits) => {
                (128 - bits.center, i32::from(bits.above_center()))
            }
            _ => (Rounding::WHOLE, 0),
        };
        Rounding { instructions: self.instructions, limit, shift }
    }

    /// What is to be known of rows besides: their sums where the format has minimums, or more than one
    /// scale for a block of activations.
    pub(super) fn needs<const R: usize>(self) -> Needs {
        #[cfg(target_arch = "x86_64")]
        let super_sums = R == TILE_ROWS && matches!(self.tile, TileKernel::SuperPairs(_));
        #[cfg(not(target_arch = "x86_64"))]
        let super_sums = false;
        Needs { sums: self.format.groups() != (1, 0) && !super_sums, super_sums }
    }

    /// Whether a row alone is multiplied by Q4_K's nibbles, as they are stored.
    pub(super) fn takes_nibbles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.format == BlockFormat::Q4K && self.instructions == Instructions::Avx512Vnni;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether a row alone is multiplied by Q8_0's bytes, as they are stored.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn takes_bytes(self) -> bool {
        self.tile == TileKernel::Stored
    }

    /// What the product of a tile needs of a block beside the stored bytes.
    pub(super) fn unpack(self, block: &[u8], out: &mut [Unpacked]) {
        #[cfg(target_arch = "x86_64")]
        match self.tile {
            TileKernel::Stored => {
                return x86::widen_q8_0_512(PanelBlock::new(self.format, block), &mut out[0]);
            }
            TileKernel::Pairs(bits) | TileKernel::SuperPairs(bits) => {
                let block = PanelBlock::new(self.format, block);
                return six_rows::unpack_centered_512(self.format, bits, block, out);
            }
            TileKernel::Unpacked | TileKernel::Halves | TileKernel::ShortSums(_) => {}
        }
        self.instructions.unpack(self.format, block, out);
    }

    /// Adds the product of a tile of rows with blocks as they are stored and [unpacked](Self::unpack),
    /// which have `G` scales and `M` minimums for each output.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "for x86 only"))]
    pub(super) fn add_tile<const R: usize, const G: usize, const M: usize>(
        self,
        (stored, unpacked): (&[u8], &[Unpacked]),
        x: TileBlocks<'_, R>,
        sums: &mut PanelRows<R>,
    ) {
        let parts = (x.blocks, x.sums);
        #[cfg(target_arch = "x86_64")]
        match self.tile {
            TileKernel::Unpacked => {}
            TileKernel::Stored => return x86::add_q8_0_tile_512(stored, unpacked, parts, sums),
            TileKernel::Halves => {
                if let Some(sums) = six_rows(sums) {
                    return six_rows::add_half_scaled_tile_512(unpacked, x.cast(), sums);
                }
            }
            TileKernel::Pairs(_) => {
                if let Some(sums) = six_rows(sums) {
                    return six_rows::add_paired_tile_512::<M>(unpacked, x.cast(), sums);
                }
            }
            TileKernel::SuperPairs(_) => {
                if let Some(sums) = six_rows(sums) {
                    return six_rows::add_super_tile_512(unpacked, x.cast(), sums);
                }
            }
            TileKernel::ShortSums(FewBits { center: 8, zero }) => {
                return avx2::add_nibbles_tile_256::<R, M>(unpacked, parts, zero, sums);
            }
            TileKernel::ShortSums(FewBits { zero, .. }) => {
                return avx2::add_five_bits_tile_256::<R, M>(unpacked, parts, zero, sums);
            }
        }
        self.instructions.add_tile::<R, G, M>(unpacked, parts, sums);
    }
}

/// The sums of a tile of six rows, where it is one.
#[cfg(target_arch = "x86_64")]
fn six_rows<const R: usize>(sums: &mut PanelRows<R>) -> Option<&mut PanelRows<TILE_ROWS>> {
    sums.as_mut_slice().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(format: BlockFormat, instructions: Instructions) -> TileKernel {
        Kernel::new(format, instructions).tile
    }

    #[test]
    fn without_a_processors_instructions_all_weights_are_unpacked() {
        for format in BlockFormat::ALL {
            assert_eq!(tile(format, Instructions::Plain), TileKernel::Unpacked, "{format:?}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_format_has_its_kernel_on_x86() {
        use TileKernel::{Halves, Pairs, ShortSums, Stored, SuperPairs, Unpacked};
        let bits = |center, zero| FewBits { center, zero };
        for format in BlockFormat::ALL {
            let (avx512, avx2) = match format {
                BlockFormat::Q8_0 => (Stored, Unpacked),
                BlockFormat::Q6K => (Halves, Unpacked),
                BlockFormat::Q5K => (SuperPairs(bits(16, 128)), ShortSums(bits(16, 128))),
                BlockFormat::Q4K => (SuperPairs(bits(8, 128)), ShortSums(bits(8, 128))),
                BlockFormat::Q5_0 => (Pairs(bits(16, 112)), ShortSums(bits(16, 112))),
                BlockFormat::Q5_1 => (Pairs(bits(16, 128)), ShortSums(bits(16, 128))),
                BlockFormat::Q4_0 => (Pairs(bits(8, 120)), ShortSums(bits(8, 120))),
                BlockFormat::Q4_1 => (Pairs(bits(8, 128)), ShortSums(bits(8, 128))),
                BlockFormat::Q3K | BlockFormat::Q2K | BlockFormat::Iq4Nl | BlockFormat::Iq4Xs => {
                    (Unpacked, Unpacked)
                }
            };
            assert_eq!(tile(format, Instructions::Avx512Vnni), avx512, "{format:?}");
            assert_eq!(tile(format, Instructions::Avx2), avx2, "{format:?}");
            assert_eq!(tile(format, Instructions::AvxVnni), Unpacked, "{format:?}");
        }
    }
}
