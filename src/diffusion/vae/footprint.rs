//! What the autoencoder takes in memory, told from its config.

use super::{Config, Tiling, names};
use crate::{
    error::Result,
    weights::{ModelFiles, Precision, TensorEntry},
};

/// A step of the encoder's or decoder's local part, by its channels.
#[derive(Debug, Clone, Copy)]
enum Step {
    Conv { input: u64, output: u64 },
    Residual { input: u64, output: u64 },
    Halve { dim: u64 },
    Enlarge { dim: u64 },
    Head { input: u64, output: u64 },
}

/// Bytes of one copy of a thread's input in a convolution, at most.
const SCRATCH_BYTES: u64 = 1 << 20;

impl Config {
    /// The most bytes of activations while a picture of `height × width` pixels is encoded.
    #[must_use]
    pub fn encoding_bytes(&self, [height, width]: [usize; 2], tiling: &Tiling) -> u64 {
        let pixels = (height * width) as u64;
        let (latent, dim) = (self.latent_pixels(pixels), self.widest());
        let picture = 2 * pixels * self.picture_channels as u64;
        let (tile, blended) = match tiling.largest_tile([height, width]) {
            Some(tile) => (tile, 3 * latent * dim),
            None => (pixels, 0),
        };
        let local = self.peak(&self.encoder_steps(), tile) + blended;
        self.bytes(picture + local.max(self.middle(latent)))
    }

    /// The most bytes of activations while latents of a picture of `height × width` pixels are
    /// decoded.
    #[must_use]
    pub fn decoding_bytes(&self, [height, width]: [usize; 2], tiling: &Tiling) -> u64 {
        let pixels = (height * width) as u64;
        let (latent, dim) = (self.latent_pixels(pixels), self.widest());
        let picture = pixels * self.picture_channels as u64;
        let (tile, around) = match tiling.largest_tile([height, width]) {
            Some(tile) => (tile, latent * dim + 3 * picture),
            None => (pixels, picture),
        };
        let local = self.peak(&self.decoder_steps(), self.latent_pixels(tile)) + around;
        // The result, clamped and as levels.
        self.bytes(local.max(self.middle(latent)).max(3 * picture))
    }

    fn bytes(&self, numbers: u64) -> u64 {
        let threads = rayon::current_num_threads() as u64;
        numbers * size_of::<f32>() as u64 + threads * SCRATCH_BYTES.min(numbers)
    }

    fn latent_pixels(&self, pixels: u64) -> u64 {
        pixels >> (2 * self.halves_time.len())
    }

    fn widest(&self) -> u64 {
        self.channels().last().copied().unwrap_or(0) as u64
    }

    /// The attention in the middle: residual, tokens, queries, keys and values twice, and the
    /// result; the residual blocks beside it take less.
    fn middle(&self, latent: u64) -> u64 {
        const COPIES: u64 = 9;
        COPIES * latent * self.widest()
    }

    /// The steps of the encoder, as it loads them.
    fn encoder_steps(&self) -> Vec<Step> {
        let channels: Vec<u64> = self.channels().into_iter().map(|n| n as u64).collect();
        let mut steps =
            vec![Step::Conv { input: self.picture_channels as u64, output: channels[0] }];
        for (level, pair) in channels.windows(2).enumerate() {
            let mut input = pair[0];
            for _ in 0..self.residual_blocks {
                steps.push(Step::Residual { input, output: pair[1] });
                input = pair[1];
            }
            if level < self.halves_time.len() {
                steps.push(Step::Halve { dim: pair[1] });
            }
        }
        steps
    }

    /// The steps of the decoder, as it loads them.
    fn decoder_steps(&self) -> Vec<Step> {
        let levels: Vec<u64> =
            self.channels().into_iter().skip(1).rev().map(|n| n as u64).collect();
        let mut input = levels[0];
        let mut steps = Vec::new();
        for (level, &output) in levels.iter().enumerate() {
            for _ in 0..=self.residual_blocks {
                steps.push(Step::Residual { input, output });
                input = output;
            }
            if level < self.halves_time.len() {
                steps.push(Step::Enlarge { dim: output });
                input = output >> 1;
            }
        }
        let output = self.picture_channels as u64;
        steps.push(Step::Head { input: levels[levels.len() - 1], output });
        steps
    }

    /// The most numbers that are in memory at a time when `steps` begin with `pixels` pixels.
    fn peak(&self, steps: &[Step], pixels: u64) -> u64 {
        let mut pixels = pixels;
        let mut peak = 0;
        for step in steps {
            let numbers = match *step {
                Step::Conv { input, output } => pixels * (input + output),
                Step::Residual { input, output } => {
                    // Input, first norm, first result; input, result, norm; the same with the
                    // shortcut and the sum.
                    let sum = if input == output { 3 * output } else { input + 3 * output };
                    pixels * (2 * input + output).max(input + 2 * output).max(sum)
                }
                Step::Halve { dim } => {
                    pixels = pixels.div_ceil(4);
                    5 * pixels * dim
                }
                Step::Enlarge { dim } => {
                    pixels *= 4;
                    pixels * dim + pixels * (dim >> 1)
                }
                Step::Head { input, output } => pixels * (2 * input + output),
            };
            peak = peak.max(numbers);
        }
        peak
    }
}

/// Bytes of the autoencoder's weights in memory, told from the header of `vae/`. Of a kernel that
/// reaches back in time only the last slice is kept, and convolutions along time are not read.
///
/// # Errors
/// Files that are missing or damaged.
pub fn weight_bytes(files: &ModelFiles, precision: &Precision) -> Result<u64> {
    let checkpoint = names::canonical(files.checkpoint("vae", "diffusion_pytorch_model")?)?;
    let kept = |(name, entry): (&str, &TensorEntry)| match *entry.shape.as_slice() {
        _ if name.contains("time_conv.") => 0,
        [_, _, time, _, _] => entry.elements().checked_div(time as u64).unwrap_or(0),
        _ => entry.elements(),
    };
    let numbers: u64 = checkpoint.tensors().map(kept).sum();
    Ok(numbers * precision.compute.size_in_bytes() as u64)
}
