//! Passes of the editor: what the models see is read, the noise is taken away, a picture comes out.
//! What does not change from one pass, or one request, to the next is computed once.

use candle_core::Tensor;
use image::RgbImage;

use super::{
    Engine,
    checked::{Checked, grid},
    estimate::{self, Facts},
    memo::{Key, key_of_pictures, key_of_text},
    pipeline::Pipeline,
    placement,
    stages::Stages,
};
use crate::{
    diffusion::{
        Conditioning, Denoise, Denoised, Grid, GuidancePass, Residency, require_finite, vae::Tiling,
    },
    error::{Error, Result},
    memory::{Ladder, Lease, Rung},
    pixels::{self, Filter, Picture, Size},
    progress::{CancelToken, Observer, Stage},
    request::HandOver,
    vlm::Seen,
};

/// Pictures as the vision-language model sees them.
pub(super) struct Sight {
    pub(super) pictures: Vec<RgbImage>,
    pub(super) seen: Seen,
    key: Key,
}

/// A request under way.
pub(super) struct Work<'a> {
    engine: &'a Engine,
    checked: &'a Checked<'a>,
    facts: Facts,
    ladder: Ladder,
    /// Passes made.
    passes: u64,
    /// Predictions that ended after the first block.
    reused: usize,
    /// The picture that the last pass made, at the working size.
    made: Option<RgbImage>,
    /// Its latents `[1, n, latent_dim]`, where the next pass is given them.
    latents: Option<Tensor>,
}

impl<'a> Work<'a> {
    pub(super) fn begin(engine: &'a Engine, checked: &'a Checked<'a>) -> Result<Self> {
        let facts = Facts::of(engine.opened.models(), checked.request)?;
        let ladder = Ladder::default();
        let (made, latents) = (None, None);
        Ok(Self { engine, checked, facts, ladder, passes: 0, reused: 0, made, latents })
    }

    /// What was done when memory ran out.
    pub(super) fn rungs(&self) -> &[Rung] {
        self.ladder.taken()
    }

    /// Runs `work`; where memory runs out, there is made room, and it runs again.
    pub(super) fn climb<T>(&mut self, mut work: impl FnMut(&Self) -> Result<T>) -> Result<T> {
        let mut ladder = std::mem::take(&mut self.ladder);
        let result = ladder.run(self, |this| work(this), Self::descend);
        self.ladder = ladder;
        result
    }

    /// Memory for the activations of a stage, which is taken after the models have taken turns.
    pub(super) fn room_for(&self, stage: Stage) -> Result<Lease> {
        let Engine { residence, .. } = self.engine;
        let stages = self.engine.opened.models().stages(&self.facts, residence.placement());
        let said = stages.into_iter().find(|said| said.stage == stage);
        residence.lease(stage.name(), said.map_or(0, |said| said.activation_bytes))
    }

    /// Makes room in one way; returns whether that made a difference.
    fn descend(&mut self, rung: Rung) -> bool {
        let Engine { residence, diffusion, .. } = self.engine;
        let mut placement = residence.placement();
        match rung {
            Rung::DropCaches => {
                self.engine.forget();
                residence.memory().trim();
                return true;
            }
            Rung::SplitGuidance => {
                if placement.guidance == GuidancePass::InTurn {
                    return false;
                }
                placement.guidance = GuidancePass::InTurn;
            }
            Rung::TileAutoencoder => {
                let unit_px = diffusion.autoencoder().config().pixels_per_latent();
                let size = self.checked.sizes.working;
                match placement::smaller_tiles(placement, size, unit_px) {
                    None => return false,
                    tile_px => placement.tile_px = tile_px,
                }
            }
            Rung::StreamBlocks => {
                let streamed = Residency::Streamed { blocks: 0 };
                if placement.transformer == streamed {
                    return false;
                }
                placement.transformer = streamed;
            }
        }
        self.engine.follow(placement);
        true
    }

    fn tiling(&self) -> Tiling {
        let unit_px = self.engine.diffusion.autoencoder().config().pixels_per_latent();
        estimate::tiling(self.engine.residence.placement(), unit_px)
    }

    /// Carries out one prompt on the picture as it is now.
    pub(super) fn pass(
        &mut self,
        prompt: &str,
        stages: &mut Stages<'_>,
        observer: &dyn Observer,
    ) -> Result<()> {
        let (diffusion, checked) = (&self.engine.diffusion, self.checked);
        let cancel = &checked.request.cancel;
        // 2. The vision-language model reads the prompt.
        let (positive, negative) =
            stages.run(Stage::EncodePrompt, || self.climb(|work| work.conditioning(prompt)))?;
        // 3. The autoencoder turns the pictures into latents.
        let (references, grids) = stages.run(Stage::EncodePicture, || {
            self.climb(|work| {
                work.engine.give_up_reading();
                let _room = work.room_for(Stage::EncodePicture)?;
                work.references()
            })
        })?;
        // 4. Noise, the one that the seed and the pass stand for.
        let seed = checked.seed.wrapping_add(self.passes);
        let noise = diffusion.initial_noise(checked.noise_source(), seed, grids[0])?;
        // 5. The denoising loop.
        let Denoised { latents, reused, .. } = stages.run_steps(Stage::Denoise, || {
            let denoise = Denoise {
                noise: &noise,
                references: Some(&references),
                grids: &grids,
                positive: &positive,
                negative: negative.as_ref(),
                cfg_scale: checked.cfg_scale,
                schedule: &checked.schedule,
            };
            let cache = checked.request.step_cache;
            self.climb(|work| {
                work.engine.before_denoising()?;
                let _room = work.room_for(Stage::Denoise)?;
                denoise.run_cached(diffusion.transformer(), cache, observer, cancel, &mut |_, _| {})
            })
        })?;
        self.reused += reused;
        // 6. The autoencoder turns the result into a picture.
        self.made = Some(stages.run(Stage::Decode, || {
            self.climb(|work| {
                let _room = work.room_for(Stage::Decode)?;
                let decoded = diffusion.picture(&latents, grids[0], &work.tiling(), cancel)?;
                pixels::rgb_from_tensor(&decoded, Stage::Decode.label())
            })
        })?);
        self.latents = match checked.request.hand_over {
            HandOver::Latents => Some(latents),
            HandOver::Pixels => None,
        };
        self.passes += 1;
        Ok(())
    }

    /// Predictions that ended after the first block, in all passes so far.
    pub(super) fn reused(&self) -> usize {
        self.reused
    }

    /// The picture so far, at the output's size and with the input's alpha and ICC profile.
    pub(super) fn picture(&self) -> Result<Picture> {
        let input = &self.checked.request.pictures[0];
        let size @ Size { width, height } = self.checked.sizes.output;
        let rgb = resized(self.first(), size, &self.checked.request.cancel)?;
        let mut picture = Picture::from_rgb(rgb);
        picture.alpha = match &input.alpha {
            Some(alpha) => Some(pixels::resize_gray(alpha, width, height, Filter::Lanczos3)?),
            None => None,
        };
        picture.icc.clone_from(&input.icc);
        Ok(picture)
    }

    /// The pictures as the vision-language model sees them now.
    pub(super) fn sight(&self) -> Result<Sight> {
        let cancel = &self.checked.request.cancel;
        let pictures = self
            .pictures()
            .zip(&self.checked.sizes.vision)
            .map(|(picture, &size)| resized(picture, size, cancel))
            .collect::<Result<Vec<_>>>()?;
        let key = key_of_pictures(&pictures);
        let look = || self.engine.opened.vlm.look_unless(&pictures, cancel);
        let seen = self.engine.memo.seen.get_or(key, look)?;
        Ok(Sight { pictures, key, seen })
    }

    /// The picture that is edited, as it is now.
    fn first(&self) -> &RgbImage {
        self.made.as_ref().unwrap_or(&self.checked.request.pictures[0].rgb)
    }

    fn pictures(&self) -> impl Iterator<Item = &RgbImage> {
        let others = self.checked.request.pictures.iter().skip(1).map(|picture| &picture.rgb);
        std::iter::once(self.first()).chain(others)
    }

    fn conditioning(&self, prompt: &str) -> Result<(Conditioning, Option<Conditioning>)> {
        let sight = self.sight()?;
        let encode = |prompt: &str| {
            let text = self.engine.opened.pipeline.text(prompt, sight.pictures.len());
            self.encode(&sight, &text)
        };
        Ok((encode(prompt)?, self.checked.negative.map(encode).transpose()?))
    }

    fn encode(&self, sight: &Sight, text: &str) -> Result<Conditioning> {
        let (vlm, memo) = (&self.engine.opened.vlm, &self.engine.memo);
        let hidden_states = memo.conditioning.get_or(key_of_text(&sight.key, text), || {
            self.engine.before_reading(false)?;
            let _room = self.room_for(Stage::EncodePrompt)?;
            // What the reference pipelines compute with; see `with_sequential_positions`.
            let inputs = vlm.prepare_seen(text, &sight.seen)?.with_sequential_positions();
            let hidden = vlm.hidden_states(&inputs, &self.checked.request.cancel)?; // (1, n, dim)
            let dropped = Pipeline::TOKENS_DROPPED;
            let kept = hidden.dim(1)?.saturating_sub(dropped);
            if kept == 0 {
                let found = format!("{} tokens with its template", hidden.dim(1)?);
                return Err(Error::field("prompt", found, format!("more than {dropped}")));
            }
            let hidden = hidden.narrow(1, dropped, kept)?;
            require_finite(&hidden, Stage::EncodePrompt)?;
            Ok(hidden)
        })?;
        Ok(Conditioning { hidden_states })
    }

    /// The pictures' tokens one after the other, and the grids of the denoised picture and of each.
    fn references(&self) -> Result<(Tensor, Vec<Grid>)> {
        let working = grid(self.engine, self.checked.sizes.working)?;
        let (mut grids, mut tokens) = (vec![working], Vec::new());
        for (index, (picture, &size)) in self.pictures().zip(&self.checked.sizes.latent).enumerate()
        {
            // The edited picture's grid is the denoised one's, so its latents fit as they are.
            let (of_picture, grid) = match (index, &self.latents) {
                (0, Some(latents)) => (latents.clone(), working),
                _ => self.latents_of(&resized(picture, size, &self.checked.request.cancel)?)?,
            };
            tokens.push(of_picture);
            grids.push(grid);
        }
        Ok((Tensor::cat(&tokens, 1)?, grids))
    }

    fn latents_of(&self, picture: &RgbImage) -> Result<(Tensor, Grid)> {
        let Engine { diffusion, memo, .. } = self.engine;
        memo.latents.get_or(key_of_pictures([picture]), || {
            let device = &diffusion.transformer().precision().device;
            let picture = pixels::tensor_from_rgb(picture, device)?;
            let cancel = &self.checked.request.cancel;
            let tokens = diffusion.reference_tokens(&picture, &self.tiling(), cancel)?;
            require_finite(&tokens.0, Stage::EncodePicture)?;
            Ok(tokens)
        })
    }
}

pub(super) fn resized(picture: &RgbImage, size: Size, cancel: &CancelToken) -> Result<RgbImage> {
    pixels::resize_unless(picture, size, Filter::Lanczos3, cancel)
}
