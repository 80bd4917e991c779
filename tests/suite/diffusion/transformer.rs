//! The transformer equals the reference.

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, Error, RequestError,
    diffusion::{
        Conditioning, Grid, Transformer,
        qwen_image::{ModelInput, Outputs},
    },
    weights::{AttentionType, Precision, Storage},
};

use super::{conditioning, files, grids};
use crate::common::{Reference, Tolerance, assert_close};

#[test]
fn the_transformer_equals_the_reference() {
    for reference in Reference::all() {
        let model = Transformer::load(&files(&reference), &Precision::reference()).unwrap();
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let cancel = CancelToken::new();
        let contexts = model.contexts(&[0.999, 0.37], &cancel).unwrap();
        for (time, context) in ["0.999", "0.37"].into_iter().zip(&contexts) {
            let name = format!("{}: dit.out.{time}", reference.name());
            let expected = reference.tensor(&format!("dit.out.{time}"));
            let all = model.forward(&input, context, Outputs::All, &cancel).unwrap();
            assert_close(&name, &all, expected, Tolerance::Relative(5e-5));
            // Leaving out what a pipeline does not use changes nothing else.
            let target = model.forward(&input, context, Outputs::Target, &cancel).unwrap();
            let part = all.narrow(1, 0, grids[0].tokens()).unwrap();
            assert_close(&name, &target, &part, Tolerance::Relative(1e-6));
            // Neither does computing the modulation of one step alone.
            let alone = model.contexts(&[time.parse().unwrap()], &cancel).unwrap();
            let alone = model.forward(&input, &alone[0], Outputs::All, &cancel).unwrap();
            assert_close(&name, &alone, &all, Tolerance::Relative(1e-6));
        }
    }
}

#[test]
fn quantized_storage_stays_near_the_reference() {
    for reference in Reference::all() {
        let precision = Precision { storage: Storage::Q8_0, ..Precision::reference() };
        let model = Transformer::load(&files(&reference), &precision).unwrap();
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let context = &model.contexts(&[0.37], &CancelToken::new()).unwrap()[0];
        let out = model.forward(&input, context, Outputs::All, &CancelToken::new()).unwrap();
        let expected = reference.tensor("dit.out.0.37");
        assert_close(reference.name(), &out, expected, Tolerance::Relative(0.05));
    }
}

#[test]
fn attention_in_bf16_changes_little() {
    for reference in Reference::all() {
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let forward = |storage, attention| {
            let precision = Precision { storage, attention, ..Precision::reference() };
            let model = Transformer::load(&files(&reference), &precision).unwrap();
            let context = &model.contexts(&[0.37], &CancelToken::new()).unwrap()[0];
            model.forward(&input, context, Outputs::All, &CancelToken::new()).unwrap()
        };
        let exact = forward(Storage::Q8_0, AttentionType::Compute);
        let rounded = forward(Storage::Q8_0, AttentionType::LikeWeights);
        // What attention rounds (3e-3 and less) moves activations over the steps of their 8 bits.
        assert_close(reference.name(), &rounded, &exact, Tolerance::Relative(1.5e-2));
        // Matrices in float32 ask for attention in float32.
        let exact = forward(Storage::Compute, AttentionType::Compute);
        let same = forward(Storage::Compute, AttentionType::LikeWeights);
        assert_close(reference.name(), &same, &exact, Tolerance::Relative(1e-7));
    }
}

#[test]
fn half_precision_stays_near_the_reference() {
    let reference = Reference::open("tiny-qwen-2511");
    let precision = Precision { compute: DType::F16, ..Precision::reference() };
    let model = Transformer::load(&files(&reference), &precision).unwrap();
    let (grids, conditioning) = (grids(&reference), conditioning(&reference));
    let tokens = reference.tensor("dit.hidden_states");
    let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
    let context = &model.contexts(&[0.37], &CancelToken::new()).unwrap()[0];
    let out = model.forward(&input, context, Outputs::All, &CancelToken::new()).unwrap();
    assert_eq!(out.dtype(), DType::F32);
    assert_close("half", &out, reference.tensor("dit.out.0.37"), Tolerance::Relative(0.01));
}

#[test]
fn tokens_that_do_not_fit_are_refused() {
    let reference = Reference::open("tiny-qwen-edit");
    let model = Transformer::load(&files(&reference), &Precision::reference()).unwrap();
    let (grids, conditioning) = (grids(&reference), conditioning(&reference));
    let tokens = reference.tensor("dit.hidden_states");
    let cancel = CancelToken::new();
    let context = &model.contexts(&[0.5], &cancel).unwrap()[0];
    let fault = |tokens: &Tensor, grids: &[Grid], conditioning: &Conditioning| {
        let input = ModelInput { tokens, grids, conditioning };
        match model.forward(&input, context, Outputs::Target, &cancel).unwrap_err() {
            Error::Request(RequestError::Field { field, .. }) => field,
            other => panic!("{other}"),
        }
    };
    assert_eq!(fault(tokens, &grids[..1], &conditioning), "latents");
    assert_eq!(fault(&tokens.narrow(2, 0, 32).unwrap(), &grids, &conditioning), "latents");
    assert_eq!(fault(&tokens.narrow(1, 0, 0).unwrap(), &[], &conditioning), "latents");
    let states = |shape: (usize, usize, usize)| Conditioning {
        hidden_states: Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap(),
    };
    assert_eq!(fault(tokens, &grids, &states((1, 9, 65))), "conditioning");
    assert_eq!(fault(tokens, &grids, &states((1, 0, 64))), "conditioning");
    assert_eq!(fault(tokens, &grids, &states((2, 9, 64))), "conditioning");
    assert_eq!(fault(tokens, &grids, &states((1, 5000, 64))), "prompt");
}
