//! Quantizing plain numbers to ggml's blocks while a matrix is laid out.

use std::{borrow::Cow, ops::Range, sync::OnceLock};

use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};
use half::f16;
use pulp::{Arch, Simd, WithSimd};

use super::{BlockFormat, MatrixBytes, PackedBlocks};

/// Numbers of a block of Q8_0, and its bytes: a scale and a byte for each number.
const BLOCK: usize = BlockFormat::Q8_0.numbers();
const BLOCK_BYTES: usize = BlockFormat::Q8_0.bytes();
const LANES: usize = 16;

/// A matrix of plain numbers quantized to `dtype`: panel by panel, so that no more than a panel for
/// each thread is held besides. `None` for types that are no blocks of a file.
pub(super) fn by_panel(matrix: &MatrixBytes<'_>, dtype: GgmlDType) -> Result<Option<PackedBlocks>> {
    let Some(format) = BlockFormat::of(dtype) else { return Ok(None) };
    let failure = OnceLock::new();
    let quantized = |rows| match blocks(matrix, rows, dtype) {
        Ok(bytes) => Cow::Owned(bytes),
        Err(error) => {
            _ = failure.set(error);
            Cow::Borrowed(&[][..])
        }
    };
    let packed = PackedBlocks::from_rows((format, matrix.dims()), quantized);
    failure.into_inner().map_or(Ok(packed), Err)
}

/// The blocks of `rows`.
fn blocks(matrix: &MatrixBytes<'_>, rows: Range<usize>, dtype: GgmlDType) -> Result<Vec<u8>> {
    let [_, width] = matrix.dims();
    let count = rows.len();
    let mut wide = vec![0.0; count * width];
    for (row, wide) in rows.zip(wide.chunks_exact_mut(width)) {
        matrix.numbers().widen(matrix.part_of_row(row, 0..width), wide);
    }
    require_finite(&wide)?;
    if dtype == GgmlDType::Q8_0 {
        let mut blocks = vec![0; wide.len().div_euclid(BLOCK) * BLOCK_BYTES];
        Arch::new().dispatch(Q8_0 { numbers: &wide, blocks: &mut blocks });
        return Ok(blocks);
    }
    let wide = Tensor::from_vec(wide, (count, width), &Device::Cpu)?;
    QTensor::quantize(&wide, dtype)?.data().map(Cow::into_owned)
}

/// Blocks cannot hold what is not finite, and quantizing would make other numbers of it.
///
/// # Errors
/// An infinite number, or NaN.
pub(super) fn require_finite(numbers: &[f32]) -> Result<()> {
    // Without a way out in the middle, so that it is done for several numbers at a time.
    match numbers.iter().fold(false, |odd, x| odd | !x.is_finite()) {
        true => bail!("a number that is not finite"),
        false => Ok(()),
    }
}

/// Candle's blocks of Q8_0, to the bit.
struct Q8_0<'a> {
    numbers: &'a [f32],
    blocks: &'a mut [u8],
}

impl WithSimd for Q8_0<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let numbers = self.numbers.as_chunks::<BLOCK>().0;
        for (x, block) in numbers.iter().zip(self.blocks.as_chunks_mut::<BLOCK_BYTES>().0) {
            let (scale, values) = block.split_at_mut(2);
            let most = largest(x);
            let step = most / 127.0;
            let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
            scale.copy_from_slice(&f16::from_f32(step).to_le_bytes());
            for (value, x) in values.iter_mut().zip(x) {
                *value = rounded(x * inverse).cast_unsigned();
            }
        }
    }
}

/// The largest magnitude; NaN is passed over, as `f32::max` does.
#[inline(always)]
fn largest(x: &[f32; BLOCK]) -> f32 {
    let larger = |most: f32, x: f32| if x > most { x } else { most };
    let mut most = [0.0; LANES];
    for x in x.as_chunks::<LANES>().0 {
        most.iter_mut().zip(x).for_each(|(most, x)| *most = larger(*most, x.abs()));
    }
    most.into_iter().fold(0.0, larger)
}

/// The nearest whole number, halves away from zero, in the range of eight bits; 0 for NaN. As
/// `x.round() as i8`, which calls a function for each number.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "both casts are of numbers in the range of eight bits"
)]
fn rounded(x: f32) -> i8 {
    let clamp = |i: i32| i.clamp(i8::MIN.into(), i8::MAX.into());
    let whole = clamp(x as i32);
    let away = i32::from((x - whole as f32).abs() >= 0.5);
    clamp(if x < 0.0 { whole - away } else { whole + away }) as i8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Numbers;

    #[test]
    fn rounding_is_that_of_the_standard_library() {
        let halves = (-600..600).map(|i: i16| f32::from(i) / 4.0);
        let near = halves.clone().flat_map(|x| [x.next_up(), x.next_down()]);
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.499_999_97, -0.0];
        for x in halves.chain(near).chain(odd) {
            #[expect(clippy::cast_possible_truncation, reason = "what it is compared with")]
            let expected = x.round() as i8;
            assert_eq!(rounded(x), expected, "{x}");
        }
    }

    #[test]
    fn blocks_are_those_of_candle() {
        let (rows, width) = (40, 96);
        let mut numbers: Vec<f32> = (0..rows * width)
            .map(|i| f32::from(u16::try_from(i * 7919 % 4099).unwrap()) / 512.0 - 4.0)
            .collect();
        // A block of zeros, one with an outlier, and tiny ones.
        numbers[..32].fill(0.0);
        numbers[40] = 3.0e9;
        numbers[128..160].iter_mut().for_each(|x| *x *= 1e-37);
        numbers[160..192].fill(f32::from_bits(3));
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let matrix = MatrixBytes::new(Numbers::F32, vec![&bytes], [rows, width]).unwrap();
        let tensor = Tensor::from_vec(numbers, (rows, width), &Device::Cpu).unwrap();
        let expected = QTensor::quantize(&tensor, GgmlDType::Q8_0).unwrap();
        assert_eq!(blocks(&matrix, 0..rows, GgmlDType::Q8_0).unwrap(), &*expected.data().unwrap());
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut numbers = [0.5_f32; 2 * 256];
            numbers[300] = odd;
            let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            let matrix = MatrixBytes::new(Numbers::F32, vec![&bytes], [2, 256]).unwrap();
            for dtype in [GgmlDType::Q8_0, GgmlDType::Q4K] {
                assert!(by_panel(&matrix, dtype).is_err(), "{odd} as {dtype:?}");
                assert!(blocks(&matrix, 0..1, dtype).is_ok());
            }
        }
    }
}
