//! A cursor into a checkpoint: a prefix, the type and the device that tensors are read into.

use std::{fmt::Display, sync::Arc};

use candle_core::{DType, Device, Tensor, quantized::QTensor};

use super::{
    alike::Asked,
    checkpoint::Checkpoint,
    lora::{Change, LowRankChanges},
};
use crate::{
    error::{ModelError, Result},
    ops::{
        LinearWeight,
        cuda::{self, Format, StoredMatrix},
    },
    progress::CancelToken,
};

/// How the matrices of linear layers are kept in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Storage {
    /// Quantized ones and fp8 as they are stored (fp8 as bf16 on a GPU), others in the type of the computation.
    #[default]
    Compute,
    /// In the given plain type, quantized ones too; widened when used.
    Plain(DType),
    /// Plain ones quantized to Q8_0 while reading: 8.5 bits a weight. Quantized ones stay as they
    /// are stored.
    Q8_0,
    /// Plain ones quantized to Q4_K while reading: 4.5 bits a weight; those whose rows are no
    /// multiple of 256 become Q8_0. Quantized ones stay as they are stored.
    Q4K,
}

/// In which type the products inside the transformer's attention are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AttentionType {
    /// bf16 with float32 sums in blocks whose matrices are kept in fewer bits than float32, where
    /// the processor has instructions for it; the type of the computation otherwise.
    #[default]
    LikeWeights,
    /// The type of the computation.
    Compute,
}

/// Where tensors go and in which types, and what stops reading them.
#[derive(Debug, Clone)]
pub struct Precision {
    /// The device of the computation.
    pub device: Device,
    /// The type of activations, norms, biases and convolutions.
    pub compute: DType,
    /// The matrices of linear layers.
    pub storage: Storage,
    /// The products inside attention.
    pub attention: AttentionType,
    /// Whether products of the transformer's blocks with fp8 weights round their activations to fp8 as
    /// well, with a scale for each row, on GPUs that multiply such numbers.
    pub float8_products: bool,
    /// Looked at before each tensor is read.
    pub cancel: CancelToken,
}

impl Precision {
    /// Float32 on the CPU: the reference.
    #[must_use]
    pub fn reference() -> Self {
        Self {
            device: Device::Cpu,
            compute: DType::F32,
            storage: Storage::Compute,
            attention: AttentionType::Compute,
            float8_products: false,
            cancel: CancelToken::new(),
        }
    }

    /// Whether [`Self::float8_products`] is asked for and the device has such products.
    #[must_use]
    pub fn multiplies_float8(&self) -> bool {
        self.float8_products && cuda::multiplies_float8(&self.device)
    }
}

/// A place in a checkpoint, named by a prefix; cheap to clone.
#[derive(Debug, Clone)]
pub struct Weights {
    checkpoint: Arc<Checkpoint>,
    precision: Precision,
    prefix: String,
    changes: Option<Arc<LowRankChanges>>,
    asked: Option<Arc<Asked>>,
    float8_products: bool,
}

impl Weights {
    /// The top of a checkpoint.
    #[must_use]
    pub fn new(checkpoint: Checkpoint, precision: Precision) -> Self {
        let (checkpoint, prefix) = (Arc::new(checkpoint), String::new());
        Self { checkpoint, precision, prefix, changes: None, asked: None, float8_products: false }
    }

    /// The same place; [`Precision::float8_products`] holds for linear layers that are read from it, or
    /// below it.
    #[must_use]
    pub(crate) fn with_float8_products(&self) -> Self {
        Self { float8_products: self.precision.multiplies_float8(), ..self.clone() }
    }

    /// The same place; `cancel` is looked at before each tensor is read.
    #[must_use]
    pub(crate) fn with_cancel(&self, cancel: &CancelToken) -> Self {
        let precision = Precision { cancel: cancel.clone(), ..self.precision.clone() };
        Self { precision, ..self.clone() }
    }

    /// The same place; linear layers that are read from it, or below it, take their changes.
    #[must_use]
    pub fn with_changes(self, changes: Arc<LowRankChanges>) -> Self {
        Self { changes: Some(changes), ..self }
    }

    /// The same place; what is asked for is noted in `asked`.
    pub(super) fn noting(&self, asked: &Arc<Asked>) -> Self {
        Self { asked: Some(Arc::clone(asked)), ..self.clone() }
    }

    /// Takes the changes of the linear layer at this place.
    pub(crate) fn take_changes(&self) -> Vec<Change> {
        self.changes.as_ref().map_or_else(Vec::new, |changes| changes.take(&self.prefix))
    }

    /// The place below `part`, which is a name or an index.
    #[must_use]
    pub fn pp(&self, part: impl Display) -> Self {
        Self { prefix: self.full_name(&part.to_string()), ..self.clone() }
    }

    /// Where tensors go and in which types.
    #[must_use]
    pub fn precision(&self) -> &Precision {
        &self.precision
    }

    /// The same place, with linear matrices kept as `storage` says.
    #[must_use]
    pub fn with_storage(&self, storage: Storage) -> Self {
        let precision = Precision { storage, ..self.precision.clone() };
        Self { precision, ..self.clone() }
    }

    /// The whole checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    pub(super) fn shared_checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Whether `name` is there below this place.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(&self.full_name(name))
    }

    /// Whether the matrix `name` below this place is multiplied in blocks, as it is stored.
    #[must_use]
    pub fn is_quantized(&self, name: &str) -> bool {
        let entry = self.checkpoint.entry(&self.full_name(name));
        entry.is_some_and(|entry| entry.multiplied_as().is_some())
    }

    /// A tensor in the type of the computation.
    ///
    /// # Errors
    /// A tensor that is missing, or has another shape or an unsupported type.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self.stored(name, shape)?.to_dtype(self.precision.compute)?)
    }

    /// The matrix of a linear layer `[out, in]`, as it is to be kept in memory.
    ///
    /// # Errors
    /// A tensor that is missing, or has another shape or an unsupported type.
    pub fn linear_weight(&self, name: &str, shape: [usize; 2]) -> Result<LinearWeight> {
        let precision = &self.precision;
        if let Some(packed) = self.packed(name, shape)? {
            return Ok(packed);
        }
        if !matches!(precision.storage, Storage::Plain(_))
            && let Some(blocks) = self.quantized(name, shape)?
        {
            return Ok(LinearWeight::Quantized(Arc::new(blocks)));
        }
        let stored = self.stored(name, &shape)?;
        let odd = |error| self.checkpoint.not_quantized(&self.full_name(name), &error);
        Ok(match precision.storage {
            Storage::Compute => {
                let entry = self.checkpoint.entry(&self.full_name(name));
                let dtype = entry.map(|entry| entry.compute_type(precision.compute));
                LinearWeight::Dense(stored.to_dtype(dtype.unwrap_or(precision.compute))?)
            }
            Storage::Plain(dtype) => LinearWeight::Dense(stored.to_dtype(dtype)?),
            Storage::Q8_0 => LinearWeight::q8_0(&stored).map_err(odd)?,
            Storage::Q4K => LinearWeight::q4_k(&stored).map_err(odd)?,
        })
    }

    /// The matrix of a linear layer `[out, in]` in the bytes of its file, where a kernel multiplies it
    /// so: fp8 e4m3 on a CUDA device, with activations in bf16. `None` otherwise.
    ///
    /// # Errors
    /// A tensor of another shape, or a failure of the device.
    pub fn stored_matrix(&self, name: &str, shape: [usize; 2]) -> Result<Option<StoredMatrix>> {
        let Precision { device, compute, storage, .. } = &self.precision;
        let [out, width] = shape;
        let whole = width.is_multiple_of(Format::F8E4M3.block().0);
        let suits = *storage == Storage::Compute && *compute == DType::BF16 && whole;
        if !suits || !cuda::runs_on(device) {
            return Ok(None);
        }
        let name = self.check(name, &shape)?;
        let Some((bytes, scale)) = self.checkpoint.load_e4m3(&name, device)? else {
            return Ok(None);
        };
        let matrix = StoredMatrix::new(bytes, Format::F8E4M3, (out, width), scale)?;
        Ok(Some(if self.float8_products { matrix.with_float8_products()? } else { matrix }))
    }

    /// Fails when a tensor was not read and no entry of `ignored` is the start of its name.
    /// Call it once per checkpoint, after everything is loaded.
    ///
    /// # Errors
    /// [`ModelError::TensorsUnused`] with the first names.
    pub fn finish(&self, ignored: &[&str]) -> Result<()> {
        const NAMES_MAX: usize = 8;
        let mut unread = self.checkpoint.unread();
        unread.retain(|name| !ignored.iter().any(|start| name.starts_with(start)));
        if unread.is_empty() {
            return Ok(());
        }
        let mut names = unread[..unread.len().min(NAMES_MAX)].join(", ");
        if unread.len() > NAMES_MAX {
            names.push_str(", …");
        }
        let path = self.checkpoint.name().to_owned();
        Err(ModelError::TensorsUnused { path, count: unread.len(), names }.into())
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = self.check(name, shape)?;
        self.checkpoint.load(&name, &self.precision.device)
    }

    /// A matrix laid out for the CPU from the bytes of its file.
    fn packed(&self, name: &str, shape: [usize; 2]) -> Result<Option<LinearWeight>> {
        let name = self.check(name, &shape)?;
        if self.precision.compute == DType::BF16 && cuda::runs_on(&self.precision.device) {
            return Ok(None); // kernels read matrices as they are stored, in the emulation too
        }
        self.checkpoint.load_packed(&name, shape, &self.precision)
    }

    fn quantized(&self, name: &str, shape: [usize; 2]) -> Result<Option<QTensor>> {
        let name = self.check(name, &shape)?;
        self.checkpoint.load_quantized(&name, &self.precision.device)
    }

    /// The whole name of a tensor that is about to be read, if it has the `shape`.
    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<String> {
        self.precision.cancel.check()?;
        let name = self.full_name(name);
        if let Some(asked) = &self.asked {
            asked.note(&name, shape);
        }
        if let Some(found) = self.checkpoint.shape(&name)
            && found != shape
        {
            return Err(ModelError::TensorShape {
                path: self.checkpoint.name().to_owned(),
                tensor: name,
                found: found.to_vec(),
                expected: shape.to_vec(),
            }
            .into());
        }
        Ok(name)
    }

    /// The whole name of `name` below this place.
    pub(crate) fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
