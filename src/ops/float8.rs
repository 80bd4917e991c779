//! Rows rounded to eight bits, for products of such numbers.

use candle_core::{D, DType, Device, Result, Tensor};

use super::cuda;

/// The largest number of e4m3.
const LARGEST: f32 = 448.0;

/// Each row of `x` as e4m3 bytes and a scale: `x ≈ scale · byte's number`, with the largest of a row at
/// 448. A row of zeros has the scale 1.
///
/// # Shapes
/// `[.., depth]` → bytes `[rows, depth]`, scales `[rows]` in float32.
///
/// # Errors
/// A failure of the device.
pub fn float8_rows(x: &Tensor) -> Result<(Tensor, Tensor)> {
    if let Some(both) = cuda::float8_rows(x)? {
        return Ok(both);
    }
    let depth = x.dim(D::Minus1)?;
    let rows = x.elem_count().checked_div(depth).unwrap_or(0);
    let numbers = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let numbers = numbers.flatten_all()?.to_vec1::<f32>()?;
    let (mut bytes, mut scales) = (Vec::with_capacity(numbers.len()), Vec::with_capacity(rows));
    for row in numbers.chunks(depth.max(1)) {
        // NaN is no maximum, and stays NaN below.
        let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let (scale, factor) = scale(largest);
        scales.push(scale);
        bytes.extend(row.iter().map(|x| e4m3(x * factor)));
    }
    let bytes = Tensor::from_vec(bytes, (rows, depth), x.device())?;
    Ok((bytes, Tensor::from_vec(scales, rows, x.device())?))
}

/// A row's scale and what its numbers are multiplied by.
fn scale(largest: f32) -> (f32, f32) {
    if largest == 0.0 { (1.0, 1.0) } else { (largest / LARGEST, LARGEST / largest) }
}

/// The nearest number of e4m3, ties to even; beyond its range the largest. NaN has no sign.
#[must_use]
pub fn e4m3(x: f32) -> u8 {
    const BIAS_DIFFERENCE: u32 = (127 - 7) << 3;
    const LARGEST_CODE: u32 = 0x7e;
    /// Bits of a float32's fraction that e4m3 does not have.
    const DROPPED: u32 = 20;
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    /// Subnormals are multiples of 2⁻⁹.
    const PER_SUBNORMAL: f32 = 512.0;
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let size = x.abs();
    if size.is_nan() {
        return 0x7f;
    }
    let code = if size < SMALLEST_NORMAL {
        // A small whole number in a float, whose low bits are its own above 2²³.
        const WHOLE: f32 = 8_388_608.0;
        (size * PER_SUBNORMAL + WHOLE).to_bits() & 0xff
    } else {
        let bits = size.to_bits();
        let even = (bits >> DROPPED) & 1;
        let rounded = bits.saturating_add((1 << (DROPPED - 1)) - 1 + even) >> DROPPED;
        (rounded - BIAS_DIFFERENCE).min(LARGEST_CODE)
    };
    sign | u8::try_from(code).unwrap_or(0x7e)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What candle makes of it, which takes its conversion from another crate.
    fn nearest(numbers: &[f32]) -> Vec<f32> {
        let x = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu).unwrap();
        let x = x.to_dtype(DType::F8E4M3).unwrap().to_dtype(DType::F32).unwrap();
        x.to_vec1().unwrap()
    }

    fn value(byte: u8) -> f32 {
        let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
        let size = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => fraction * 2.0_f32.powi(-6),
            _ => (1.0 + fraction) * 2.0_f32.powi(exponent - 7),
        };
        if byte & 0x80 == 0 { size } else { -size }
    }

    #[test]
    fn numbers_become_the_nearest_ones() {
        let mut numbers = vec![0.0, -0.0, 448.0, 464.0, 1e9, f32::INFINITY, f32::MIN_POSITIVE];
        // Every number of e4m3, the middles between neighbours, and what lies just beside those.
        for pair in (0..0x7e_u8).map(|byte| (value(byte), value(byte + 1))) {
            let middle = (pair.0 + pair.1) / 2.0;
            let near = [middle.next_up(), middle.next_down()];
            numbers.extend([pair.0, middle, near[0], near[1], -middle, pair.1]);
        }
        numbers.extend((0..4000_u16).map(|i| (f32::from(i) - 2000.0) * 0.37));
        for (x, expected) in numbers.iter().zip(nearest(&numbers)) {
            let found = value(e4m3(*x));
            assert_eq!(found.to_bits(), expected.to_bits(), "{x}: {found}, not {expected}");
        }
        assert_eq!([e4m3(f32::NAN), e4m3(-f32::NAN)], [0x7f; 2]);
    }

    #[test]
    fn each_row_fills_the_range() {
        let x = Tensor::new(&[[[0.5_f32, -2.0, 0.0]], [[0.0, 0.0, 0.0]]], &Device::Cpu).unwrap();
        let (bytes, scales) = float8_rows(&x).unwrap();
        assert_eq!((bytes.dims(), scales.dims()), (&[2, 3][..], &[2][..]));
        assert_eq!(scales.to_vec1::<f32>().unwrap(), [2.0 / 448.0, 1.0]);
        let bytes = bytes.to_vec2::<u8>().unwrap();
        assert_eq!(
            bytes[0].iter().map(|byte| value(*byte)).collect::<Vec<_>>(),
            [112.0, -448.0, 0.0]
        );
        assert_eq!(bytes[1], [0, 0, 0]);
    }
}
