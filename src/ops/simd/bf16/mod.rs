//! Attention over tiles whose products are those of bf16 numbers with float32 sums, on processors
//! with AVX-512 BF16. Softmax and sums are float32.
//!
//! The instruction multiplies pairs of neighbours and adds both products, so that keys and queries
//! are packed in pairs along the head, weights and values in pairs of keys. Registers hold queries
//! across and keys (or the head's dimensions) down, so that the running maximum and sum are plain
//! vectors.

use super::transpose::Square;

#[cfg(target_arch = "x86_64")]
mod attend;
#[cfg(target_arch = "x86_64")]
mod packing;
#[cfg(target_arch = "x86_64")]
mod registers;

/// Two numbers as bf16, the first in the low half.
pub(crate) type Pair = u32;

/// Numbers in a register.
const LANES: usize = 16;
/// Registers across in a tile.
const VECTORS: usize = 3;
/// Keys, or dimensions of the head, in a register tile: 8 × 3 sums fit into 32 registers.
const ROWS: usize = 8;
/// Keys whose weights are held at a time: the sums are read and written once for them. Weights of more
/// than 256 keys, 24 KB, gained nothing; those of 128 lost 1 %.
const KEYS: usize = 256;
/// Rows and columns of a square that is transposed.
const SQUARE: usize = 4;
/// Queries of a tile.
pub(crate) const QUERIES: usize = VECTORS * LANES;

/// A row of a tile: a number, or a pair, for each query.
type Columns<T> = [[T; LANES]; VECTORS];

/// How the rows of a stream's queries or keys become what is multiplied: normalised by their root
/// mean square, weighted, and neighbouring pairs rotated.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for x86 only"))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Preparation<'a> {
    /// The norm's weight, `[dim]`.
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    /// What all numbers are multiplied with.
    pub(crate) factor: f32,
}

/// Keys and values of one head, and what is computed from them; reused from head to head.
#[derive(Debug, Default)]
pub(crate) struct Head {
    /// `[tile of keys][pair of dims][key]`.
    keys: Vec<[Pair; ROWS]>,
    /// `[tile of dims][pair of keys][dim]`.
    values: Vec<[Pair; ROWS]>,
    /// `[pair of dims][query]`.
    queries: Vec<Columns<Pair>>,
    /// `[key][query]` of one tile of keys.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for x86 only"))]
    scores: [Columns<f32>; ROWS],
    /// `[pair of keys][query]` of [`KEYS`] keys.
    weights: Vec<Columns<Pair>>,
    /// `[dim][query]`.
    sums: Vec<Columns<f32>>,
    /// `[query][dim]`.
    results: Vec<f32>,
    /// `[key][pair of dims]` of one tile of keys.
    key_rows: Vec<Pair>,
    /// `[query][pair of dims]`.
    query_rows: Vec<Pair>,
    count: usize,
}

impl Head {
    /// Whether heads of this width can be attended to on this machine.
    pub(crate) fn supports(dim: usize) -> bool {
        dim > 0 && dim.is_multiple_of(ROWS) && is_supported()
    }

    /// Makes room for `count` keys and values of a head of `dim`, which [`Self::supports`] allows.
    pub(crate) fn begin(&mut self, count: usize, dim: usize) {
        assert!(Self::supports(dim), "a head of {dim} on a machine that cannot");
        let padded = count.next_multiple_of(ROWS);
        let half = dim >> 1;
        self.count = count;
        self.key_rows.resize(ROWS * half, 0);
        self.query_rows.resize(QUERIES * half, 0);
        self.keys.resize(padded.div_euclid(ROWS) * half, [0; ROWS]);
        self.values.resize(dim.div_euclid(ROWS) * (padded >> 1), [0; ROWS]);
        // Values that are not there have the weight 0, but what was left there may be NaN.
        for tile in self.values.chunks_exact_mut((padded >> 1).max(1)) {
            tile[count >> 1..].fill([0; ROWS]);
        }
        self.queries.resize(half, [[0; LANES]; VECTORS]);
        self.weights.resize(KEYS >> 1, [[0; LANES]; VECTORS]);
        self.sums.resize(dim, [[0.0; LANES]; VECTORS]);
        self.results.resize(QUERIES * dim, 0.0);
    }

    /// Packs key `i`, with the cosines and sines of its angles, `[dim / 2]`. Keys come one after the
    /// other.
    pub(crate) fn set_key(&mut self, i: usize, x: &[f32], turn: [&[f32]; 2], how: Preparation<'_>) {
        let (half, row) = (self.queries.len(), i % ROWS);
        prepare(x, turn, how, &mut self.key_rows[row * half..][..half]);
        let is_last = i + 1 == self.count;
        if is_last {
            // Copies of the last key, which do not change the largest score, fill its tile.
            for missing in row + 1..ROWS {
                self.key_rows.copy_within(row * half..(row + 1) * half, missing * half);
            }
        }
        if is_last || row + 1 == ROWS {
            let tile = &mut self.keys[i.div_euclid(ROWS) * half..][..half];
            transpose(&self.key_rows, tile.as_flattened_mut(), ROWS);
        }
    }

    /// Packs the values `2 · pair` and, where it is there, `2 · pair + 1`.
    pub(crate) fn set_values(&mut self, pair: usize, first: &[f32], second: Option<&[f32]>) {
        let pairs = self.count.next_multiple_of(ROWS) >> 1;
        // What stands for a neighbour that is not there gets no weight.
        pack_values(first, second.unwrap_or(first), &mut self.values[pair..], pairs);
    }

    /// Packs the query of lane `lane`, of [`QUERIES`].
    pub(crate) fn set_query(
        &mut self,
        lane: usize,
        x: &[f32],
        turn: [&[f32]; 2],
        how: Preparation<'_>,
    ) {
        let half = self.queries.len();
        prepare(x, turn, how, &mut self.query_rows[lane * half..][..half]);
    }

    /// Attends from the packed queries to all keys. Scores are `q · k` and the weights `2^score`,
    /// so that the queries' factor holds the scale and log₂ e.
    pub(crate) fn attend(&mut self) {
        let queries = self.queries.as_flattened_mut().as_flattened_mut();
        transpose(&self.query_rows, queries, QUERIES);
        attend(self);
        let sums = self.sums.as_flattened().as_flattened();
        transpose(sums, &mut self.results, self.sums.len());
    }

    /// The attended values of lane `lane`.
    pub(crate) fn store(&self, lane: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.results[lane * out.len()..][..out.len()]);
    }
}

/// `out[column][row]` of `x[row][column]`, `rows` of each; both sides are multiples of [`SQUARE`].
fn transpose<T: Square<SQUARE>>(x: &[T], out: &mut [T], rows: usize) {
    let columns = x.len().div_euclid(rows);
    for (i, x) in x.chunks_exact(SQUARE * columns).enumerate() {
        let [x0, x1, x2, x3] = [0, 1, 2, 3].map(|j| x[j * columns..].as_chunks::<SQUARE>().0);
        let bands = out.chunks_exact_mut(SQUARE * rows);
        for (band, (((x0, x1), x2), x3)) in bands.zip(x0.iter().zip(x1).zip(x2).zip(x3)) {
            let square = T::transposed([*x0, *x1, *x2, *x3]);
            for (out, column) in band.chunks_exact_mut(rows).zip(&square) {
                out[i * SQUARE..][..SQUARE].copy_from_slice(column);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn is_supported() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use {
    attend::attend,
    packing::{pack_values, prepare},
};

#[cfg(not(target_arch = "x86_64"))]
fn prepare(_: &[f32], _: [&[f32]; 2], _: Preparation<'_>, _: &mut [Pair]) {
    unreachable!("a head is packed only where the instructions are");
}

#[cfg(not(target_arch = "x86_64"))]
fn pack_values(_: &[f32], _: &[f32], _: &mut [[Pair; ROWS]], _: usize) {
    unreachable!("a head is packed only where the instructions are");
}

#[cfg(not(target_arch = "x86_64"))]
fn attend(_: &mut Head) {
    unreachable!("a head is packed only where the instructions are");
}
