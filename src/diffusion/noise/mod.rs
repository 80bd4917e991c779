//! Standard normal noise, equal to what PyTorch draws from the same seed.

mod mersenne;
mod philox;

pub use mersenne::CpuGenerator;
pub use philox::{CudaGenerator, CudaGrid};

/// The generator that noise is drawn from; the same seed gives other noise from another generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoiseSource {
    /// `torch.Generator("cpu")`: the Mersenne twister.
    Cpu,
    /// `torch.Generator("cuda")`: Philox, spread over the threads of a device.
    Cuda(CudaGrid),
}

impl NoiseSource {
    /// The first `count` numbers that `torch.randn` draws in float32 after `manual_seed(seed)`.
    #[must_use]
    pub fn standard_normal(self, seed: u64, count: usize) -> Vec<f32> {
        match self {
            Self::Cpu => CpuGenerator::new(seed).standard_normal(count),
            Self::Cuda(grid) => CudaGenerator::new(seed, grid).standard_normal(count),
        }
    }
}

/// The nearest float32.
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is what is asked for")]
pub(super) fn rounded(x: f64) -> f32 {
    x as f32
}
