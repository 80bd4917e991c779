//! That the emulation finds accesses to memory which nothing orders, in kernels that have such faults on purpose.

use candle_core::{DType, Device, Result};

use super::{
    emulated,
    ffi::{self, Output},
    launch::{Args, Launch},
};

/// A seed: accesses are watched in random orders.
const ORDER: u32 = 77;

/// A kernel, its blocks, and whether it is started once more, early.
type Fault = (&'static str, usize, bool);

const FAULTS: [Fault; 8] = [
    ("fault_of_block_barrier", 1, false),
    ("fault_of_warp_barrier", 1, false),
    ("fault_of_reuse", 1, false),
    ("fault_of_named_barrier", 1, false),
    ("fault_of_blocks", 2, false),
    ("fault_of_fence", 2, false),
    ("fault_of_publishing", 1, false),
    ("fault_of_early_start", 1, true),
];

fn run((kernel, blocks, again): Fault, faulty: bool) -> Result<()> {
    let mut to = Output::new(&Device::Cpu, &[64], DType::F32)?;
    to.write(&[0_u32; 64])?;
    let mut args = Args::default();
    args.address(to.address()).flag(faulty);
    let launch = Launch {
        kernel: kernel.to_owned(),
        grid: [blocks, 1, 1],
        threads: 64,
        shared_bytes: 2048,
        args,
    };
    emulated(ORDER, || {
        ffi::launch(&Device::Cpu, &launch)?;
        if again {
            ffi::launch_early(&Device::Cpu, &launch)?;
        }
        Ok(())
    })
}

#[test]
fn accesses_that_nothing_orders_are_found() {
    for fault in FAULTS {
        let kernel = fault.0;
        run(fault, false).unwrap_or_else(|error| panic!("{kernel}: {error}"));
        let Err(error) = run(fault, true) else { panic!("{kernel}: its fault was not found") };
        assert!(error.to_string().contains("nothing orders the two"), "{kernel}: {error}");
    }
}
