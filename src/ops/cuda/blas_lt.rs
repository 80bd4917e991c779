//! The border to cuBLASLt. Products get bare addresses, so whoever composes one answers for them, as in
//! `ffi`: tensors must be alive when a product is queued, and sizes must be theirs.
//!
//! The library's matrices lie by columns. `y = x · wᵀ` by rows is `yᵀ = w · xᵀ` by columns: its left
//! operand is the weight, transposed, its right one the activations as they lie, and the bias runs along
//! its rows. That is also the only form in which it multiplies fp8.
//!
//! Reference: <https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api>.
#![expect(unsafe_code, reason = "a library in C")]

use std::{
    collections::HashMap,
    ffi::{c_int, c_void},
    ptr::from_ref,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice, Error, Result,
    cuda::{WrapErr, cudarc},
};
use cudarc::{
    cublaslt::{
        result::{self, CublasError},
        sys,
    },
    driver::{CudaSlice, CudaStream, DevicePtr},
};

/// Memory that products may use, as NVIDIA recommends for Hopper. Elsewhere less would do.
const WORKSPACE_BYTES: usize = 32 << 20;
/// What addresses are multiples of.
const ALIGNMENT_BYTES: u32 = 16;

unsafe extern "C" {
    /// cudarc's own declaration takes the attribute as an enum, which has the modes of scales only
    /// from CUDA 12.8 on. An older library answers that it does not know the attribute.
    #[link_name = "cublasLtMatmulDescSetAttribute"]
    fn set_numbered_attribute(
        description: sys::cublasLtMatmulDesc_t,
        attribute: c_int,
        value: *const c_void,
        bytes: usize,
    ) -> c_int;
}

/// The library on one device's stream.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
    /// The way that was found for a product, or that there is none.
    ways: Mutex<HashMap<Kind, Option<sys::cublasLtMatmulAlgo_t>>>,
}

// SAFETY: the handle may be used from any thread, and the workspace by one product at a time, which the
// one stream sees to.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// What an algorithm is chosen by: rows, depth, outputs; bias, GELU, fp8.
type Kind = ([usize; 3], [bool; 3]);

/// Addresses of the scales of fp8 operands, float32: one an output, one a row.
pub(super) struct Scales {
    pub(super) weight: u64,
    pub(super) x: u64,
}

/// A product's addresses and sizes.
pub(super) struct Inputs {
    /// `[outs][depth]`, in bf16 or, with scales, in e4m3.
    pub(super) weight: u64,
    /// `[rows][depth]`, likewise.
    pub(super) x: u64,
    /// `[outs]` in bf16.
    pub(super) bias: Option<u64>,
    /// `[rows][outs]` in bf16.
    pub(super) out: u64,
    pub(super) scales: Option<Scales>,
    pub(super) gelu_tanh: bool,
    /// Rows, depth, outputs.
    pub(super) sizes: [usize; 3],
}

impl Library {
    pub(super) fn open(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let handle = result::create_handle().map_err(Error::wrap)?;
        // SAFETY: products write the workspace before they read it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }.w()?;
        Ok(Self { handle, workspace, stream, ways: Mutex::default() })
    }

    /// Queues the product; `false` where the library has no way for it.
    pub(super) fn multiply(&self, inputs: &Inputs) -> Result<bool> {
        self.stream.context().bind_to_thread().w()?;
        match self.queue(inputs) {
            Ok(()) => Ok(true),
            Err(error) if is_refusal(&error) => Ok(false),
            Err(error) => Err(Error::wrap(error)),
        }
    }

    fn queue(&self, inputs: &Inputs) -> std::result::Result<(), CublasError> {
        let [rows, depth, outs] = inputs.sizes.map(|size| size as u64);
        let operand = match inputs.scales {
            Some(_) => sys::cudaDataType_t::CUDA_R_8F_E4M3,
            None => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let description = Description::of(inputs)?;
        let weight = Layout::new(operand, depth, outs)?;
        let x = Layout::new(operand, depth, rows)?;
        let out = Layout::new(sys::cudaDataType_t::CUDA_R_16BF, outs, rows)?;
        let way = self.way(inputs, &description, [&weight, &x, &out])?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let (workspace, _on_one_stream) = self.workspace.device_ptr(&self.stream);
        let at = |address: u64| address as *const c_void;
        // SAFETY: the descriptors are alive, and the addresses are those of live tensors of these sizes;
        // the output is nobody else's.
        unsafe {
            result::matmul(
                self.handle,
                description.0,
                from_ref(&one).cast(),
                from_ref(&zero).cast(),
                at(inputs.weight),
                weight.0,
                at(inputs.x),
                x.0,
                at(inputs.out),
                out.0,
                at(inputs.out).cast_mut(),
                out.0,
                from_ref(&way),
                at(workspace).cast_mut(),
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        }
    }

    /// The library's first choice, asked for once for a kind of product.
    fn way(
        &self,
        inputs: &Inputs,
        description: &Description,
        [weight, x, out]: [&Layout; 3],
    ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        const NONE: CublasError = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let marks = [inputs.bias.is_some(), inputs.gelu_tanh, inputs.scales.is_some()];
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = ways.get(&(inputs.sizes, marks)) {
            return known.ok_or(NONE);
        }
        let preference = Preference::new()?;
        // SAFETY: the descriptors are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                description.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
            )
        };
        let way = match found {
            Ok(found) => Some(found.algo),
            Err(error) if is_refusal(&error) => None,
            Err(error) => return Err(error),
        };
        ways.insert((inputs.sizes, marks), way);
        way.ok_or(NONE)
    }
}

/// Whether the library says that it does not do this, rather than that something broke.
fn is_refusal(error: &CublasError) -> bool {
    use sys::cublasStatus_t as Status;
    matches!(
        error.0,
        Status::CUBLAS_STATUS_NOT_SUPPORTED
            | Status::CUBLAS_STATUS_INVALID_VALUE
            | Status::CUBLAS_STATUS_ARCH_MISMATCH
    )
}

/// What is computed.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn of(inputs: &Inputs) -> std::result::Result<Self, CublasError> {
        use sys::{cublasLtEpilogue_t as Epilogue, cublasLtMatmulDescAttributes_t as Attribute};
        const TRANSPOSED: i32 = 1;
        let single = sys::cudaDataType_t::CUDA_R_32F;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let made = Self(result::create_matmul_desc(sums, single)?);
        made.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        let epilogue = match (inputs.bias.is_some(), inputs.gelu_tanh) {
            (false, false) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (true, false) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (false, true) => Epilogue::CUBLASLT_EPILOGUE_GELU,
            (true, true) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        made.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if let Some(bias) = &inputs.bias {
            made.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        if let Some(scales) = &inputs.scales {
            // CUBLASLT_MATMUL_DESC_A_SCALE_MODE and _B_SCALE_MODE, and
            // CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F of the header.
            const MODES: [c_int; 2] = [31, 32];
            const ONE_A_ROW: i32 = 3;
            for mode in MODES {
                made.set_numbered(mode, &ONE_A_ROW)?;
            }
            made.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scales.weight)?;
            made.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &scales.x)?;
        }
        Ok(made)
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> std::result::Result<(), CublasError> {
        // SAFETY: the description is alive, and the value has the attribute's type.
        unsafe {
            let value = from_ref(value).cast();
            result::set_matmul_desc_attribute(self.0, attribute, value, size_of::<T>())
        }
    }

    fn set_numbered(&self, attribute: c_int, value: &i32) -> std::result::Result<(), CublasError> {
        // SAFETY: the description is alive, and the modes of scales are 32-bit integers.
        let status = unsafe {
            set_numbered_attribute(self.0, attribute, from_ref(value).cast(), size_of::<i32>())
        };
        if status == 0 {
            return Ok(());
        }
        Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was made by the library and is destroyed once.
        let _nothing_to_do_about_it = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// How a matrix lies: by columns without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        numbers: sys::cudaDataType,
        rows: u64,
        columns: u64,
    ) -> std::result::Result<Self, CublasError> {
        let too_many = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let Ok(apart) = i64::try_from(rows) else { return Err(too_many) };
        result::create_matrix_layout(numbers, rows, columns, apart).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was made by the library and is destroyed once.
        let _nothing_to_do_about_it = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What algorithms may count on.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let made = Self(result::create_matmul_pref()?);
        made.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64))?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            made.set(attribute, &ALIGNMENT_BYTES)?;
        }
        Ok(made)
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> std::result::Result<(), CublasError> {
        // SAFETY: the preference is alive, and the value has the attribute's type.
        unsafe {
            let value = from_ref(value).cast();
            result::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>())
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was made by the library and is destroyed once.
        let _nothing_to_do_about_it = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
