//! Times at the published dimensions: single operations, then the transformer with all its layers.
//!
//! `benches/peer_gpu.py` times the same operations in PyTorch; names and sizes agree.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};

use super::{
    Options, Part, autoencoder, host, language, on_kernels, recorded,
    report::{Finding, Row},
    weights::{self, Dimensions, Matrices},
};
use crate::{
    diffusion::{
        Conditioning, Grid, Transformer,
        qwen_image::{ModelInput, Outputs},
    },
    error::Result,
    ops::{
        self, Conv2dShape, JointShape, JointStream, Mask, NormedConv2d, PackedConv2d, PackedLinear,
        Padding, Picture, Sinusoids,
        cuda::{Format, StoredMatrix, has_hopper, use_blas_lt, with_hopper},
    },
    progress::CancelToken,
    weights::{ModelFiles, Precision, Storage},
};

/// In this order.
pub(super) const PARTS: &[Part] = &[
    timed("time of attention", |device, options| operations(device, options.shrink)),
    timed("time of hopper", |device, options| attentions(device, "hopper", options.shrink)),
    timed("time of rows", |device, options| elementwise(device, options.shrink)),
    timed("time of products", |device, options| products(device, options.shrink)),
    timed("time of epilogues", |device, options| epilogues(device, options.shrink)),
    timed("time of the transformer in bf16", |device, options| {
        transformer(device, options, (Matrices::Bf16, Storage::Compute, false), "Compute")
    }),
    timed("time of the transformer in Q8_0", |device, options| {
        transformer(device, options, (Matrices::Bf16, Storage::Q8_0, false), "Q8_0")
    }),
    timed("time of the transformer in Q4_K", |device, options| {
        transformer(device, options, (Matrices::Bf16, Storage::Q4K, false), "Q4K")
    }),
    timed("time of the transformer in fp8", |device, options| {
        let kept = |products| (Matrices::Float8, Storage::Compute, products);
        let mut rows = transformer(device, options, kept(false), "fp8 widened");
        rows.extend(transformer(device, options, kept(true), "fp8"));
        rows
    }),
    timed("time of the autoencoder", |device, options| {
        autoencoder::times(device, &options.scratch, options.shrink)
    }),
    timed("time of the host", host::steps),
    timed("a token of the host", |device, _| on_kernels(device, || language::of_the_host(device))),
    timed("time of recorded steps", recorded::large),
    timed("time of the language model", |device, options| {
        on_kernels(device, || language::times(device, options.shrink))
    }),
];

const fn timed(name: &'static str, work: fn(&Device, &Options) -> Vec<Row>) -> Part {
    Part { name, timed: true, limit_s: 90, work }
}

/// How long work is repeated before it is timed.
const WARM_UP: Duration = Duration::from_millis(60);
/// Layers whose kernels fit a device's queue.
const HOST_LAYERS: usize = 12;
/// A 1024 × 1024 picture with one reference, and a long request.
const IMAGE_TOKENS: usize = 8192;
const TEXT_TOKENS: usize = 512;

pub(super) struct Timer<'a> {
    pub(super) device: &'a Device,
    part: &'static str,
    runs: usize,
    pub(super) rows: Vec<Row>,
}

impl Timer<'_> {
    /// Times `work`, which does `amount` of `unit` a second at the rate that is reported.
    pub(super) fn time(
        &mut self,
        name: String,
        (amount, unit): (f64, &'static str),
        work: impl Fn() -> Result<()>,
    ) {
        let finding = match self.median(&work) {
            Ok(seconds) => Finding::Timed { seconds, rate: amount / seconds, unit: unit.into() },
            Err(error) => Finding::failed(&error),
        };
        self.rows.push(Row { part: self.part.into(), name, finding });
    }

    /// Times how long the host takes to queue `work`, whatever the device takes afterwards.
    fn time_host(&mut self, name: String, work: impl Fn() -> Result<()>) {
        let finding = match self.medians(&work) {
            Ok([seconds, _]) => Finding::Timed { seconds, rate: 1.0 / seconds, unit: "1/s".into() },
            Err(error) => Finding::failed(&error),
        };
        self.rows.push(Row { part: self.part.into(), name, finding });
    }

    fn median(&self, work: &impl Fn() -> Result<()>) -> Result<f64> {
        self.medians(work).map(|[_, seconds]| seconds)
    }

    /// Seconds until `work` is queued, and until it is done.
    fn medians(&self, work: &impl Fn() -> Result<()>) -> Result<[f64; 2]> {
        // A GPU that was idle needs a while to reach its clocks.
        let begin = Instant::now();
        while {
            work()?;
            self.device.synchronize()?;
            self.device.is_cuda() && begin.elapsed() < WARM_UP
        } {}
        let mut seconds = [Vec::with_capacity(self.runs), Vec::with_capacity(self.runs)];
        for _ in 0..self.runs {
            let start = Instant::now();
            work()?;
            seconds[0].push(start.elapsed().as_secs_f64());
            self.device.synchronize()?;
            seconds[1].push(start.elapsed().as_secs_f64());
        }
        Ok(seconds.map(|mut seconds| {
            seconds.sort_by(f64::total_cmp);
            seconds.get(seconds.len() >> 1).copied().unwrap_or(f64::NAN)
        }))
    }
}

#[expect(clippy::cast_precision_loss, reason = "an amount of work")]
fn amount(factors: &[usize]) -> f64 {
    factors.iter().map(|factor| *factor as f64).product()
}

fn random(device: &Device, dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::randn(0.0_f32, 1.0, dims, device)?.to_dtype(DType::BF16)?)
}

/// Rows of what could not even be prepared.
fn or_failed(part: &'static str, rows: Result<Vec<Row>>) -> Vec<Row> {
    rows.unwrap_or_else(|error| {
        let finding = Finding::failed(&error);
        vec![Row { part: part.into(), name: "preparation".to_owned(), finding }]
    })
}

/// Keeps a GPU busy until its clocks are up, which a process that has just begun to use it waits for.
fn wake(device: &Device) -> Result<()> {
    const BUSY: Duration = Duration::from_millis(400);
    let begin = Instant::now();
    while device.is_cuda() && begin.elapsed() < BUSY {
        let x = random(device, &[2048, 2048])?;
        for _ in 0..16 {
            x.matmul(&x)?;
        }
        device.synchronize()?;
    }
    Ok(())
}

/// `work` on kernels, with a timer of so many runs.
pub(super) fn taken(
    device: &Device,
    part: &'static str,
    runs: usize,
    work: impl FnOnce(&mut Timer<'_>) -> Result<()> + Send,
) -> Vec<Row> {
    on_kernels(device, || {
        let mut timer = Timer { device, part, runs, rows: Vec::new() };
        let done = wake(device).and_then(|()| work(&mut timer));
        or_failed(part, done.map(|()| timer.rows))
    })
}

fn operations(device: &Device, shrink: usize) -> Vec<Row> {
    let runs = 20_usize.div_ceil(shrink);
    with_hopper(false, || {
        taken(device, "operations", runs, |timer| {
            joint(timer, shrink).and_then(|()| causal(timer, shrink))
        })
    })
}

fn elementwise(device: &Device, shrink: usize) -> Vec<Row> {
    taken(device, "operations", 20_usize.div_ceil(shrink), |timer| {
        rows(timer, shrink).and_then(|()| latents(timer, shrink))
    })
}

/// The times of attention with Hopper's own instructions.
fn attentions(device: &Device, part: &'static str, shrink: usize) -> Vec<Row> {
    if !on_kernels(device, || has_hopper(device)) {
        return Vec::new();
    }
    let runs = 20_usize.div_ceil(shrink);
    with_hopper(true, || {
        taken(device, part, runs, |timer| joint(timer, shrink).and_then(|()| causal(timer, shrink)))
    })
}

fn joint(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    let device = timer.device;
    let small = |n: usize| n.div_ceil(shrink);
    let (heads, d) = (small(24), 128);
    for (image, batch) in [(IMAGE_TOKENS, 1), (IMAGE_TOKENS, 2), (2 * IMAGE_TOKENS, 1)] {
        let (image, text) = (small(image), small(TEXT_TOKENS));
        let rows = |n: usize| random(device, &[batch, n, heads, d]);
        let ones = Tensor::ones(d, DType::BF16, device)?;
        let angles = |n: usize| Tensor::ones((n, d >> 1), DType::F32, device);
        let text_rows = [rows(text)?, rows(text)?, rows(text)?];
        let image_rows = [rows(image)?, rows(image)?, rows(image)?];
        let (text_angles, image_angles) = (angles(text)?, angles(image)?);
        let stream = |[query, key, value]: &'_ [Tensor; 3], angles: &'_ Tensor| -> [Tensor; 4] {
            [query.clone(), key.clone(), value.clone(), angles.clone()]
        };
        let (t, i) = (stream(&text_rows, &text_angles), stream(&image_rows, &image_angles));
        let shape = JointShape { scale: 0.088, eps: 1e-6, text_lengths: None };
        let n = text + image;
        let work = amount(&[4, batch, heads, n, n, d]) / 1e12;
        timer.time(
            format!("joint attention, {n} tokens, batch {batch}"),
            (work, "TFLOP/s"),
            || {
                ops::joint_attention(&as_stream(&t, &ones), &as_stream(&i, &ones), shape)?;
                Ok(())
            },
        );
    }
    Ok(())
}

/// The language model of 7B: 28 heads over 4.
fn causal(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    let device = timer.device;
    let small = |n: usize| n.div_ceil(shrink);
    let d = 128;
    for (n, m) in [(small(1500), small(1500)), (1, small(1500)), (1, small(8000))] {
        let (q, k) = (random(device, &[1, n, 28, d])?, random(device, &[1, m, 4, d])?);
        let mask = Mask::Causal { offset: m - n };
        let work = if n > 1 {
            (amount(&[2, 28, n, m, d]) / 1e12, "TFLOP/s")
        } else {
            (amount(&[2, m, 4, d, 2]) / 1e9, "GB/s")
        };
        timer.time(format!("causal attention, {n} of {m} tokens"), work, || {
            ops::attention(&q, &k, &k, 0.088, mask)?;
            Ok(())
        });
    }
    Ok(())
}

fn as_stream<'a>(
    [query, key, value, angles]: &'a [Tensor; 4],
    norm: &'a Tensor,
) -> JointStream<'a> {
    JointStream {
        query: Some(query),
        key,
        value,
        norm_query: norm,
        norm_key: norm,
        cos: angles,
        sin: angles,
    }
}

fn rows(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    const EPS: f64 = 1e-6;
    let device = timer.device;
    let n = IMAGE_TOKENS.div_ceil(shrink);
    let dim = 3072_usize.div_ceil(8 * shrink) * 8;
    let (x, y) = (random(device, &[1, n, dim])?, random(device, &[1, n, dim])?);
    let wide = random(device, &[1, n, 4 * dim])?;
    let (gate, shift) = (random(device, &[1, 1, dim])?, random(device, &[1, 1, dim])?);
    let bytes = |passes: usize| (amount(&[passes, n, dim, 2]) / 1e9, "GB/s");
    timer.time(format!("modulated norm, {n} rows"), bytes(2), || {
        ops::modulated_layer_norm(&x, &gate, &shift, EPS)?;
        Ok(())
    });
    timer.time(format!("gated add, {n} rows"), bytes(3), || {
        ops::gated_add(&x, &y, &gate)?;
        Ok(())
    });
    timer.time(format!("gated add and norm, {n} rows"), bytes(4), || {
        ops::gated_add_norm(&x, &y, &gate, [&gate, &shift], EPS)?;
        Ok(())
    });
    timer.time(format!("gelu, {n} rows of four times the width"), bytes(8), || {
        ops::gelu_tanh(&wide)?;
        Ok(())
    });
    pictures(timer, shrink)
}

/// What the autoencoder does at its largest sides.
fn pictures(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    let device = timer.device;
    let shape = Conv2dShape { stride: 1, padding: Padding::all(1) };
    for (channels, side) in [(96, 1024), (192, 512)] {
        let side = usize::div_ceil(side, shrink);
        let picture = Picture::new(random(device, &[1, channels, side, side])?)?;
        let conv = random(device, &[channels, channels, 3, 3])?;
        let conv = PackedConv2d::new(&conv, None, shape)?;
        let gamma = random(device, &[channels])?;
        let normed = NormedConv2d::new(conv.clone(), gamma.clone())?;
        let work = (amount(&[2, side, side, channels, channels, 9]) / 1e12, "TFLOP/s");
        let name = format!("convolution 3 × 3, {channels} channels, side {side}");
        timer.time(name.clone(), work, || {
            conv.apply(&picture)?;
            Ok(())
        });
        timer.time(format!("{name}, with norm and silu"), work, || {
            normed.apply(picture.clone())?;
            Ok(())
        });
        timer.time(format!("{name}, norm and silu after it"), work, || {
            conv.apply(&picture)?.rms_norm_silu(&gamma)?;
            Ok(())
        });
        let work = (amount(&[2, side, side, channels, 2]) / 1e9, "GB/s");
        let name = format!("channel norm and silu, {channels} channels, side {side}");
        timer.time(name, work, || {
            picture.rms_norm_silu(&gamma)?;
            Ok(())
        });
    }
    Ok(())
}

/// What stands at the ends of the transformer: once an edit or once a schedule.
fn latents(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    const CHANNELS: usize = 16;
    const STEPS: usize = 50;
    let device = timer.device;
    let side = 64_usize.div_ceil(shrink);
    let x = Tensor::randn(0.0_f32, 1.0, (1, CHANNELS, 2 * side, 2 * side), device)?;
    let work = (amount(&[2, CHANNELS, 4, side, side, 4]) / 1e9, "GB/s");
    timer.time(format!("pack patches, {side} × {side} tokens in f32"), work, || {
        ops::pack_patches(&x)?;
        Ok(())
    });
    let tokens = ops::pack_patches(&x)?.to_dtype(DType::BF16)?;
    let work = (work.0 / 2.0, work.1);
    timer.time(format!("unpack patches, {side} × {side} tokens in bf16"), work, || {
        ops::unpack_patches(&tokens, (side, side))?;
        Ok(())
    });
    let times = Tensor::ones(STEPS, DType::F32, device)?;
    let shape = Sinusoids {
        width: 256,
        flip_sin_to_cos: true,
        downscale_freq_shift: 0.0,
        scale: 1000.0,
        max_period: 1e4,
    };
    let work = (amount(&[STEPS, shape.width]) / 1e9, "G numbers/s");
    timer.time(format!("timestep embedding, {STEPS} steps"), work, || {
        ops::timestep_embedding(&times, shape, DType::BF16)?;
        Ok(())
    });
    Ok(())
}

fn products(device: &Device, shrink: usize) -> Vec<Row> {
    taken(device, "products", 20_usize.div_ceil(shrink), |timer| all_products(timer, shrink))
}

fn all_products(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    let device = timer.device;
    let small = |n: usize| n.div_ceil(256 * shrink) * 256;
    for [rows, depth, outs] in [
        [small(IMAGE_TOKENS), small(3072), small(3072)],
        [small(IMAGE_TOKENS), small(3072), small(12_288)],
        [1, small(3584), small(18_944)],
    ] {
        let x = random(device, &[rows, depth])?;
        let weight = random(device, &[outs, depth])?;
        let size = format!("{rows} rows, {depth} to {outs}");
        let work = |bytes_a_weight: f64| match rows {
            1 => (amount(&[depth, outs]) * bytes_a_weight / 1e9, "GB/s"),
            _ => (amount(&[2, rows, depth, outs]) / 1e12, "TFLOP/s"),
        };
        let plain = PackedLinear::new(ops::LinearWeight::Dense(weight.clone()), None)?;
        for (name, on) in [("the library", false), ("cuBLASLt", true)] {
            use_blas_lt(on);
            timer.time(format!("product bf16 of {name}, {size}"), work(2.0), || {
                plain.forward(&x)?;
                Ok(())
            });
        }
        for (format, dtype, bytes) in [
            (Format::Q8_0, GgmlDType::Q8_0, 34.0 / 32.0),
            (Format::Q4K, GgmlDType::Q4K, 144.0 / 256.0),
        ] {
            let kept = ops::LinearWeight::quantized(&weight, dtype)?;
            let layer = PackedLinear::new(kept, None)?;
            timer.time(format!("product {format:?}, {size}"), work(bytes), || {
                layer.forward(&x)?;
                Ok(())
            });
        }
        for (format, bytes) in [(Format::F8E4M3, 1), (Format::Bf16, 2)] {
            let blocks = Tensor::ones(depth * outs * bytes, DType::U8, device)?;
            let matrix = StoredMatrix::new(blocks, format, (outs, depth), 1.0)?;
            timer.time(format!("product {format:?}, {size}"), work(amount(&[bytes])), || {
                matrix.forward(&x, None)?;
                Ok(())
            });
        }
    }
    Ok(())
}

/// Products with what follows them, in one and in several.
fn epilogues(device: &Device, shrink: usize) -> Vec<Row> {
    let runs = 20_usize.div_ceil(shrink);
    let rows = taken(device, "epilogues", runs, |timer| all_epilogues(timer, shrink));
    use_blas_lt(true);
    rows
}

fn all_epilogues(timer: &mut Timer<'_>, shrink: usize) -> Result<()> {
    let device = timer.device;
    let small = |n: usize| n.div_ceil(256 * shrink) * 256;
    let [rows, depth, outs] = [small(IMAGE_TOKENS), small(3072), small(12_288)];
    let (x, bias) = (random(device, &[rows, depth])?, random(device, &[outs])?);
    let weight = ops::LinearWeight::Dense(random(device, &[outs, depth])?);
    let plain = PackedLinear::new(weight, Some(bias.clone()))?;
    let blocks = Tensor::ones(depth * outs, DType::U8, device)?;
    let stored = StoredMatrix::new(blocks, Format::F8E4M3, (outs, depth), 1.0)?;
    let widened = PackedLinear::stored(stored.clone(), Some(bias.clone()));
    let float8 = PackedLinear::stored(stored.clone().with_float8_products()?, Some(bias));
    let work = (amount(&[2, rows, depth, outs]) / 1e12, "TFLOP/s");
    let size = format!("{rows} rows, {depth} to {outs}, bias and GELU");
    for (name, on) in [("bf16 of the library", false), ("bf16 of cuBLASLt", true)] {
        use_blas_lt(on);
        timer.time(format!("{name}, {size}"), work, || {
            plain.forward_gelu_tanh(&x)?;
            Ok(())
        });
    }
    for (name, layer) in [("fp8 widened", widened), ("fp8 of cuBLASLt", float8)] {
        timer.time(format!("{name}, {size}"), work, || {
            layer.forward_gelu_tanh(&x)?;
            Ok(())
        });
    }
    let bytes = (amount(&[3, outs, depth]) / 1e9, "GB/s");
    timer.time(format!("fp8 to bf16, {outs} rows of {depth}"), bytes, || {
        stored.widened(0..outs)?;
        Ok(())
    });
    for depth in [depth, outs] {
        let x = random(device, &[rows, depth])?;
        let bytes = (amount(&[3, rows, depth]) / 1e9, "GB/s");
        timer.time(format!("fp8 rows, {rows} rows of {depth}"), bytes, || {
            ops::float8_rows(&x)?;
            Ok(())
        });
    }
    Ok(())
}

fn transformer(
    device: &Device,
    options: &Options,
    (matrices, storage, float8_products): (Matrices, Storage, bool),
    kept: &str,
) -> Vec<Row> {
    let Options { scratch, shrink, .. } = options;
    let dims = Dimensions::new(*shrink);
    let (part, runs) = ("transformer", 3_usize.div_ceil(*shrink));
    let folder = scratch.join(format!("{matrices:?}"));
    taken(device, part, runs, |timer| {
        weights::write(&folder, device, dims, matrices, false)?;
        let precision = Precision {
            device: device.clone(),
            compute: DType::BF16,
            storage,
            float8_products,
            ..Precision::reference()
        };
        forward(timer, &folder, (dims, &precision, kept), *shrink)
    })
}

/// One forward pass over a 1024 × 1024 picture and its reference. All blocks share the weights of one,
/// which are too large for a cache, so that times are those of as many blocks.
fn forward(
    timer: &mut Timer<'_>,
    folder: &Path,
    (dims, precision, kept): (Dimensions, &Precision, &str),
    shrink: usize,
) -> Result<()> {
    let device = timer.device;
    let files = ModelFiles::Folder(folder.to_owned());
    let model = Transformer::load(&files, precision)?.repeated(dims.layers);
    let side = 64_usize.div_ceil(shrink);
    let grid = Grid { height: side, width: side };
    let text = TEXT_TOKENS.div_ceil(shrink);
    let tokens = Tensor::randn(0.0_f32, 1.0, (1, 2 * side * side, dims.latent), device)?;
    let hidden_states = Tensor::randn(0.0_f32, 1.0, (1, text, dims.conditioning), device)?;
    let conditioning = Conditioning { hidden_states };
    let cancel = CancelToken::new();
    let contexts = model.contexts(&[0.5], &cancel)?;
    let Some(context) = contexts.first() else { return Ok(()) };
    let name = format!("{} layers, {} tokens, {kept}", dims.layers, 2 * side * side + text);
    let step = |model: &Transformer| {
        let input =
            ModelInput { tokens: &tokens, grids: &[grid, grid], conditioning: &conditioning };
        model.forward(&input, context, Outputs::Target, &cancel)?;
        Ok(())
    };
    timer.time(name, (1.0, "steps/s"), || step(&model));
    // Few enough layers that a device's queue does not fill up and hold the host back.
    let layers = HOST_LAYERS.min(dims.layers);
    let model = model.repeated(layers);
    timer.time_host(format!("the host's part of {layers} layers, {kept}"), || step(&model));
    Ok(())
}
