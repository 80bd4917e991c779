//! What is checked and timed where there is a GPU: `pentimento-gpu-check` in one program, so that a
//! machine without a compiler and without a network can run it.
//!
//! Correctness first: every kernel against its plain version, whole models against the reference,
//! sizes whose scores would not fit 32-bit numbers, the allocator's counters. Then times at the published
//! dimensions. Each part can run in a process of its own. The results are files: see [`report`].

mod accuracy;
mod autoencoder;
mod host;
mod language;
mod large;
mod models;
mod pool;
mod recorded;
pub mod report;
mod times;
mod weights;

use std::path::PathBuf;

use candle_core::{Device, Result};

use crate::ops::cuda::{has_hopper, parity};
use report::{Finding, Report, Row};

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// The folder of the reference checkpoints; without it they are left out.
    pub references: Option<PathBuf>,
    /// Where weights at the published dimensions may be written for a while.
    pub scratch: PathBuf,
    /// Leave out the times.
    pub correctness_only: bool,
    /// Divides the sizes of what is large: 1 on a GPU, more in tests.
    pub shrink: usize,
}

/// The first CUDA device, and its name with its compute capability.
///
/// # Errors
/// A build without CUDA, no driver, or no device.
pub fn first_gpu() -> Result<(Device, String)> {
    let device = crate::memory::cuda_device(0)?;
    let name = crate::ops::cuda::device_name(&device)?;
    Ok((device, name))
}

/// A piece of the check that can run in a process of its own, so that a fault of the device in one spoils no
/// other.
#[derive(Clone, Copy)]
pub struct Part {
    /// Its name.
    pub name: &'static str,
    /// Whether it takes times, and so must run alone.
    pub timed: bool,
    /// Seconds after which something hangs.
    pub limit_s: u64,
    work: fn(&Device, &Options) -> Vec<Row>,
}

/// Correctness.
const CHECKS: [Part; 14] = [
    check("joint attention", |device, _| group(device, 0)),
    check("attention", |device, _| group(device, 1)),
    check("elementwise", |device, _| group(device, 2)),
    check("pictures", |device, _| group(device, 3)),
    check("products", |device, _| group(device, 4)),
    check("decode", |device, _| group(device, 5)),
    check("tensors", |device, _| group(device, 6)),
    check("hopper", hopper),
    check("cublaslt", |device, _| {
        named("cublaslt", parity::run_blas(device, &[0]).iter().map(Row::of_outcome).collect())
    }),
    check("models", |device, options| match &options.references {
        Some(folder) => on_kernels(device, || models::check(device, folder)),
        None => Vec::new(),
    }),
    check("large", |device, options| on_kernels(device, || large::check(device, options.shrink))),
    check("memory", |device, _| pool::check(device)),
    check("recorded", recorded::check),
    check("accuracy", |device, options| on_kernels(device, || accuracy::check(device, options))),
];

const fn check(name: &'static str, work: fn(&Device, &Options) -> Vec<Row>) -> Part {
    Part { name, timed: false, limit_s: 60, work }
}

/// All parts, in the order in which they run.
#[must_use]
pub fn parts(options: &Options) -> Vec<Part> {
    let times = times::PARTS.iter().filter(|_| !options.correctness_only);
    CHECKS.iter().chain(times).copied().collect()
}

impl Part {
    /// Runs it in this process.
    #[must_use]
    pub fn run(&self, device: &Device, options: &Options) -> Vec<Row> {
        (self.work)(device, options)
    }

    /// What is reported where it did not come to an end.
    #[must_use]
    pub fn broken(&self, why: String) -> Row {
        Row { part: self.name.into(), name: "the whole".to_owned(), finding: Finding::Failed(why) }
    }
}

/// Runs everything on `device` in this process and tells `progress` what was done, line by line.
pub fn run(device: &Device, options: &Options, progress: &mut dyn FnMut(&Row)) -> Report {
    let mut report = Report::default();
    for part in parts(options) {
        for row in part.run(device, options) {
            progress(&row);
            report.rows.push(row);
        }
    }
    report
}

fn group(device: &Device, i: usize) -> Vec<Row> {
    let group = &parity::GROUPS[i];
    parity::run_group(group, device, &[0]).iter().map(Row::of_outcome).collect()
}

fn hopper(device: &Device, _options: &Options) -> Vec<Row> {
    if !on_kernels(device, || has_hopper(device)) {
        return Vec::new();
    }
    named("hopper", parity::run_hopper(device, &[0]).iter().map(Row::of_outcome).collect())
}

fn named(part: &'static str, rows: Vec<Row>) -> Vec<Row> {
    rows.into_iter().map(|row| Row { part: part.into(), ..row }).collect()
}

/// Runs `work` so that kernels are used: in the emulation on the CPU, which belongs to one thread.
fn on_kernels<T: Send>(device: &Device, work: impl FnOnce() -> T + Send) -> T {
    #[cfg(feature = "cuda-emulation")]
    if device.is_cpu()
        && let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(1).build()
    {
        return pool.install(|| crate::ops::cuda::emulated(0, work));
    }
    let _emulated_elsewhere = device;
    work()
}
