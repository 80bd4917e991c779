//! The block formats of GGUF files, and how blocks are interleaved over the outputs of a panel.

use super::{BLOCK, PANEL, SUPER_BLOCK};

/// Four neighbouring bytes of a block.
pub(super) type Word = [u8; 4];

/// A format of quantized blocks. Its bytes are ggml's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are ggml's")]
pub enum BlockFormat {
    Q8_0,
    Q6K,
    Q5K,
    Q5_0,
    Q5_1,
    Q4K,
    Q4_0,
    Q4_1,
    Q3K,
    Q2K,
    Iq4Nl,
    Iq4Xs,
}

/// Where the parts of a block are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    /// Where the numbers of 16 bits start, and how many there are.
    pub(super) halves: (usize, usize),
    /// Where everything else starts, and how many words of four bytes it is.
    pub(super) words: (usize, usize),
}

/// Weights of four or five bits.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FewBits {
    /// What lies in their middle.
    pub(super) center: u8,
    /// What 0 is unpacked to: where a format has minimums weights start from 128, and elsewhere their
    /// center is there.
    pub(super) zero: u8,
}

#[cfg(target_arch = "x86_64")]
impl FewBits {
    /// How much more unpacked weights are than centered ones.
    pub(super) fn above_center(self) -> u8 {
        self.zero + self.center - 128
    }
}

impl BlockFormat {
    /// All formats.
    pub const ALL: [Self; 12] = [
        Self::Q8_0,
        Self::Q6K,
        Self::Q5K,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q3K,
        Self::Q2K,
        Self::Iq4Nl,
        Self::Iq4Xs,
    ];

    /// Weights of one block.
    #[must_use]
    pub const fn numbers(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q5_0 | Self::Q5_1 | Self::Q4_0 | Self::Q4_1 | Self::Iq4Nl => BLOCK,
            _ => SUPER_BLOCK,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn bytes(self) -> usize {
        let parts = self.parts();
        2 * parts.halves.1 + 4 * parts.words.1
    }

    pub(super) const fn parts(self) -> Parts {
        let (halves, words) = match self {
            Self::Q8_0 => ((0, 1), (2, 8)),
            Self::Q5_0 => ((0, 1), (2, 5)),
            Self::Q5_1 => ((0, 2), (4, 5)),
            Self::Q4_0 | Self::Iq4Nl => ((0, 1), (2, 4)),
            Self::Q4_1 => ((0, 2), (4, 4)),
            Self::Q6K => ((208, 1), (0, 52)),
            Self::Q5K => ((0, 2), (4, 43)),
            Self::Q4K => ((0, 2), (4, 35)),
            Self::Q3K => ((108, 1), (0, 27)),
            Self::Q2K => ((80, 2), (0, 20)),
            Self::Iq4Xs => ((0, 2), (4, 33)),
        };
        Parts { halves, words }
    }

    /// What is special about weights of four and five bits.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn few_bits(self) -> Option<FewBits> {
        let center = match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q4K => 8,
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => 16,
            Self::Q8_0 | Self::Q6K | Self::Q3K | Self::Q2K | Self::Iq4Nl | Self::Iq4Xs => {
                return None;
            }
        };
        let zero = if self.groups().1 == 0 { 128 - center } else { 128 };
        Some(FewBits { center, zero })
    }

    /// Whether a block is one of 256 weights.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_super_blocks(self) -> bool {
        self.numbers() == SUPER_BLOCK
    }

    /// Groups of weights with a scale of their own in 32 weights, and groups with a minimum.
    pub(super) fn groups(self) -> (usize, usize) {
        match self {
            Self::Q8_0 | Self::Q5_0 | Self::Q4_0 | Self::Q3K | Self::Iq4Nl | Self::Iq4Xs => (1, 0),
            Self::Q5_1 | Self::Q4_1 | Self::Q5K | Self::Q4K => (1, 1),
            Self::Q6K => (2, 0),
            Self::Q2K => (1, 2),
        }
    }
}

/// One block of each output of a panel: `[number of 16 bits][output]`, then `[word][output]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct PanelBlock<'a> {
    pub(super) halves: &'a [[[u8; 2]; PANEL]],
    pub(super) words: &'a [[Word; PANEL]],
}

impl<'a> PanelBlock<'a> {
    #[inline(always)]
    pub(super) fn new(format: BlockFormat, bytes: &'a [u8]) -> Self {
        let (halves, words) = bytes.split_at(2 * PANEL * format.parts().halves.1);
        Self { halves: bytemuck::cast_slice(halves), words: bytemuck::cast_slice(words) }
    }
}

/// Interleaves the blocks of at most [`PANEL`] rows: `panel` is `[block]` of [`PanelBlock`]s.
pub(super) fn interleave(format: BlockFormat, rows: &[u8], depth: usize, panel: &mut [u8]) {
    let (bytes, parts) = (format.bytes(), format.parts());
    let (halves_len, flip) = (2 * PANEL * parts.halves.1, flipped(format));
    for (place, block) in panel.chunks_exact_mut(PANEL * bytes).enumerate() {
        let (halves, words) = block.split_at_mut(halves_len);
        let halves: &mut [[[u8; 2]; PANEL]] = bytemuck::cast_slice_mut(halves);
        let words: &mut [[u32; PANEL]] = bytemuck::cast_slice_mut(words);
        for (output, row) in rows.chunks_exact(depth * bytes).enumerate() {
            let stored = &row[place * bytes..][..bytes];
            let from = stored[parts.halves.0..].as_chunks().0;
            for (half, from) in halves.iter_mut().zip(from) {
                half[output] = *from;
            }
            let from = stored[parts.words.0..].as_chunks().0;
            for (word, from) in words.iter_mut().zip(from) {
                word[output] = u32::from_ne_bytes(*from) ^ flip;
            }
        }
    }
}

/// Bits of a word that are stored inverted: Q8_0's signed bytes are kept as `q + 128`.
fn flipped(format: BlockFormat) -> u32 {
    if format == BlockFormat::Q8_0 { 0x8080_8080 } else { 0 }
}
