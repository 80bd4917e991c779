//! Denoising: schedules, noise, guidance, the transformer and the autoencoder.
//!
//! ```
//! use std::path::Path;
//!
//! use candle_core::{DType, Device, Tensor};
//! use pentimento::{
//!     CancelToken,
//!     diffusion::{Conditioning, Denoise, DiffusionModel, noise::NoiseSource, vae::Tiling},
//!     weights::{LowRankChanges, ModelFiles, Precision},
//! };
//!
//! # fn main() -> pentimento::Result<()> {
//! # let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/tiny-qwen-edit");
//! let model = DiffusionModel::load(&ModelFiles::Folder(folder), &Precision::reference())?;
//! let (cancel, tiling) = (CancelToken::new(), Tiling::default());
//!
//! // A grey picture, and the encoder's last hidden states of a request of seven tokens.
//! let picture = Tensor::zeros((1, 3, 32, 48), DType::F32, &Device::Cpu)?;
//! let hidden_states = Tensor::zeros((1, 7, 64), DType::F32, &Device::Cpu)?;
//!
//! let (reference, grid) = model.reference_tokens(&picture, &tiling, &cancel)?;
//! let noise = model.initial_noise(NoiseSource::Cpu, 42, grid)?;
//! let schedule = model.schedule().schedule(4, grid.tokens())?;
//! let latents = Denoise {
//!     noise: &noise,
//!     references: Some(&reference),
//!     grids: &[grid, grid],
//!     positive: &Conditioning { hidden_states },
//!     negative: None,
//!     cfg_scale: 1.0,
//!     schedule: &schedule,
//! }
//! .run(model.transformer(), &(), &cancel, &mut |_, _| {})?;
//! let edited = model.picture(&latents, grid, &tiling, &cancel)?; // from −1 to 1
//! assert_eq!(edited.dims(), [1, 3, 32, 48]);
//! # Ok(())
//! # }
//! ```

pub(crate) mod config_check;
mod denoise;
mod finite;
pub mod guidance;
pub mod noise;
pub mod qwen_image;
pub mod schedule;
pub mod vae;

use candle_core::Tensor;

use crate::{
    error::{Error, Result},
    progress::CancelToken,
    weights::{LowRankChanges, ModelFiles, Precision},
};
use noise::NoiseSource;
use qwen_image::pack::{latents_from_tokens, tokens_from_latents};
use schedule::ScheduleConfig;
use vae::{Autoencoder, Tiling};

pub use crate::ops::cuda::{AtWork, at_work};
pub use denoise::{Denoise, Denoised};
pub(crate) use finite::require_finite;
pub use qwen_image::{
    Conditioning, Grid, GuidancePass, Residency, StepCache, StepRecording, StepsRecorded,
    Transformer,
};

/// Side of a token in latent pixels.
pub(crate) const LATENTS_PER_TOKEN: usize = 2;

/// The parts of a pipeline that make pictures: transformer, autoencoder and schedule.
#[derive(Debug)]
pub struct DiffusionModel {
    transformer: Transformer,
    autoencoder: Autoencoder,
    schedule: ScheduleConfig,
}

impl DiffusionModel {
    /// Reads `transformer/`, `vae/` and `scheduler/` of a model folder.
    ///
    /// # Errors
    /// What each of the parts refuses, or parts that do not belong together.
    pub fn load(files: &ModelFiles, precision: &Precision) -> Result<Self> {
        Self::load_changed(files, precision, LowRankChanges::default())
    }

    /// As [`Self::load`], with low-rank changes of the transformer; see
    /// [`Transformer::load_changed`].
    ///
    /// # Errors
    /// As [`Self::load`], or changes that are left over.
    pub fn load_changed(
        files: &ModelFiles,
        precision: &Precision,
        changes: LowRankChanges,
    ) -> Result<Self> {
        let schedule = ScheduleConfig::load(files)?;
        let model = Self::open(files, schedule, precision, changes, Residency::Resident)?;
        model.transformer.fill(&precision.cancel)?;
        Ok(model)
    }

    /// As [`Self::load_changed`], but along the levels of `schedule`, and the transformer's blocks are read
    /// later; see [`Transformer::open`].
    ///
    /// # Errors
    /// As [`Self::load_changed`].
    pub fn open(
        files: &ModelFiles,
        schedule: ScheduleConfig,
        precision: &Precision,
        changes: LowRankChanges,
        residency: Residency,
    ) -> Result<Self> {
        // The small part first, so that its faults show before gigabytes are read.
        let autoencoder = Autoencoder::load(files, precision)?;
        let transformer = Transformer::open(files, precision, changes, residency)?;
        let (found, expected) =
            (autoencoder.config().latent_channels, transformer.config().latent_channels());
        if found != expected {
            let expected = format!("{expected}, as the transformer's in_channels say");
            return Err(files.config("vae/config.json", "z_dim", found, expected));
        }
        Ok(Self { transformer, autoencoder, schedule })
    }

    /// The denoiser.
    #[must_use]
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// The autoencoder.
    #[must_use]
    pub fn autoencoder(&self) -> &Autoencoder {
        &self.autoencoder
    }

    /// The scheduler's config.
    #[must_use]
    pub fn schedule(&self) -> &ScheduleConfig {
        &self.schedule
    }

    /// Pixels along the side of one token.
    #[must_use]
    pub fn pixels_per_token(&self) -> usize {
        LATENTS_PER_TOKEN * self.autoencoder.config().pixels_per_latent()
    }

    /// The grid of a picture of this size.
    ///
    /// # Errors
    /// Sides that are zero or not multiples of a token's.
    #[expect(clippy::integer_division, reason = "checked to be multiples")]
    pub fn grid(&self, height_px: usize, width_px: usize) -> Result<Grid> {
        let side = self.pixels_per_token();
        let fits = |px: usize| px > 0 && px.is_multiple_of(side);
        if !fits(height_px) || !fits(width_px) {
            let expected = format!("multiples of {side}");
            return Err(Error::field("size", format!("{width_px} × {height_px}"), expected));
        }
        Ok(Grid { height: height_px / side, width: width_px / side })
    }

    /// A picture as tokens for the transformer: `[1, 3, h, w]` from −1 to 1 → `[1, n, latent_dim]`
    /// and its grid.
    ///
    /// # Errors
    /// Sides that are not multiples of a token's, [`Error::Cancelled`], or a failure of the device.
    pub fn reference_tokens(
        &self,
        picture: &Tensor,
        tiling: &Tiling,
        cancel: &CancelToken,
    ) -> Result<(Tensor, Grid)> {
        let (_, _, h, w) = picture.dims4()?;
        self.grid(h, w)?;
        tokens_from_latents(&self.autoencoder.encode(picture, tiling, cancel)?)
    }

    /// The noise that a run with `seed` begins with: `[1, n, latent_dim]` in float32, on the host.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn initial_noise(&self, source: NoiseSource, seed: u64, grid: Grid) -> Result<Tensor> {
        let channels = self.transformer.config().latent_channels();
        let (h, w) = (grid.height * LATENTS_PER_TOKEN, grid.width * LATENTS_PER_TOKEN);
        let values = source.standard_normal(seed, channels * h * w);
        let noise = Tensor::from_vec(values, (1, channels, h, w), &candle_core::Device::Cpu)?;
        Ok(tokens_from_latents(&noise)?.0)
    }

    /// The picture of denoised tokens: `[1, n, latent_dim]` → `[1, 3, h, w]` from −1 to 1.
    ///
    /// # Errors
    /// Tokens that do not fit `grid`, [`Error::Cancelled`], or a failure of the device.
    pub fn picture(
        &self,
        tokens: &Tensor,
        grid: Grid,
        tiling: &Tiling,
        cancel: &CancelToken,
    ) -> Result<Tensor> {
        self.autoencoder.decode(&latents_from_tokens(tokens, grid)?, tiling, cancel)
    }
}
