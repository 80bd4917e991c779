//! Launches that are prepared once and started again and again, on a device as a recorded graph, and what
//! they leave for the host.

use candle_core::{DType, Device, Result, bail};

#[cfg(feature = "cuda")]
use super::ffi::count_launches;
use super::{
    ffi::{Output, launch, launch_early},
    launch::Launch,
};

/// Float32 that a kernel writes again and again, each number once, and the host reads. A device writes them to the
/// host's memory where it can, so that nothing is copied; kernels must not read them.
#[derive(Debug)]
pub(super) struct Readout(Place);

#[derive(Debug)]
enum Place {
    /// Memory that kernels write, which is the host's where they run there.
    Plain(Output),
    /// The host's, in which a device writes.
    #[cfg(feature = "cuda")]
    Mapped(device::Mapped),
    /// A device's, and what it is copied to.
    #[cfg(feature = "cuda")]
    Copied(Output, device::Pinned),
}

impl Readout {
    pub(super) fn new(device: &Device, count: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = device {
            match device::Mapped::new(cuda, count) {
                Ok(mapped) => return Ok(Self(Place::Mapped(mapped))),
                Err(error) => tracing::debug!(%error, "a device does not write to the host"),
            }
            let from = Output::new(device, &[count], DType::F32)?;
            return Ok(Self(Place::Copied(from, device::Pinned::new(cuda, count)?)));
        }
        Ok(Self(Place::Plain(Output::new(device, &[count], DType::F32)?)))
    }

    /// Where kernels write.
    pub(super) fn address(&self) -> u64 {
        match &self.0 {
            Place::Plain(output) => output.address(),
            #[cfg(feature = "cuda")]
            Place::Mapped(mapped) => mapped.address(),
            #[cfg(feature = "cuda")]
            Place::Copied(from, _) => from.address(),
        }
    }

    /// Waits for what is queued and reads what it wrote. The next start writes to the same place.
    pub(super) fn read(&mut self) -> Result<&mut [f32]> {
        match &mut self.0 {
            Place::Plain(output) => match output.on_host() {
                Some(numbers) => Ok(numbers),
                None => bail!("no place to read to"),
            },
            #[cfg(feature = "cuda")]
            Place::Mapped(mapped) => mapped.read(),
            #[cfg(feature = "cuda")]
            Place::Copied(from, to) => match from.on_device() {
                Some(from) => to.read(from),
                None => bail!("no place to read from"),
            },
        }
    }
}

/// Kernels that are started in this order again and again, with the same arguments.
pub(super) struct Sequence {
    launches: Vec<Launch>,
    starts: Starts,
    #[cfg(feature = "cuda")]
    queue: Option<device::Queue>,
}

impl Sequence {
    /// Prepares the launches. What their arguments point to must outlive the sequence.
    pub(super) fn new(device: &Device, launches: Vec<Launch>, starts: Starts) -> Result<Self> {
        launches.iter().try_for_each(Launch::check)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            let queue = Some(device::Queue::new(device, &launches, starts)?);
            return Ok(Self { launches, starts, queue });
        }
        let _of_a_device = device;
        Ok(Self {
            launches,
            starts,
            #[cfg(feature = "cuda")]
            queue: None,
        })
    }

    pub(super) fn launches(&self) -> &[Launch] {
        &self.launches
    }

    /// Whether they are started as a whole.
    pub(super) fn is_recorded(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.queue.as_ref().is_some_and(device::Queue::is_recorded);
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// Changes arguments of the only launch, from the field `at` on.
    pub(super) fn set(&mut self, at: usize, fields: &[u64]) -> Result<()> {
        let [launch] = self.launches.as_mut_slice() else { bail!("arguments of several kernels") };
        let known = launch.args.0.get_mut(at..at.saturating_add(fields.len()));
        let Some(known) = known else { bail!("{launch}: too many fields") };
        known.copy_from_slice(fields);
        #[cfg(feature = "cuda")]
        if let Some(queue) = &mut self.queue {
            queue.set(launch)?;
        }
        Ok(())
    }

    /// Starts all of them.
    pub(super) fn run(&self, device: &Device) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(queue) = &self.queue {
            count_launches(self.launches.len());
            return queue.run();
        }
        // The first one follows what is no kernel of the sequence.
        self.launches.iter().enumerate().try_for_each(|(i, start)| {
            let early = i > 0 && self.starts == Starts::Overlapping;
            if early { launch_early(device, start) } else { launch(device, start) }
        })
    }
}

/// How a [`Sequence`] is started on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Starts {
    /// One by one.
    Single,
    /// Recorded once, as a graph that is started as a whole.
    Recorded,
    /// Recorded; where the device can, a kernel begins before the one before it has ended, and waits within. Every
    /// kernel of the sequence must wait so.
    Overlapping,
    /// One by one, each with room for all its blocks at a time, which wait for each other.
    Together,
}

#[cfg(feature = "cuda")]
pub(super) use device::Graph;

#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "kernels get addresses")]
mod device {
    use std::sync::Arc;

    use candle_core::{
        CudaDevice, CudaStorage, Result, bail,
        cuda::{WrapErr, cudarc},
    };
    use cudarc::driver::{CudaFunction, CudaStream, PinnedHostSlice, result, sys};

    use super::{
        super::{
            ffi::{Arguments, Order, capability, function, queue},
            launch::Launch,
        },
        Starts,
    };

    /// Host memory that a device copies to without help.
    #[derive(Debug)]
    pub(super) struct Pinned(PinnedHostSlice<f32>);

    impl Pinned {
        pub(super) fn new(device: &CudaDevice, count: usize) -> Result<Self> {
            Ok(Self(locked(device, count, 0)?))
        }

        pub(super) fn read(&mut self, from: &CudaStorage) -> Result<&mut [f32]> {
            let stream = from.device.cuda_stream();
            stream.memcpy_dtoh(from.as_cuda_slice::<f32>()?, &mut self.0).w()?;
            // Looks again and again, where the slice's own event would sleep.
            stream.synchronize().w()?;
            self.0.as_mut_slice().w()
        }
    }

    /// Host memory that kernels on a device's stream write to.
    #[derive(Debug)]
    pub(super) struct Mapped {
        stream: Arc<CudaStream>,
        memory: PinnedHostSlice<f32>,
        address: sys::CUdeviceptr,
    }

    impl Mapped {
        pub(super) fn new(device: &CudaDevice, count: usize) -> Result<Self> {
            let mut memory = locked(device, count, sys::CU_MEMHOSTALLOC_DEVICEMAP)?;
            let mut address = 0;
            // SAFETY: the memory was made to be mapped, and lives until what is returned is dropped.
            unsafe {
                let start = memory.as_mut_ptr().w()?.cast();
                sys::cuMemHostGetDevicePointer_v2(&raw mut address, start, 0)
            }
            .result()
            .w()?;
            Ok(Self { stream: device.cuda_stream(), memory, address })
        }

        /// The memory's, as the device knows it.
        pub(super) fn address(&self) -> u64 {
            self.address
        }

        pub(super) fn read(&mut self) -> Result<&mut [f32]> {
            self.stream.synchronize().w()?;
            self.memory.as_mut_slice().w()
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // Kernels that are queued may write to it.
            let _nothing_to_do_about_it = self.stream.synchronize();
        }
    }

    /// Host memory that stays where it is. What a kernel leaves out is NaN.
    fn locked(device: &CudaDevice, count: usize, flags: u32) -> Result<PinnedHostSlice<f32>> {
        let stream = device.cuda_stream();
        // SAFETY: it is written here, before it is read. Memory that writes are combined for would be slow
        // to read.
        let memory = unsafe { stream.context().alloc_pinned_with_flags::<f32>(count, flags) };
        let mut memory = memory.w()?;
        memory.as_mut_slice().w()?.fill(f32::NAN);
        Ok(memory)
    }

    /// A sequence of launches that are ready to start.
    pub(super) struct Queue {
        stream: Arc<CudaStream>,
        ready: Vec<Ready>,
        /// Of all but the first.
        order: Order,
        graph: Option<Graph>,
    }

    struct Ready {
        function: CudaFunction,
        arguments: Box<Arguments>,
        launch: Launch,
    }

    impl Ready {
        fn new(device: &CudaDevice, launch: &Launch) -> Result<Self> {
            Ok(Self {
                function: function(device, launch)?,
                arguments: Box::new(Arguments::of(launch)?),
                launch: launch.clone(),
            })
        }

        fn start(&self, stream: sys::CUstream, order: Order) -> Result<()> {
            queue(&self.function, &self.arguments, &self.launch, (stream, order))
        }
    }

    /// Launches that were recorded and are started as a whole on a device's stream.
    #[derive(Debug)]
    pub(in super::super) struct Graph {
        stream: Arc<CudaStream>,
        graph: sys::CUgraph,
        executable: sys::CUgraphExec,
    }

    // SAFETY: the handles may be used from any thread, by one at a time: starting a graph is the only thing
    // that is done through a shared reference, and its owner shares it with nobody.
    unsafe impl Send for Graph {}

    /// A stream that nothing but a recording uses.
    struct RecordingStream(sys::CUstream);

    impl Drop for RecordingStream {
        fn drop(&mut self) {
            // SAFETY: it was made here and is destroyed once.
            let _nothing_to_do_about_it = unsafe { result::stream::destroy(self.0) };
        }
    }

    impl Graph {
        /// Records what `start` starts on the stream that it gets. That is one of its own: what another thread
        /// queues on the device's stream meanwhile, such as weights that are copied, must not be recorded.
        fn of(
            stream: &Arc<CudaStream>,
            start: impl FnOnce(sys::CUstream) -> Result<()>,
        ) -> Result<Self> {
            use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD;
            stream.context().bind_to_thread().w()?;
            let own = result::stream::create(result::stream::StreamKind::NonBlocking).w()?;
            let own = RecordingStream(own);
            // SAFETY: the stream is alive until the end of this function.
            unsafe { result::stream::begin_capture(own.0, THIS_THREAD) }.w()?;
            let started = start(own.0);
            // SAFETY: as above; a recording that began is ended, whatever came of it.
            let graph = unsafe { result::stream::end_capture(own.0) }.w()?;
            let mut made = Self::captured(stream, graph)?;
            started?;
            made.instantiate()?;
            made.upload()?;
            Ok(made)
        }

        /// What was recorded, to be started on `stream`; the graph belongs to what is returned.
        pub(in super::super) fn captured(
            stream: &Arc<CudaStream>,
            graph: sys::CUgraph,
        ) -> Result<Self> {
            if graph.is_null() {
                bail!("nothing was recorded");
            }
            Ok(Self { stream: Arc::clone(stream), graph, executable: std::ptr::null_mut() })
        }

        pub(in super::super) fn handle(&self) -> sys::CUgraph {
            self.graph
        }

        /// Makes it what can be started; once.
        pub(in super::super) fn instantiate(&mut self) -> Result<()> {
            self.stream.context().bind_to_thread().w()?;
            let flags = sys::CUgraphInstantiate_flags(0);
            // SAFETY: the graph is alive.
            self.executable = unsafe { result::graph::instantiate(self.graph, flags) }.w()?;
            Ok(())
        }

        /// Takes its memory, after it was [instantiated](Self::instantiate).
        pub(in super::super) fn upload(&self) -> Result<()> {
            self.stream.context().bind_to_thread().w()?;
            // SAFETY: both are alive.
            unsafe { result::graph::upload(self.executable, self.stream.cu_stream()) }.w()
        }

        /// Starts it, after it was [instantiated](Self::instantiate).
        pub(in super::super) fn launch(&self) -> Result<()> {
            self.stream.context().bind_to_thread().w()?;
            // SAFETY: both are alive.
            unsafe { result::graph::launch(self.executable, self.stream.cu_stream()) }.w()
        }
    }

    impl Drop for Graph {
        fn drop(&mut self) {
            // SAFETY: they were made here and are destroyed once; what was started goes on.
            unsafe {
                if !self.executable.is_null() {
                    let _nothing_to_do_about_it = result::graph::exec_destroy(self.executable);
                }
                let _nothing_to_do_about_it = result::graph::destroy(self.graph);
            }
        }
    }

    impl Queue {
        pub(super) fn new(
            device: &CudaDevice,
            launches: &[Launch],
            starts: Starts,
        ) -> Result<Self> {
            let ready = launches.iter().map(|launch| Ready::new(device, launch));
            let stream = device.cuda_stream();
            let early = starts == Starts::Overlapping && capability(device)?.0 >= 9;
            let order = if early { Order::Early } else { Order::InTurn };
            let ready = ready.collect::<Result<Vec<Ready>>>()?;
            let mut made = Self { stream, ready, order, graph: None };
            if starts == Starts::Together {
                made.order = Order::Together;
            } else if starts != Starts::Single {
                made.graph = made.recorded();
            }
            Ok(made)
        }

        /// The launches as a graph; `None` where the driver does not record them, so that they are started
        /// one by one.
        fn recorded(&self) -> Option<Graph> {
            match Graph::of(&self.stream, |recording| self.start_each(recording)) {
                Ok(graph) => Some(graph),
                Err(error) => {
                    tracing::debug!(%error, "kernels are not recorded");
                    None
                }
            }
        }

        fn start_each(&self, stream: sys::CUstream) -> Result<()> {
            self.stream.context().bind_to_thread().w()?;
            self.ready.iter().enumerate().try_for_each(|(i, ready)| {
                let waits = i == 0 && self.order == Order::Early;
                ready.start(stream, if waits { Order::InTurn } else { self.order })
            })
        }

        /// Changes the arguments of the only launch, which is not recorded.
        pub(super) fn set(&mut self, launch: &Launch) -> Result<()> {
            let (None, [ready]) = (&self.graph, self.ready.as_mut_slice()) else {
                bail!("{launch}: its arguments stay");
            };
            *ready.arguments = Arguments::of(launch)?;
            Ok(())
        }

        pub(super) fn run(&self) -> Result<()> {
            match &self.graph {
                Some(graph) => graph.launch(),
                None => self.start_each(self.stream.cu_stream()),
            }
        }

        pub(super) fn is_recorded(&self) -> bool {
            self.graph.is_some()
        }
    }
}
