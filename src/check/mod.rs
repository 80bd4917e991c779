//! What is checked and timed where there is a GPU: `pentimento-gpu-check` in one program, so that a
//! machine without a compiler and without a network can run it.
//!
//! Correctness first: every kernel against its plain version, whole models against the reference,
//! sizes whose scores would not fit 32-bit numbers, the allocator's counters. Then times at the published
//! dimensions. The results are files: see [`report`].

mod large;
mod models;
mod pool;
pub mod report;
mod times;
mod weights;

use std::path::{Path, PathBuf};

use candle_core::{Device, Result};

use crate::ops::cuda::{has_hopper, parity, use_hopper};
use report::{Report, Row};

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
    let device = Device::new_cuda(0)?;
    let name = crate::ops::cuda::device_name(&device)?;
    Ok((device, name))
}

/// Runs everything on `device` and tells `progress` what was done, line by line.
///
/// # Errors
/// A failure outside the checks themselves; those are rows of the report.
pub fn run(device: &Device, options: &Options, progress: &mut dyn FnMut(&Row)) -> Result<Report> {
    let mut report = Report::default();
    let mut add = |report: &mut Report, rows: Vec<Row>| {
        for row in rows {
            progress(&row);
            report.rows.push(row);
        }
    };
    add(&mut report, parity::run(device, &[0]).iter().map(Row::of_outcome).collect());
    if let Some(folder) = &options.references {
        add(&mut report, on_kernels(device, || models::check(device, folder)));
    }
    add(&mut report, on_kernels(device, || large::check(device, options.shrink)));
    add(&mut report, pool::check(device));
    let blas = parity::run_blas(device, &[0]);
    let blas = blas.iter().map(Row::of_outcome).map(|row| Row { part: "cublaslt", ..row });
    add(&mut report, blas.collect());
    if !options.correctness_only {
        for part in times::PARTS {
            let rows =
                on_kernels(device, || part(device, Path::new(&options.scratch), options.shrink));
            add(&mut report, rows);
        }
    }
    if on_kernels(device, || has_hopper(device)) {
        let rows = parity::run_hopper(device, &[0]);
        let rows: Vec<Row> = rows.iter().map(Row::of_outcome).collect();
        let right = rows.iter().all(Row::passed);
        add(&mut report, rows.into_iter().map(|row| Row { part: "hopper", ..row }).collect());
        if right && !options.correctness_only {
            use_hopper(true);
            let rows = on_kernels(device, || times::attentions(device, "hopper", options.shrink));
            use_hopper(false);
            add(&mut report, rows);
        }
    }
    Ok(report)
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
