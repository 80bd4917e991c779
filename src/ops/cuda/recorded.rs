//! A stretch of work that one thread queues on a device, recorded once and started again as a whole.
//!
//! Operations queue on the device's own stream and nowhere else, so that is what is recorded: whatever another
//! thread queues there meanwhile would be recorded with it. So nothing is recorded while another thread is
//! [at work](at_work), and such threads do not begin meanwhile; kernels, their memory and products of any other
//! thread wait until a recording has ended. Who records sees to the rest: no weights are read, and no tensor that
//! was made before is dropped.
//!
//! What is allocated while it is recorded becomes nodes of the graph: addresses that stay, in memory of a pool
//! beside the default one. Reference:
//! <https://docs.nvidia.com/cuda/cuda-c-programming-guide/#graph-memory-nodes>.

use std::{
    cell::Cell,
    marker::PhantomData,
    sync::{
        PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use candle_core::{Device, Result};

/// Held to write by a thread that records, and to read by those that queue.
static TURNS: RwLock<()> = RwLock::new(());

/// Threads that are at work.
static AT_WORK: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static RECORDS: Cell<bool> = const { Cell::new(false) };
    /// How often this thread said that it is at work.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// As long as it lives, its thread queues work on devices.
#[derive(Debug)]
pub struct AtWork(PhantomData<*const ()>);

/// Says that this thread is going to queue work on devices, by any operation: waits until no other thread records,
/// and keeps others from beginning. A thread may say it again.
#[must_use]
pub fn at_work() -> AtWork {
    if DEPTH.get() == 0 {
        let _nobody_records = TURNS.read().unwrap_or_else(PoisonError::into_inner);
        AT_WORK.fetch_add(1, Ordering::SeqCst);
    }
    DEPTH.set(DEPTH.get() + 1);
    AtWork(PhantomData)
}

impl Drop for AtWork {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get().saturating_sub(1));
        if DEPTH.get() == 0 {
            AT_WORK.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Whether another thread is at work.
fn others_at_work() -> bool {
    AT_WORK.load(Ordering::SeqCst) > usize::from(DEPTH.get() > 0)
}

/// Whether what this thread queues is recorded and not run.
pub(super) fn is_recording() -> bool {
    RECORDS.get()
}

/// Waits until no other thread records, and keeps others from beginning as long as it lives. Not to be taken
/// twice by one thread.
pub(super) fn turn() -> Option<RwLockReadGuard<'static, ()>> {
    (!is_recording()).then(|| TURNS.read().unwrap_or_else(PoisonError::into_inner))
}

/// Runs `work` as the only one that queues; `None` where others are at work.
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "nothing records"))]
fn alone<T>(work: impl FnOnce() -> T) -> Option<T> {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            RECORDS.set(false);
        }
    }
    let _others_wait = TURNS.write().unwrap_or_else(PoisonError::into_inner);
    if others_at_work() {
        return None;
    }
    RECORDS.set(true);
    let _reset = Reset;
    Some(work())
}

/// What was recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Kernels.
    pub kernels: usize,
    /// All nodes of the graph: kernels, copies within the device, and memory that is taken or given back.
    pub nodes: usize,
    /// Bytes that lie at addresses of the graph.
    pub bytes: u64,
}

/// Work that was recorded. Its memory is given back when this is dropped.
#[derive(Debug)]
pub struct Recording {
    what: Recorded,
    #[cfg(feature = "cuda")]
    graph: Option<super::queue::Graph>,
    #[cfg(feature = "cuda")]
    device: Device,
}

/// Whether work on `device` can be recorded: on a CUDA device whose work is in one stream of its own.
#[must_use]
pub fn records(device: &Device) -> bool {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device::records(device),
        _ => false,
    }
}

impl Recording {
    /// Records what `work` queues on `device` from this thread; nothing of it runs yet. `work` must give back
    /// all the memory that it takes and none that was taken before, and must not wait for the device.
    ///
    /// # Errors
    /// A device that does not record, other threads at work, what `work` fails with, work that cannot be repeated, such as a copy
    /// from the host, or a failure of the device. What is queued later is not recorded in any case.
    pub fn of(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = device {
            let Some(graph) = alone(|| device::record(cuda, work)) else {
                candle_core::bail!("another thread is at work")
            };
            let graph = graph?;
            let what = device::repeatable(&graph)?;
            return Ok(Self { what, graph: Some(graph), device: device.clone() });
        }
        _ = work;
        candle_core::bail!("nothing is recorded on {device:?}")
    }

    /// What was recorded.
    #[must_use]
    pub fn what(&self) -> Recorded {
        self.what
    }

    /// Prepares the work to be started. Once.
    ///
    /// # Errors
    /// No memory, or a failure of the device.
    pub fn prepare(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &mut self.graph {
            graph.instantiate()?;
            crate::memory::note_device_peak(&self.device);
        }
        Ok(())
    }

    /// Takes the memory, after the work was [prepared](Self::prepare), so that it can be
    /// [started](Self::start).
    ///
    /// # Errors
    /// No memory, or a failure of the device.
    pub fn take_memory(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &self.graph {
            graph.upload()?;
            crate::memory::note_device_peak(&self.device);
        }
        Ok(())
    }

    /// Queues all of it.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn start(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(graph) = &self.graph {
            super::ffi::count_launches(self.what.kernels);
            return graph.launch();
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Drop for Recording {
    fn drop(&mut self) {
        crate::memory::note_device_peak(&self.device);
        // What still runs has its memory until it has ended.
        let ended = self.device.synchronize();
        self.graph = None;
        crate::memory::trim_recorded(&self.device);
        if let Err(error) = ended {
            tracing::debug!(%error, "recorded work did not end well");
        }
    }
}

#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "calls of the driver")]
mod device {
    use std::{mem::MaybeUninit, ptr};

    use candle_core::{
        CudaDevice, Result, bail,
        cuda::{WrapErr, cudarc},
    };
    use cudarc::driver::{
        result,
        sys::{self, CUgraphNodeType as NodeType, CUmemorytype as MemoryType},
    };

    use super::{super::queue::Graph, Recorded};

    pub(super) fn records(device: &CudaDevice) -> bool {
        let stream = device.cuda_stream();
        // The stream that belongs to nobody cannot be recorded, and events would be recorded too.
        !stream.cu_stream().is_null() && !stream.context().is_event_tracking()
    }

    /// A stream under recording, which ends with it.
    struct Capture(sys::CUstream);

    impl Capture {
        fn begin(stream: sys::CUstream) -> Result<Self> {
            use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD;
            // SAFETY: the stream is its device's, which outlives the recording.
            unsafe { result::stream::begin_capture(stream, THIS_THREAD) }.w()?;
            Ok(Self(stream))
        }

        fn end(self) -> Result<sys::CUgraph> {
            let stream = self.0;
            std::mem::forget(self);
            // SAFETY: as above; it was begun.
            unsafe { result::stream::end_capture(stream) }.w()
        }
    }

    /// After a panic.
    impl Drop for Capture {
        fn drop(&mut self) {
            // SAFETY: as above; the graph, where there is one, is nobody else's.
            unsafe {
                if let Ok(graph) = result::stream::end_capture(self.0)
                    && !graph.is_null()
                {
                    let _nothing_to_do_about_it = result::graph::destroy(graph);
                }
            }
        }
    }

    pub(super) fn record(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        if !records(device) {
            bail!("the device's work is not in one stream of its own");
        }
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let capture = Capture::begin(stream.cu_stream())?;
        let worked = work();
        let graph = capture.end().and_then(|graph| Graph::captured(&stream, graph));
        // What went wrong when tensors were dropped is kept for the next call, which is another's.
        let dropped = stream.context().check_err().w();
        worked?;
        dropped?;
        graph
    }

    /// What a graph consists of.
    ///
    /// # Errors
    /// What cannot be repeated as it is: copies from or to the host, events, memory that is kept.
    pub(super) fn repeatable(graph: &Graph) -> Result<Recorded> {
        let nodes = nodes(graph)?;
        let mut what = Recorded { nodes: nodes.len(), ..Recorded::default() };
        let (mut taken, mut given_back) = (Vec::new(), Vec::new());
        for node in nodes {
            let mut kind = NodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: the node is the graph's, and `kind` a place for its type.
            unsafe { sys::cuGraphNodeGetType(node, &raw mut kind) }.result().w()?;
            match kind {
                NodeType::CU_GRAPH_NODE_TYPE_KERNEL => what.kernels += 1,
                NodeType::CU_GRAPH_NODE_TYPE_MEMSET | NodeType::CU_GRAPH_NODE_TYPE_EMPTY => {}
                NodeType::CU_GRAPH_NODE_TYPE_MEMCPY => within_device(node)?,
                NodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC => taken.push(range(node)?),
                NodeType::CU_GRAPH_NODE_TYPE_MEM_FREE => {
                    let mut address = 0;
                    // SAFETY: the node frees memory, and `address` is a place for where.
                    unsafe { sys::cuGraphMemFreeNodeGetParams(node, &raw mut address) }
                        .result()
                        .w()?;
                    given_back.push(address);
                }
                other => bail!("{other:?} cannot be repeated"),
            }
        }
        let mut addresses: Vec<u64> = taken.iter().map(|[start, _]| *start).collect();
        addresses.sort_unstable();
        given_back.sort_unstable();
        if addresses != given_back {
            let (taken, given_back) = (addresses.len(), given_back.len());
            bail!("memory was taken {taken} times and given back {given_back} times");
        }
        what.bytes = covered(taken);
        Ok(what)
    }

    fn nodes(graph: &Graph) -> Result<Vec<sys::CUgraphNode>> {
        let mut count = 0;
        // SAFETY: without a place for nodes the driver says how many there are.
        unsafe { sys::cuGraphGetNodes(graph.handle(), ptr::null_mut(), &raw mut count) }
            .result()
            .w()?;
        let mut nodes = vec![ptr::null_mut(); count];
        // SAFETY: there is room for so many.
        unsafe { sys::cuGraphGetNodes(graph.handle(), nodes.as_mut_ptr(), &raw mut count) }
            .result()
            .w()?;
        nodes.truncate(count);
        Ok(nodes)
    }

    /// Refuses a copy from or to the host, whose memory may be another's when it is repeated.
    fn within_device(node: sys::CUgraphNode) -> Result<()> {
        let mut copy = MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
        // SAFETY: the node is a copy, whose description there is a place for. Its types of memory are read as
        // the numbers they are, whatever they are.
        let kinds = unsafe {
            sys::cuGraphMemcpyNodeGetParams(node, copy.as_mut_ptr()).result().w()?;
            let copy = copy.as_ptr();
            [&raw const (*copy).srcMemoryType, &raw const (*copy).dstMemoryType]
                .map(|kind| kind.cast::<u32>().read())
        };
        let near =
            [MemoryType::CU_MEMORYTYPE_DEVICE as u32, MemoryType::CU_MEMORYTYPE_UNIFIED as u32];
        if kinds.iter().any(|kind| !near.contains(kind)) {
            bail!("a copy from or to the host cannot be repeated");
        }
        Ok(())
    }

    /// The address and the bytes that a node takes.
    fn range(node: sys::CUgraphNode) -> Result<[u64; 2]> {
        let mut taken = MaybeUninit::<sys::CUDA_MEM_ALLOC_NODE_PARAMS>::zeroed();
        // SAFETY: the node takes memory, and there is a place for its description, of which two numbers are
        // read.
        unsafe {
            sys::cuGraphMemAllocNodeGetParams(node, taken.as_mut_ptr()).result().w()?;
            let taken = taken.as_ptr();
            Ok([(*taken).dptr, (*taken).bytesize as u64])
        }
    }

    /// Bytes that lie in at least one of the ranges.
    fn covered(mut ranges: Vec<[u64; 2]>) -> u64 {
        ranges.sort_unstable();
        let mut end = 0;
        let mut bytes = 0;
        for [start, length] in ranges {
            let past = start + length;
            bytes += past.saturating_sub(start.max(end));
            end = end.max(past);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, Mutex, atomic::AtomicBool},
        thread,
        time::Duration,
    };

    use super::*;

    /// What is tested is one for the process.
    static TESTS: Mutex<()> = Mutex::new(());

    #[test]
    fn others_wait_while_one_records() {
        let _one_test_at_a_time = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let _own = [at_work(), at_work()];
            let other = alone(|| {
                assert!(is_recording() && turn().is_none());
                let other = scope.spawn(|| {
                    assert!(!is_recording());
                    let _at_work = at_work();
                    let turn = turn();
                    assert!(ended.load(Ordering::SeqCst), "in the middle of a recording");
                    turn.is_some()
                });
                thread::sleep(Duration::from_millis(20));
                ended.store(true, Ordering::SeqCst);
                other
            });
            assert!(!is_recording() && other.unwrap().join().unwrap());
        });
    }

    #[test]
    fn nobody_records_while_others_are_at_work() {
        let _one_test_at_a_time = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        let (begun, over) = (Barrier::new(2), Barrier::new(2));
        thread::scope(|scope| {
            scope.spawn(|| {
                let _at_work = at_work();
                begun.wait();
                over.wait();
            });
            begun.wait();
            assert!(alone(|| ()).is_none());
            let _own = at_work();
            assert!(alone(|| ()).is_none());
            over.wait();
        });
        assert!(alone(|| ()).is_some());
    }

    #[test]
    fn a_cpu_records_nothing() {
        assert!(!records(&Device::Cpu));
        let error = Recording::of(&Device::Cpu, || Ok(())).unwrap_err();
        assert!(error.to_string().contains("nothing is recorded"), "{error}");
    }
}
