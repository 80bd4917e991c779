//! Where each token stands: three axes (time, row, column) for the language model's rotary
//! embedding.
//!
//! Follows `get_rope_index` in
//! <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py>.

use std::ops::Range;

use super::preprocess::PatchGrid;

/// The position of one token on the three axes: time, row, column.
pub type Position = [u32; 3];

/// Positions of a whole sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// One per token.
    pub tokens: Vec<Position>,
    /// What all three axes hold for the first token after the sequence.
    pub next: u32,
}

impl Positions {
    /// `0, 1, 2, …` on all three axes: a text without pictures.
    #[must_use]
    pub fn sequential(len: u32) -> Self {
        Self { tokens: (0..len).map(|at| [at; 3]).collect(), next: len }
    }

    /// Positions of a text of `len` tokens with pictures in it. `pictures` holds, in order, the
    /// tokens that each picture takes and its grid of tokens (patches already merged).
    #[must_use]
    pub fn multimodal(len: usize, pictures: &[(Range<usize>, PatchGrid)]) -> Self {
        let mut tokens: Vec<Position> = Vec::with_capacity(len);
        let mut next = 0;
        for (span, grid) in pictures {
            push_text(&mut tokens, &mut next, span.start);
            let (rows, columns) = (0..small(grid.height), 0..small(grid.width));
            for row in rows {
                tokens.extend(columns.clone().map(|column| [next, next + row, next + column]));
            }
            next += small(grid.height.max(grid.width));
        }
        push_text(&mut tokens, &mut next, len);
        Self { tokens, next }
    }

    /// How far the positions after the sequence are from its length: never above zero.
    #[must_use]
    pub fn delta(&self) -> i64 {
        i64::from(self.next) - i64::from(small(self.tokens.len()))
    }
}

/// Text up to token `end`.
fn push_text(tokens: &mut Vec<Position>, next: &mut u32, end: usize) {
    while tokens.len() < end {
        tokens.push([*next; 3]);
        *next += 1;
    }
}

/// A length, which is below the longest sequence.
pub(super) fn small(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_as_long_as_its_longer_side() {
        let grid = PatchGrid { height: 2, width: 3 };
        let positions = Positions::multimodal(9, &[(2..8, grid)]);
        let columns = |axis: usize| positions.tokens.iter().map(|p| p[axis]).collect::<Vec<_>>();
        assert_eq!(columns(0), [0, 1, 2, 2, 2, 2, 2, 2, 5]);
        assert_eq!(columns(1), [0, 1, 2, 2, 2, 3, 3, 3, 5]);
        assert_eq!(columns(2), [0, 1, 2, 3, 4, 2, 3, 4, 5]);
        assert_eq!((positions.next, positions.delta()), (6, -3));
    }

    #[test]
    fn text_alone_counts_up() {
        assert_eq!(Positions::multimodal(4, &[]), Positions::sequential(4));
        assert_eq!(Positions::sequential(4).delta(), 0);
    }
}
