//! The models of a folder made by `make_published.py`, and its inputs.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken,
    diffusion::{
        Conditioning, Grid, Transformer,
        qwen_image::{ModelInput, Outputs},
        vae::{Autoencoder, Tiling},
    },
    ops::KeepBuffers,
    weights::{ModelFiles, Precision},
};

fn inputs(folder: &Path, name: &str) -> Tensor {
    let inputs = candle_core::safetensors::load(folder.join("inputs.safetensors"), &Device::Cpu);
    inputs.unwrap().remove(name).unwrap().to_dtype(DType::F32).unwrap()
}

/// One forward pass over the tokens of the picture and its reference: everything that diffusers'
/// forward does, the modulation of the step and the references' output included.
pub(crate) fn transformer(folder: &Path, precision: Precision) -> impl Fn() -> Tensor + use<> {
    let files = ModelFiles::Folder(folder.to_owned());
    let model = Transformer::load(&files, &precision).unwrap();
    let tokens = inputs(folder, "tokens");
    let conditioning = Conditioning { hidden_states: inputs(folder, "text") };
    let side = (tokens.dim(1).unwrap() / 2).isqrt();
    // As in a loop of several steps.
    let buffers = KeepBuffers::new();
    move || {
        let _buffers = &buffers;
        let grids = [Grid { height: side, width: side }; 2];
        let input = ModelInput { tokens: &tokens, grids: &grids, conditioning: &conditioning };
        let cancel = CancelToken::new();
        let contexts = model.contexts(&[0.5], &cancel).unwrap();
        model.forward(&input, &contexts[0], Outputs::All, &cancel).unwrap()
    }
}

/// The picture to its latents.
pub(crate) fn encode(folder: &Path) -> impl Fn() -> Tensor + use<> {
    let (model, picture) = (autoencoder(folder), inputs(folder, "picture"));
    move || model.encode(&picture, &Tiling::OFF, &CancelToken::new()).unwrap()
}

/// Latents to a picture.
pub(crate) fn decode(folder: &Path) -> impl Fn() -> Tensor + use<> {
    let (model, latents) = (autoencoder(folder), encode(folder)());
    move || model.decode(&latents, &Tiling::OFF, &CancelToken::new()).unwrap()
}

fn autoencoder(folder: &Path) -> Autoencoder {
    let files = ModelFiles::Folder(folder.to_owned());
    Autoencoder::load(&files, &Precision::reference()).unwrap()
}
