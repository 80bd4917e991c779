//! How much memory a piece of work will take, said before anything is allocated.

use super::inspect::PARTS;
use crate::{
    error::Result,
    memory::Budget,
    request::WeightShare,
    weights::{ModelFiles, Precision, Storage},
};

/// What a model's weights take in memory, part by part.
pub(super) fn weights(files: &ModelFiles, precision: &Precision) -> Result<Vec<WeightShare>> {
    let share = |(part, stem): (&'static str, &str)| -> Result<WeightShare> {
        let checkpoint = files.checkpoint(part, stem)?;
        let bytes = match part {
            // The autoencoder's convolutions are not quantized.
            "vae" => checkpoint.elements() * size_of::<f32>() as u64,
            _ => checkpoint.kept_bytes(precision),
        };
        Ok(WeightShare { part, bytes })
    };
    PARTS.into_iter().map(share).collect()
}

/// Checks that the weights of the model `name` fit.
pub(super) fn check_weights(
    shares: &[WeightShare],
    name: &str,
    precision: &Precision,
    budget: Budget,
) -> Result<()> {
    let bytes = shares.iter().map(|share| share.bytes).sum();
    check(&format!("the weights of {name}"), bytes, precision, budget)
}

/// Checks that one part of a model fits; returns what it takes in bytes.
pub(super) fn check_part(
    files: &ModelFiles,
    folder: &str,
    stem: &str,
    precision: &Precision,
    budget: Budget,
) -> Result<u64> {
    let bytes = files.checkpoint(folder, stem)?.kept_bytes(precision);
    check(&format!("the weights in {}", files.describe(folder)), bytes, precision, budget)?;
    Ok(bytes)
}

fn check(what: &str, bytes: u64, precision: &Precision, budget: Budget) -> Result<()> {
    if !precision.device.is_cpu() {
        return Ok(()); // the device's own allocator answers for its memory
    }
    let hint = match precision.storage {
        Storage::Q4K => "close other programs, or use a smaller model",
        Storage::Q8_0 => "--dtype q4_k takes about half of q8_0",
        _ => "--dtype q8_0 takes about a quarter of f32",
    };
    budget.check(what, bytes, hint)
}

/// The widths that activations follow from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widths {
    /// Channels of a token in the transformer.
    pub(super) transformer: usize,
    /// Channels of the autoencoder at full resolution.
    pub(super) autoencoder: usize,
}

/// Bytes that activations take at their highest: the widest block of the transformer or the widest
/// stage of the autoencoder, whichever is more. `pixels` are those of the largest picture.
pub(super) fn activation_bytes(tokens: usize, pixels: u64, widths: Widths) -> u64 {
    // Residual stream, its norm, q, k, v and the attention's result, and the MLP's hidden layer
    // before and after its activation (4 widths each).
    const TRANSFORMER_COPIES: u64 = 6 + 8;
    // Input, norm, output and residual of a residual block at full resolution.
    const AUTOENCODER_COPIES: u64 = 4;
    let f32_bytes = size_of::<f32>() as u64;
    let transformer = tokens as u64 * widths.transformer as u64 * TRANSFORMER_COPIES;
    let autoencoder = pixels * widths.autoencoder as u64 * AUTOENCODER_COPIES;
    f32_bytes * transformer.max(autoencoder)
}
