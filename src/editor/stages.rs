//! Times the stages of a request and tells the observer about them.

use std::time::{Duration, Instant};

use candle_core::Device;

use crate::{
    error::Result,
    memory,
    progress::{Event, Observer, Stage},
    request::StageReport,
};

/// Runs stages one after the other and keeps a report of each.
pub(super) struct Stages<'a> {
    observer: &'a dyn Observer,
    /// Where the stages compute.
    device: Device,
    reports: Vec<StageReport>,
}

impl<'a> Stages<'a> {
    pub(super) fn new(observer: &'a dyn Observer, device: &Device) -> Self {
        Self { observer, device: device.clone(), reports: Vec::new() }
    }

    /// Runs `work` as a stage that has no steps of its own.
    pub(super) fn run<T>(&mut self, stage: Stage, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.observer.event(&Event::Step { stage, step: 0, of: 1, elapsed: Duration::ZERO });
        self.run_steps(stage, work)
    }

    /// Runs `work` as a stage that tells of its own steps. What it leaves in the queue of a GPU is waited
    /// for, so that its time is its own.
    pub(super) fn run_steps<T>(
        &mut self,
        stage: Stage,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let start = Instant::now();
        let result = work()?;
        self.device.synchronize()?;
        let elapsed = start.elapsed();
        self.observer.event(&Event::StageDone { stage, elapsed });
        self.add(stage, elapsed);
        Ok(result)
    }

    /// Adds a stage that ran beside another one.
    pub(super) fn add(&mut self, stage: Stage, elapsed: Duration) {
        let peak_resident_bytes = memory::peak_resident_bytes();
        let device = memory::device_peak(&self.device);
        tracing::debug!(?stage, ?elapsed, ?peak_resident_bytes, ?device, "stage done");
        self.reports.push(StageReport { stage, elapsed, peak_resident_bytes, device });
    }

    pub(super) fn finish(self) -> Vec<StageReport> {
        self.reports
    }
}
