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
    weights::{AttentionType, ModelFiles, Precision, Storage},
};

fn inputs(folder: &Path, name: &str) -> Tensor {
    let inputs = candle_core::safetensors::load(folder.join("inputs.safetensors"), &Device::Cpu);
    inputs.unwrap().remove(name).unwrap().to_dtype(DType::F32).unwrap()
}

/// One forward pass over the tokens of the picture and its reference: everything that diffusers'
/// forward does, the modulation of the step and the references' output included.
pub(crate) fn transformer(folder: &Path, storage: Storage) -> impl Fn() -> Tensor + use<> {
    let files = ModelFiles::Folder(folder.to_owned());
    let attention = AttentionType::default();
    let precision = Precision { storage, attention, ..Precision::reference() };
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

/// The picture to its latents and back.
pub(crate) fn autoencoder(folder: &Path) -> impl Fn() -> Tensor + use<> {
    let files = ModelFiles::Folder(folder.to_owned());
    let model = Autoencoder::load(&files, &Precision::reference()).unwrap();
    let picture = inputs(folder, "picture");
    move || {
        let cancel = CancelToken::new();
        let latents = model.encode(&picture, &Tiling::OFF, &cancel).unwrap();
        model.decode(&latents, &Tiling::OFF, &cancel).unwrap()
    }
}
