//! From numbers to bytes of a type.

use candle_core::{Device, Result as TensorResult, Tensor, quantized::QTensor};
use half::{bf16, f16};

use super::types::WriteType;

/// Largest magnitude of e4m3.
pub(super) const FP8_MAX: f32 = 448.0;
/// Largest magnitude of f16, which scales of blocks are kept in.
const F16_MAX: f32 = 65_504.0;

/// What numbers cannot be written as they are wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    /// Not a number, or infinite.
    NotFinite(f32),
    /// Beyond the type's range.
    Range(f32),
}

/// The first number that `kind` cannot hold.
pub(super) fn fault(kind: WriteType, numbers: &[f32]) -> Option<Fault> {
    let limit = match kind {
        WriteType::F32 | WriteType::Bf16 | WriteType::Fp8 => f32::MAX,
        _ => F16_MAX,
    };
    if numbers.iter().all(|x| x.abs() <= limit) {
        return None;
    }
    let odd = numbers.iter().copied().find(|x| !x.is_finite());
    let largest = numbers.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    Some(odd.map_or(Fault::Range(largest), Fault::NotFinite))
}

/// Numbers as bytes of `kind`; for blocks they are whole blocks, for fp8 they are divided by
/// `scale` first.
///
/// # Errors
/// A failure of the quantizer.
pub(super) fn encode(kind: WriteType, numbers: Vec<f32>, scale: f32) -> TensorResult<Vec<u8>> {
    Ok(match kind {
        WriteType::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        WriteType::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        WriteType::Bf16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        WriteType::Fp8 => numbers.iter().map(|x| e4m3(x / scale)).collect(),
        kind => {
            let Some(dtype) = kind.blocks() else { return Ok(Vec::new()) };
            if numbers.is_empty() {
                return Ok(Vec::new());
            }
            let count = numbers.len();
            let row = Tensor::from_vec(numbers, count, &Device::Cpu)?;
            QTensor::quantize(&row, dtype)?.data()?.into_owned()
        }
    })
}

/// The nearest number of four bits of exponent with bias 7 and three of fraction, ties to even;
/// what is too large becomes the largest.
pub(super) fn e4m3(value: f32) -> u8 {
    const SMALLEST_NORMAL: f32 = 0.015_625; // 2⁻⁶
    const STEPS_BELOW: f32 = 512.0; // numbers below it are 2⁻⁹ apart
    const LARGEST: u8 = 0x7e;
    let magnitude = value.abs();
    let code = if magnitude >= FP8_MAX {
        LARGEST
    } else if magnitude < SMALLEST_NORMAL {
        small(magnitude * STEPS_BELOW)
    } else {
        // The exponent of an f32 has bias 127; three bits of fraction remain of its 23.
        let exponent = magnitude.to_bits() >> 23;
        let fraction = f32::from_bits((magnitude.to_bits() & 0x007f_ffff) | 0x3f80_0000) - 1.0;
        let base = u8::try_from((exponent + 7).saturating_sub(127)).unwrap_or(0) << 3;
        (base + small(fraction * 8.0)).min(LARGEST) // eight eighths carry into the exponent
    };
    code | (u8::from(value.is_sign_negative()) << 7)
}

/// A number from 0 to 8, rounded to a whole one, ties to even.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is 0 to 8")]
fn small(number: f32) -> u8 {
    number.round_ties_even().clamp(0.0, 8.0) as u8
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::weights::float8::Float8;

    #[test]
    fn e4m3_is_the_nearest_number() {
        let table = Float8::of(Dtype::F8_E4M3).unwrap();
        let bytes: Vec<u8> = (0..0x7f).collect();
        let values = table.scaled(&bytes, 1.0);
        for (code, value) in (0..).zip(&values) {
            assert_eq!(e4m3(*value), code, "{value}");
            assert_eq!(e4m3(-value), code | 0x80, "-{value}");
        }
        for (code, pair) in (0_u8..).zip(values.windows(2)) {
            let middle = f32::midpoint(pair[0], pair[1]);
            let even = code + (code & 1);
            assert_eq!(e4m3(middle), even, "{middle}");
            assert_eq!(e4m3(middle.next_down()), code, "below {middle}");
            assert_eq!(e4m3(middle.next_up()), code + 1, "above {middle}");
        }
        assert_eq!((e4m3(1e9), e4m3(-1e9), e4m3(1e-30)), (0x7e, 0xfe, 0));
    }

    #[test]
    fn what_a_type_cannot_hold_is_found() {
        assert_eq!(fault(WriteType::F16, &[1.0, -65_504.0]), None);
        assert_eq!(fault(WriteType::F16, &[1.0, -65_505.0]), Some(Fault::Range(65_505.0)));
        assert_eq!(fault(WriteType::Bf16, &[1.0, 1e30]), None);
        assert_eq!(fault(WriteType::Q4K, &[1e6]), Some(Fault::Range(1e6)));
        let odd = fault(WriteType::F32, &[1.0, f32::NEG_INFINITY, f32::NAN]);
        assert_eq!(odd, Some(Fault::NotFinite(f32::NEG_INFINITY)));
        assert!(matches!(fault(WriteType::F32, &[f32::NAN]), Some(Fault::NotFinite(_))));
    }
}
