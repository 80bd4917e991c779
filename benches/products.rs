//! Products with a weight matrix in each stored type, and candle's to compare with.
//!
//! `products [FILTER]` prints for each type and shape the best and the median of some repeats in
//! thousand million operations a second; with `candle` as the second argument candle's too.
#![expect(clippy::unwrap_used, reason = "a benchmark may panic")]
#![expect(clippy::print_stdout, reason = "numbers for a report")]
#![expect(clippy::cast_precision_loss, reason = "numbers for a report")]

use std::time::{Duration, Instant};

use candle_core::{
    DType, Device, Module, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor},
};
use pentimento::ops::{LinearWeight, PackedLinear};

/// `[rows, width, out]`.
const SHAPES: [[usize; 3]; 5] = [
    [2248, 3072, 3072],
    [2248, 3072, 12_288],
    [2248, 12_288, 3072],
    [1, 3072, 12_288],
    [1, 12_288, 3072],
];
const BLOCKS: [GgmlDType; 10] = [
    GgmlDType::Q8_0,
    GgmlDType::Q6K,
    GgmlDType::Q5K,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q4K,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q3K,
    GgmlDType::Q2K,
];

fn main() {
    // `cargo bench` without arguments only builds it.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(filter) = arguments.first() else { return };
    for [rows, width, out] in SHAPES {
        let shape = format!("{rows}×{width}×{out}");
        if !filter.split(' ').any(|word| shape.contains(word)) && filter.contains('×') {
            continue;
        }
        let random = |dims: [usize; 2]| Tensor::randn(0_f32, 1.0, &dims, &Device::Cpu).unwrap();
        let (x, weight) = (random([rows, width]), random([out, width]));
        let operations = (2 * rows * width * out) as f64;
        let wanted = |name: &str| format!("{name} {rows}×{width}×{out}").contains(filter.as_str());
        for dtype in [DType::F32, DType::BF16] {
            let name = format!("{dtype:?}");
            if wanted(&name) {
                let weight = weight.to_dtype(dtype).unwrap();
                let layer = PackedLinear::new(LinearWeight::Dense(weight), None).unwrap();
                report(&format!("{name} {rows}×{width}×{out}"), operations, || {
                    layer.forward(&x).unwrap()
                });
            }
        }
        for dtype in BLOCKS.into_iter().filter(|dtype| wanted(&format!("{dtype:?}"))) {
            let name = format!("{dtype:?} {rows}×{width}×{out}");
            let blocks = std::sync::Arc::new(QTensor::quantize(&weight, dtype).unwrap());
            let layer = PackedLinear::new(LinearWeight::Quantized(blocks.clone()), None).unwrap();
            report(&name, operations, || layer.forward(&x).unwrap());
            if arguments.iter().any(|argument| argument == "candle") {
                let layer = QMatMul::from_arc(blocks).unwrap();
                report(&format!("{name} candle"), operations, || layer.forward(&x).unwrap());
            }
        }
    }
}

fn report(name: &str, operations: f64, run: impl Fn() -> Tensor) {
    const AT_LEAST: usize = 5;
    const AT_MOST: usize = 200;
    const TIME: Duration = Duration::from_secs(1);
    run();
    let begin = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < AT_LEAST || (seconds.len() < AT_MOST && begin.elapsed() < TIME) {
        let start = Instant::now();
        std::hint::black_box(run());
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let speed = |i: usize| operations / seconds[i] / 1e9;
    println!("{name}: best {:.0}, median {:.0}", speed(0), speed(seconds.len() >> 1));
}
