//! The autoencoder equals the reference, whole and in tiles.

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, Error, RequestError,
    diffusion::vae::{Autoencoder, Tiling},
    weights::Precision,
};

use super::{files, largest_difference};
use crate::common::{Reference, Tolerance, assert_close};

/// `x · std + mean`, the autoencoder's own latents.
fn denormalised(autoencoder: &Autoencoder, x: &Tensor) -> Tensor {
    let statistic = |values: &[f64]| {
        let values = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        values.reshape((1, values.elem_count(), 1, 1)).unwrap()
    };
    let config = autoencoder.config();
    let x = x.broadcast_mul(&statistic(&config.latents_std)).unwrap();
    x.broadcast_add(&statistic(&config.latents_mean)).unwrap()
}

fn normalised(autoencoder: &Autoencoder, x: &Tensor) -> Tensor {
    let zero = denormalised(autoencoder, &x.zeros_like().unwrap());
    let one = denormalised(autoencoder, &x.ones_like().unwrap());
    ((x - &zero).unwrap() / (one - zero).unwrap()).unwrap()
}

#[test]
fn the_autoencoder_equals_the_three_dimensional_reference() {
    for reference in Reference::with("vae.image") {
        let autoencoder = Autoencoder::load(&files(&reference), &Precision::reference()).unwrap();
        let cancel = CancelToken::new();
        let picture = reference.tensor("vae.image").squeeze(2).unwrap();
        let mean = reference.tensor("vae.mean").squeeze(2).unwrap();
        let latents = autoencoder.encode(&picture, &Tiling::default(), &cancel).unwrap();
        let found = denormalised(&autoencoder, &latents);
        assert_close(reference.name(), &found, &mean, Tolerance::Relative(5e-5));
        let latents = normalised(&autoencoder, &mean);
        let decoded = autoencoder.decode(&latents, &Tiling::default(), &cancel).unwrap();
        let expected = reference.tensor("vae.decoded").squeeze(2).unwrap();
        assert_close(reference.name(), &decoded, &expected, Tolerance::Relative(5e-5));
    }
}

/// Tiles that share twice as much as the layers see equal the whole; with less, errors appear where
/// tiles meet. Random weights carry them further than trained ones do.
#[test]
fn tiles_equal_the_whole() {
    for name in ["tiny-qwen-plus", "edit-23"] {
        let reference = Reference::open(name);
        let autoencoder = Autoencoder::load(&files(&reference), &Precision::reference()).unwrap();
        let cancel = CancelToken::new();
        let picture = smooth_picture(328, 312);
        let whole = autoencoder.encode(&picture, &Tiling::OFF, &cancel).unwrap();
        let decoded = autoencoder.decode(&whole, &Tiling::OFF, &cancel).unwrap();
        let exact_px = autoencoder.exact_overlap_px();
        // Tile, overlap, and the largest and the mean difference allowed.
        for (tile_px, overlap_px, largest, mean) in
            [(2 * exact_px, exact_px, 1e-5, 1e-6), (160, 80, 0.05, 1e-3), (128, 32, 1.0, 2e-2)]
        {
            let tiling = Tiling { above_pixels: 0, tile_px, overlap_px };
            let latents = autoencoder.encode(&picture, &tiling, &cancel).unwrap();
            let again = autoencoder.decode(&whole, &tiling, &cancel).unwrap();
            for (tiled, whole) in [(&latents, &whole), (&again, &decoded)] {
                let found = largest_difference(tiled, whole);
                let average = (tiled - whole).unwrap().abs().unwrap().mean_all().unwrap();
                let average = f64::from(average.to_scalar::<f32>().unwrap());
                assert!(
                    found <= largest && average <= mean,
                    "{name}, tiles of {tile_px} px sharing {overlap_px} px: {found:e}, {average:e}"
                );
            }
        }
        // Up to the threshold nothing is tiled.
        let tiling = Tiling { above_pixels: 328 * 312, tile_px: 64, overlap_px: 0 };
        assert!(!tiling.applies(328, 312) && tiling.applies(328, 320));
        let latents = autoencoder.encode(&picture, &tiling, &cancel).unwrap();
        assert!(largest_difference(&latents, &whole) == 0.0);
    }
}

/// A picture with slow and fast changes, from −1 to 1.
fn smooth_picture(height: usize, width: usize) -> Tensor {
    let value = |c: usize, y: usize, x: usize| {
        let (c, y, x) = (c as f32, y as f32, x as f32);
        0.6 * (x / 23.0 + c).sin() * (y / 31.0 - c).cos() + 0.4 * (x * y / 97.0).sin()
    };
    let values: Vec<f32> = (0..3)
        .flat_map(|c| (0..height).flat_map(move |y| (0..width).map(move |x| value(c, y, x))))
        .collect();
    Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu).unwrap()
}

#[test]
fn pictures_and_latents_that_do_not_fit_are_refused() {
    let reference = Reference::open("tiny-qwen-edit");
    let autoencoder = Autoencoder::load(&files(&reference), &Precision::reference()).unwrap();
    let cancel = CancelToken::new();
    let zeros = |shape: [usize; 4]| Tensor::zeros(&shape, DType::F32, &Device::Cpu).unwrap();
    for shape in [[1, 3, 33, 32], [1, 3, 32, 36], [1, 4, 32, 32], [1, 3, 0, 32]] {
        let error = autoencoder.encode(&zeros(shape), &Tiling::OFF, &cancel).unwrap_err();
        let expected = RequestError::Field {
            field: "picture",
            found: format!("{} channels, {} × {}", shape[1], shape[3], shape[2]),
            expected: "3 channels, sides a multiple of 8".to_owned(),
        };
        assert!(matches!(&error, Error::Request(found) if *found == expected), "{error}");
    }
    for shape in [[1, 15, 4, 4], [1, 16, 0, 4]] {
        let error = autoencoder.decode(&zeros(shape), &Tiling::OFF, &cancel).unwrap_err();
        assert!(
            matches!(error, Error::Request(RequestError::Field { field: "latents", .. })),
            "{error}"
        );
    }
    cancel.cancel();
    let picture = zeros([1, 3, 32, 32]);
    let error = autoencoder.encode(&picture, &Tiling::OFF, &cancel).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let error = autoencoder.decode(&zeros([1, 16, 4, 4]), &Tiling::OFF, &cancel).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
}
