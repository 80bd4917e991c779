//! The product of a tile without any processor's own instructions.

use super::{
    BLOCK, FOURS, PANEL, PanelRows, Unpacked,
    activations::{RowBlock, Sums},
    format::Word,
};

/// Adds the product of a tile of rows with a panel of outputs, whose blocks have `G` scales and `M`
/// minimums for each output.
pub(super) fn add_tile<const R: usize, const G: usize, const M: usize>(
    panel: &[Unpacked],
    x: (&[RowBlock<R>], &[Sums<R>]),
    out: &mut PanelRows<R>,
) {
    for (panel, (x, sums)) in panel.iter().zip(x.0.iter().zip(x.1)) {
        for (row, out) in out.iter_mut().enumerate() {
            let power = exponent(x.exponents[row]);
            let fours = FOURS.div_euclid(G);
            let parts = panel.weights.chunks_exact(fours).zip(x.values[row].chunks_exact(fours));
            for ((weights, values), scales) in parts.zip(&panel.scales) {
                let counts = counts(weights, values);
                for (out, (count, scale)) in out.iter_mut().zip(counts.iter().zip(scales)) {
                    *out += count * power * scale;
                }
            }
            let (all, second) = (sums.all[row], sums.second[row]);
            let sums = if M == 1 { [all, 0.0] } else { [all - second, second] };
            for (sum, mins) in sums.iter().zip(&panel.mins).take(M) {
                out.iter_mut().zip(mins).for_each(|(out, min)| *out -= min * sum);
            }
        }
    }
}

/// The power of two that `bits` stand for when they are added to an exponent.
fn exponent(bits: i32) -> f32 {
    f32::from_bits(1_f32.to_bits().wrapping_add_signed(bits))
}

/// `Σ (u − 128) · v` for each output.
#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "at most 32 · 128 · 127, which is exact in f32")]
fn counts(weights: &[[Word; PANEL]], values: &[[i8; 4]]) -> [f32; PANEL] {
    const { assert!(BLOCK == 32) };
    let mut counts = [0_i32; PANEL];
    for (weights, values) in weights.iter().zip(values) {
        for (count, weights) in counts.iter_mut().zip(weights) {
            let pairs = weights.iter().zip(values);
            *count += pairs.map(|(u, v)| (i32::from(*u) - 128) * i32::from(*v)).sum::<i32>();
        }
    }
    counts.map(|count| count as f32)
}
