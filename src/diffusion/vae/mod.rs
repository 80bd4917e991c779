//! The Qwen-Image autoencoder: between pictures and latents, for single pictures.

mod blocks;
mod config;
mod footprint;
pub(crate) mod names;
mod tiling;

use candle_core::{DType, Tensor};

use crate::{
    error::{Error, Result},
    layers::Conv2d,
    ops::{self, Combination, Picture},
    progress::CancelToken,
    weights::{ModelFiles, Precision, Storage, Weights},
};
use blocks::{
    Channels, Head, LocalLayer, MidBlock, ResidualBlock, causal_conv, pointwise_conv, run, sight_px,
};
use tiling::{Scale, Sight};

pub(crate) use config::CLASS;
pub use config::Config;
pub use footprint::weight_bytes;
pub use tiling::Tiling;

/// The Qwen-Image autoencoder.
///
/// Reference: `AutoencoderKLQwenImage` at
/// <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py>.
#[derive(Debug)]
pub struct Autoencoder {
    config: Config,
    precision: Precision,
    encoder: Encoder,
    decoder: Decoder,
    /// Mean and standard deviation of the latents' channels, `[1, c, 1, 1]`.
    mean: Tensor,
    std: Tensor,
}

#[derive(Debug)]
struct Encoder {
    /// From pixels to the latents' resolution.
    down: Vec<LocalLayer>,
    mid: MidBlock,
    head: Head,
    /// The half of `quant_conv` that gives the mean; the other gives a variance that is not used.
    quant_mean: Conv2d,
}

#[derive(Debug)]
struct Decoder {
    post_quant: Conv2d,
    conv_in: Conv2d,
    mid: MidBlock,
    /// From the latents' resolution to pixels.
    up: Vec<LocalLayer>,
}

impl Autoencoder {
    /// Reads `vae/` of a model folder. Its weights are never quantized.
    ///
    /// # Errors
    /// Files that are missing or damaged, a config that is not supported, or tensors that are
    /// missing, left over or of another shape.
    pub fn load(files: &ModelFiles, precision: &Precision) -> Result<Self> {
        let config = Config::load(files)?;
        let precision = Precision { storage: Storage::Compute, ..precision.clone() };
        let checkpoint = names::canonical(files.checkpoint("vae", "diffusion_pytorch_model")?)?;
        let weights = Weights::new(checkpoint, precision.clone());
        let mut ignored = Vec::new();
        let encoder = Encoder::load(&weights, &config, &mut ignored)?;
        let decoder = Decoder::load(&weights, &config, &mut ignored)?;
        weights.finish(&ignored.iter().map(String::as_str).collect::<Vec<_>>())?;
        let statistic = |values: &[f64]| {
            let values = Tensor::new(values, &precision.device)?.to_dtype(precision.compute)?;
            values.reshape((1, config.latent_channels, 1, 1)) // (1, c, 1, 1)
        };
        let (mean, std) = (statistic(&config.latents_mean)?, statistic(&config.latents_std)?);
        Ok(Self { config, precision, encoder, decoder, mean, std })
    }

    /// The model's dimensions.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The overlap with which tiles equal the whole but for rounding, in pixels.
    #[must_use]
    pub fn exact_overlap_px(&self) -> usize {
        let unit_px = self.config.pixels_per_latent();
        let sight = sight_px(&self.encoder.down, 1).max(sight_px(&self.decoder.up, unit_px));
        (2 * sight.div_ceil(unit_px) + 1) * unit_px
    }

    /// The most probable latents of a picture, normalised for the transformer.
    ///
    /// # Shapes
    /// `[b, 3, h, w]` from −1 to 1 → `[b, c, h / 8, w / 8]` in float32.
    ///
    /// # Errors
    /// Sides that are not multiples of a latent pixel's, [`Error::Cancelled`], checked between
    /// blocks, or a failure of the device.
    pub fn encode(
        &self,
        picture: &Tensor,
        tiling: &Tiling,
        cancel: &CancelToken,
    ) -> Result<Tensor> {
        let unit_px = self.config.pixels_per_latent();
        let (_, c, h, w) = picture.dims4()?;
        let fits = |side: usize| side > 0 && side.is_multiple_of(unit_px);
        if c != self.config.picture_channels || !fits(h) || !fits(w) {
            let expected = format!("3 channels, sides a multiple of {unit_px}");
            return Err(Error::field("picture", format!("{c} channels, {w} × {h}"), expected));
        }
        let Precision { device, compute, .. } = &self.precision;
        let x = picture.to_device(device)?.to_dtype(*compute)?;
        let down = |x: Tensor| run(&self.encoder.down, Picture::new(x)?, cancel);
        let x = if tiling.applies(h, w) {
            let sight = Sight { unit_px, sight_px: sight_px(&self.encoder.down, 1) };
            #[expect(clippy::integer_division, reason = "checked to be multiples")]
            let tiles = tiling.tiles([h / unit_px, w / unit_px], sight)?;
            let down = |x: Tensor| Ok(down(x)?.into_planes()?);
            Picture::new(tiles.map(&x, Scale { input: unit_px, output: 1 }, down)?)?
        } else {
            down(x)?
        };
        let x = self.encoder.mid.forward(x, cancel)?;
        let mean = self.encoder.quant_mean.forward(&self.encoder.head.forward(&x)?)?;
        let mean = mean.into_planes()?;
        let centred = ops::combine(&mean, &self.mean, Combination::Difference)?;
        let latents = ops::combine(&centred, &self.std, Combination::Quotient)?;
        Ok(latents.to_dtype(DType::F32)?)
    }

    /// The picture of normalised latents.
    ///
    /// # Shapes
    /// `[b, c, h, w]` → `[b, 3, 8·h, 8·w]` from −1 to 1 in float32.
    ///
    /// # Errors
    /// Another number of channels, [`Error::Cancelled`], checked between blocks, or a failure of
    /// the device.
    pub fn decode(
        &self,
        latents: &Tensor,
        tiling: &Tiling,
        cancel: &CancelToken,
    ) -> Result<Tensor> {
        let unit_px = self.config.pixels_per_latent();
        let (_, c, h, w) = latents.dims4()?;
        if c != self.config.latent_channels || h == 0 || w == 0 {
            let expected = format!("{} channels, at least 1 × 1", self.config.latent_channels);
            return Err(Error::field("latents", format!("{c} channels, {w} × {h}"), expected));
        }
        let Precision { device, compute, .. } = &self.precision;
        let x = latents.to_device(device)?.to_dtype(*compute)?;
        let x = ops::combine(&x, &self.std, Combination::Product)?;
        let x = ops::add(&x, &self.mean)?;
        let x = self.decoder.post_quant.forward(&Picture::new(x)?)?;
        let x = self.decoder.conv_in.forward(&x)?;
        let x = self.decoder.mid.forward(x, cancel)?;
        let up = |x: Picture| Ok(run(&self.decoder.up, x, cancel)?.into_planes()?);
        let picture = if tiling.applies(h * unit_px, w * unit_px) {
            let sight = Sight { unit_px, sight_px: sight_px(&self.decoder.up, unit_px) };
            let tiles = tiling.tiles([h, w], sight)?;
            let up = |x: Tensor| up(Picture::new(x)?);
            tiles.map(&x.into_planes()?, Scale { input: 1, output: unit_px }, up)?
        } else {
            up(x)?
        };
        Ok(ops::clamp(&picture, -1.0, 1.0)?.to_dtype(DType::F32)?)
    }
}

impl Encoder {
    fn load(weights: &Weights, config: &Config, ignored: &mut Vec<String>) -> Result<Self> {
        let quant = weights.pp("quant_conv");
        let weights = weights.pp("encoder");
        let channels = config.channels();
        let input = Channels { input: config.picture_channels, output: channels[0] };
        let mut down = vec![LocalLayer::Conv(causal_conv(&weights.pp("conv_in"), input)?)];
        let mut index = 0;
        let mut next = || {
            index += 1;
            weights.pp("down_blocks").pp(index - 1)
        };
        for (level, pair) in channels.windows(2).enumerate() {
            let mut input = pair[0];
            for _ in 0..config.residual_blocks {
                let channels = Channels { input, output: pair[1] };
                down.push(LocalLayer::Residual(ResidualBlock::load(&next(), channels)?));
                input = pair[1];
            }
            if let Some(&halves_time) = config.halves_time.get(level) {
                let place = next();
                down.push(LocalLayer::halve(&place, pair[1])?);
                ignore_time_conv(&place, halves_time, ignored);
            }
        }
        let (dim, moments) = (channels[channels.len() - 1], 2 * config.latent_channels);
        let quant_channels = Channels { input: moments, output: moments };
        Ok(Self {
            down,
            mid: MidBlock::load(&weights.pp("mid_block"), dim)?,
            head: Head::load(&weights, Channels { input: dim, output: moments })?,
            quant_mean: pointwise_conv(&quant, quant_channels, config.latent_channels)?,
        })
    }
}

impl Decoder {
    fn load(weights: &Weights, config: &Config, ignored: &mut Vec<String>) -> Result<Self> {
        let latent = config.latent_channels;
        let post_quant = Channels { input: latent, output: latent };
        let post_quant = pointwise_conv(&weights.pp("post_quant_conv"), post_quant, latent)?;
        let weights = weights.pp("decoder");
        let levels: Vec<usize> = config.channels().into_iter().skip(1).rev().collect();
        let mut input = levels[0];
        let conv_in = Channels { input: latent, output: input };
        let mut up = Vec::new();
        for (level, &output) in levels.iter().enumerate() {
            let block = weights.pp("up_blocks").pp(level);
            for i in 0..=config.residual_blocks {
                let place = block.pp("resnets").pp(i);
                up.push(LocalLayer::Residual(ResidualBlock::load(
                    &place,
                    Channels { input, output },
                )?));
                input = output;
            }
            if let Some(&doubles_time) = config.halves_time.iter().rev().nth(level) {
                let place = block.pp("upsamplers").pp(0);
                up.push(LocalLayer::enlarge(&place, output)?);
                ignore_time_conv(&place, doubles_time, ignored);
                #[expect(clippy::integer_division, reason = "the config's check asks for it")]
                let halved = output / 2;
                input = halved;
            }
        }
        let head = Channels { input: levels[levels.len() - 1], output: config.picture_channels };
        up.push(LocalLayer::Head(Head::load(&weights, head)?));
        Ok(Self {
            post_quant,
            conv_in: causal_conv(&weights.pp("conv_in"), conv_in)?,
            mid: MidBlock::load(&weights.pp("mid_block"), levels[0])?,
            up,
        })
    }
}

/// Notes the tensors of a convolution along time: it joins neighbouring frames, and for the first
/// frame, which a single picture is, the model skips it.
fn ignore_time_conv(place: &Weights, works_in_time: bool, ignored: &mut Vec<String>) {
    if works_in_time {
        ignored.push(place.full_name("time_conv."));
    }
}
