//! The normal numbers of PyTorch's CUDA generator, computed on the host.

use super::rounded;

const THREADS_PER_BLOCK: u64 = 256;
/// Normal numbers that one call of the generator gives each thread.
const UNROLL: u64 = 4;

/// How many threads PyTorch starts at most for a random tensor.
///
/// Tensors with no more elements than threads are the same on every device; beyond that a thread
/// draws several elements and the number of threads decides which.
///
/// Reference: <https://github.com/pytorch/pytorch/blob/v2.8.0/aten/src/ATen/native/cuda/DistributionTemplates.h#L47-L88>.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CudaGrid {
    blocks_max: Option<u64>,
}

impl CudaGrid {
    /// A device with a thread for every element: what programs that imitate the CUDA generator on
    /// the host assume.
    pub const UNLIMITED: Self = Self { blocks_max: None };

    /// A real device, by its number of multiprocessors and the threads each of them holds
    /// (132 and 2048 for an H100 SXM, 128 and 1536 for an RTX 4090).
    #[must_use]
    #[expect(clippy::integer_division, reason = "blocks that fit whole on a multiprocessor")]
    pub fn of_device(multiprocessors: u32, threads_per_multiprocessor: u32) -> Self {
        let blocks = u64::from(threads_per_multiprocessor) / THREADS_PER_BLOCK;
        Self { blocks_max: Some((u64::from(multiprocessors) * blocks).max(1)) }
    }

    /// Threads that are started for `count` elements.
    fn threads(self, count: u64) -> u64 {
        let blocks = count.div_ceil(THREADS_PER_BLOCK);
        THREADS_PER_BLOCK * self.blocks_max.map_or(blocks, |max| blocks.min(max))
    }
}

/// `torch.Generator("cuda")`, for `torch.randn` in float32.
///
/// The device takes sine and cosine from its fast, less accurate units, so single values differ
/// from a device's by up to about 1e-5.
///
/// Reference: `curand_normal4` of cuRAND, with the counters that [`CudaGrid`] describes.
///
/// ```
/// use pentimento::diffusion::noise::{CudaGenerator, CudaGrid};
///
/// let noise = CudaGenerator::new(10, CudaGrid::UNLIMITED).standard_normal(3);
/// assert!((noise[0] + 0.1029).abs() < 1e-4 && (noise[1] - 1.6810).abs() < 1e-4);
/// ```
#[derive(Debug, Clone)]
pub struct CudaGenerator {
    seed: u64,
    grid: CudaGrid,
    /// Calls of the block cipher that earlier draws have used, in every thread.
    calls_used: u64,
}

impl CudaGenerator {
    /// A generator after `manual_seed(seed)`; all 64 bits count.
    #[must_use]
    pub fn new(seed: u64, grid: CudaGrid) -> Self {
        Self { seed, grid, calls_used: 0 }
    }

    /// The next `count` numbers, as one call of `torch.randn` draws them.
    #[must_use]
    #[expect(
        clippy::integer_division,
        reason = "calls that the thread with the most elements makes"
    )]
    pub fn standard_normal(&mut self, count: usize) -> Vec<f32> {
        if count == 0 {
            return Vec::new();
        }
        let threads = self.grid.threads(count as u64);
        let values = (0..count as u64).map(|element| self.value(element, threads)).collect();
        self.calls_used += (count as u64 - 1) / (threads * UNROLL) + 1;
        values
    }

    /// One element of a tensor that `threads` threads fill. In each turn of the grid every thread
    /// fills one element; a call of the cipher lasts for four turns.
    #[expect(clippy::integer_division, reason = "which turn of the grid an element belongs to")]
    fn value(&self, element: u64, threads: u64) -> f32 {
        let (turn, thread) = (element / threads, element % threads);
        let words = philox(self.calls_used + turn / UNROLL, thread, self.seed);
        match turn % UNROLL {
            0 => box_muller(words[0], words[1]).0,
            1 => box_muller(words[0], words[1]).1,
            2 => box_muller(words[2], words[3]).0,
            _ => box_muller(words[2], words[3]).1,
        }
    }
}

/// Philox 4×32 with ten rounds: `call` and `thread` are the counter, `seed` is the key.
///
/// Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
fn philox(call: u64, thread: u64, seed: u64) -> [u32; 4] {
    const ROUNDS: usize = 10;
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let ([a, b], [c, d]) = (halves(call), halves(thread));
    let (mut counter, mut key) = ([a, b, c, d], halves(seed));
    for _ in 0..ROUNDS {
        let [low_0, high_0] = halves(u64::from(counter[0]) * u64::from(MULTIPLIERS[0]));
        let [low_1, high_1] = halves(u64::from(counter[2]) * u64::from(MULTIPLIERS[1]));
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// The low and the high 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is asked for")]
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Two normal numbers out of two words; the first carries the sine.
fn box_muller(radius_word: u32, angle_word: u32) -> (f32, f32) {
    const STEP: f32 = 1.0 / 4_294_967_296.0;
    const ANGLE_STEP: f32 = STEP * std::f32::consts::TAU;
    // Words are rounded to float32 first, as the device does.
    let u = radius_word as f32 * STEP + STEP / 2.0;
    let v = angle_word as f32 * ANGLE_STEP + ANGLE_STEP / 2.0;
    let radius = rounded((-2.0 * f64::from(u).ln()).sqrt());
    let (sin, cos) = f64::from(v).sin_cos();
    (rounded(sin) * radius, rounded(cos) * radius)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_words() {
        // The known-answer file of the authors' Random123 library, `philox4x32 10`.
        assert_eq!(philox(0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = u64::MAX;
        assert_eq!(philox(ones, ones, ones), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox(0x85a3_08d3_243f_6a88, 0x0370_7344_1319_8a2e, 0x299f_31d0_a409_3822),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// The ends of a tensor of 9,483,264 elements with seed 1, as torch printed them on an A100 and
    /// an H100 in <https://github.com/pytorch/pytorch/issues/143086>.
    #[test]
    fn the_grid_decides_beyond_one_element_per_thread() {
        const COUNT: u64 = 49 * 12 * 112 * 144;
        let check = |multiprocessors, end: [f32; 3]| {
            let grid = CudaGrid::of_device(multiprocessors, 2048);
            let generator = CudaGenerator::new(1, grid);
            let threads = grid.threads(COUNT);
            let value = |element| generator.value(element, threads);
            let found = [0, 1, 2, COUNT - 3, COUNT - 2, COUNT - 1].map(value);
            let expected = [-0.2963, 2.6764, -0.1408, end[0], end[1], end[2]];
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() < 6e-5, "{found:?}, expected {expected:?}");
            }
        };
        check(108, [0.1549, -0.6797, -0.1656]);
        check(132, [-0.6970, -0.7780, 0.3267]);
    }

    #[test]
    fn draws_follow_each_other() {
        let mut generator = CudaGenerator::new(3, CudaGrid::UNLIMITED);
        let first = generator.standard_normal(300);
        let second = generator.standard_normal(300);
        assert_ne!(first, second);
        let words = philox(1, 0, 3);
        assert!((second[0] - box_muller(words[0], words[1]).0).abs() < f32::EPSILON);
        assert!(generator.standard_normal(0).is_empty());
    }
}
