//! What the autoencoder takes in memory, told from its config.

use candle_core::DType;

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

/// How activations are computed and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// In float32, one operation after the other.
    Plain,
    /// In bf16 on a GPU: shortcuts and enlargements are part of a convolution, and channels are filled up
    /// to a multiple of 8.
    Pixels,
}

impl Way {
    fn of(precision: &Precision) -> Self {
        match precision.device.is_cuda() && precision.compute == DType::BF16 {
            true => Self::Pixels,
            false => Self::Plain,
        }
    }

    /// Bytes of activations, and of what the CPU's threads need beside them.
    fn bytes(self, numbers: u64) -> u64 {
        match self {
            Self::Plain => {
                let threads = rayon::current_num_threads() as u64;
                numbers * size_of::<f32>() as u64 + threads * SCRATCH_BYTES.min(numbers)
            }
            Self::Pixels => numbers * DType::BF16.size_in_bytes() as u64,
        }
    }

    /// Numbers of a float32 picture, as this way counts them.
    fn wide(self, numbers: u64) -> u64 {
        if self == Self::Pixels { 2 * numbers } else { numbers }
    }

    /// Channels as they lie in memory.
    fn stored(self, channels: u64) -> u64 {
        if self == Self::Pixels { channels.next_multiple_of(8) } else { channels }
    }
}

/// What a picture's size says.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Numbers of the picture.
    picture: u64,
    /// Pixels that are computed at a time: of the largest tile, or all.
    tile: u64,
    is_tiled: bool,
    /// Numbers between the local part and the middle.
    features: u64,
}

impl Sizes {
    /// The attention in the middle: residual, tokens, queries, keys and values twice, and the
    /// result; the residual blocks beside it take less.
    fn middle(self) -> u64 {
        const COPIES: u64 = 9;
        COPIES * self.features
    }
}

impl Config {
    /// The most bytes of activations while a picture of `size`, height and width in pixels, is encoded.
    #[must_use]
    pub fn encoding_bytes(&self, size: [usize; 2], tiling: &Tiling, precision: &Precision) -> u64 {
        let (way, sizes) = (Way::of(precision), self.sizes(size, tiling));
        let picture = way.wide(2 * sizes.picture);
        let blended = if sizes.is_tiled { 3 * sizes.features } else { 0 };
        let local = peak(&self.encoder_steps(), sizes.tile, way) + blended;
        way.bytes(picture + local.max(sizes.middle()))
    }

    /// The most bytes of activations while latents of a picture of `size`, height and width in pixels,
    /// are decoded.
    #[must_use]
    pub fn decoding_bytes(&self, size: [usize; 2], tiling: &Tiling, precision: &Precision) -> u64 {
        let (way, sizes) = (Way::of(precision), self.sizes(size, tiling));
        let picture = sizes.picture;
        let around = if sizes.is_tiled { sizes.features + 3 * picture } else { picture };
        let local = peak(&self.decoder_steps(), self.latent_pixels(sizes.tile), way) + around;
        // The result, clamped and as levels.
        way.bytes(local.max(sizes.middle()).max(way.wide(3 * picture)))
    }

    fn sizes(&self, [height, width]: [usize; 2], tiling: &Tiling) -> Sizes {
        let pixels = (height * width) as u64;
        let tile = tiling.largest_tile([height, width]);
        Sizes {
            picture: pixels * self.picture_channels as u64,
            tile: tile.unwrap_or(pixels),
            is_tiled: tile.is_some(),
            features: self.latent_pixels(pixels) * self.widest(),
        }
    }

    fn latent_pixels(&self, pixels: u64) -> u64 {
        pixels >> (2 * self.halves_time.len())
    }

    fn widest(&self) -> u64 {
        self.channels().last().copied().unwrap_or(0) as u64
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
}

/// The most numbers that are in memory at a time when `steps` begin with `pixels` pixels.
fn peak(steps: &[Step], mut pixels: u64, way: Way) -> u64 {
    let mut peak = 0;
    for step in steps {
        let numbers = match *step {
            Step::Conv { input, output } => pixels * (way.stored(input) + way.stored(output)),
            Step::Residual { input, output } => {
                let [input, output] = [input, output].map(|n| way.stored(n));
                // Input, first norm, first result; input, result, norm; the same with the
                // shortcut and the sum, or with their sum alone.
                let sum = match way {
                    Way::Plain if input == output => 3 * output,
                    Way::Plain => input + 3 * output,
                    Way::Pixels => input + 2 * output,
                };
                pixels * (2 * input + output).max(input + 2 * output).max(sum)
            }
            Step::Halve { dim } => {
                pixels = pixels.div_ceil(4);
                5 * pixels * way.stored(dim)
            }
            Step::Enlarge { dim } => {
                let small = pixels * way.stored(dim);
                pixels *= 4;
                let before = if way == Way::Pixels { small } else { 4 * small };
                before + pixels * way.stored(dim >> 1)
            }
            Step::Head { input, output } => {
                // Pixels are laid out as planes in the end.
                let planes = if way == Way::Pixels { output } else { 0 };
                pixels * (2 * way.stored(input) + way.stored(output) + planes)
            }
        };
        peak = peak.max(numbers);
    }
    peak
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A published residual block with 1024 × 1024 pixels, and what leads to it.
    const STEPS: [Step; 2] = [Step::Enlarge { dim: 192 }, Step::Residual { input: 96, output: 96 }];

    #[test]
    fn pixels_take_half_of_planes_or_less() {
        let bytes = |steps: &[Step], way: Way| way.bytes(peak(steps, 1 << 18, way));
        let each = STEPS.iter().map(std::slice::from_ref);
        for steps in each.chain([&STEPS[..]]) {
            let [plain, pixels] = [Way::Plain, Way::Pixels].map(|way| bytes(steps, way));
            assert!(2 * pixels <= plain, "{steps:?}: {pixels} of {plain}");
        }
        // Input, norm and result of 96 channels.
        assert_eq!(bytes(&STEPS, Way::Pixels), (2 * 3 * 96) << 20);
    }
}
