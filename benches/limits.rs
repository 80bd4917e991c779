//! The limits of this machine: multiply-adds in registers and memory, on one and on all threads.
//!
//! `limits run` prints the best of some repeats, in thousand million operations (a multiplication and
//! an addition are two) or bytes a second. Instructions that the processor lacks are left out.
#![expect(clippy::print_stdout, reason = "numbers for a report")]
#![expect(clippy::cast_precision_loss, reason = "numbers for a report")]

use std::time::Instant;

use rayon::prelude::*;

const REPEATS: usize = 12;
const STEPS: u64 = 2_000_000;
/// Far more than the caches hold.
const FLOATS: usize = 64 << 20;

fn main() {
    // `cargo bench` without arguments only builds it.
    if !std::env::args().any(|argument| argument == "run") {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    for (name, operations, run) in x86::available() {
        let threads = rayon::current_num_threads();
        let one = best(|| run(STEPS));
        let all = best(|| (0..threads).into_par_iter().with_max_len(1).for_each(|_| run(STEPS)));
        let all_operations = operations * threads as f64;
        report(name, operations * STEPS as f64 / one, all_operations * STEPS as f64 / all);
    }
    let (from, mut to) = (vec![1.0_f32; FLOATS], vec![0.0_f32; FLOATS]);
    let bytes = size_of_val(from.as_slice()) as f64;
    let sum = |from: &[f32]| {
        let mut sums = [0.0; 64];
        for from in from.as_chunks::<64>().0 {
            sums.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
        std::hint::black_box(sums);
    };
    let one = best(|| sum(&from));
    let all = best(|| from.par_chunks(1 << 18).for_each(sum));
    report("bytes read", bytes / one, bytes / all);
    let one = best(|| to.copy_from_slice(&from));
    let all = best(|| {
        let pairs = to.par_chunks_mut(1 << 18).zip(from.par_chunks(1 << 18));
        pairs.for_each(|(to, from)| to.copy_from_slice(from));
    });
    report("bytes copied", bytes / one, bytes / all);
}

fn report(name: &str, one: f64, all: f64) {
    println!("{name}: {:.0} on one thread, {:.0} on all", one / 1e9, all / 1e9);
}

/// Seconds of the fastest repeat.
fn best(mut run: impl FnMut()) -> f64 {
    let seconds = (0..REPEATS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    /// Sixteen sums in registers, so that none waits for another.
    macro_rules! sixteen {
        ($name:ident, $instruction:literal) => {
            fn $name(steps: u64) {
                #[expect(unsafe_code, reason = "the compiler would remove a product nobody reads")]
                // SAFETY: registers only, all of them named; `available` has found the instruction.
                unsafe {
                    asm!(
                        "2:",
                        ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                        concat!($instruction, " zmm\\r, zmm30, zmm31"),
                        ".endr",
                        "dec {steps}",
                        "jnz 2b",
                        steps = inout(reg) steps => _,
                        out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                        out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                        out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                        out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                    );
                }
            }
        };
    }

    sixteen!(float32, "vfmadd231ps");
    sixteen!(bf16, "vdpbf16ps");
    sixteen!(int8, "vpdpbusd");

    /// Name, operations of a step, and the loop over steps.
    type Loop = (&'static str, f64, fn(u64));

    /// The loops that this processor can run.
    pub(super) fn available() -> Vec<Loop> {
        let mut found: Vec<Loop> = Vec::new();
        if is_x86_feature_detected!("avx512f") {
            found.push(("float32 multiply-add", 16.0 * 32.0, float32));
        }
        if is_x86_feature_detected!("avx512bf16") {
            found.push(("bf16 multiply-add", 16.0 * 64.0, bf16));
        }
        if is_x86_feature_detected!("avx512vnni") {
            found.push(("8-bit multiply-add", 16.0 * 128.0, int8));
        }
        found
    }
}
