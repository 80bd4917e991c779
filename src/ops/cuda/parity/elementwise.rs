//! Norms, activations, rotation and the sampler's step against their definitions.

use candle_core::{DType, Result, Tensor};

use super::Suite;
use crate::ops::{self, ModulatedTokens, Sinusoids};

pub(super) fn check(suite: &mut Suite) {
    rows(suite);
    runs(suite);
    streams(suite);
    activations(suite);
    rotations(suite);
    channels(suite);
    steps(suite);
    timesteps(suite);
    patches(suite);
}

fn rows(suite: &mut Suite) {
    const EPS: f64 = 1e-6;
    for [b, n, dim] in [[3, 70, 8], [2, 5, 48], [1, 3, 3072], [2, 2, 3584]] {
        let name = format!("[{b}, {n}, {dim}]");
        let x = suite.random(&[b, n, dim]);
        let x = (x.affine(3.0, 0.7)).unwrap_or(x);
        let (y, weight) = (suite.random(&[b, n, dim]), suite.random(&[dim]));
        for wide in [&[][..], &[1]] {
            let case =
                format!("{name}, weight in {}", if wide.is_empty() { "bf16" } else { "f32" });
            suite.compare("rms norm", case, ([&x, &weight], wide), |[x, weight]| {
                let weight = if x.dtype().is_float() && wide.is_empty() {
                    weight.clone()
                } else {
                    weight.to_dtype(x.dtype())?
                };
                ops::rms_norm(x, &weight, EPS)
            });
        }
        suite.compare("layer norm", name.clone(), ([&x], &[]), |[x]| ops::layer_norm(x, EPS));
        for shared in [[b, 1, dim], [b, n, dim], [1, 1, dim]] {
            let [scale, shift, gate] = [0, 1, 2].map(|_| suite.random(&shared));
            let case = format!("{name} by {shared:?}");
            let inputs = ([&x, &scale, &shift], &[][..]);
            suite.compare("modulated norm", case.clone(), inputs, |[x, scale, shift]| {
                ops::modulated_layer_norm(x, scale, shift, EPS)
            });
            let inputs = ([&y, &x, &gate], &[][..]);
            suite.compare("gated add", case.clone(), inputs, |[y, x, gate]| {
                ops::gated_add(y, x, gate)
            });
            let inputs = ([&y, &x, &gate, &scale, &shift], &[][..]);
            suite.compare("gated add and norm", case, inputs, |[y, x, gate, scale, shift]| {
                let (sum, normed) = ops::gated_add_norm(y, x, gate, [scale, shift], EPS)?;
                Tensor::cat(&[sum, normed], 0)
            });
        }
    }
}

/// Runs of tokens with a modulation each.
fn runs(suite: &mut Suite) {
    const EPS: f64 = 1e-6;
    for ([b, n, dim], first) in [([1, 70, 48], 33), ([3, 9, 8], 4), ([2, 5, 3072], 0)] {
        let name = format!("[{b}, {n}, {dim}], {first} tokens in the first run");
        let [x, y] = [0, 1].map(|_| suite.random(&[b, n, dim]));
        let modulation = [0; 6].map(|_| suite.random(&[1, 1, dim]));
        let [a, b, c, d, e, f] = &modulation;
        let inputs = ([&x, a, b, c, d, e, f], &[][..]);
        suite.compare("modulated norm of runs", name.clone(), inputs, |[x, of @ ..]| {
            ops::modulated_layer_norm_each(x, &two_runs(of, [first, n]), EPS)
        });
        let inputs = ([&y, &x, a, b, c, d, e, f], &[][..]);
        suite.compare("gated add of runs", name.clone(), inputs, |[y, x, of @ ..]| {
            ops::gated_add_each(y, x, &two_runs(of, [first, n]))
        });
        suite.compare("gated add and norm of runs", name, inputs, |[y, x, of @ ..]| {
            let [a, b, c, d, e, f] = of;
            // The norm of the next half has numbers of its own.
            let (runs, next) = (two_runs(of, [first, n]), two_runs([d, e, f, b, c, a], [first, n]));
            let (sum, normed) = ops::gated_add_norm_each(y, x, [&runs, &next], EPS)?;
            Tensor::cat(&[sum, normed], 0)
        });
    }
}

/// Streams of other lengths at once: in the last case of more pieces than a start of a kernel takes.
fn streams(suite: &mut Suite) {
    const EPS: f64 = 1e-6;
    for ([b, dim], text, image) in [([1, 64], 5, 40), ([2, 3072], 3, 4), ([3, 24], 7, 90)] {
        let name = format!("{b} entries of {text} and {image} tokens, {dim} wide");
        let [x, y] = [0, 1].map(|_| suite.random(&[b, text, dim]));
        let [s, t] = [0, 1].map(|_| suite.random(&[b, image, dim]));
        let modulation = [0; 6].map(|_| suite.random(&[1, 1, dim]));
        let [one, two, three, four, five, six] = &modulation;
        let inputs = [&x, &y, &s, &t, one, two, three, four, five, six];
        // The text of two entries is one run.
        let first = if b == 2 { [text, 2] } else { [2, 2] };
        suite.compare("streams", name, (inputs, &[]), |[x, y, s, t, of @ ..]| {
            let [one, two, three, four, five, six] = of;
            let after = [four, five, six, two, three, one];
            let runs = [(0, text), (1, image)].map(|(i, n)| filled(&two_runs(of, [first[i], n])));
            let next =
                [(0, text), (1, image)].map(|(i, n)| filled(&two_runs(after, [first[i], n])));
            let normed = ops::modulated_layer_norm_streams([(x, &runs[0]), (s, &runs[1])], EPS)?;
            let [a, b] = [(y, x, &runs[0]), (t, s, &runs[1])]
                .map(|(residual, x, runs)| ops::GatedTokens { residual, x, runs });
            let sums = ops::gated_add_streams([a, b])?;
            let both = ops::gated_add_norm_streams([(a, &next[0]), (b, &next[1])], EPS)?;
            let both = both.into_iter().flat_map(<[Tensor; 2]>::from);
            let all = normed.into_iter().chain(sums).chain(both);
            // (b·n of all, dim)
            Tensor::cat(&all.map(|x| x.flatten_to(1)).collect::<Result<Vec<_>>>()?, 0)
        });
    }
}

/// The first tokens of `n` and the others, by scale, shift and gate each.
fn two_runs<'a>(of: [&'a Tensor; 6], [first, n]: [usize; 2]) -> [ModulatedTokens<'a>; 2] {
    let run = |tokens, i: usize| {
        let (scale, shift, gate) = (of[i], of[i + 1], of[i + 2]);
        ModulatedTokens { tokens, scale, shift, gate }
    };
    [run(first, 0), run(n - first, 3)]
}

/// The runs that have tokens.
fn filled<'a>(runs: &[ModulatedTokens<'a>]) -> Vec<ModulatedTokens<'a>> {
    runs.iter().filter(|run| run.tokens > 0).copied().collect()
}

fn activations(suite: &mut Suite) {
    for dims in [vec![1], vec![3, 37], vec![2, 5, 1040]] {
        let (x, up) = (suite.random(&dims), suite.random(&dims));
        let x = (x.affine(4.0, 0.0)).unwrap_or(x);
        let name = format!("{dims:?}");
        suite.compare("gelu tanh", name.clone(), ([&x], &[]), |[x]| ops::gelu_tanh(x));
        suite.compare("gelu erf", name.clone(), ([&x], &[]), |[x]| ops::gelu_erf(x));
        suite.compare("silu", name.clone(), ([&x], &[]), |[x]| ops::silu(x));
        suite.compare("swiglu", name, ([&x, &up], &[]), |[x, up]| ops::swiglu(x, up));
    }
}

fn rotations(suite: &mut Suite) {
    for [b, n, h, d] in [[1, 1, 1, 2], [2, 7, 3, 80], [1, 33, 4, 128]] {
        let x = suite.random(&[b, n, h, d]);
        let Ok([cos, sin]) = suite.angles(n, d >> 1) else { return };
        let name = format!("[{b}, {n}, {h}, {d}]");
        // The plain version computes in the type of its input, and wants angles of that type.
        suite.compare("rotate pairs", name.clone(), ([&x, &cos, &sin], &[]), |[x, cos, sin]| {
            ops::rotate_pairs(x, cos, sin)
        });
        suite.compare("rotate halves", name, ([&x, &cos, &sin], &[]), |[x, cos, sin]| {
            ops::rotate_halves(x, cos, sin)
        });
    }
}

fn channels(suite: &mut Suite) {
    for dims in [[1, 1, 1, 1], [2, 17, 5, 7], [1, 96, 9, 31]] {
        let (x, gamma) = (suite.random(&dims), suite.random(&dims[1..2]));
        let name = format!("{dims:?}");
        suite.compare("channel norm", name.clone(), ([&x, &gamma], &[]), |[x, gamma]| {
            ops::channel_rms_norm(x, gamma)
        });
        suite.compare("channel norm and silu", name, ([&x, &gamma], &[]), |[x, gamma]| {
            ops::channel_rms_norm_silu(x, gamma)
        });
    }
}

/// In float32: the plain version's error is that of float32, too.
fn steps(suite: &mut Suite) {
    for dims in [[1, 5, 64], [2, 3, 20]] {
        let [latents, positive, negative] = [0, 1, 2].map(|_| suite.random(&dims));
        for guided in [false, true] {
            let case = format!("{dims:?}, guided {guided}");
            let inputs = ([&latents, &positive, &negative], &[0, 1, 2][..]);
            suite.compare("guided step", case, inputs, |[latents, positive, negative]| {
                let negative = guided.then_some((negative, 4.0));
                ops::guided_step(latents, positive, negative, -0.13)
            });
        }
    }
}

/// Timesteps on a scale of 1, as the transformer sees them, and beyond.
fn timesteps(suite: &mut Suite) {
    let times: Vec<f32> = (0..37_u8).map(|i| f32::from(i) / 36.0).collect();
    let Ok(times) = Tensor::from_vec(times, 37, &candle_core::Device::Cpu) else { return };
    for (width, flip_sin_to_cos, downscale_freq_shift, scale) in
        [(256, true, 0.0, 1000.0), (6, false, 1.0, 1.0), (320, true, 0.5, 1.0)]
    {
        let shape =
            Sinusoids { width, flip_sin_to_cos, downscale_freq_shift, scale, max_period: 1e4 };
        let case = format!("{width} numbers, cosines first {flip_sin_to_cos}, scale {scale}");
        suite.compare("timestep embedding", case, ([&times], &[0]), |[times]| {
            let wide = times.dtype() == DType::F64;
            let dtype = if wide { DType::F64 } else { DType::BF16 };
            ops::timestep_embedding(times, shape, dtype)
        });
    }
}

/// Moved numbers are the same numbers.
fn patches(suite: &mut Suite) {
    for [b, c, height, width] in [[1, 1, 1, 1], [2, 3, 5, 7], [1, 16, 9, 32]] {
        let x = suite.random(&[b, c, 2 * height, 2 * width]);
        let tokens = suite.random(&[b, height * width, 4 * c]);
        for (dtype, wide) in [("bf16", &[][..]), ("f32", &[0])] {
            let name = format!("[{b}, {c}, 2 · {height}, 2 · {width}] in {dtype}");
            suite.compare("pack patches", name.clone(), ([&x], wide), |[x]| ops::pack_patches(x));
            suite.compare("unpack patches", name, ([&tokens], wide), |[tokens]| {
                ops::unpack_patches(tokens, (height, width))
            });
        }
    }
}
