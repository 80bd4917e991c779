//! The CUDA kernels, in the emulation and on a device where there is one.

#[cfg(feature = "cuda-emulation")]
use std::path::Path;

use candle_core::Device;
#[cfg(feature = "cuda-emulation")]
use pentimento::check::{self, Options};
use pentimento::{
    check::report::Row,
    ops::cuda::parity::{self, Outcome},
};

fn require(outcomes: &[Outcome], at_least: usize) {
    let rows = outcomes.iter().map(Row::of_outcome);
    let failed: Vec<String> = rows.filter(|row| !row.passed()).map(|row| row.line()).collect();
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), outcomes.len(), failed.join("\n"));
    assert!(outcomes.len() > at_least, "only {} checks", outcomes.len());
}

#[cfg(feature = "cuda-emulation")]
#[test]
fn emulated_kernels_follow_the_rule_in_every_order_of_threads() {
    require(&parity::run(&Device::Cpu, &[0, 1, 77]), 300);
}

#[cfg(feature = "cuda-emulation")]
#[test]
fn emulated_kernels_of_a_hopper_follow_the_rule_in_every_order_of_threads() {
    require(&parity::run_hopper(&Device::Cpu, &[0, 1, 77]), 40);
    require(&parity::run_blas(&Device::Cpu, &[0, 1, 77]), 50);
}

#[cfg(feature = "cuda-emulation")]
#[test]
fn emulated_decoding_follows_the_rule_in_every_order_of_threads() {
    let decode = parity::GROUPS.iter().find(|group| group.name == "decode").unwrap();
    require(&parity::run_group(decode, &Device::Cpu, &[0, 1, 77]), 80);
}

/// Everything that `pentimento-gpu-check` does, small.
#[cfg(feature = "cuda-emulation")]
#[test]
fn the_check_of_a_gpu_passes_in_the_emulation() {
    let scratch = tempfile::tempdir().unwrap();
    let references = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference");
    let options = Options {
        references: Some(references),
        scratch: scratch.path().to_owned(),
        correctness_only: false,
        shrink: 100,
    };
    let mut lines = Vec::new();
    let report = check::run(&Device::Cpu, &options, &mut |row| lines.push(row.line()));
    let failed: Vec<&String> = lines.iter().filter(|line| line.starts_with("FAIL")).collect();
    assert!(report.passed() && failed.is_empty(), "{failed:#?}");
    for part in [
        "parity",
        "models",
        "large",
        "memory",
        "cublaslt",
        "operations",
        "products",
        "epilogues",
        "transformer",
        "hopper",
        "autoencoder",
        "recorded",
        "a token of the host",
    ] {
        assert!(report.rows.iter().any(|row| row.part == part), "no {part}: {lines:#?}");
    }
}

/// Memory that runs out in the middle of a pass is told as such wherever it does, and the model computes
/// afterwards what it did before.
#[cfg(feature = "cuda-emulation")]
#[test]
fn a_pass_that_runs_out_of_memory_says_so_and_can_be_repeated() {
    use candle_core::DType;
    use pentimento::{
        CancelToken, Error,
        diffusion::{
            GuidancePass, Transformer,
            qwen_image::{Branch, ModelInput, Outputs},
        },
        memory::ladder::is_out_of_memory,
        ops::cuda::emulated_with_room_for,
        weights::{ModelFiles, Precision},
    };

    use crate::{
        common::Reference,
        diffusion::{conditioning, grids},
    };

    let reference = Reference::open("tiny-qwen-2511");
    let files = ModelFiles::Folder(reference.folder.clone());
    let precision = Precision { compute: DType::BF16, ..Precision::reference() };
    let model = Transformer::load(&files, &precision).unwrap();
    model.set_guidance(GuidancePass::OneBatch);
    let (tokens, grids) = (reference.tensor("dit.hidden_states"), grids(&reference));
    let conditioning = conditioning(&reference);
    let cancel = CancelToken::new();
    let pass = |allocations| {
        emulated_with_room_for(allocations, || {
            let contexts = model.contexts(&[0.37], &cancel)?;
            let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
            let mut branches = [(); 2].map(|()| Branch { input, cache: None });
            let both = model.forward_each(&mut branches, &contexts[0], Outputs::Target, &cancel)?;
            Ok::<Vec<f32>, Error>(both[1].flatten_all()?.to_vec1()?)
        })
    };
    let (expected, all) = pass(u64::MAX);
    let expected = expected.unwrap();
    assert!(all > 30, "{all} allocations");
    let some = (0..all).step_by(usize::try_from(all).unwrap() / 9);
    for allocations in some.chain([1, 2, all - 1]) {
        let (result, taken) = pass(allocations);
        let error = result.unwrap_err();
        assert!(is_out_of_memory(&error), "{allocations}: {error}");
        assert_eq!(taken, allocations);
    }
    assert_eq!(pass(all).0.unwrap(), expected);
}

/// With channels side by side, tiles are cut, blended and put together as planes are.
#[cfg(feature = "cuda-emulation")]
#[test]
fn an_autoencoder_on_kernels_works_in_tiles() {
    use candle_core::{DType, Tensor};
    use pentimento::{
        CancelToken,
        diffusion::vae::{Autoencoder, Tiling},
        ops::cuda::{emulated, launches},
        weights::{ModelFiles, Precision},
    };

    use crate::common::Reference;

    let files = ModelFiles::Folder(Reference::open("tiny-qwen-plus").folder);
    let tiling = Tiling { above_pixels: 0, tile_px: 48, overlap_px: 16 };
    let picture = Tensor::rand(-1.0_f32, 1.0, (1, 3, 72, 40), &Device::Cpu).unwrap();
    let both = |compute: DType, latents: Option<&Tensor>| {
        let precision = Precision { compute, ..Precision::reference() };
        let model = Autoencoder::load(&files, &precision).unwrap();
        let found = model.encode(&picture, &tiling, &CancelToken::new()).unwrap();
        let decoded = model.decode(latents.unwrap_or(&found), &tiling, &CancelToken::new());
        [found, decoded.unwrap()]
    };
    let exact = both(DType::F32, None);
    let before = launches();
    let found = emulated(0, || both(DType::BF16, Some(&exact[0])));
    assert!(launches() > before + 100);
    for (found, exact) in found.iter().zip(&exact) {
        let error = (found - exact).unwrap().sqr().unwrap().mean_all().unwrap();
        let all = exact.sqr().unwrap().mean_all().unwrap();
        let [error, all] = [error, all].map(|x| x.to_scalar::<f32>().unwrap().sqrt());
        assert!(error < 0.02 * all, "{error} of {all}");
    }
}

/// fp8 e4m3 stays as it is in the file, with its scale, and gives what the widened matrix gives.
#[cfg(feature = "cuda-emulation")]
#[test]
fn fp8_matrices_are_multiplied_as_they_are_stored() {
    use candle_core::{DType, Tensor};
    use pentimento::{
        layers::Linear,
        ops::cuda::{emulated, launches},
        weights::{Checkpoint, Precision, Weights},
    };
    use safetensors::{Dtype, tensor::TensorView};

    let bytes: Vec<u8> = (0..32 * 48_u32).map(|i| (i * 37 % 251) as u8 & 0xf7).collect();
    let scale = 0.037_f32.to_le_bytes();
    let bias = [0_u8; 64];
    let view = |dtype, shape, data| TensorView::new(dtype, shape, data).unwrap();
    let tensors = [
        ("l.weight", view(Dtype::F8_E4M3, vec![32, 48], &bytes[..])),
        ("l.weight_scale", view(Dtype::F32, vec![], &scale[..])),
        ("l.bias", view(Dtype::BF16, vec![32], &bias[..])),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.safetensors");
    fs_err::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let load = |compute| {
        let precision = Precision { compute, ..Precision::reference() };
        let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), precision);
        let linear = Linear::load(&weights.pp("l"), 48, 32).unwrap();
        weights.finish(&[]).unwrap();
        linear
    };
    let x = Tensor::randn(0.0_f32, 1.0, (3, 48), &Device::Cpu).unwrap();
    let x = x.to_dtype(DType::BF16).unwrap();
    let wide = x.to_dtype(DType::F32).unwrap();
    let expected = load(DType::F32).forward(&wide).unwrap();
    let before = launches();
    let found = emulated(0, || load(DType::BF16).forward(&x)).unwrap();
    assert!(launches() > before, "no kernel ran");
    let error = (found.to_dtype(DType::F32).unwrap() - &expected).unwrap().abs().unwrap();
    let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(largest(&error) <= largest(&expected) / 128.0, "{error}");
}

#[cfg(feature = "cuda")]
#[test]
fn kernels_follow_the_rule_on_a_device() {
    if let Ok(device) = Device::new_cuda(0) {
        require(&parity::run(&device, &[0]), 100);
        require(&parity::run_blas(&device, &[0]), 15);
    }
}

/// The device has its next token before anyone hears of one; a request that is cancelled meanwhile loses none.
#[cfg(feature = "cuda-emulation")]
#[test]
fn the_last_token_before_a_cancelled_one_is_heard_of() {
    use candle_core::DType;
    use pentimento::{
        CancelToken, Error,
        ops::{cuda::emulated, on_worker},
        vlm::{GenerateOptions, Sampling, VisionLanguageModel},
        weights::{ModelFiles, Precision, Storage},
    };

    use crate::common::Reference;

    let files = ModelFiles::Folder(Reference::open("tiny-qwen-2511").folder);
    // Plain matrices in host memory are laid out for the CPU, without a prepared pass.
    let (compute, storage) = (DType::BF16, Storage::Q8_0);
    let precision = Precision { compute, storage, ..Precision::reference() };
    let check = || {
        let model = VisionLanguageModel::load(&files, "text_encoder", &precision).unwrap();
        let inputs = model.prepare("make it red", &[]).unwrap();
        let options = GenerateOptions { sampling: Sampling::Greedy, ..model.generate_options() };
        // Something is heard of each token where none is a part of a character.
        let write = |cancel: &CancelToken, on_text: &mut dyn FnMut(&str)| {
            let mut letters = model.constraint("start: /[a-z]{20}/").unwrap();
            model.generate_within(&inputs, &options, Some(&mut letters), cancel.into(), on_text)
        };
        let mut pieces: Vec<String> = Vec::new();
        write(&CancelToken::new(), &mut |piece| pieces.push(piece.to_owned())).unwrap();
        assert!(pieces.len() > 2, "{pieces:?}");

        let (cancel, mut heard) = (CancelToken::new(), Vec::new());
        let result = write(&cancel, &mut |piece| {
            heard.push(piece.to_owned());
            cancel.cancel();
        });
        assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        // The second one was on its way.
        assert_eq!(heard, pieces[..2]);
    };
    // The emulation is the thread's own, and prompts are read on a worker.
    on_worker(|| emulated(0, check));
}
