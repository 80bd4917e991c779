//! That the emulation finds accesses to memory which nothing orders, in kernels that have such faults on purpose.

use candle_core::{DType, Device, Result};

use super::{
    emulated,
    ffi::{self, Output},
    launch::{Args, Launch},
};

/// A seed: accesses are watched in random orders.
const ORDER: u32 = 77;

/// What comes of two blocks, or of two starts where the second is early.
fn run(kernel: &str, faulty: bool) -> Result<()> {
    let mut to = Output::new(&Device::Cpu, &[64], DType::F32)?;
    to.write(&[0_u32; 64])?;
    let mut args = Args::default();
    args.address(to.address()).flag(faulty);
    let blocks = if kernel == "fault_of_blocks" || kernel == "fault_of_fence" { 2 } else { 1 };
    let launch = Launch {
        kernel: kernel.to_owned(),
        grid: [blocks, 1, 1],
        threads: 64,
        shared_bytes: 2048,
        args,
    };
    emulated(ORDER, || {
        ffi::launch(&Device::Cpu, &launch)?;
        if kernel == "fault_of_early_start" {
            ffi::launch_early(&Device::Cpu, &launch)?;
        }
        Ok(())
    })
}

#[test]
fn accesses_that_nothing_orders_are_found() {
    for kernel in [
        "fault_of_block_barrier",
        "fault_of_warp_barrier",
        "fault_of_reuse",
        "fault_of_named_barrier",
        "fault_of_blocks",
        "fault_of_fence",
        "fault_of_publishing",
        "fault_of_early_start",
    ] {
        run(kernel, false).unwrap_or_else(|error| panic!("{kernel}: {error}"));
        let Err(error) = run(kernel, true) else { panic!("{kernel}: its fault was not found") };
        assert!(error.to_string().contains("nothing orders the two"), "{kernel}: {error}");
    }
}
