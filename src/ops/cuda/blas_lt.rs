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
    collections::{HashMap, hash_map::Entry},
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
    driver::{CudaSlice, CudaStream, DevicePtr, sys::CUevent_flags},
};

/// Memory that products may use, as NVIDIA recommends for Hopper. Elsewhere less would do.
const WORKSPACE_BYTES: usize = 32 << 20;
/// What addresses are multiples of.
const ALIGNMENT_BYTES: u32 = 16;
/// Multiplications from which a product's ways are timed: some 0.1 ms on a Hopper.
const TIMED_FROM: usize = 1 << 35;
/// Ways that are timed. The library's first choice was 1 to 7 % slower than the best of eight
/// (H200, 8704 rows).
const WAYS: usize = 8;
/// Runs of a way that are timed, after one that is not.
const TIMED_RUNS: u8 = 2;

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
    /// What was found for a kind of product, or that the library does not do it.
    known: Mutex<HashMap<Kind, Option<Prepared>>>,
}

/// How a kind of product is computed, and its descriptors, in which only addresses change.
struct Prepared {
    algorithm: sys::cublasLtMatmulAlgo_t,
    description: Description,
    /// Of weights, activations and result.
    layouts: [Layout; 3],
}

impl Prepared {
    fn new(
        inputs: &Inputs,
        algorithm: sys::cublasLtMatmulAlgo_t,
        fast_sums: bool,
    ) -> std::result::Result<Self, CublasError> {
        let description = Description::of(inputs, fast_sums)?;
        Ok(Self { algorithm, description, layouts: layouts(inputs)? })
    }
}

// SAFETY: the handle may be used from any thread, the descriptors by whoever holds their lock, and the
// workspace by one product at a time, which the one stream sees to.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// What a way is chosen by: rows, depth, outputs and how far rows of the result lie apart; bias, GELU, fp8.
type Kind = ([usize; 4], [bool; 3]);

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
    /// `[rows][outs]` in bf16; rows start so many numbers apart.
    pub(super) out: u64,
    pub(super) apart: usize,
    pub(super) scales: Option<Scales>,
    /// Of all sums, before the bias.
    pub(super) scale: f32,
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
        Ok(Self { handle, workspace, stream, known: Mutex::default() })
    }

    /// Queues the product; `false` where the library has no way for it.
    ///
    /// A large product of a kind that is new is computed in several ways, and the fastest is kept: each
    /// writes the whole result anew, and the last is the one that stays. Which that is may differ from
    /// process to process, and with it the order of sums.
    pub(super) fn multiply(&self, inputs: &Inputs) -> Result<bool> {
        self.stream.context().bind_to_thread().w()?;
        let _turn = super::recorded::turn();
        let [rows, depth, outs] = inputs.sizes;
        let marks = [inputs.bias.is_some(), inputs.gelu_tanh, inputs.scales.is_some()];
        let kind = ([rows, depth, outs, inputs.apart], marks);
        // Descriptions hold addresses while a product is queued, which is one thread's at a time.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let prepared = match known.entry(kind) {
            Entry::Occupied(prepared) => prepared.into_mut(),
            Entry::Vacant(place) => place.insert(self.choose(inputs)?),
        };
        let Some(prepared) = prepared else { return Ok(false) };
        Ok(unless_refused(self.queue(inputs, prepared))?.is_some())
    }

    /// The fastest way of a large product, the library's first choice for others.
    fn choose(&self, inputs: &Inputs) -> Result<Option<Prepared>> {
        let work = inputs.sizes.iter().fold(1, |work: usize, size| work.saturating_mul(*size));
        let is_timed = work >= TIMED_FROM;
        let sums: &[bool] =
            if is_timed && inputs.scales.is_some() { &[true, false] } else { &[false] };
        let mut best: Option<(f32, Prepared)> = None;
        for &fast_sums in sums {
            let found = self.algorithms(inputs, fast_sums, if is_timed { WAYS } else { 1 });
            for algorithm in unless_refused(found)?.unwrap_or_default() {
                let prepared = Prepared::new(inputs, algorithm, fast_sums);
                let Some(prepared) = unless_refused(prepared)? else { continue };
                if !is_timed {
                    return Ok(Some(prepared));
                }
                let Some(ms) = self.time(inputs, &prepared)? else { continue };
                if best.as_ref().is_none_or(|(least, _)| ms < *least) {
                    best = Some((ms, prepared));
                }
            }
        }
        Ok(best.map(|(_, prepared)| prepared))
    }

    /// Milliseconds of [`TIMED_RUNS`]; `None` where the library does not compute this way after all.
    fn time(&self, inputs: &Inputs, way: &Prepared) -> Result<Option<f32>> {
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        if unless_refused(self.queue(inputs, way))?.is_none() {
            return Ok(None);
        }
        let start = self.stream.record_event(flags).w()?;
        for _ in 0..TIMED_RUNS {
            if unless_refused(self.queue(inputs, way))?.is_none() {
                return Ok(None);
            }
        }
        let end = self.stream.record_event(flags).w()?;
        Ok(Some(start.elapsed_ms(&end).w()?))
    }

    fn queue(&self, inputs: &Inputs, way: &Prepared) -> std::result::Result<(), CublasError> {
        let Prepared { algorithm, description, layouts: [weight, x, out] } = way;
        description.point_to(inputs)?;
        let zero = 0.0_f32;
        let (workspace, _on_one_stream) = self.workspace.device_ptr(&self.stream);
        let at = |address: u64| address as *const c_void;
        // SAFETY: the descriptors are alive, and the addresses are those of live tensors of these sizes;
        // the output is nobody else's.
        unsafe {
            result::matmul(
                self.handle,
                description.0,
                from_ref(&inputs.scale).cast(),
                from_ref(&zero).cast(),
                at(inputs.weight),
                weight.0,
                at(inputs.x),
                x.0,
                at(inputs.out),
                out.0,
                at(inputs.out).cast_mut(),
                out.0,
                from_ref(algorithm),
                at(workspace).cast_mut(),
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        }
    }

    /// Up to so many algorithms, the likeliest first.
    fn algorithms(
        &self,
        inputs: &Inputs,
        fast_sums: bool,
        at_most: usize,
    ) -> std::result::Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
        let description = Description::of(inputs, fast_sums)?;
        let [weight, x, out] = layouts(inputs)?;
        let preference = Preference::new()?;
        let mut found = Vec::<sys::cublasLtMatmulHeuristicResult_t>::with_capacity(at_most);
        let (wanted, mut count) = (c_int::try_from(at_most).unwrap_or(1), 0);
        // SAFETY: the descriptors are alive; the library writes no more results than there is room
        // for, and says how many.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
                wanted,
                found.as_mut_ptr(),
                &raw mut count,
            )
            .result()?;
            found.set_len(usize::try_from(count).unwrap_or(0).min(at_most));
        }
        found.retain(|found| found.state.result().is_ok());
        Ok(found.into_iter().map(|found| found.algo).collect())
    }
}

/// The layouts of weights, activations and result.
fn layouts(inputs: &Inputs) -> std::result::Result<[Layout; 3], CublasError> {
    let [rows, depth, outs] = inputs.sizes;
    let operand = match inputs.scales {
        Some(_) => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        None => sys::cudaDataType_t::CUDA_R_16BF,
    };
    Ok([
        Layout::new(operand, [depth, outs], depth)?,
        Layout::new(operand, [depth, rows], depth)?,
        Layout::new(sys::cudaDataType_t::CUDA_R_16BF, [outs, rows], inputs.apart)?,
    ])
}

/// What came of a call; `None` where the library does not do it.
fn unless_refused<T>(answer: std::result::Result<T, CublasError>) -> Result<Option<T>> {
    match answer {
        Ok(done) => Ok(Some(done)),
        Err(error) if is_refusal(&error) => Ok(None),
        Err(error) => Err(Error::wrap(error)),
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
    /// With `fast_sums`, sums of products in fp8 have fewer bits: an error of 2 to 3·10⁻³ of the result instead
    /// of 1.7·10⁻³, which is that of its rounding to bf16.
    fn of(inputs: &Inputs, fast_sums: bool) -> std::result::Result<Self, CublasError> {
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
        if inputs.bias.is_some() {
            let kind = sys::cudaDataType_t::CUDA_R_16BF;
            made.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &kind)?;
        }
        if inputs.scales.is_some() {
            // CUBLASLT_MATMUL_DESC_A_SCALE_MODE and _B_SCALE_MODE, and
            // CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F of the header.
            const MODES: [c_int; 2] = [31, 32];
            const ONE_A_ROW: i32 = 3;
            for mode in MODES {
                made.set_numbered(mode, &ONE_A_ROW)?;
            }
            made.set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &i8::from(fast_sums))?;
        }
        made.point_to(inputs)?;
        Ok(made)
    }

    /// Sets the addresses that a product of this kind has beside its operands.
    fn point_to(&self, inputs: &Inputs) -> std::result::Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        if let Some(bias) = &inputs.bias {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        if let Some(scales) = &inputs.scales {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scales.weight)?;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &scales.x)?;
        }
        Ok(())
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

/// How a matrix lies: by columns, whose starts are so many numbers apart.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        numbers: sys::cudaDataType,
        [rows, columns]: [usize; 2],
        apart: usize,
    ) -> std::result::Result<Self, CublasError> {
        let too_many = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let Ok(apart) = i64::try_from(apart) else { return Err(too_many) };
        result::create_matrix_layout(numbers, rows as u64, columns as u64, apart).map(Self)
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
