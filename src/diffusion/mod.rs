//! Denoising: schedules, noise, guidance, the transformer and the autoencoder.
