//! The transformer equals the reference.

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, Error, RequestError,
    diffusion::{
        Conditioning, Grid, GuidancePass, Transformer,
        qwen_image::{Branch, ModelInput, Outputs},
    },
    weights::{AttentionType, Precision, Storage},
};

use super::{conditioning, files, grids, largest_difference};
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

/// Two prompts of different lengths, so that one of them is padded, in either order, and two of one
/// length.
#[test]
fn predictions_in_one_batch_equal_those_of_two_passes() {
    for reference in Reference::all() {
        let (grids, long) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let cut = |from: usize| {
            let kept = long.hidden_states.dim(1).unwrap() - 3;
            Conditioning { hidden_states: long.hidden_states.narrow(1, from, kept).unwrap() }
        };
        let (short, other) = (cut(0), cut(2));
        for storage in [Storage::Compute, Storage::Q8_0] {
            let precision = Precision { storage, ..Precision::reference() };
            let model = Transformer::load(&files(&reference), &precision).unwrap();
            let cancel = CancelToken::new();
            let context = &model.contexts(&[0.37], &cancel).unwrap()[0];
            let both = |pair: [&Conditioning; 2], outputs, guidance| {
                model.set_guidance(guidance);
                let mut branches = pair.map(|conditioning| {
                    let input = ModelInput { tokens, grids: &grids, conditioning };
                    Branch { input, cache: None }
                });
                model.forward_each(&mut branches, context, outputs, &cancel).unwrap()
            };
            for pair in [[&long, &short], [&short, &long], [&short, &other]] {
                for outputs in [Outputs::Target, Outputs::All] {
                    let apart = both(pair, outputs, GuidancePass::InTurn);
                    let together = both(pair, outputs, GuidancePass::OneBatch);
                    assert_eq!(together.len(), 2);
                    let name = format!("{} {storage:?} {outputs:?}", reference.name());
                    let all = |entries: &[Tensor]| Tensor::cat(entries, 0).unwrap();
                    let (found, expected) = (all(&together), all(&apart));
                    assert_close(&name, &found, &expected, Tolerance::Relative(2e-6));
                    let difference = largest_difference(&apart[0], &apart[1]);
                    assert!(difference > 1e-4, "the prompts change nothing: {difference}");
                }
            }
        }
    }
}

/// Positions and lengths are kept from input to input: whatever came before, a prediction is that of a model
/// that has seen nothing.
#[test]
fn what_is_kept_of_other_inputs_changes_nothing() {
    let reference = Reference::open("tiny-qwen-2511");
    let (grids, long) = (grids(&reference), conditioning(&reference));
    let tokens = reference.tensor("dit.hidden_states");
    let cut = long.hidden_states.narrow(1, 2, long.hidden_states.dim(1).unwrap() - 3).unwrap();
    let short = Conditioning { hidden_states: cut };
    let alone = tokens.narrow(1, 0, grids[0].tokens()).unwrap();
    let turned: Vec<Grid> =
        grids.iter().map(|grid| Grid { height: grid.width, width: grid.height }).collect();
    let input = |tokens, grids, conditioning| ModelInput { tokens, grids, conditioning };
    let inputs = [
        vec![input(tokens, &grids[..], &long)],
        vec![input(tokens, &grids[..], &short)],
        vec![input(tokens, &grids[..], &long), input(tokens, &grids[..], &short)],
        vec![input(tokens, &turned[..], &long)],
        vec![input(&alone, &grids[..1], &long)],
        vec![input(tokens, &grids[..], &short), input(tokens, &grids[..], &long)],
        vec![input(tokens, &grids[..], &long)],
    ];
    let cancel = CancelToken::new();
    let predictions = |model: &Transformer, inputs: &[ModelInput<'_>]| {
        let context = &model.contexts(&[0.37], &cancel).unwrap()[0];
        let mut branches: Vec<_> =
            inputs.iter().map(|input| Branch { input: *input, cache: None }).collect();
        let found = model.forward_each(&mut branches, context, Outputs::All, &cancel).unwrap();
        Tensor::cat(&found, 0).unwrap()
    };
    for guidance in [GuidancePass::InTurn, GuidancePass::OneBatch] {
        let fresh = || {
            let model = Transformer::load(&files(&reference), &Precision::reference()).unwrap();
            model.set_guidance(guidance);
            model
        };
        let used = fresh();
        for (i, inputs) in inputs.iter().chain(&inputs).enumerate() {
            let (found, expected) = (predictions(&used, inputs), predictions(&fresh(), inputs));
            let difference = largest_difference(&found, &expected);
            assert!(difference == 0.0, "input {i}, {guidance:?}: {difference}");
        }
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
