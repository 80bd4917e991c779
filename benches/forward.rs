//! One of the two models at the published dimensions, a few times; `compare.sh` runs it in turn
//! with diffusers.
//!
//! `forward FOLDER transformer|autoencoder f32|bf16|q8_0 REPEATS` prints one line for each repeat
//! after a first, untimed one: `seconds,peak_bytes,checksum`.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark may panic")]
#![expect(clippy::integer_division, reason = "half of the tokens are the reference's")]
#![expect(clippy::print_stdout, reason = "numbers for compare.sh")]

use std::{path::Path, time::Instant};

use candle_core::{DType, Tensor};
use pentimento::{memory::peak_resident_bytes, weights::Storage};

mod published;

fn main() {
    // `cargo bench` without arguments only builds it.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [folder, what, kept, repeats] = arguments.as_slice() else { return };
    let storage = match kept.as_str() {
        "f32" => Storage::Compute,
        "bf16" => Storage::Plain(DType::BF16),
        "q8_0" => Storage::Q8_0,
        other => panic!("{other}: expected f32, bf16 or q8_0"),
    };
    let repeats: usize = repeats.parse().unwrap();
    match what.as_str() {
        "transformer" => report(repeats, published::transformer(Path::new(folder), storage)),
        "autoencoder" => report(repeats, published::autoencoder(Path::new(folder))),
        other => panic!("{other}: expected transformer or autoencoder"),
    }
}

fn report(repeats: usize, run: impl Fn() -> Tensor) {
    run();
    for _ in 0..repeats {
        let start = Instant::now();
        let out = run();
        let seconds = start.elapsed().as_secs_f64();
        let checksum: f32 = out.abs().unwrap().mean_all().unwrap().to_scalar().unwrap();
        println!("{seconds:.4},{},{checksum:.5}", peak_resident_bytes().unwrap_or(0));
    }
}
