//! Numbers of eight bits: e4m3 without infinities, and e5m2.

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

/// Numbers that a thread widens at least.
const TOGETHER: usize = 1 << 16;

/// What each byte stands for. Every value is exact in bf16.
pub(super) struct Float8([f32; 256]);

impl Float8 {
    /// The numbers of a type; `None` for one that is not of eight bits.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        let value: fn(u8) -> f32 = match dtype {
            Dtype::F8_E4M3 => e4m3,
            Dtype::F8_E5M2 => e5m2,
            _ => return None,
        };
        let mut table = [0.0; 256];
        for (byte, entry) in (0..=u8::MAX).zip(&mut table) {
            *entry = value(byte);
        }
        Some(Self(table))
    }

    /// The numbers of `bytes`.
    pub(super) fn exact(&self, bytes: &[u8]) -> Vec<bf16> {
        let table = self.0.map(bf16::from_f32);
        let bytes = bytes.par_iter().with_min_len(TOGETHER);
        bytes.map(|byte| table[usize::from(*byte)]).collect()
    }

    /// The numbers of `bytes` times `scale`.
    pub(super) fn scaled(&self, bytes: &[u8], scale: f32) -> Vec<f32> {
        let table = self.0.map(|number| number * scale);
        let bytes = bytes.par_iter().with_min_len(TOGETHER);
        bytes.map(|byte| table[usize::from(*byte)]).collect()
    }
}

/// Four bits of exponent with bias 7, three of fraction; all ones is NaN, there is no infinity.
fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (byte >> 3 & 0x0f, byte & 0x07);
    let magnitude = match (exponent, fraction) {
        (0x0f, 0x07) => f32::NAN,
        (0, _) => f32::from(fraction) * 2_f32.powi(-9),
        _ => (1.0 + f32::from(fraction) / 8.0) * 2_f32.powi(i32::from(exponent) - 7),
    };
    signed(byte, magnitude)
}

/// Five bits of exponent with bias 15, two of fraction: the upper half of an f16.
fn e5m2(byte: u8) -> f32 {
    half::f16::from_le_bytes([0, byte]).to_f32()
}

fn signed(byte: u8, magnitude: f32) -> f32 {
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_what_the_formats_say() {
        // Largest, smallest normal, smallest, one, and the odd ones out, as in the OCP's table.
        for (byte, value) in [
            (0x7e, 448.0),
            (0x08, 2_f32.powi(-6)),
            (0x01, 2_f32.powi(-9)),
            (0x38, 1.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(e4m3(byte).to_bits(), f32::to_bits(value), "{byte:02x}");
        }
        for (byte, value) in [
            (0x7b, 57_344.0),
            (0x04, 2_f32.powi(-14)),
            (0x01, 2_f32.powi(-16)),
            (0x3c, 1.0),
            (0x7c, f32::INFINITY),
        ] {
            assert_eq!(e5m2(byte).to_bits(), f32::to_bits(value), "{byte:02x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && e5m2(0x7d).is_nan());
    }

    #[test]
    fn bf16_holds_every_value() {
        for dtype in [Dtype::F8_E4M3, Dtype::F8_E5M2] {
            let table = Float8::of(dtype).unwrap();
            let bytes: Vec<u8> = (0..=255).collect();
            for (exact, value) in table.exact(&bytes).iter().zip(table.0) {
                assert!(exact.to_f32().to_bits() == value.to_bits() || value.is_nan());
            }
        }
    }
}
