//! One of the models at the published dimensions, a few times; `compare.sh` runs it in turn
//! with diffusers.
//!
//! `forward FOLDER transformer|encode|decode f32|bf16|q8_0|q4_k REPEATS` prints one line for each repeat
//! after a first, untimed one: `seconds,peak_bytes,checksum`. `forward FOLDER error TYPE 0` prints how
//! far the transformer's output is from that in float32.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark may panic")]
#![expect(clippy::integer_division, reason = "half of the tokens are the reference's")]
#![expect(clippy::print_stdout, reason = "numbers for compare.sh")]

use std::{path::Path, time::Instant};

use candle_core::{DType, Tensor};
use pentimento::{
    memory::peak_resident_bytes,
    weights::{AttentionType, Precision, Storage},
};

mod published;

fn main() {
    // `cargo bench` without arguments only builds it.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [folder, what, kept, repeats] = arguments.as_slice() else { return };
    let storage = match kept.as_str() {
        "f32" => Storage::Plain(DType::F32),
        "bf16" => Storage::Plain(DType::BF16),
        "q8_0" => Storage::Q8_0,
        "q4_k" => Storage::Q4K,
        other => panic!("{other}: expected f32, bf16, q8_0 or q4_k"),
    };
    let attention = AttentionType::LikeWeights;
    let precision = Precision { storage, attention, ..Precision::reference() };
    let repeats: usize = repeats.parse().unwrap();
    match what.as_str() {
        "transformer" => report(repeats, published::transformer(Path::new(folder), precision)),
        "encode" => report(repeats, published::encode(Path::new(folder))),
        "decode" => report(repeats, published::decode(Path::new(folder))),
        "error" => error(Path::new(folder), &precision),
        other => panic!("{other}: expected transformer, encode, decode or error"),
    }
}

/// Prints how far a forward pass is from float32, with attention in float32 and as it is by default.
fn error(folder: &Path, precision: &Precision) {
    let exact = published::transformer(folder, Precision::reference())();
    for attention in [AttentionType::Compute, AttentionType::LikeWeights] {
        let out = published::transformer(folder, Precision { attention, ..precision.clone() })();
        let square = |x: Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let error = (square((&out - &exact).unwrap()) / square(exact.clone())).sqrt();
        println!("attention {attention:?}: {error:.3e} of the output's root mean square");
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
