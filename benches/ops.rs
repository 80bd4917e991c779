//! Each operation at the published dimensions, and the machine's limit to compare with.
//!
//! `cargo bench --bench ops [-- FILTER]`; criterion's throughput is operations (or bytes) a second.
#![expect(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use pentimento::ops::{
    self, Conv2dShape, JointShape, JointStream, LinearWeight, Mask, PackedConv2d, PackedLinear,
    Padding,
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Tokens of a 512 × 512 picture, of one reference as large, and of a text.
const TOKENS: usize = 1024 + 1024 + 200;
const HIDDEN: usize = 3072;
const HEADS: usize = 24;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(3));
    group
}

/// Multiplications and additions of float32 in registers only, on all threads.
struct Peak(usize);

impl WithSimd for Peak {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat_f32s(1.0); 12];
        let (x, y) = (simd.splat_f32s(0.999), simd.splat_f32s(0.001));
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, x, y);
            }
        }
        sums.iter().map(|sum| simd.reduce_sum_f32s(*sum)).sum()
    }
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

fn peak(c: &mut Criterion) {
    const STEPS: usize = 2_000_000;
    let mut group = group(c, "limit");
    let threads = rayon::current_num_threads();
    let operations = threads * STEPS * 12 * Arch::new().dispatch(Lanes) * 2;
    group.throughput(Throughput::Elements(operations as u64));
    group.bench_function("float32 multiply-add", |b| {
        b.iter(|| {
            (0..threads).into_par_iter().map(|_| Arch::new().dispatch(Peak(STEPS))).sum::<f32>()
        });
    });
    group.finish();
}

fn attention(c: &mut Criterion) {
    let mut group = group(c, "attention");
    // Name, [queries, keys, heads, heads of keys, head], mask, scores computed.
    let windows: Vec<usize> = (0..=16).map(|i| 64 * i).collect();
    let cases: [(&str, [usize; 5], Mask<'_>, usize); 5] = [
        ("joint 2248", [TOKENS, TOKENS, HEADS, HEADS, 128], Mask::None, TOKENS * TOKENS),
        ("causal 1000", [1000, 1000, 28, 4, 128], Mask::Causal { offset: 0 }, 500_000),
        ("one of 2000", [1, 2000, 28, 4, 128], Mask::None, 2000),
        ("vision 1024", [1024, 1024, 16, 16, 80], Mask::None, 1024 * 1024),
        ("vision windows", [1024, 1024, 16, 16, 80], Mask::Segments(&windows), 1024 * 64),
    ];
    for (name, [n, m, h, h_kv, d], mask, scores) in cases {
        let (q, k) = (random(&[1, n, h, d]), random(&[1, m, h_kv, d]));
        group.throughput(Throughput::Elements((4 * scores * h * d) as u64));
        group.bench_function(name, |b| b.iter(|| ops::attention(&q, &k, &k, 0.09, mask).unwrap()));
    }
    group.finish();
}

/// One stream's tensors: queries, keys and values alike.
struct Stream {
    heads: Tensor,
    norm: Tensor,
    angles: Tensor,
}

impl Stream {
    fn new(tokens: usize) -> Self {
        let heads = random(&[1, tokens, HEADS, 128]);
        Self { heads, norm: random(&[128]), angles: random(&[tokens, 64]) }
    }

    fn joint(&self) -> JointStream<'_> {
        JointStream {
            query: Some(&self.heads),
            key: &self.heads,
            value: &self.heads,
            norm_query: &self.norm,
            norm_key: &self.norm,
            cos: &self.angles,
            sin: &self.angles,
        }
    }
}

fn joint_attention(c: &mut Criterion) {
    let mut group = group(c, "joint attention");
    let (text, image) = (Stream::new(200), Stream::new(TOKENS - 200));
    let shape = JointShape { scale: 0.09, eps: 1e-6, text_lengths: None };
    group.throughput(Throughput::Elements((4 * TOKENS * TOKENS * HEADS * 128) as u64));
    group.bench_function("f32", |b| {
        b.iter(|| ops::joint_attention(&text.joint(), &image.joint(), shape).unwrap());
    });
    group.bench_function("bf16", |b| {
        b.iter(|| ops::joint_attention_bf16(&text.joint(), &image.joint(), shape).unwrap());
    });
    group.finish();
}

fn linear(c: &mut Criterion) {
    let mut group = group(c, "linear");
    for [rows, width, out] in [
        [TOKENS, HIDDEN, HIDDEN],
        [TOKENS, HIDDEN, 4 * HIDDEN],
        [TOKENS, 4 * HIDDEN, HIDDEN],
        [1, 3584, 18_944],
    ] {
        let (x, weight) = (random(&[1, rows, width]), random(&[out, width]));
        group.throughput(Throughput::Elements((2 * rows * width * out) as u64));
        let bf16 = LinearWeight::Dense(weight.to_dtype(DType::BF16).unwrap());
        let kept = [
            ("f32", LinearWeight::Dense(weight.clone())),
            ("bf16", bf16),
            ("q8_0", LinearWeight::q8_0(&weight).unwrap()),
        ];
        for (name, weight) in kept {
            let layer = PackedLinear::new(weight, None).unwrap();
            group.bench_function(format!("{name} {rows}×{width}×{out}"), |b| {
                b.iter(|| layer.forward(&x).unwrap())
            });
        }
        let x = x.squeeze(0).unwrap();
        let transposed = weight.t().unwrap();
        group.bench_function(format!("candle f32 {rows}×{width}×{out}"), |b| {
            b.iter(|| x.matmul(&transposed).unwrap())
        });
    }
    group.finish();
}

fn conv(c: &mut Criterion) {
    let mut group = group(c, "conv2d");
    let halving = Padding { top: 0, bottom: 1, left: 0, right: 1 };
    // [channels in, channels out, side, kernel, stride]
    for [input, out, side, kernel, stride] in [
        [96, 96, 512, 3, 1],
        [192, 192, 256, 3, 1],
        [384, 384, 128, 3, 1],
        [384, 384, 64, 3, 1],
        [96, 96, 512, 3, 2],
        [384, 1152, 64, 1, 1],
        [3, 96, 512, 3, 1],
        [96, 3, 512, 3, 1],
    ] {
        let (x, weight, bias) = (
            random(&[1, input, side, side]),
            random(&[out, input, kernel, kernel]),
            random(&[out]),
        );
        let padding = match (kernel, stride) {
            (1, _) => Padding::default(),
            (_, 2) => halving,
            _ => Padding::all(1),
        };
        let layer =
            PackedConv2d::new(&weight, Some(&bias), Conv2dShape { stride, padding }).unwrap();
        let side_out = side.div_euclid(stride);
        group.throughput(Throughput::Elements(
            (2 * input * out * kernel * kernel * side_out * side_out) as u64,
        ));
        group.bench_function(
            format!("{kernel}×{kernel}/{stride} {input}→{out} at {side}"),
            |b| b.iter(|| layer.forward(&x).unwrap()),
        );
    }
    group.finish();
}

fn passes(c: &mut Criterion) {
    let mut group = group(c, "passes");
    let (x, wide) = (random(&[1, TOKENS, HIDDEN]), random(&[1, TOKENS, 4 * HIDDEN]));
    let (row, weight) = (random(&[1, 1, HIDDEN]), random(&[HIDDEN]));
    let bytes = |x: &Tensor, count: usize| Throughput::Bytes((4 * count * x.elem_count()) as u64);
    group.throughput(bytes(&x, 2));
    group.bench_function("modulated_layer_norm", |b| {
        b.iter(|| ops::modulated_layer_norm(&x, &row, &row, 1e-6).unwrap())
    });
    group.bench_function("rms_norm", |b| b.iter(|| ops::rms_norm(&x, &weight, 1e-6).unwrap()));
    let heads = x.reshape((1, TOKENS, HEADS, 128)).unwrap(); // (b, n, h, d)
    let angles = random(&[TOKENS, 64]);
    group.bench_function("rotate_pairs", |b| {
        b.iter(|| ops::rotate_pairs(&heads, &angles, &angles).unwrap())
    });
    group.throughput(bytes(&x, 3));
    group.bench_function("gated_add", |b| b.iter(|| ops::gated_add(&x, &x, &row).unwrap()));
    group.throughput(bytes(&wide, 2));
    group.bench_function("gelu_tanh", |b| b.iter(|| ops::gelu_tanh(&wide).unwrap()));
    group.bench_function("silu", |b| b.iter(|| ops::silu(&wide).unwrap()));
    let (picture, gamma) = (random(&[1, 96, 512, 512]), random(&[96]));
    group.throughput(bytes(&picture, 2));
    group.bench_function("channel_rms_norm_silu", |b| {
        b.iter(|| ops::channel_rms_norm_silu(&picture, &gamma).unwrap())
    });
    let small = random(&[1, 192, 256, 256]);
    group.throughput(bytes(&small, 5));
    group.bench_function("upsample_nearest_2x", |b| {
        b.iter(|| ops::upsample_nearest_2x(&small).unwrap())
    });
    group.finish();
}

criterion_group!(benches, peak, attention, joint_attention, linear, conv, passes);
criterion_main!(benches);
