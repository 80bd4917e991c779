//! Transposes of small squares, with which matrices are laid out: registers run along the rows of a
//! file, and are to run along the outputs.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpackhi_epi32, _mm_unpacklo_epi8,
    _mm_unpacklo_epi16, _mm_unpacklo_epi32,
};

use half::{bf16, f16};

/// A number of which squares of `N` rows are transposed: as many as a register of 16 bytes holds.
pub(crate) trait Square<const N: usize>: Copy {
    /// `out[column][row]` of `rows[row][column]`.
    fn transposed(rows: [[Self; N]; N]) -> [[Self; N]; N];
}

/// Pairing each row with the one half a square later, number by number, as often as halving the
/// square goes, transposes it.
macro_rules! square {
    ($number:ty, $n:literal, $low:ident, $high:ident) => {
        impl Square<$n> for $number {
            #[inline(always)]
            fn transposed(rows: [[Self; $n]; $n]) -> [[Self; $n]; $n] {
                #[cfg(target_arch = "x86_64")]
                {
                    let mut rows: [__m128i; $n] = rows.map(bytemuck::cast);
                    for _ in 0..const { usize::ilog2($n) } {
                        let old = rows;
                        for i in 0..const { $n >> 1 } {
                            let (a, b) = (old[i], old[i + const { $n >> 1 }]);
                            #[expect(
                                unsafe_code,
                                reason = "an intrinsic of the base instruction set"
                            )]
                            // SAFETY: every processor of x86-64 has SSE2.
                            unsafe {
                                (rows[2 * i], rows[2 * i + 1]) = ($low(a, b), $high(a, b));
                            }
                        }
                    }
                    rows.map(bytemuck::cast)
                }
                #[cfg(not(target_arch = "x86_64"))]
                std::array::from_fn(|column| rows.map(|row| row[column]))
            }
        }
    };
}

square!(u8, 16, _mm_unpacklo_epi8, _mm_unpackhi_epi8);
square!(u16, 8, _mm_unpacklo_epi16, _mm_unpackhi_epi16);
square!(u32, 4, _mm_unpacklo_epi32, _mm_unpackhi_epi32);
square!(f32, 4, _mm_unpacklo_epi32, _mm_unpackhi_epi32);

/// Squares of numbers that are kept in the bits of others.
macro_rules! square_of_bits {
    ($number:ty, $n:literal) => {
        impl Square<$n> for $number {
            #[inline(always)]
            fn transposed(rows: [[Self; $n]; $n]) -> [[Self; $n]; $n] {
                Square::transposed(rows.map(|row| row.map(<$number>::to_bits)))
                    .map(|row| row.map(<$number>::from_bits))
            }
        }
    };
}

square_of_bits!(bf16, 8);
square_of_bits!(f16, 8);

/// `out[k · rows.len() + row] = rows[row][k]` for the first `depth` numbers of all rows.
#[inline(always)]
pub(crate) fn transpose<T: Square<N>, const N: usize, const WIDTH: usize>(
    rows: &[[T; WIDTH]],
    depth: usize,
    out: &mut [T],
) {
    let count = rows.len();
    let (squares, rest) = rows.as_chunks::<N>();
    let whole = depth - depth % N;
    for (i, rows) in squares.iter().enumerate() {
        for k in (0..whole).step_by(N) {
            let square = rows.each_ref().map(|row| match row[k..].first_chunk::<N>() {
                Some(part) => *part,
                None => [row[k]; N],
            });
            for (j, part) in T::transposed(square).iter().enumerate() {
                out[(k + j) * count + i * N..][..N].copy_from_slice(part);
            }
        }
        for k in whole..depth {
            for (j, row) in rows.iter().enumerate() {
                out[k * count + i * N + j] = row[k];
            }
        }
    }
    for (j, row) in rest.iter().enumerate() {
        for (out, x) in out[squares.len() * N + j..].iter_mut().step_by(count).zip(&row[..depth]) {
            *out = *x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T, const N: usize>(number: impl Fn(usize) -> T)
    where
        T: Square<N> + PartialEq + std::fmt::Debug,
    {
        const WIDTH: usize = 40;
        for (count, depth) in [(1, 1), (5, 3), (16, 40), (33, 39), (48, 17), (7, 40)] {
            let rows: Vec<[T; WIDTH]> =
                (0..count).map(|row| std::array::from_fn(|k| number(row * WIDTH + k))).collect();
            let mut out = vec![number(9999); depth * count];
            transpose(&rows, depth, &mut out);
            for k in 0..depth {
                for row in 0..count {
                    assert_eq!(out[k * count + row], number(row * WIDTH + k), "{row} {k}");
                }
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        check(|i| u8::try_from(i % 251).unwrap());
        check(|i| u16::try_from(i).unwrap());
        check(|i| u32::try_from(i).unwrap());
        check(|i| f32::from(u16::try_from(i).unwrap()));
        check(|i| bf16::from_bits(u16::try_from(i).unwrap()));
        check(|i| f16::from_bits(u16::try_from(i).unwrap()));
    }
}
