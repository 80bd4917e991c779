//! The border to the kernels: addresses of tensors, memory for what kernels write, and the launch
//! itself. Nothing else in this crate starts kernels.
//!
//! A launch gets bare addresses, so whoever composes one answers for them: tensors must outlive it (memory is freed
//! in the order of the stream, so they need only be alive when it is queued), and sizes must be theirs.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicU64, Ordering},
};

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail, quantized::QTensor};
use half::bf16;

use super::launch::Launch;

/// The address of a tensor's first element; the rest lies by its strides.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let offset = layout.start_offset();
    match &*storage {
        Storage::Cpu(storage) => match storage {
            CpuStorage::BF16(all) => Ok(host_address(&all[offset..])),
            CpuStorage::F32(all) => Ok(host_address(&all[offset..])),
            CpuStorage::U8(all) => Ok(host_address(&all[offset..])),
            CpuStorage::U32(all) => Ok(host_address(&all[offset..])),
            CpuStorage::I64(all) => Ok(host_address(&all[offset..])),
            _ => bail!("a kernel does not read {:?}", tensor.dtype()),
        },
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => device::address(storage, offset),
        _ => bail!("a kernel cannot read what lies on {:?}", tensor.device()),
    }
}

/// The address of a quantized matrix's blocks.
pub(super) fn blocks_address(matrix: &QTensor) -> Result<u64> {
    if !matrix.device().is_cpu() {
        return Ok(matrix.device_ptr()?.addr() as u64);
    }
    match matrix.data()? {
        Cow::Borrowed(bytes) => Ok(host_address(bytes)),
        Cow::Owned(_) => bail!("the blocks of a quantized matrix are not in one piece"),
    }
}

fn host_address<T>(slice: &[T]) -> u64 {
    slice.as_ptr().addr() as u64
}

/// Memory that a kernel writes.
#[derive(Debug)]
pub(super) struct Output {
    dims: Vec<usize>,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
    U8(Vec<u8>),
    #[cfg(feature = "cuda")]
    Cuda(candle_core::CudaStorage),
}

impl Output {
    /// Room for `dims` numbers of bf16, float32 or eight bits. On a device they start as anything, in
    /// host memory as NaN, so that what a kernel leaves out is seen.
    pub(super) fn new(device: &Device, dims: &[usize], dtype: DType) -> Result<Self> {
        let count = dims.iter().product();
        if device.is_cpu() {
            super::allocated_on_host()?;
        }
        let memory = match (device, dtype) {
            (Device::Cpu, DType::BF16) => Memory::Bf16(vec![bf16::NAN; count]),
            (Device::Cpu, DType::F32) => Memory::F32(vec![f32::NAN; count]),
            (Device::Cpu, DType::U8) => Memory::U8(vec![u8::MAX; count]), // NaN of e4m3
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), _) => Memory::Cuda(device::allocate(device, count, dtype)?),
            _ => bail!("a kernel does not write {dtype:?} on {device:?}"),
        };
        Ok(Self { dims: dims.to_vec(), memory })
    }

    /// Where the kernel writes.
    pub(super) fn address(&self) -> u64 {
        match &self.memory {
            Memory::Bf16(numbers) => host_address(numbers),
            Memory::F32(numbers) => host_address(numbers),
            Memory::U8(numbers) => host_address(numbers),
            #[cfg(feature = "cuda")]
            Memory::Cuda(storage) => device::address(storage, 0).unwrap_or(0),
        }
    }

    /// Puts `numbers` at the beginning of room for float32, or their bytes in room for bytes, behind what
    /// is queued.
    pub(super) fn write<T: bytemuck::NoUninit>(&mut self, numbers: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(numbers);
        let to: &mut [u8] = match &mut self.memory {
            Memory::F32(to) => bytemuck::cast_slice_mut(to),
            Memory::U8(to) => to,
            #[cfg(feature = "cuda")]
            Memory::Cuda(storage) => return device::write(storage, bytes),
            Memory::Bf16(_) => bail!("not room for float32 or bytes"),
        };
        let Some(to) = to.get_mut(..bytes.len()) else { bail!("no room for {}", bytes.len()) };
        to.copy_from_slice(bytes);
        Ok(())
    }

    /// Copies `bytes` bytes of the blocks of `matrix` to room for bytes, from byte `at` on, behind what is queued.
    pub(super) fn copy_blocks(&mut self, at: usize, matrix: &QTensor, bytes: usize) -> Result<()> {
        let room: usize = self.dims.iter().product();
        if at + bytes > room || bytes > matrix.storage_size_in_bytes() {
            bail!("{bytes} bytes of a matrix do not fit at {at} of {room}");
        }
        match &mut self.memory {
            Memory::U8(to) => to[at..at + bytes].copy_from_slice(&matrix.data()?[..bytes]),
            #[cfg(feature = "cuda")]
            Memory::Cuda(storage) => device::copy(storage, at, blocks_address(matrix)?, bytes)?,
            Memory::Bf16(_) | Memory::F32(_) => bail!("not room for bytes"),
        }
        Ok(())
    }

    /// Float32 in host memory; `None` elsewhere.
    pub(super) fn on_host(&mut self) -> Option<&mut [f32]> {
        match &mut self.memory {
            Memory::F32(numbers) => Some(numbers),
            _ => None,
        }
    }

    /// On a device.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(&self) -> Option<&candle_core::CudaStorage> {
        match &self.memory {
            Memory::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    /// What was written; the launches must have been queued before.
    pub(super) fn into_tensor(self) -> Result<Tensor> {
        match self.memory {
            Memory::Bf16(numbers) => Tensor::from_vec(numbers, self.dims, &Device::Cpu),
            Memory::F32(numbers) => Tensor::from_vec(numbers, self.dims, &Device::Cpu),
            Memory::U8(numbers) => Tensor::from_vec(numbers, self.dims, &Device::Cpu),
            #[cfg(feature = "cuda")]
            Memory::Cuda(storage) => {
                let none = candle_core::op::BackpropOp::none();
                Ok(Tensor::from_storage(Storage::Cuda(storage), self.dims, none, false))
            }
        }
    }
}

/// Kernels that were started in this process.
static LAUNCHES: AtomicU64 = AtomicU64::new(0);

/// How many kernels were started in this process, on all devices: shows whether an operation ran as one.
#[must_use]
pub fn launches() -> u64 {
    LAUNCHES.load(Ordering::Relaxed)
}

/// Counts kernels that were started.
pub(super) fn count_launches(count: usize) {
    LAUNCHES.fetch_add(count as u64, Ordering::Relaxed);
}

/// When a queued kernel begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// After those before it.
    InTurn,
    /// Perhaps before those before it have ended, for which it waits within.
    Early,
    /// As [`Self::InTurn`], with room for all its blocks at a time, which wait for each other.
    #[cfg(feature = "cuda")]
    Together,
}

/// Starts a kernel: on a device queued behind what was queued before, in host memory at once.
pub(super) fn launch(device: &Device, launch: &Launch) -> Result<()> {
    start(device, launch, Order::InTurn)
}

/// As [`launch`], for kernels that wait within for those before them, on devices of compute capability 9.0
/// and later: it may begin before they have ended.
pub(super) fn launch_early(device: &Device, launch: &Launch) -> Result<()> {
    start(device, launch, Order::Early)
}

/// What a device has of what blocks take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) multiprocessors: usize,
    /// Of shared memory, the most that one block may use, and what a multiprocessor has.
    pub(super) shared_bytes: usize,
    pub(super) shared_bytes_all: usize,
    /// Whether it is of compute capability 9.0 or later: copies rows to shared memory by itself, and starts
    /// kernels early.
    pub(super) is_hopper: bool,
}

/// The limits of a device; few multiprocessors in the emulation, so that blocks have more to do, and as many
/// that a block's share of queries ends within a head.
pub(super) fn limits(device: &Device) -> Result<Limits> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device::limits(device),
        _ => {
            let [shared_bytes, shared_bytes_all] = [227 << 10, 228 << 10];
            Ok(Limits { multiprocessors: 5, shared_bytes, shared_bytes_all, is_hopper: true })
        }
    }
}

#[cfg_attr(
    not(any(feature = "cuda", feature = "cuda-emulation")),
    expect(unused_variables, reason = "no kernel runs")
)]
fn start(device: &Device, launch: &Launch, order: Order) -> Result<()> {
    if launch.grid.contains(&0) {
        return Ok(());
    }
    launch.check()?;
    let _turn = super::recorded::turn();
    let order = match order {
        // What it follows may be no kernel, which it could not overlap with.
        Order::Early if super::recorded::is_recording() => Order::InTurn,
        order => order,
    };
    count_launches(usize::from(!super::recorded::is_recording()));
    match device {
        #[cfg(feature = "cuda-emulation")]
        Device::Cpu => emulation::launch(launch, order == Order::Early),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device::launch(device, launch, order),
        _ => bail!("no kernel runs on {device:?}"),
    }
}

#[cfg(feature = "cuda")]
pub(super) use device::{Arguments, capability, function, name as device_name, queue};

#[cfg(feature = "cuda-emulation")]
#[expect(unsafe_code, reason = "the emulation is C++")]
mod emulation {
    use std::ffi::{CStr, CString, c_char, c_void};

    use candle_core::{Error, Result, bail};

    use super::super::launch::Launch;

    unsafe extern "C" {
        fn pentimento_emulate(
            name: *const c_char,
            grid: *const i64,
            threads: i64,
            shared_bytes: u64,
            args: *const c_void,
            argument_bytes: u64,
            order: u32,
            early: bool,
        ) -> *const c_char;
    }

    pub(super) fn launch(launch: &Launch, early: bool) -> Result<()> {
        let order = super::super::emulated_order().unwrap_or(0);
        let name = CString::new(launch.kernel.as_str()).map_err(Error::wrap)?;
        let grid = launch.grid.map(i64::try_from);
        let [Ok(x), Ok(y), Ok(z)] = grid else { bail!("a grid of {:?} blocks", launch.grid) };
        let threads = i64::try_from(launch.threads).map_err(Error::wrap)?;
        let args = &launch.args.0;
        // SAFETY: the emulation copies nothing beyond the argument's bytes, whose number it checks
        // against the kernel's own; the addresses in it are those of live tensors of the sizes that
        // stand beside them. What comes back is null or a string that lives until this thread's
        // next launch, and is copied before.
        let fault = unsafe {
            let fault = pentimento_emulate(
                name.as_ptr(),
                [x, y, z].as_ptr(),
                threads,
                launch.shared_bytes as u64,
                args.as_ptr().cast(),
                size_of_val(args.as_slice()) as u64,
                order,
                early,
            );
            (!fault.is_null()).then(|| CStr::from_ptr(fault).to_string_lossy().into_owned())
        };
        match fault {
            Some(fault) => bail!("{fault}"),
            None => Ok(()),
        }
    }
}

#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "a kernel gets addresses")]
mod device {
    use std::{
        collections::{HashMap, hash_map::Entry},
        sync::{Arc, Mutex, PoisonError},
    };

    use candle_core::{
        CudaDevice, CudaStorage, DType, Error, Result, bail,
        cuda::{DeviceId, WrapErr, cudarc},
        cuda_backend::CudaDType,
    };
    use cudarc::{
        driver::{
            CudaFunction, CudaModule, DevicePtr,
            sys::{
                self, CUdevice_attribute_enum as DeviceAttribute,
                CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            },
        },
        nvrtc::Ptx,
    };
    use half::bf16;

    use super::{
        super::launch::{FIELDS_MAX, Launch},
        Limits, Order,
    };
    use crate::memory::CudaPool;

    /// Every kernel for every architecture, as the build script compiled them.
    static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
    /// Shared memory that every kernel may use without asking.
    const SHARED_BYTES_FREE: usize = 48 << 10;

    /// A kernel's arguments with room to spare; the driver reads as many bytes as the kernel takes.
    #[repr(C)]
    pub(in super::super) struct Arguments([u64; FIELDS_MAX]);

    impl Arguments {
        pub(in super::super) fn of(launch: &Launch) -> Result<Self> {
            let mut arguments = Self([0; FIELDS_MAX]);
            let fields = launch.args.0.as_slice();
            let Some(room) = arguments.0.get_mut(..fields.len()) else {
                bail!("{launch}: too many arguments");
            };
            room.copy_from_slice(fields);
            Ok(arguments)
        }
    }

    /// What is loaded on each device.
    static LOADED: Mutex<Option<HashMap<DeviceId, Loaded>>> = Mutex::new(None);

    struct Loaded {
        module: Arc<CudaModule>,
        /// With the shared memory that they may use.
        functions: HashMap<String, (CudaFunction, usize)>,
    }

    pub(super) fn address(storage: &CudaStorage, offset: usize) -> Result<u64> {
        fn of<T: CudaDType>(storage: &CudaStorage, offset: usize) -> Result<u64> {
            let slice = storage.as_cuda_slice::<T>()?;
            let stream = storage.device.cuda_stream();
            let (address, _on_one_stream) = slice.device_ptr(&stream);
            Ok(address + (offset * size_of::<T>()) as u64)
        }
        use candle_core::backend::BackendStorage;
        match storage.dtype() {
            DType::BF16 => of::<bf16>(storage, offset),
            DType::F32 => of::<f32>(storage, offset),
            DType::U8 => of::<u8>(storage, offset),
            DType::U32 => of::<u32>(storage, offset),
            DType::I64 => of::<i64>(storage, offset),
            other => bail!("a kernel does not read {other:?}"),
        }
    }

    pub(super) fn allocate(device: &CudaDevice, count: usize, dtype: DType) -> Result<CudaStorage> {
        let _turn = super::super::recorded::turn();
        // SAFETY: the kernel that the memory is for writes every number before any is read.
        unsafe {
            match dtype {
                DType::BF16 => {
                    Ok(CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(count)?, device.clone()))
                }
                DType::F32 => {
                    Ok(CudaStorage::wrap_cuda_slice(device.alloc::<f32>(count)?, device.clone()))
                }
                DType::U8 => {
                    Ok(CudaStorage::wrap_cuda_slice(device.alloc::<u8>(count)?, device.clone()))
                }
                other => bail!("a kernel does not write {other:?}"),
            }
        }
    }

    /// The kernel by its name; the module is loaded once for a device.
    pub(in super::super) fn function(device: &CudaDevice, launch: &Launch) -> Result<CudaFunction> {
        let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match all.get_or_insert_default().entry(device.id()) {
            Entry::Occupied(loaded) => loaded.into_mut(),
            Entry::Vacant(place) => {
                // What one operation frees is the next one's, without a call to the system.
                CudaPool::new(device).map_err(Error::wrap)?;
                let stream = device.cuda_stream();
                let module = stream.context().load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
                place.insert(Loaded { module, functions: HashMap::new() })
            }
        };
        let known = loaded.functions.get(&launch.kernel);
        let (function, room) = match known {
            Some((function, room)) => (function.clone(), *room),
            None => (loaded.module.load_function(&launch.kernel).w()?, SHARED_BYTES_FREE),
        };
        if launch.shared_bytes > room {
            let bytes = i32::try_from(launch.shared_bytes).map_err(Error::wrap)?;
            let set =
                function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes);
            set.map_err(|error| named(launch, &error))?;
        }
        if known.is_none() || launch.shared_bytes > room {
            let room = room.max(launch.shared_bytes);
            loaded.functions.insert(launch.kernel.clone(), (function.clone(), room));
        }
        Ok(function)
    }

    /// The driver's error with the launch that it is about.
    fn named(launch: &Launch, error: &cudarc::driver::DriverError) -> Error {
        Error::msg(format!("{launch}: {error:?}"))
    }

    /// The device's compute capability.
    pub(in super::super) fn capability(device: &CudaDevice) -> Result<(i32, i32)> {
        Ok(known(device)?.1)
    }

    fn ask(device: &CudaDevice, attribute: DeviceAttribute) -> Result<usize> {
        let found = device.cuda_stream().context().attribute(attribute).w()?;
        usize::try_from(found).map_err(Error::wrap)
    }

    /// The device's name and compute capability.
    pub(in super::super) fn name(device: &CudaDevice) -> Result<String> {
        let stream = device.cuda_stream();
        let (major, minor) = capability(device)?;
        Ok(format!("{}, compute capability {major}.{minor}", stream.context().name().w()?))
    }

    pub(super) fn limits(device: &CudaDevice) -> Result<Limits> {
        Ok(known(device)?.0)
    }

    /// Limits and compute capability, asked for once for each device: products and attention look at them at
    /// every start.
    fn known(device: &CudaDevice) -> Result<(Limits, (i32, i32))> {
        use DeviceAttribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as OF_A_BLOCK,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR as OF_ALL,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        type Known = HashMap<DeviceId, (Limits, (i32, i32))>;
        static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get_or_insert_default().get(&device.id()) {
            return Ok(*found);
        }
        let capability = device.cuda_stream().context().compute_capability().w()?;
        let limits = Limits {
            multiprocessors: ask(device, MULTIPROCESSORS)?,
            shared_bytes: ask(device, OF_A_BLOCK)?,
            shared_bytes_all: ask(device, OF_ALL)?,
            is_hopper: capability.0 >= 9,
        };
        known.get_or_insert_default().insert(device.id(), (limits, capability));
        Ok((limits, capability))
    }

    pub(super) fn launch(device: &CudaDevice, launch: &Launch, order: Order) -> Result<()> {
        let function = function(device, launch)?;
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        queue(&function, &Arguments::of(launch)?, launch, (stream.cu_stream(), order))
    }

    /// Queues `function` with `arguments` as `launch` says, on a stream of the context that is current.
    pub(in super::super) fn queue(
        function: &CudaFunction,
        arguments: &Arguments,
        launch: &Launch,
        (stream, order): (sys::CUstream, Order),
    ) -> Result<()> {
        let small = |n: usize| u32::try_from(n).map_err(Error::wrap);
        let [x, y, z] = launch.grid;
        let (id, value) = match order {
            Order::Together => (
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
                sys::CUlaunchAttributeValue { cooperative: 1 },
            ),
            Order::InTurn | Order::Early => (
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            ),
        };
        let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let config = sys::CUlaunchConfig {
            gridDimX: small(x)?,
            gridDimY: small(y)?,
            gridDimZ: small(z)?,
            blockDimX: small(launch.threads)?,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: small(launch.shared_bytes)?,
            hStream: stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(order != Order::InTurn),
        };
        let arguments: *const Arguments = &raw const *arguments;
        let mut parameters = [arguments.cast_mut().cast::<std::ffi::c_void>()];
        // SAFETY: the arguments are the kernel's own, which the emulation's tests hold; addresses and
        // sizes in them are those of tensors that are alive while this is queued. The driver copies them
        // before it returns.
        let started = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        started.result().map_err(|error| named(launch, &error))
    }

    /// Copies `bytes` bytes from the device's own `from` to byte `at` of what the storage holds.
    pub(super) fn copy(storage: &CudaStorage, at: usize, from: u64, bytes: usize) -> Result<()> {
        let _turn = super::super::recorded::turn();
        let stream = storage.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let to = address(storage, 0)? + at as u64;
        // SAFETY: both lie on the device, as long as it was checked, and the copy is queued on the one stream of all
        // work, so that neither is given back before.
        unsafe { cudarc::driver::result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
            .w()
    }

    /// Puts bytes at the beginning of memory for bytes or float32.
    pub(super) fn write(storage: &mut CudaStorage, bytes: &[u8]) -> Result<()> {
        use candle_core::backend::BackendStorage;
        let device = storage.device.clone();
        match storage.dtype() {
            DType::U8 => device.memcpy_htod(bytes, u8::as_cuda_slice_mut(storage)?),
            DType::F32 => {
                let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
                device.memcpy_htod(&numbers, f32::as_cuda_slice_mut(storage)?)
            }
            other => bail!("not room for bytes: {other:?}"),
        }
    }
}
