//! How much memory a piece of work will take, said before anything is allocated.

use candle_core::DType;

use super::inspect::ModelInfo;
use crate::request::WeightShare;
use crate::{
    error::Result,
    memory::Budget,
    weights::{ModelFiles, Precision, Storage},
};

/// Values of one Q8_0 block and its bytes.
const Q8_0_BLOCK: (u64, u64) = (32, 34);
/// Values of one Q4_K super-block and its bytes.
const Q4_K_BLOCK: (u64, u64) = (256, 144);

/// What a model's weights take in memory, part by part.
pub(super) fn weights(info: &ModelInfo, precision: &Precision) -> Vec<WeightShare> {
    info.parts
        .iter()
        .map(|part| WeightShare {
            part: part.name,
            bytes: match part.name {
                // The autoencoder's convolutions are not quantized.
                "vae" => part.parameters * size_of::<f32>() as u64,
                _ => weight_bytes(part.parameters, precision),
            },
        })
        .collect()
}

/// Checks that the weights of the model `name` fit.
pub(super) fn check_weights(
    weights: &[WeightShare],
    name: &str,
    precision: &Precision,
    budget: Budget,
) -> Result<()> {
    let bytes = weights.iter().map(|share| share.bytes).sum();
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
    let checkpoint = files.checkpoint(folder, stem)?;
    let bytes = weight_bytes(checkpoint.elements(), precision);
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

fn weight_bytes(parameters: u64, precision: &Precision) -> u64 {
    let dtype = match precision.storage {
        Storage::Q8_0 => return blocks_bytes(parameters, Q8_0_BLOCK),
        Storage::Q4K => return blocks_bytes(parameters, Q4_K_BLOCK),
        Storage::Compute => precision.compute,
        Storage::Plain(dtype) => dtype,
    };
    parameters * DType::size_in_bytes(&dtype) as u64
}

fn blocks_bytes(parameters: u64, (values, bytes): (u64, u64)) -> u64 {
    (parameters * bytes).div_ceil(values)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantized_weight_takes_its_share_of_a_block() {
        let precision = Precision { storage: Storage::Q8_0, ..Precision::reference() };
        assert_eq!(weight_bytes(320, &precision), 340);
        let precision = Precision { storage: Storage::Q4K, ..Precision::reference() };
        assert_eq!(weight_bytes(512, &precision), 288);
        assert_eq!(weight_bytes(320, &Precision::reference()), 1280);
    }
}
