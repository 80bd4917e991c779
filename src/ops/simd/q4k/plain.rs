//! The steps of a Q4_K product without any processor's own instructions. The compiler also builds
//! the simpler ones for wider registers, in [`super::x86`].

use super::{
    FOURS, Four, PANEL, PanelBlock, RowBlock, SUB_BLOCK, SUB_BLOCKS, SUPER_BLOCK, Unpacked,
};

/// Quantizes row `i` of a tile, block by block: the largest magnitude becomes 127. A block with NaN
/// gets the scale NaN, so that it stays visible in the product.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "rounded numbers between −127 and 127")]
#[expect(clippy::cast_precision_loss, reason = "a sum of 32 such numbers is exact in f32")]
pub(super) fn quantize_row<const R: usize>(x: &[f32], packed: &mut [RowBlock<R>], i: usize) {
    for (x, packed) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(packed) {
        for (sub_block, x) in x.as_chunks::<SUB_BLOCK>().0.iter().enumerate() {
            // Magnitudes as integers are ordered like the numbers, and NaN is the largest.
            let bits = x.iter().fold(0, |max: u32, x| max.max(x.abs().to_bits()));
            let max = f32::from_bits(bits);
            let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
            let mut values = [0_i8; SUB_BLOCK];
            let mut sum = 0;
            for (value, x) in values.iter_mut().zip(x) {
                let rounded = (x * inverse).round_ties_even() as i32;
                sum += rounded;
                *value = rounded as i8;
            }
            let scale = max / 127.0;
            packed.scales[sub_block][i] = scale;
            packed.sums[sub_block][i] = scale * sum as f32;
            packed.values[sub_block][i].as_flattened_mut().copy_from_slice(&values);
        }
    }
}

/// A byte for each nibble, and scales and minimums multiplied out.
#[inline(always)]
pub(super) fn unpack(block: &PanelBlock, unpacked: &mut Unpacked) {
    let pairs = unpacked.weights.as_chunks_mut::<2>().0;
    for ([low, high], nibbles) in pairs.iter_mut().zip(&block.nibbles) {
        let nibbles = nibbles.as_flattened().as_flattened();
        let low = low.as_flattened_mut().as_flattened_mut();
        low.iter_mut().zip(nibbles).for_each(|(low, nibbles)| *low = nibbles & 15);
        let high = high.as_flattened_mut().as_flattened_mut();
        high.iter_mut().zip(nibbles).for_each(|(high, nibbles)| *high = nibbles >> 4);
    }
    let [first, second, rest] = &block.six_bits;
    for output in 0..PANEL {
        let (d, dmin) = (block.d[output].to_f32(), block.dmin[output].to_f32());
        let (first, second, rest) = (first[output], second[output], rest[output]);
        for i in 0..4 {
            // The upper four sub-blocks' two highest bits are the lower four's spare ones.
            let (scale, min) = (first[i] & 63, second[i] & 63);
            unpacked.scales[i][output] = d * f32::from(scale);
            unpacked.mins[i][output] = dmin * f32::from(min);
            let scale = (rest[i] & 15) | (first[i] >> 6 << 4);
            let min = (rest[i] >> 4) | (second[i] >> 6 << 4);
            unpacked.scales[4 + i][output] = d * f32::from(scale);
            unpacked.mins[4 + i][output] = dmin * f32::from(min);
        }
    }
}

/// Adds the product of a tile of rows with a panel of outputs.
pub(super) fn add_product<const R: usize>(
    panel: &[Unpacked],
    x: &[RowBlock<R>],
    sums: &mut [[f32; PANEL]; R],
) {
    for (panel, x) in panel.iter().zip(x) {
        for sub_block in 0..SUB_BLOCKS {
            let weights = &panel.weights[sub_block];
            for (row, sums) in sums.iter_mut().enumerate() {
                let counts = counts(weights, &x.values[sub_block][row]);
                let (scale, sum) = (x.scales[sub_block][row], x.sums[sub_block][row]);
                for (output, total) in sums.iter_mut().enumerate() {
                    let product = panel.scales[sub_block][output] * scale * counts[output];
                    *total += product - panel.mins[sub_block][output] * sum;
                }
            }
        }
    }
}

/// `Σ q · v` for each output of a sub-block.
#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "at most 32 · 15 · 127, which is exact in f32")]
fn counts(weights: &[[Four<u8>; PANEL]; FOURS], values: &[Four<i8>; FOURS]) -> [f32; PANEL] {
    let mut counts = [0_i32; PANEL];
    for (weights, values) in weights.iter().zip(values) {
        for (count, weights) in counts.iter_mut().zip(weights) {
            let products = weights.iter().zip(values).map(|(q, v)| i32::from(*q) * i32::from(*v));
            *count += products.sum::<i32>();
        }
    }
    counts.map(|count| count as f32)
}
