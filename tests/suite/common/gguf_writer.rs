//! Writes GGUF files, whole and broken ones.

use std::path::Path;

use candle_core::{
    DType, Tensor,
    quantized::{GgmlDType, QTensor},
};

const ALIGNMENT: usize = 32;

/// The entry of a tensor; dims as in the file, the fastest first.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

/// A file that is being put together; what is public may be broken on purpose.
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    pub(crate) tensors: Vec<Entry>,
    pub(crate) data: Vec<u8>,
    keys: Vec<Vec<u8>>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Gguf {
    pub(crate) fn new() -> Self {
        let (tensors, data, keys) = (Vec::new(), Vec::new(), Vec::new());
        Self { version: 3, tensor_count: None, key_count: None, tensors, data, keys }
    }

    pub(crate) fn raw_key(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.keys.push([&string(key)[..], &kind.to_le_bytes(), value].concat());
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.raw_key(key, 8, &string(value));
    }

    pub(crate) fn int(&mut self, key: &str, value: u32) {
        self.raw_key(key, 4, &value.to_le_bytes());
    }

    pub(crate) fn float(&mut self, key: &str, value: f32) {
        self.raw_key(key, 6, &value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.raw_key(key, 7, &[value.into()]);
    }

    fn list(&mut self, key: &str, kind: u32, items: &[Vec<u8>]) {
        let count = items.len() as u64;
        let value = [&kind.to_le_bytes()[..], &count.to_le_bytes(), &items.concat()].concat();
        self.raw_key(key, 9, &value);
    }

    pub(crate) fn ints(&mut self, key: &str, items: &[i32]) {
        let items: Vec<Vec<u8>> = items.iter().map(|item| item.to_le_bytes().to_vec()).collect();
        self.list(key, 5, &items);
    }

    pub(crate) fn floats(&mut self, key: &str, items: &[f32]) {
        let items: Vec<Vec<u8>> = items.iter().map(|item| item.to_le_bytes().to_vec()).collect();
        self.list(key, 6, &items);
    }

    pub(crate) fn texts(&mut self, key: &str, items: &[String]) {
        let items: Vec<Vec<u8>> = items.iter().map(|item| string(item)).collect();
        self.list(key, 8, &items);
    }

    pub(crate) fn raw(&mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) {
        let dims = shape.iter().rev().map(|&n| n as u64).collect();
        let offset = self.data.len() as u64;
        self.tensors.push(Entry { name: name.to_owned(), dims, kind, offset });
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
    }

    /// The numbers in the tensor's own type: f32, f16 or bf16.
    pub(crate) fn plain(&mut self, name: &str, tensor: &Tensor) {
        let flat = tensor.flatten_all().unwrap();
        let (kind, bytes): (u32, Vec<u8>) = match tensor.dtype() {
            DType::F16 => {
                let values: Vec<half::f16> = flat.to_vec1().unwrap();
                (1, values.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            DType::BF16 => {
                let values: Vec<half::bf16> = flat.to_vec1().unwrap();
                (30, values.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            _ => {
                let values: Vec<f32> = flat.to_vec1().unwrap();
                (0, values.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
        };
        self.raw(name, tensor.dims(), kind, &bytes);
    }

    pub(crate) fn quantized(&mut self, name: &str, tensor: &Tensor, kind: GgmlDType) {
        let id = match kind {
            GgmlDType::Q4_0 => 2,
            GgmlDType::Q5_1 => 7,
            GgmlDType::Q8_0 => 8,
            GgmlDType::Q4K => 12,
            other => panic!("no number for {other:?}"),
        };
        // Candle quantizes a tensor's storage from its start, wherever the tensor lies in it.
        let wide = tensor.to_dtype(DType::F32).unwrap().force_contiguous().unwrap();
        let blocks = QTensor::quantize(&wide, kind).unwrap();
        self.raw(name, tensor.dims(), id, &blocks.data().unwrap());
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        bytes.extend(self.keys.concat());
        for entry in &self.tensors {
            bytes.extend(string(&entry.name));
            bytes.extend((entry.dims.len() as u32).to_le_bytes());
            bytes.extend(entry.dims.iter().flat_map(|n| n.to_le_bytes()));
            bytes.extend(entry.kind.to_le_bytes());
            bytes.extend(entry.offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(&self.data);
        bytes
    }

    pub(crate) fn write(&self, path: &Path) {
        fs_err::write(path, self.bytes()).unwrap();
    }
}
