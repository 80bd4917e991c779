//! The normal numbers of PyTorch's CPU generator.

use std::f32::consts::TAU;

use rand_mt::Mt;

use super::rounded;

/// Values that are turned into normal numbers together on the long path.
const GROUP: usize = 16;
const HALF_GROUP: usize = 8;

/// `torch.Generator("cpu")`, for `torch.randn` in float32.
///
/// Fewer than 16 numbers are drawn one by one in float64; 16 and more are drawn in groups in
/// float32, so the first numbers depend on how many are asked for. Logarithm, sine and cosine are
/// rounded correctly here and to a few units in the last place there, so results agree to about
/// 1e-6, not to the bit.
///
/// Reference: <https://github.com/pytorch/pytorch/blob/v2.8.0/aten/src/ATen/native/cpu/DistributionTemplates.h#L96-L209>
/// and <https://github.com/pytorch/pytorch/blob/v2.8.0/aten/src/ATen/core/DistributionsHelper.h#L172-L217>.
///
/// ```
/// use pentimento::diffusion::noise::CpuGenerator;
///
/// let noise = CpuGenerator::new(0).standard_normal(2);
/// assert!((noise[0] - 1.540996).abs() < 1e-6 && (noise[1] + 0.29342893).abs() < 1e-6);
/// ```
#[derive(Debug, Clone)]
pub struct CpuGenerator {
    engine: Mt,
    /// The second number of the last pair on the short path, kept for the next call.
    spare: Option<f64>,
}

impl CpuGenerator {
    /// A generator after `manual_seed(seed)`. The Mersenne twister takes the low 32 bits only.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "PyTorch drops the high bits, too")]
        let low = seed as u32;
        Self { engine: Mt::new(low), spare: None }
    }

    /// The next `count` numbers, as one call of `torch.randn` draws them.
    #[must_use]
    pub fn standard_normal(&mut self, count: usize) -> Vec<f32> {
        if count < GROUP {
            return (0..count).map(|_| rounded(self.normal_f64())).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform_f32()).collect();
        for group in values.chunks_exact_mut(GROUP) {
            box_muller_group(group);
        }
        if !count.is_multiple_of(GROUP) {
            // The last group is drawn anew and overlaps the one before.
            let tail = &mut values[count - GROUP..];
            tail.fill_with(|| self.uniform_f32());
            box_muller_group(tail);
        }
        values
    }

    /// Uniform in `[0, 1)` with 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        const BITS: u32 = 24;
        let value = self.engine.next_u32() & ((1 << BITS) - 1);
        rounded(f64::from(value) / f64::from(1_u32 << BITS))
    }

    /// Uniform in `[0, 1)` with 53 bits.
    fn uniform_f64(&mut self) -> f64 {
        const BITS: u32 = 53;
        let high = u64::from(self.engine.next_u32());
        let low = u64::from(self.engine.next_u32());
        let value = (high << 32 | low) & ((1 << BITS) - 1);
        value as f64 / (1_u64 << BITS) as f64
    }

    fn normal_f64(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = std::f64::consts::TAU * u1;
        self.spare = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

/// Turns 16 uniform numbers into 16 normal ones: value `i` of the first half gives the radius, value
/// `i` of the second half the angle.
fn box_muller_group(group: &mut [f32]) {
    let (first, second) = group.split_at_mut(HALF_GROUP);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = rounded((-2.0 * f64::from(1.0 - *a).ln()).sqrt());
        let (sin, cos) = f64::from(TAU * *b).sin_cos();
        *a = radius * rounded(cos);
        *b = radius * rounded(sin);
    }
}
