//! Reference cases and comparisons that all tests share.

pub(crate) mod gguf_writer;
pub(crate) mod parts;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

/// How far a number may be from the expected one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tolerance {
    /// The largest difference, as a share of the largest expected magnitude.
    Relative(f64),
    /// The largest difference.
    Absolute(f64),
}

/// Compares two tensors; NaN never passes, and a failure prints the first five faults.
#[track_caller]
pub(crate) fn assert_close(name: &str, actual: &Tensor, expected: &Tensor, tolerance: Tolerance) {
    assert_eq!(actual.dims(), expected.dims(), "{name}: shape");
    let values = |x: &Tensor| -> Vec<f32> {
        x.to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    };
    let (actual, expected) = (values(actual), values(expected));
    let largest = expected.iter().fold(0.0_f64, |max, &x| max.max(f64::from(x).abs()));
    let limit = match tolerance {
        Tolerance::Relative(share) => share * largest.max(f64::MIN_POSITIVE),
        Tolerance::Absolute(limit) => limit,
    };
    // `!(a <= b)` rather than `a > b`, so that NaN is a fault.
    #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must be a fault")]
    let faults: Vec<String> = actual
        .iter()
        .zip(&expected)
        .enumerate()
        .filter(|(_, (a, e))| !((f64::from(**a) - f64::from(**e)).abs() <= limit))
        .map(|(i, (a, e))| format!("  at {i}: {a}, expected {e}"))
        .collect();
    assert!(
        faults.is_empty(),
        "{name}: {} of {} differ by more than {limit:e} (largest expected {largest})\n{}",
        faults.len(),
        expected.len(),
        faults[..faults.len().min(5)].join("\n")
    );
}

/// One reference checkpoint with its recorded cases.
pub(crate) struct Reference {
    pub(crate) folder: PathBuf,
    pub(crate) facts: serde_json::Value,
    tensors: std::collections::HashMap<String, Tensor>,
}

impl Reference {
    /// `tests/data/reference/<name>`.
    #[track_caller]
    pub(crate) fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference").join(name);
        let cases = folder.join("cases");
        let facts =
            std::io::read_to_string(fs_err::File::open(cases.join("cases.json")).unwrap()).unwrap();
        let tensors =
            candle_core::safetensors::load(cases.join("cases.safetensors"), &Device::Cpu).unwrap();
        Self { folder, facts: serde_json::from_str(&facts).unwrap(), tensors }
    }

    /// Every reference checkpoint in the tree, in the order of their names.
    pub(crate) fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference");
        let mut names: Vec<String> = fs_err::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names.iter().map(|name| Self::open(name)).collect()
    }

    /// Those that recorded `name`. A reference whose model, inputs and numbers are those of another does
    /// not repeat them; see `tests/data/make/slim.py`.
    #[track_caller]
    pub(crate) fn with(name: &str) -> Vec<Self> {
        let mut found = Self::all();
        found.retain(|reference| reference.has(name));
        assert!(!found.is_empty(), "no reference has {name}");
        found
    }

    pub(crate) fn name(&self) -> &str {
        self.folder.file_name().unwrap().to_str().unwrap()
    }

    #[track_caller]
    pub(crate) fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no case {name}", self.name()))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    #[track_caller]
    pub(crate) fn ints(&self, name: &str) -> Vec<i64> {
        self.tensor(name).flatten_all().unwrap().to_dtype(DType::I64).unwrap().to_vec1().unwrap()
    }
}

/// Writes tensors of any type.
pub(crate) fn save_raw(path: &Path, tensors: &[(String, safetensors::Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    fs_err::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The bytes of a tensor of eight-bit floats.
pub(crate) fn float8_bytes(tensor: &Tensor) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors = std::collections::HashMap::from([("x", tensor.clone())]);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let bytes = fs_err::read(&path).unwrap();
    safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("x").unwrap().data().to_vec()
}
