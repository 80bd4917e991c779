//! The CUDA kernels, in the emulation and on a device where there is one.

use candle_core::Device;
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

#[cfg(feature = "cuda")]
#[test]
fn kernels_follow_the_rule_on_a_device() {
    if let Ok(device) = Device::new_cuda(0) {
        require(&parity::run(&device, &[0]));
    }
}
