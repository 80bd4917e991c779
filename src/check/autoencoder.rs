//! Times of the autoencoder at its published dimensions with random weights.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};

use super::{
    report::{Finding, Row},
    times::{Timer, taken},
};
use crate::{
    diffusion::vae::{Autoencoder, Tiling},
    error::Result,
    progress::CancelToken,
    weights::{ModelFiles, Precision},
};

const PART: &str = "autoencoder";
/// Every tensor's name and shape, from diffusers' `AutoencoderKLQwenImage` with its defaults.
const SHAPES: &str = include_str!("autoencoder.txt");
/// The narrowest width there.
const BASE: usize = 96;
const SIDE_PX: usize = 1024;
/// Pixels of a latent.
const UNIT_PX: usize = 8;
const CHANNELS: usize = 16;
/// What the pool and the libraries of a GPU take beside the tensors, in MiB.
const ROUNDING_MIB: f64 = 64.0;

pub(super) fn times(device: &Device, scratch: &Path, shrink: usize) -> Vec<Row> {
    let folder = scratch.join(PART);
    taken(device, PART, 5_usize.div_ceil(shrink), |timer| {
        write(&folder, device, BASE.div_ceil(8 * shrink) * 8)?;
        both_ways(timer, &folder, shrink)
    })
}

fn both_ways(timer: &mut Timer<'_>, folder: &Path, shrink: usize) -> Result<()> {
    let device = timer.device;
    let compute = DType::BF16;
    let precision = Precision { device: device.clone(), compute, ..Precision::reference() };
    let model = Autoencoder::load(&ModelFiles::Folder(folder.to_owned()), &precision)?;
    let side = SIDE_PX.div_ceil(UNIT_PX * shrink);
    let px = UNIT_PX * side;
    let picture = Tensor::randn(0.0_f32, 0.5, (1, 3, px, px), device)?;
    let latents = Tensor::randn(0.0_f32, 1.0, (1, CHANNELS, side, side), device)?;
    let cancel = CancelToken::new();
    let before = used(device)?;
    timer.time(format!("encode {px} × {px}"), (1.0, "pictures/s"), || {
        model.encode(&picture, &Tiling::OFF, &cancel)?;
        Ok(())
    });
    timer.time(format!("decode {px} × {px}"), (1.0, "pictures/s"), || {
        model.decode(&latents, &Tiling::OFF, &cancel)?;
        Ok(())
    });
    let finding = match (before, used(device)?) {
        (Some([before, _]), Some([_, most])) => {
            let (config, sides) = (model.config(), [px, px]);
            let encoding = config.encoding_bytes(sides, &Tiling::OFF, &precision);
            let decoding = config.decoding_bytes(sides, &Tiling::OFF, &precision);
            #[expect(clippy::cast_precision_loss, reason = "some MiB")]
            let mebibytes = |bytes: u64| (bytes >> 20) as f64;
            let limit = mebibytes(encoding.max(decoding)) + ROUNDING_MIB;
            Finding::Checked { value: mebibytes(most.saturating_sub(before)), limit }
        }
        _ => Finding::LeftOut("there is no memory pool on the CPU".to_owned()),
    };
    let name = format!("MiB for {px} × {px} pixels, of the estimate");
    timer.rows.push(Row { part: PART.into(), name, finding });
    Ok(())
}

/// Bytes that are taken from the device's memory pool, and the most that were.
#[cfg(feature = "cuda")]
fn used(device: &Device) -> Result<Option<[u64; 2]>> {
    use crate::memory::{CudaPool, Pool as _};

    device.synchronize()?;
    let Device::Cuda(device) = device else { return Ok(None) };
    let usage = CudaPool::new(device)?.usage();
    Ok(Some([usage.used, usage.used_high]))
}

#[cfg(not(feature = "cuda"))]
fn used(device: &Device) -> Result<Option<[u64; 2]>> {
    device.synchronize()?;
    Ok(None)
}

/// Writes `vae/` below `folder`, in bf16, with `base` in place of the published width.
fn write(folder: &Path, device: &Device, base: usize) -> Result<()> {
    let folder = folder.join("vae");
    fs_err::create_dir_all(&folder)?;
    let tensors: HashMap<&str, Tensor> = SHAPES
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let name = words.next().unwrap_or_default();
            let sizes = words.filter_map(|word| word.parse().ok());
            let narrowed = |size: usize| match size.checked_div(BASE) {
                Some(widths) if size.is_multiple_of(BASE) => widths * base,
                _ => size,
            };
            let shape: Vec<usize> = sizes.map(narrowed).collect();
            let x = Tensor::randn(0.0_f32, 0.02, shape, device)?.to_dtype(DType::BF16)?;
            Ok((name, x.to_device(&Device::Cpu)?))
        })
        .collect::<candle_core::Result<_>>()?;
    candle_core::safetensors::save(&tensors, folder.join("diffusion_pytorch_model.safetensors"))?;
    let config = serde_json::json!({ "_class_name": "AutoencoderKLQwenImage", "base_dim": base });
    fs_err::write(folder.join("config.json"), config.to_string())?;
    Ok(())
}
