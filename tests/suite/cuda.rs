//! The CUDA kernels, in the emulation and on a device where there is one.

#[cfg(feature = "cuda-emulation")]
use std::path::Path;

use candle_core::Device;
#[cfg(feature = "cuda-emulation")]
use pentimento::check::{self, Options};
use pentimento::{
    check::report::Row,
    ops::cuda::parity::{self, Outcome},
};

fn require(outcomes: &[Outcome]) {
    let rows = outcomes.iter().map(Row::of_outcome);
    let failed: Vec<String> = rows.filter(|row| !row.passed()).map(|row| row.line()).collect();
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), outcomes.len(), failed.join("\n"));
    assert!(outcomes.len() > 100, "only {} checks", outcomes.len());
}

#[cfg(feature = "cuda-emulation")]
#[test]
fn emulated_kernels_follow_the_rule_in_every_order_of_threads() {
    require(&parity::run(&Device::Cpu, &[0, 1, 77]));
}

/// Everything that `pentimento-gpu-check` does, small.
#[cfg(feature = "cuda-emulation")]
#[test]
fn the_check_of_a_gpu_passes_in_the_emulation() {
    let scratch = tempfile::tempdir().unwrap();
    let references = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference");
    let options = Options {
        references: Some(references),
        scratch: scratch.path().to_owned(),
        correctness_only: false,
        shrink: 100,
    };
    let mut lines = Vec::new();
    let report = check::run(&Device::Cpu, &options, &mut |row| lines.push(row.line())).unwrap();
    let failed: Vec<&String> = lines.iter().filter(|line| line.starts_with("FAIL")).collect();
    assert!(report.passed() && failed.is_empty(), "{failed:#?}");
    for part in ["parity", "models", "large", "memory", "operations", "products", "transformer"] {
        assert!(report.rows.iter().any(|row| row.part == part), "no {part}: {lines:#?}");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn kernels_follow_the_rule_on_a_device() {
    if let Ok(device) = Device::new_cuda(0) {
        require(&parity::run(&device, &[0]));
    }
}
