//! The sinusoids that a timestep becomes.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};

use super::cuda;

/// Which sinusoids, under the names of `get_timestep_embedding` in
/// [diffusers](https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/embeddings.py#L27-L78).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sinusoids {
    /// Numbers that a timestep becomes, an even number.
    pub width: usize,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Taken from half the width before the exponents are divided by it.
    pub downscale_freq_shift: f64,
    /// Factor of the angles.
    pub scale: f64,
    /// The longest period.
    pub max_period: f64,
}

/// `timesteps: [n]` → `[n, width]` in `dtype`: sines and cosines of `scale · t · fᵢ` with
/// `fᵢ = max_period^(−i / (width/2 − shift))`.
///
/// Timesteps in float32 are computed in float32, each operation rounded as in the reference; float64 in
/// float64.
///
/// # Errors
/// An odd width, another type or rank, or a failure of the device.
pub fn timestep_embedding(timesteps: &Tensor, shape: Sinusoids, dtype: DType) -> Result<Tensor> {
    let n = timesteps.dims1()?;
    if !shape.width.is_multiple_of(2) || shape.width == 0 {
        bail!("timestep embedding: a width of {}", shape.width);
    }
    if let Some(embedding) = cuda::timestep_embedding(timesteps, shape, dtype)? {
        return Ok(embedding);
    }
    let host = timesteps.to_device(&Device::Cpu)?.contiguous()?;
    let dims = (n, shape.width);
    let (storage, layout) = host.storage_and_layout();
    let start = layout.start_offset();
    let embedding = match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => {
            Tensor::from_vec(shape.of_floats(&all[start..start + n]), dims, &Device::Cpu)?
        }
        Storage::Cpu(CpuStorage::F64(all)) => {
            Tensor::from_vec(shape.of_doubles(&all[start..start + n]), dims, &Device::Cpu)?
        }
        _ => bail!("timestep embedding: timesteps of type {:?}", timesteps.dtype()),
    };
    embedding.to_dtype(dtype)?.to_device(timesteps.device())
}

#[expect(clippy::cast_precision_loss, reason = "a width is small")]
impl Sinusoids {
    /// What the exponents are divided by.
    pub(super) fn divisor(self) -> f64 {
        (self.width >> 1) as f64 - self.downscale_freq_shift
    }

    #[expect(clippy::cast_possible_truncation, reason = "the reference computes in float32")]
    fn of_floats(self, timesteps: &[f32]) -> Vec<f32> {
        let (log, divisor) = (-self.max_period.ln() as f32, self.divisor() as f32);
        let frequency = |i: usize| f64::from(log * i as f32 / divisor).exp() as f32;
        let frequencies: Vec<f32> = (0..self.width >> 1).map(frequency).collect();
        let scale = self.scale as f32;
        self.both(timesteps, |t, i| scale * (t * frequencies[i]), f32::sin, f32::cos)
    }

    fn of_doubles(self, timesteps: &[f64]) -> Vec<f64> {
        let frequency = |i: usize| (-self.max_period.ln() * i as f64 / self.divisor()).exp();
        self.both(timesteps, |t, i| self.scale * t * frequency(i), f64::sin, f64::cos)
    }

    fn both<T: Copy>(
        self,
        timesteps: &[T],
        angle: impl Fn(T, usize) -> T,
        sin: fn(T) -> T,
        cos: fn(T) -> T,
    ) -> Vec<T> {
        let (first, second) = if self.flip_sin_to_cos { (cos, sin) } else { (sin, cos) };
        let mut all = Vec::with_capacity(timesteps.len() * self.width);
        for &t in timesteps {
            for f in [first, second] {
                all.extend((0..self.width >> 1).map(|i| f(angle(t, i))));
            }
        }
        all
    }
}
