//! GGUF files: numbers as gguf-py reads them, and what damaged files say.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, quantized::QTensor};
use pentimento::{
    Error, ModelError,
    layers::Linear,
    weights::{
        Checkpoint, Precision, Storage, Weights,
        gguf::{AXES_MAX, KEYS_MAX, NAME_BYTES_MAX, TENSORS_MAX},
    },
};

use crate::common::{Tolerance, assert_close, gguf_writer::Gguf, parts};

fn types() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf/types.gguf")
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_type_gives_the_numbers_of_gguf_py() {
    let expected = parts::load(&types().with_extension("safetensors"));
    let weights = Weights::new(Checkpoint::open_file(&types()).unwrap(), Precision::reference());
    assert_eq!(expected.len(), 17);
    for (name, expected) in &expected {
        let actual = weights.tensor(name, expected.dims()).unwrap();
        assert_eq!(bits(&actual), bits(expected), "{name}");
    }
    weights.finish(&[]).unwrap();
}

#[test]
fn metadata_of_every_type_are_read() {
    let checkpoint = Checkpoint::open_file(&types()).unwrap();
    for (key, text) in [
        ("value.uint8", "200"),
        ("value.int8", "-100"),
        ("value.uint16", "60000"),
        ("value.int16", "-30000"),
        ("value.uint32", "4000000000"),
        ("value.int32", "-2000000000"),
        ("value.float32", "1.5"),
        ("value.uint64", "9223372036854775813"),
        ("value.int64", "-4611686018427387904"),
        ("value.float64", "0.1"),
        ("value.bool", "true"),
        ("value.string", "é 你好"),
        ("list.text", "[3 strings]"),
        ("list.int", "[3 whole numbers]"),
        ("general.architecture", "test"),
    ] {
        assert_eq!(checkpoint.value(key).unwrap().to_string(), text, "{key}");
    }
    assert_eq!(checkpoint.metadata().len(), 18);
}

#[test]
fn a_linear_layer_is_multiplied_in_the_type_of_the_file() {
    let checkpoint = || Checkpoint::open_file(&types()).unwrap();
    let names: Vec<String> = checkpoint()
        .tensors()
        .filter(|(_, entry)| entry.shape == [2, 256])
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(names.len(), 15);
    let values: Vec<f32> = (0..5 * 256).map(|i| (i as f32 * 0.7).sin() + 0.3).collect();
    let x = Tensor::from_vec(values, (5, 256), &Device::Cpu).unwrap();
    for name in names {
        let run = |storage| {
            // The layer's weight stands below a name of its own.
            let layer = |old: &str| if old == name { "fc.weight" } else { old }.to_owned();
            let precision = Precision { storage, ..Precision::reference() };
            let weights = Weights::new(checkpoint().rename(layer).unwrap(), precision);
            let layer = Linear::load_without_bias(&weights.pp("fc"), 256, 2).unwrap();
            (weights.pp("fc").is_quantized("weight"), layer.forward(&x).unwrap())
        };
        let (in_blocks, actual) = run(Storage::Compute);
        assert_eq!(in_blocks, name.contains('Q'), "{name}");
        let (_, expected) = run(Storage::Plain(DType::F32));
        // Products of blocks round the activations to eight bits.
        let limit = if in_blocks { 0.05 } else { 1e-5 };
        assert_close(&name, &actual, &expected, Tolerance::Relative(limit));
    }
}

#[test]
fn memory_is_counted_as_stored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut file = Gguf::new();
    let matrix = Tensor::randn(0_f32, 1.0, (4, 256), &Device::Cpu).unwrap();
    file.quantized("a", &matrix, candle_core::quantized::GgmlDType::Q4K);
    file.plain("b", &matrix);
    file.write(&path);
    let bytes = |storage| {
        let precision = Precision { storage, ..Precision::reference() };
        Checkpoint::open_file(&path).unwrap().kept_bytes(&precision)
    };
    // Rows are laid out in panels of 32.
    assert_eq!(bytes(Storage::Compute), 32 * 144 + 32 * 256 * 4);
    assert_eq!(bytes(Storage::Plain(DType::BF16)), 2 * 32 * 256 * 2);
    assert_eq!(bytes(Storage::Q8_0), 32 * 144 + 32 * 8 * 34);
}

/// What the engine says to a file of these bytes.
#[track_caller]
fn message(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    fs_err::write(&path, bytes).unwrap();
    match Checkpoint::open_file(&path) {
        Err(Error::Model(error @ (ModelError::Corrupt { .. } | ModelError::TensorType { .. }))) => {
            error.to_string()
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Gguf), words: &[&str]) {
    let mut file = Gguf::new();
    file.text("general.architecture", "test");
    file.plain("a", &Tensor::ones((2, 32), DType::F32, &Device::Cpu).unwrap());
    file.plain("b", &Tensor::ones(8, DType::F32, &Device::Cpu).unwrap());
    change(&mut file);
    let message = message(&file.bytes());
    for word in words.iter().chain(&["x.gguf"]) {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}

#[test]
fn damaged_files_are_typed_errors() {
    refused(|file| file.version = 1, &["version 1", "2 or 3"]);
    refused(|file| file.version = 3_u32.swap_bytes(), &["big-endian"]);
    refused(|file| file.tensor_count = Some(40), &["tensor"]);
    refused(|file| file.tensor_count = Some(u64::MAX), &["tensors", &TENSORS_MAX.to_string()]);
    refused(|file| file.key_count = Some(1 << 40), &["keys", &KEYS_MAX.to_string()]);
    refused(|file| file.raw_key("general.alignment", 4, &7_u32.to_le_bytes()), &["alignment", "7"]);
    refused(|file| file.raw_key("general.alignment", 4, &0_u32.to_le_bytes()), &["power of two"]);
    refused(|file| file.raw_key("k", 13, &[]), &["key k", "type 13"]);
    refused(|file| file.raw_key("k", 7, &[2]), &["key k", "truth"]);
    refused(|file| file.raw_key("k", 8, &u64::MAX.to_le_bytes()), &["key k", "bytes in a string"]);
    refused(
        |file| file.raw_key("k", 8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe]),
        &["key k", "UTF-8"],
    );
    let nested = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat();
    refused(|file| file.raw_key("k", 9, &nested), &["key k", "array of arrays"]);
    let long = [&5_u32.to_le_bytes()[..], &(1_u64 << 20).to_le_bytes()].concat();
    refused(|file| file.raw_key("k", 9, &long), &["key k", "end of the file"]);
    refused(|file| file.text("general.architecture", "again"), &["general.architecture", "twice"]);
    let name = "n".repeat(NAME_BYTES_MAX + 1);
    refused(|file| file.text(&name, ""), &["bytes in a string", &NAME_BYTES_MAX.to_string()]);
}

#[test]
fn tensors_that_cannot_be_are_typed_errors() {
    refused(|file| file.tensors[1].name = "a".into(), &["tensor a", "twice"]);
    refused(|file| file.tensors[1].offset = 0, &["tensor b", "shares bytes with a"]);
    refused(|file| file.tensors[1].offset = 1 << 40, &["tensor b", "truncated"]);
    refused(|file| file.tensors[1].offset = u64::MAX - 31, &["tensor b", "truncated"]);
    refused(|file| file.tensors[1].offset += 1, &["tensor b", "multiple of 32"]);
    refused(|file| file.tensors[1].kind = 99, &["tensor b", "99", "Q4_K"]);
    refused(|file| file.tensors[1].kind = 12, &["tensor b", "rows of 8", "256"]);
    refused(|file| file.tensors[1].dims = vec![1; AXES_MAX + 1], &["tensor b", "6 axes"]);
    for dims in [vec![1 << 40, 1 << 40], vec![1 << 40, 1 << 40, 0]] {
        refused(|file| file.tensors[1].dims = dims, &["tensor b", "addressed"]);
    }
    refused(|file| file.data.truncate(100), &["tensor a", "truncated"]);
    for shape in [vec![3, 3], vec![-8, -1], vec![8, 1, 1, 1, 1, 1]] {
        refused(|file| file.ints("comfy.gguf.orig_shape.b", &shape), &["tensor b", "orig_shape"]);
    }
    refused(|file| file.text("comfy.gguf.orig_shape.b", "[8]"), &["tensor b", "orig_shape"]);
    // A type that is known but not read is an error only when its tensor is asked for.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut file = Gguf::new();
    file.raw("a", &[256], 16, &[0; 66]);
    file.write(&path);
    let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), Precision::reference());
    let error = weights.tensor("a", &[256]).unwrap_err().to_string();
    assert!(error.contains("IQ2_XXS") && error.contains("x.gguf") && error.contains("tensor a"));
}

#[test]
fn blocks_survive_the_way_through_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let matrix = Tensor::randn(0_f32, 1.0, (3, 64), &Device::Cpu).unwrap();
    let kind = candle_core::quantized::GgmlDType::Q8_0;
    let mut file = Gguf::new();
    file.quantized("a", &matrix, kind);
    file.write(&path);
    let weights = Weights::new(Checkpoint::open_file(&path).unwrap(), Precision::reference());
    let expected = QTensor::quantize(&matrix, kind).unwrap().dequantize(&Device::Cpu).unwrap();
    assert_eq!(bits(&weights.tensor("a", &[3, 64]).unwrap()), bits(&expected));
    let wrong = weights.tensor("a", &[64, 3]).unwrap_err().to_string();
    assert!(wrong.contains("[3, 64]") && wrong.contains("[64, 3]"), "{wrong}");
}
