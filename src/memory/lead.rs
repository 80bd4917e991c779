//! How far the host runs ahead of a device.

use std::time::Duration;
#[cfg(feature = "cuda")]
use std::{collections::VecDeque, sync::Arc, time::Instant};

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::{
    WrapErr,
    cudarc::driver::{CudaEvent, CudaStream},
};
use candle_core::{Device, Result};

/// Keeps the host from queueing all its work ahead of a device, so that what is no longer wanted need not
/// be done. The device has the pieces that were queued since, and does not wait.
#[derive(Debug)]
pub struct Lead {
    waited: Duration,
    #[cfg(feature = "cuda")]
    queue: Option<Queue>,
}

/// A stream and the ends of the last pieces in it.
#[cfg(feature = "cuda")]
#[derive(Debug)]
struct Queue {
    stream: Arc<CudaStream>,
    ends: VecDeque<CudaEvent>,
    pieces: usize,
}

impl Lead {
    /// At most `pieces` are queued on `device` and not done. A CPU queues nothing.
    #[must_use]
    pub fn new(device: &Device, pieces: usize) -> Self {
        #[cfg(feature = "cuda")]
        return Self {
            waited: Duration::ZERO,
            queue: match device {
                Device::Cuda(device) => {
                    Some(Queue { stream: device.cuda_stream(), ends: VecDeque::new(), pieces })
                }
                _ => None,
            },
        };
        #[cfg(not(feature = "cuda"))]
        {
            _ = (device, pieces);
            Self { waited: Duration::ZERO }
        }
    }

    /// For work that is not to be waited for.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::new(&Device::Cpu, 0)
    }

    /// How long the host has waited so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// A piece was queued. Where there are as many as may be, waits for the first of them.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn queued(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(Queue { stream, ends, pieces }) = &mut self.queue {
            let end = if ends.len() < *pieces {
                stream.context().new_event(None).w()?
            } else {
                let Some(first) = ends.pop_front() else { return Ok(()) };
                let begin = Instant::now();
                first.synchronize().w()?;
                self.waited += begin.elapsed();
                first
            };
            end.record(stream).w()?;
            ends.push_back(end);
        }
        Ok(())
    }
}
