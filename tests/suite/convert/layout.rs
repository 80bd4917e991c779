//! The bytes of new files, without a reader of ours in between.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use pentimento::{ConvertRequest, weights::WriteType};
use sha2::{Digest, Sha256};

use super::converted;
use crate::common::gguf_writer::Gguf;

const MATRIX: &str = "transformer_blocks.0.img_mod.1.weight";
const KERNEL: &str = "transformer_blocks.0.kernel.weight";

/// A transformer by its names.
fn tensors() -> HashMap<String, Tensor> {
    let numbers = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
    let tensor = |shape: &[usize]| {
        let numbers = numbers(shape.iter().product());
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    };
    HashMap::from([
        ("img_in.weight".to_owned(), tensor(&[2, 3]).to_dtype(DType::BF16).unwrap()),
        (MATRIX.to_owned(), tensor(&[3, 64])),
        (KERNEL.to_owned(), tensor(&[2, 1, 2, 2, 3]).to_dtype(DType::F16).unwrap()),
        ("txt_norm.weight".to_owned(), tensor(&[5]).to_dtype(DType::BF16).unwrap()),
    ])
}

#[test]
fn a_gguf_file_is_laid_out_as_the_format_says() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("m.safetensors"), folder.path().join("m.gguf"));
    candle_core::safetensors::save(&tensors(), &input).unwrap();
    let outcome = converted(&ConvertRequest::new(&input, &output, WriteType::Q8_0));
    let tensors = tensors();
    let mut expected = Gguf::new();
    expected.text("general.architecture", "qwen_image");
    expected.text("general.type", "model");
    expected.text("general.name", "m");
    expected.int("general.file_type", 7);
    expected.int("general.quantization_version", 2);
    expected.int("general.alignment", 32);
    expected.ints(&format!("comfy.gguf.orig_shape.{KERNEL}"), &[2, 1, 2, 2, 3]);
    expected.plain("img_in.weight", &tensors["img_in.weight"]);
    expected.quantized(MATRIX, &tensors[MATRIX], GgmlDType::Q8_0);
    // ggml has four axes: the slowest two are put together.
    expected.plain(KERNEL, &tensors[KERNEL].reshape((2, 2, 2, 3)).unwrap());
    let norm = tensors["txt_norm.weight"].to_dtype(DType::F32).unwrap();
    expected.plain("txt_norm.weight", &norm);
    let bytes = fs_err::read(&output).unwrap();
    assert_eq!(bytes, expected.bytes());
    let digits: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let file = &outcome.files[0];
    assert_eq!((&file.sha256, file.bytes), (&digits, bytes.len() as u64));
    let checkpoint = pentimento::weights::Checkpoint::open_file(&output).unwrap();
    assert_eq!(file.fingerprint, checkpoint.fingerprint());
    // Nothing tells the version, so nothing is claimed; a name is enough.
    assert!(outcome.version.is_none() && outcome.notes[0].contains("--name"), "{outcome:?}");
    let mut named = ConvertRequest::new(&input, folder.path().join("n.gguf"), WriteType::Q8_0);
    named.name = Some("my-edit-2511".to_owned());
    let outcome = converted(&named);
    assert_eq!(outcome.version, Some("Qwen-Image-Edit-2511"));
    let checkpoint = pentimento::weights::Checkpoint::open_file(&named.output).unwrap();
    assert!(checkpoint.contains("__index_timestep_zero__"));
}

#[test]
fn a_safetensors_file_is_one_that_the_crate_reads() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("m.safetensors"), folder.path().join("o.sft"));
    candle_core::safetensors::save(&tensors(), &input).unwrap();
    let mut request = ConvertRequest::new(&input, &output, WriteType::Fp8);
    request.name = Some("a name".to_owned());
    converted(&request);
    let bytes = fs_err::read(&output).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert!(header.is_multiple_of(8));
    let texts = metadata.metadata().clone().unwrap();
    assert_eq!(texts["modelspec.title"], "a name");
    assert_eq!(texts["format"], "pt");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let found: Vec<(String, safetensors::Dtype)> = {
        let mut all: Vec<_> =
            file.iter().map(|(name, view)| (name.to_owned(), view.dtype())).collect();
        all.sort();
        all
    };
    use safetensors::Dtype::{BF16, F8_E4M3, F16, F32, U8};
    let layer = MATRIX.strip_suffix(".weight").unwrap();
    let expected = [
        ("img_in.weight".to_owned(), BF16),
        (format!("{layer}.comfy_quant"), U8),
        (MATRIX.to_owned(), F8_E4M3),
        (format!("{layer}.weight_scale"), F32),
        (KERNEL.to_owned(), F16),
        ("txt_norm.weight".to_owned(), BF16),
    ];
    assert_eq!(found, expected);
    for (name, view) in file.iter() {
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize - 8 - header;
        assert!(start.is_multiple_of(view.dtype().bitsize().div_ceil(8)), "{name} at {start}");
    }
}

#[test]
fn files_of_one_model_are_the_same_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("m.safetensors");
    let mut tensors = tensors();
    // More than a batch of chunks on one thread.
    let numbers: Vec<f32> = (0..1024 * 1024).map(|i| (i as f32 * 0.37).sin()).collect();
    let large = Tensor::from_vec(numbers, (1024, 1024), &Device::Cpu).unwrap();
    tensors.insert(MATRIX.to_owned(), large);
    candle_core::safetensors::save(&tensors, &input).unwrap();
    let file = |threads: usize| {
        let output = folder.path().join(format!("{threads}.gguf"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| converted(&ConvertRequest::new(&input, &output, WriteType::Q4K)));
        fs_err::read(output).unwrap()
    };
    assert_eq!(file(1), file(3));
}
