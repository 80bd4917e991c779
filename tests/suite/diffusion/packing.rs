//! Guidance, and the order of tokens.

use candle_core::{Device, Tensor};
use pentimento::{
    Error,
    diffusion::{
        Grid,
        guidance::rescaled_guidance,
        qwen_image::pack::{latents_from_tokens, tokens_from_latents},
    },
};

use super::largest_difference;
use crate::common::{Tolerance, assert_close};

#[test]
fn guidance_keeps_the_length_of_the_prediction() {
    let positive = Tensor::new(&[[[3.0_f32, 4.0], [1.0, 0.0]]], &Device::Cpu).unwrap();
    let negative = Tensor::new(&[[[3.0_f32, 0.0], [1.0, 0.0]]], &Device::Cpu).unwrap();
    let guided = rescaled_guidance(&positive, &negative, 2.0).unwrap();
    // (3, 8) has the length √73 and is brought to that of (3, 4).
    let ratio = 5.0 / 73.0_f32.sqrt();
    let expected = Tensor::new(&[[[3.0 * ratio, 8.0 * ratio], [1.0, 0.0]]], &Device::Cpu).unwrap();
    assert_close("guidance", &guided, &expected, Tolerance::Absolute(1e-6));
}

#[test]
fn packing_orders_channels_before_the_places_in_a_patch() {
    let latents = Tensor::arange(0.0_f32, 48.0, &Device::Cpu).unwrap();
    let latents = latents.reshape((1, 2, 4, 6)).unwrap();
    let (tokens, grid) = tokens_from_latents(&latents).unwrap();
    assert_eq!((tokens.dims(), grid), (&[1, 6, 8][..], Grid { height: 2, width: 3 }));
    let token: Vec<f32> = tokens.get(0).unwrap().get(1).unwrap().to_vec1().unwrap();
    assert_eq!(token, [2.0, 3.0, 8.0, 9.0, 26.0, 27.0, 32.0, 33.0]);
    let back = latents_from_tokens(&tokens, grid).unwrap();
    assert!(largest_difference(&back, &latents) == 0.0);

    let odd = latents.narrow(2, 0, 3).unwrap();
    assert!(matches!(tokens_from_latents(&odd), Err(Error::Request(_))));
    let other = Grid { height: 2, width: 2 };
    assert!(matches!(latents_from_tokens(&tokens, other), Err(Error::Request(_))));
}
