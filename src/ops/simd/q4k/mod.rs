//! The product of Q4_K super-blocks with one row of activations that is quantized to 8 bits in
//! blocks of 32.
//!
//! A super-block is ggml's: 256 weights of 4 bits in eight sub-blocks, `w = d · scale · q − dmin ·
//! min` with a 6-bit scale and minimum for each sub-block. With activations `x = s · v`, the product
//! of a sub-block is `d · scale · s · Σ q · v − dmin · min · s · Σ v`. The nibbles are multiplied as
//! they are: one token reads each weight once, so that unpacking them first would not pay.

#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::halves;

use half::f16;
use rayon::prelude::*;

/// Weights of a super-block.
const SUPER_BLOCK: usize = 256;
/// Weights that share a scale and a minimum, and activations that share a scale.
const SUB_BLOCK: usize = 32;
const SUB_BLOCKS: usize = SUPER_BLOCK.div_euclid(SUB_BLOCK);
/// Four neighbours of a sub-block: what 8-bit instructions add to one 32-bit sum.
const FOURS: usize = SUB_BLOCK.div_euclid(4);
/// Outputs of a panel.
const PANEL: usize = 32;

/// Four neighbouring weights or activations (two times four where they are nibbles).
type Four<T> = [T; 4];

/// One super-block of each output of a panel. Aligned, so that no load straddles two cache lines.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct PanelBlock {
    /// What the scales are multiplied with.
    d: [f16; PANEL],
    /// What the minimums are multiplied with.
    dmin: [f16; PANEL],
    /// ggml's twelve bytes of scales and minimums: `[four][output][4]`.
    six_bits: [[Four<u8>; PANEL]; 3],
    /// `[pair of sub-blocks][four][output][4]`: low nibbles are the first sub-block's.
    nibbles: [[[Four<u8>; PANEL]; FOURS]; SUB_BLOCKS.div_euclid(2)],
}

/// One super-block of the activations.
#[derive(Debug, Clone, Copy)]
struct RowBlock {
    values: [[Four<i8>; FOURS]; SUB_BLOCKS],
    scales: [f32; SUB_BLOCKS],
    /// The sum of the sub-block's activations, as they were rounded.
    sums: [f32; SUB_BLOCKS],
}

/// One matrix, `[panel][super-block]`, and where its product goes.
#[cfg(target_arch = "x86_64")]
pub(super) struct RowProduct<'a> {
    pub(super) blocks: &'a [PanelBlock],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) out: &'a mut [f32],
}

/// `out[j] = Σₖ x[k] · weight[j][k] + bias[j]` of each matrix: the row is quantized once, and the
/// threads share all panels out at once.
#[cfg(target_arch = "x86_64")]
pub(super) fn multiply_row(x: &[f32], products: Vec<RowProduct<'_>>) {
    let zero = RowBlock {
        values: [[[0; 4]; FOURS]; SUB_BLOCKS],
        scales: [0.0; SUB_BLOCKS],
        sums: [0.0; SUB_BLOCKS],
    };
    let depth = x.len().div_euclid(SUPER_BLOCK);
    let mut row = vec![zero; depth];
    x86::quantize_row_avx512(x, &mut row);
    let panels: usize = products.iter().map(|product| product.out.len().div_ceil(PANEL)).sum();
    let tasks = super::tiles::tasks();
    let group = panels.div_ceil(tasks.min(panels).max(1));
    let pieces = products.into_iter().flat_map(|RowProduct { blocks, bias, out }| {
        let blocks = blocks.chunks(group * depth);
        blocks.zip(out.chunks_mut(group * PANEL)).enumerate().map(move |(i, (blocks, out))| {
            let bias = bias.map(|bias| &bias[i * group * PANEL..]);
            RowProduct { blocks, bias, out }
        })
    });
    let pieces: Vec<RowProduct<'_>> = pieces.collect();
    pieces.into_par_iter().with_max_len(1).for_each(|RowProduct { blocks, bias, out }| {
        let panels = blocks.chunks_exact(depth).zip(out.chunks_mut(PANEL));
        for (i, (panel, out)) in panels.enumerate() {
            let mut sums = [0.0; PANEL];
            x86::add_row_avx512(panel, &row, &mut sums);
            match bias {
                Some(bias) => {
                    let out = out.iter_mut().zip(sums).zip(&bias[i * PANEL..]);
                    out.for_each(|((y, x), b)| *y = x + b);
                }
                None => out.iter_mut().zip(sums).for_each(|(y, x)| *y = x),
            }
        }
    });
}
