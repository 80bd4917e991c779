//! Matrices as they lie in files, for layouts that are made from a file's bytes without a copy in
//! between.

use std::{borrow::Cow, ops::Range};

use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{BlockFormat, Float8};

/// The type of the numbers in a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Numbers {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// Eight bits, each number times the scale.
    Float8(Float8, f32),
    /// Blocks of quantized numbers.
    Blocks(BlockFormat),
}

/// How a matrix is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// In the type of the file.
    Stored,
    /// In single precision.
    F32,
    /// In half precision.
    F16,
    /// In the upper half of single precision.
    Bf16,
    /// In blocks of 32 numbers with 8 bits each, where rows are a multiple of that; as stored
    /// otherwise.
    Q8_0,
    /// In super-blocks of 256 numbers with 4 bits each, where rows are a multiple of that; as
    /// [`Kept::Q8_0`] otherwise.
    Q4K,
}

impl Kept {
    /// Whether a plain matrix that is not quantized keeps its type.
    pub(super) fn is_as_stored(self) -> bool {
        matches!(self, Self::Stored | Self::Q8_0 | Self::Q4K)
    }
}

impl Numbers {
    /// How many numbers stand together, and their bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Float8(..) => (1, 1),
            Self::Blocks(format) => (format.numbers(), format.bytes()),
        }
    }

    /// The numbers of `bytes` in single precision; `out` has as many. Blocks are not widened.
    pub(super) fn widen(self, bytes: &[u8], out: &mut [f32]) {
        /// Halves that are widened at a time.
        const PIECE: usize = 256;
        match self {
            Self::F32 => {
                let numbers = bytes.as_chunks().0.iter();
                out.iter_mut().zip(numbers).for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
            }
            Self::Bf16 => {
                for (x, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *x = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
            Self::F16 => {
                let mut halves = [f16::ZERO; PIECE];
                for (out, bytes) in out.chunks_mut(PIECE).zip(bytes.chunks(2 * PIECE)) {
                    let halves = &mut halves[..out.len()];
                    for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                        *half = f16::from_le_bytes(*bytes);
                    }
                    halves.convert_to_f32_slice(out);
                }
            }
            Self::Float8(kind, scale) => kind.widen(bytes, scale, out),
            Self::Blocks(_) => {}
        }
    }
}

/// A matrix `[out, width]` in the bytes of files: whole rows, one piece after the other.
#[derive(Debug)]
pub struct MatrixBytes<'a> {
    numbers: Numbers,
    pieces: Vec<&'a [u8]>,
    dims: [usize; 2],
    row_bytes: usize,
}

impl<'a> MatrixBytes<'a> {
    /// `None` where the pieces are not whole rows, or not as many as the matrix has; a matrix
    /// without numbers is none.
    #[must_use]
    pub fn new(numbers: Numbers, pieces: Vec<&'a [u8]>, dims: [usize; 2]) -> Option<Self> {
        let [out, width] = dims;
        let (block, bytes) = numbers.block();
        let row_bytes = width.div_euclid(block) * bytes;
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        let whole = width.is_multiple_of(block)
            && row_bytes > 0
            && out > 0
            && out.checked_mul(row_bytes) == Some(total)
            && pieces.iter().all(|piece| piece.len().is_multiple_of(row_bytes));
        whole.then_some(Self { numbers, pieces, dims, row_bytes })
    }

    pub(super) fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Rows and columns.
    pub(super) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// The bytes of the numbers at `columns` of a row; not for blocks.
    pub(super) fn part_of_row(&self, row: usize, columns: Range<usize>) -> &'a [u8] {
        let mut skipped = row * self.row_bytes;
        for piece in &self.pieces {
            if skipped < piece.len() {
                let (_, bytes) = self.numbers.block();
                return &piece[skipped..][columns.start * bytes..columns.end * bytes];
            }
            skipped -= piece.len();
        }
        &[]
    }

    /// The bytes of `rows`; a copy of them only where they lie in two pieces.
    pub(super) fn rows(&self, rows: Range<usize>) -> Cow<'a, [u8]> {
        let mut skipped = rows.start * self.row_bytes;
        let mut wanted = rows.len() * self.row_bytes;
        let mut found = Cow::Borrowed(&[][..]);
        for piece in &self.pieces {
            let part = piece.get(skipped..).unwrap_or_default();
            skipped = skipped.saturating_sub(piece.len());
            let part = &part[..part.len().min(wanted)];
            wanted -= part.len();
            if found.is_empty() {
                found = Cow::Borrowed(part);
            } else if !part.is_empty() {
                found.to_mut().extend_from_slice(part);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{
        DType, Device, Tensor,
        quantized::{GgmlDType, QTensor},
    };

    use super::*;
    use crate::ops::{LinearWeight, PackedLinear};

    #[test]
    fn rows_are_found_in_every_piece() {
        let bytes: Vec<u8> = (0..60).collect();
        for cuts in [vec![60], vec![12, 48], vec![24, 12, 24], vec![0, 60], vec![12; 5]] {
            let mut rest = bytes.as_slice();
            let mut pieces = Vec::new();
            for len in cuts {
                let (piece, after) = rest.split_at(len);
                pieces.push(piece);
                rest = after;
            }
            let matrix = MatrixBytes::new(Numbers::Bf16, pieces, [5, 6]).unwrap();
            for start in 0..5 {
                for end in start..=5 {
                    assert_eq!(*matrix.rows(start..end), bytes[12 * start..12 * end]);
                }
            }
        }
    }

    #[test]
    fn what_is_no_whole_matrix_is_none() {
        let bytes = [0; 96];
        let whole = |numbers, len: usize, dims| {
            MatrixBytes::new(numbers, vec![&bytes[..len]], dims).is_some()
        };
        assert!(whole(Numbers::F32, 96, [2, 12]) && whole(Numbers::F16, 96, [4, 12]));
        assert!(whole(Numbers::Blocks(BlockFormat::Q8_0), 68, [2, 32]));
        assert!(!whole(Numbers::Blocks(BlockFormat::Q8_0), 68, [2, 33]));
        assert!(!whole(Numbers::F32, 92, [2, 12]) && !whole(Numbers::F32, 96, [0, 12]));
        assert!(!whole(Numbers::F32, 0, [2, 0]) && !whole(Numbers::F32, 0, [usize::MAX, 0]));
        assert!(!whole(Numbers::F32, 96, [usize::MAX, 12]));
        let halves = vec![&bytes[..40], &bytes[40..]];
        assert!(MatrixBytes::new(Numbers::F32, halves, [2, 12]).is_none());
    }

    const OUT: usize = 50;
    const WIDTH: usize = 512;

    fn number(i: usize) -> f32 {
        f32::from(u16::try_from(i * 7919 % 4099).unwrap()) / 2048.0 - 1.0
    }

    fn numbers() -> Tensor {
        let numbers: Vec<f32> = (0..OUT * WIDTH).map(number).collect();
        Tensor::from_vec(numbers, (OUT, WIDTH), &Device::Cpu).unwrap()
    }

    /// What a layer makes of a few rows, to the bit.
    fn product(weight: LinearWeight) -> Vec<u32> {
        let x: Vec<f32> = (0..3 * WIDTH).map(|i| number(i * 31 + 5)).collect();
        let x = Tensor::from_vec(x, (3, WIDTH), &Device::Cpu).unwrap();
        let y = PackedLinear::new(weight, None).unwrap().forward(&x).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|y| y.to_bits()).collect()
    }

    fn of_file(numbers: Numbers, bytes: &[u8], kept: Kept) -> Option<LinearWeight> {
        // Two pieces, of which the second begins within a panel, at an odd address.
        let (first, second) = bytes.split_at(bytes.len().div_euclid(OUT) * 19);
        let odd = [&[0], second].concat();
        let matrix = MatrixBytes::new(numbers, vec![first, &odd[1..]], [OUT, WIDTH]).unwrap();
        LinearWeight::of_file(&matrix, kept).unwrap()
    }

    #[test]
    fn a_matrix_of_a_file_is_the_one_of_its_tensor() {
        let wide = numbers();
        let plain = |dtype| wide.to_dtype(dtype).unwrap();
        let bytes = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let halves = |x: &Tensor| -> Vec<u8> {
            let bits: Vec<u16> = match x.dtype() {
                DType::F16 => x
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f16>()
                    .unwrap()
                    .iter()
                    .map(|x| x.to_bits())
                    .collect(),
                _ => x
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<bf16>()
                    .unwrap()
                    .iter()
                    .map(|x| x.to_bits())
                    .collect(),
            };
            bits.iter().flat_map(|x| x.to_le_bytes()).collect()
        };
        let e4m3: Vec<u8> = (0..OUT * WIDTH).map(|i| u8::try_from(i * 37 % 120).unwrap()).collect();
        let mut scaled = vec![0.0; e4m3.len()];
        Float8::E4M3.widen(&e4m3, 0.01, &mut scaled);
        let scaled = Tensor::from_vec(scaled, (OUT, WIDTH), &Device::Cpu).unwrap();
        let float8 = Numbers::Float8(Float8::E4M3, 0.01);
        for (numbers, tensor, bytes) in [
            (Numbers::F32, wide.clone(), bytes(&values(&wide))),
            (Numbers::F16, plain(DType::F16), halves(&plain(DType::F16))),
            (Numbers::Bf16, plain(DType::BF16), halves(&plain(DType::BF16))),
            (float8, scaled, e4m3),
        ] {
            let dense = |dtype| LinearWeight::Dense(tensor.to_dtype(dtype).unwrap());
            for (kept, expected) in [
                (Kept::Stored, LinearWeight::Dense(tensor.clone())),
                (Kept::F32, dense(DType::F32)),
                (Kept::F16, dense(DType::F16)),
                (Kept::Bf16, dense(DType::BF16)),
                (Kept::Q8_0, LinearWeight::q8_0(&tensor).unwrap()),
                (Kept::Q4K, LinearWeight::q4_k(&tensor).unwrap()),
            ] {
                let found = of_file(numbers, &bytes, kept).unwrap();
                assert_eq!(product(found), product(expected), "{numbers:?} {kept:?}");
            }
        }
        let q8_0 = QTensor::quantize(&wide, GgmlDType::Q8_0).unwrap();
        let bytes = q8_0.data().unwrap().into_owned();
        let blocks = Numbers::Blocks(BlockFormat::Q8_0);
        let expected = product(LinearWeight::Quantized(Arc::new(q8_0)));
        for kept in [Kept::Stored, Kept::Q8_0, Kept::Q4K] {
            assert_eq!(product(of_file(blocks, &bytes, kept).unwrap()), expected);
        }
        assert!(of_file(blocks, &bytes, Kept::F32).is_none(), "blocks are not widened here");
    }

    #[test]
    fn halves_that_stay_are_not_asked_for() {
        let bytes = vec![0; 2 * OUT * WIDTH];
        let is_narrow = |kept| {
            let weight = of_file(Numbers::Bf16, &bytes, kept).unwrap();
            PackedLinear::new(weight, None).unwrap().is_narrow()
        };
        assert!(!is_narrow(Kept::Stored) && !is_narrow(Kept::F32));
        assert!(is_narrow(Kept::Bf16) && is_narrow(Kept::Q8_0));
    }
}
