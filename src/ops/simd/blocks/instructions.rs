//! The sets of instructions that matrices are multiplied with.

use super::{
    BlockFormat, PanelRows, Unpacked,
    activations::{PlainSteps, Row, RowBlock, Sums},
    format::PanelBlock,
    plain, unpack,
};
#[cfg(target_arch = "x86_64")]
use super::{avx2, x86};

/// The instructions that a matrix is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Plain,
}

impl Instructions {
    /// All that this machine has, the fastest first.
    pub(super) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            found.extend((avx2 && avx512).then_some(Self::Avx512Vnni));
            let vnni = is_x86_feature_detected!("avxvnni");
            found.extend((avx2 && vnni).then_some(Self::AvxVnni));
            found.extend(avx2.then_some(Self::Avx2));
        }
        found.push(Self::Plain);
        found
    }

    pub(super) fn quantize_row<const R: usize>(self, row: &mut Row<'_, R>) -> f32 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => x86::quantize_row_512(row),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni | Self::Avx2 => x86::quantize_row_256(row),
            Self::Plain => row.quantize(PlainSteps),
        }
    }

    pub(super) fn unpack(self, format: BlockFormat, block: &[u8], out: &mut [Unpacked]) {
        let block = PanelBlock::new(format, block);
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => x86::unpack_512(format, block, out),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni | Self::Avx2 => x86::unpack_256(format, block, out),
            Self::Plain => unpack::unpack(format, block, out, unpack::wide, |indices| {
                indices.iter_mut().for_each(|i| *i = unpack::TABLE[usize::from(*i & 15)]);
            }),
        }
    }

    /// Adds the product of a tile of rows with a panel of outputs, whose blocks have `G` scales and
    /// `M` minimums for each output.
    pub(super) fn add_tile<const R: usize, const G: usize, const M: usize>(
        self,
        panel: &[Unpacked],
        x: (&[RowBlock<R>], &[Sums<R>]),
        out: &mut PanelRows<R>,
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => x86::add_tile_512::<R, G, M>(panel, x, out),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => avx2::add_tile_vnni_256::<R, G, M>(panel, x, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::add_tile_256::<R, G, M>(panel, x, out),
            Self::Plain => plain::add_tile::<R, G, M>(panel, x, out),
        }
    }
}
