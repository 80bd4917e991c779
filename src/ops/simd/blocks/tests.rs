//! Every format and every instruction set against computations in float64.

use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};

use super::*;

const SHAPES: [[usize; 3]; 7] = [
    [1, 256, 1],
    [1, 1536, 70],
    [3, 768, 33],
    [6, 256, 32],
    [17, 512, 20],
    [7, 4608, 40],
    [250, 256, 40],
];

/// Numbers that look random, the same each time: 0 to 65535.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u16 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        u16::from_le_bytes(self.0.to_le_bytes()[4..6].try_into().unwrap())
    }

    /// About normal, with a spread of 1.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| f32::from(self.next()) / 65_536.0).sum();
        sum - 6.0
    }
}

/// Blocks with any bits but small scales.
fn blocks(format: BlockFormat, out: usize, width: usize) -> Vec<u8> {
    let mut noise = Noise(7);
    let count = (out * width).div_euclid(format.numbers());
    let mut bytes: Vec<u8> =
        (0..count * format.bytes()).map(|_| noise.next().to_le_bytes()[0]).collect();
    let (start, halves) = format.parts().halves;
    for block in bytes.chunks_exact_mut(format.bytes()) {
        for half in block[start..][..2 * halves].chunks_exact_mut(2) {
            let number = half::f16::from_f32(0.01 + f32::from(noise.next()) / 1e6);
            half.copy_from_slice(&number.to_le_bytes());
        }
    }
    bytes
}

fn candle_type(format: BlockFormat) -> Option<GgmlDType> {
    Some(match format {
        BlockFormat::Q8_0 => GgmlDType::Q8_0,
        BlockFormat::Q6K => GgmlDType::Q6K,
        BlockFormat::Q5K => GgmlDType::Q5K,
        BlockFormat::Q5_0 => GgmlDType::Q5_0,
        BlockFormat::Q5_1 => GgmlDType::Q5_1,
        BlockFormat::Q4K => GgmlDType::Q4K,
        BlockFormat::Q4_0 => GgmlDType::Q4_0,
        BlockFormat::Q4_1 => GgmlDType::Q4_1,
        BlockFormat::Q3K => GgmlDType::Q3K,
        BlockFormat::Q2K => GgmlDType::Q2K,
        BlockFormat::Iq4Nl | BlockFormat::Iq4Xs => return None,
    })
}

/// The numbers of a matrix as candle reads them, or as the format's definition says.
fn numbers(format: BlockFormat, bytes: &[u8], out: usize, width: usize) -> Vec<f32> {
    if let Some(dtype) = candle_type(format) {
        let storage = QStorage::from_data(bytes.into(), &Device::Cpu, dtype).unwrap();
        let tensor = QTensor::new(storage, (out, width)).unwrap();
        let numbers = tensor.dequantize(&Device::Cpu).unwrap();
        return numbers.flatten_all().unwrap().to_vec1().unwrap();
    }
    const VALUES: [i8; 16] =
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    let mut numbers = Vec::new();
    for block in bytes.chunks_exact(format.bytes()) {
        let d = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
        let high = u16::from_le_bytes([block[2], block[3]]);
        let indices = if format == BlockFormat::Iq4Nl { &block[2..] } else { &block[8..] };
        for (part, indices) in indices.chunks_exact(16).enumerate() {
            let scale = || {
                let low = u16::from(block[4 + (part >> 1)] >> (4 * (part & 1)) & 15);
                f32::from(low | (high >> (2 * part) & 3) << 4) - 32.0
            };
            let scale = if format == BlockFormat::Iq4Nl { d } else { d * scale() };
            for shift in [0, 4] {
                let value = |byte: &u8| f32::from(VALUES[usize::from(byte >> shift & 15)]);
                numbers.extend(indices.iter().map(|byte| scale * value(byte)));
            }
        }
    }
    numbers
}

/// A matrix for each set of instructions, and its numbers.
fn packed(format: BlockFormat, out: usize, width: usize) -> (Vec<PackedBlocks>, Vec<f32>) {
    let bytes = blocks(format, out, width);
    let with = |i| PackedBlocks::with_instructions(format, &bytes, [out, width], i).unwrap();
    let all = Instructions::available().into_iter().map(with).collect();
    (all, numbers(format, &bytes, out, width))
}

fn product(packed: &PackedBlocks, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let (out, width) = packed.dims();
    let mut y = vec![f32::NAN; x.len().div_euclid(width) * out];
    packed.multiply(x, bias, &mut y);
    y
}

/// `x · weightᵀ` and the sums of the products' magnitudes.
fn exact(x: &[f32], weight: &[f32], width: usize) -> Vec<(f64, f64)> {
    let rows = x.chunks_exact(width).flat_map(|x| {
        weight.chunks_exact(width).map(|weight| {
            let products = x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w));
            products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
        })
    });
    rows.collect()
}

#[test]
fn a_packed_matrix_keeps_its_numbers() {
    for format in BlockFormat::ALL {
        let (packed, numbers) = packed(format, 41, 512);
        for packed in packed {
            let rows: Vec<f32> = (0..41).flat_map(|row| packed.row(row)).collect();
            assert_eq!(rows.len(), numbers.len());
            for (i, (ours, theirs)) in rows.iter().zip(&numbers).enumerate() {
                let limit = 4.0 * f32::EPSILON * theirs.abs().max(1.0);
                let name = packed.kernel.instructions;
                assert!((ours - theirs).abs() <= limit, "{format:?} {name:?} {i}: {ours} {theirs}");
            }
        }
    }
}

/// Whole numbers up to the limit with one of that in every block: quantizing them is exact.
#[test]
fn the_product_is_that_of_the_quantized_activations() {
    for [rows, width, out] in SHAPES {
        for format in BlockFormat::ALL {
            let (packed, weight) = packed(format, out, width);
            for packed in &packed {
                let is_q4k_row = rows == 1 && packed.shares_rows();
                let limit =
                    if is_q4k_row { Rounding::WHOLE } else { packed.kernel.rounding().limit };
                let whole = |i: usize| {
                    f32::from(u8::try_from(i * 31 % 255).unwrap()) % f32::from(2 * limit + 1)
                        - f32::from(limit)
                };
                let x: Vec<f32> = (0..rows * width).map(whole).collect();
                let blocks = x.chunks(BLOCK);
                let x: Vec<f32> =
                    blocks.flat_map(|x| [&[f32::from(limit)], &x[1..]].concat()).collect();
                let bias: Vec<f32> = (0..out).map(|i| whole(7 * i)).collect();
                let exact = exact(&x, &weight, width);
                let y = product(packed, &x, Some(&bias));
                for (i, (y, (sum, size))) in y.iter().zip(&exact).enumerate() {
                    let error = (f64::from(*y) - sum - f64::from(bias[i % out])).abs();
                    let name =
                        format!("{format:?} {:?} {rows}×{width}×{out}", packed.kernel.instructions);
                    assert!(error < 1e-6 * (size + 127.0), "{name} at {i}: {error} of {size}");
                }
            }
        }
    }
}

/// Activations as these models have them: one channel in 256 is a hundred times larger, one row is
/// zero, one number is ten thousand.
fn activations(rows: usize, width: usize, outliers: bool) -> Vec<f32> {
    let mut noise = Noise(3);
    let mut x: Vec<f32> = (0..rows * width).map(|_| noise.normal()).collect();
    if outliers {
        x.iter_mut().skip(5).step_by(256).for_each(|x| *x *= 100.0);
        x[width - 1] = 1e4;
        if rows > 1 {
            x[width..2 * width].fill(0.0);
        }
    }
    x
}

/// The rule: the error is at most twice that of rounding each block of 32 activations to 8 bits
/// with a scale of its own. Numbers do not depend on how many threads there are.
#[test]
fn rounding_follows_the_rule() {
    // A few rows may be rounded well by chance, and their errors are much alike for all outputs.
    for [rows, width, out] in [[250, 256, 40], [44, 1536, 33]] {
        for (format, outliers) in BlockFormat::ALL.into_iter().flat_map(|f| [(f, false), (f, true)])
        {
            let x = activations(rows, width, outliers);
            let rounded = x.chunks_exact(BLOCK).flat_map(|x| {
                let step = x.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0;
                let step = if step > 0.0 { step } else { 1.0 };
                x.iter().map(move |x| (x / step).round_ties_even() * step)
            });
            let rounded: Vec<f32> = rounded.collect();
            let (packed, weight) = packed(format, out, width);
            let exact_sums = exact(&x, &weight, width);
            let error = |y: &[f64]| -> f64 {
                let squares = y.iter().zip(&exact_sums).map(|(y, (exact, _))| (y - exact).powi(2));
                squares.sum::<f64>().sqrt()
            };
            let plain = exact(&rounded, &weight, width);
            let plain = error(&plain.iter().map(|(sum, _)| *sum).collect::<Vec<_>>());
            for packed in &packed {
                let name = packed.kernel.instructions;
                let name = format!("{format:?} {name:?} {rows}×{width}×{out}, outliers {outliers}");
                let y = product(packed, &x, None);
                let ours = error(&y.iter().copied().map(f64::from).collect::<Vec<_>>());
                assert!(ours <= 2.0 * plain, "{name}: error {ours}, plain {plain}");
                let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
                assert_eq!(y, pool.install(|| product(packed, &x, None)), "{name} with 3 threads");
            }
        }
    }
}

/// But for Q4_K and Q5_K: with one row the first has a product of its own, and with many rows the
/// minimums of a super-block are multiplied at once.
#[test]
fn a_row_alone_gives_the_numbers_it_gives_among_others() {
    let others = [BlockFormat::Q4K, BlockFormat::Q5K];
    for format in BlockFormat::ALL.into_iter().filter(|format| !others.contains(format)) {
        let x = activations(7, 1536, true);
        for packed in &packed(format, 70, 1536).0 {
            let all = product(packed, &x, None);
            for (x, all) in x.chunks_exact(1536).zip(all.chunks_exact(70)) {
                assert_eq!(
                    product(packed, x, None),
                    all,
                    "{format:?} {:?}",
                    packed.kernel.instructions
                );
            }
        }
    }
}

/// Rows that are rounded once, for formats that need sums and for formats that do not.
#[test]
fn rows_that_several_matrices_share_give_what_each_gives() {
    let x = activations(7, 768, true);
    let formats = [
        BlockFormat::Q8_0,
        BlockFormat::Q4K,
        BlockFormat::Q6K,
        BlockFormat::Q4_1,
        BlockFormat::Q4_0,
    ];
    let packed = formats.map(|format| packed(format, 70, 768).0);
    let rows = DenseRows { x: &x, width: 768 };
    for (i, instructions) in Instructions::available().into_iter().enumerate() {
        for shared in [&[0, 1, 2, 3, 4][..], &[0], &[0, 0], &[1, 3], &[3, 1, 4]] {
            let matrices: Vec<&PackedBlocks> = shared.iter().map(|m| &packed[*m][i]).collect();
            let rounded = PackedBlocks::round(&matrices, &rows).unwrap();
            for matrix in matrices {
                let mut y = vec![f32::NAN; 7 * 70];
                matrix.multiply_rounded(&rounded, None, &mut y, &AsItIs);
                let name = matrix.kernel.format;
                assert_eq!(y, product(matrix, &x, None), "{name:?} {instructions:?} {shared:?}");
            }
        }
    }
    let wider = packed_q8_0(1024);
    assert!(PackedBlocks::round(&[&packed[0][0], &wider], &rows).is_none());
    assert!(PackedBlocks::round(&[], &rows).is_none());
}

fn packed_q8_0(width: usize) -> PackedBlocks {
    PackedBlocks::new(BlockFormat::Q8_0, &blocks(BlockFormat::Q8_0, 4, width), [4, width]).unwrap()
}

#[test]
fn what_is_not_finite_stays_visible() {
    for format in BlockFormat::ALL {
        for packed in &packed(format, 40, 512).0 {
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0; 3 * 512];
                x[512 + 40] = odd;
                let y = product(packed, &x, None);
                assert!(y[40..80].iter().all(|y| !y.is_finite()), "{format:?} {y:?}");
                assert!(y[..40].iter().chain(&y[80..]).all(|y| y.is_finite()), "{format:?} {y:?}");
                let one = product(packed, &x[512..1024], None);
                assert!(one.iter().all(|y| !y.is_finite()), "{format:?} {one:?}");
            }
        }
    }
}

#[test]
fn the_extremes_of_float32_stay_finite() {
    for format in [BlockFormat::Q8_0, BlockFormat::Q4K] {
        for packed in &packed(format, 40, 512).0 {
            for size in [1e-45, 1e-38, 1e-26, 1e-24, 1e30] {
                let mut x = vec![size; 2 * 512];
                x[0] = 0.0;
                x[512..600].fill(1e-30);
                let y = product(packed, &x, None);
                assert!(y.iter().all(|y| y.is_finite()), "{format:?} {size}");
            }
        }
    }
}

#[test]
fn other_bytes_are_refused() {
    for format in BlockFormat::ALL {
        let (numbers, bytes) = (format.numbers(), vec![0; format.bytes()]);
        assert!(PackedBlocks::new(format, &bytes, [1, numbers]).is_some());
        assert!(PackedBlocks::new(format, &bytes, [1, 2 * numbers]).is_none());
        assert!(PackedBlocks::new(format, &bytes, [1, numbers - 1]).is_none());
        assert!(PackedBlocks::new(format, &[], [0, numbers]).is_none());
        assert!(PackedBlocks::new(format, &[], [1, 0]).is_none());
    }
}
