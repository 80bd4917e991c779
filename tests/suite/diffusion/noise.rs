//! Noise equals what torch draws.

use std::collections::BTreeMap;

use pentimento::diffusion::noise::{CpuGenerator, CudaGenerator, CudaGrid, NoiseSource};

use super::{tensors, vector};
use crate::common::{Tolerance, assert_close};

#[test]
fn noise_equals_torch_on_the_cpu() {
    let mut cases = 0;
    for (name, expected) in BTreeMap::from_iter(tensors("noise.safetensors")) {
        let Some(rest) = name.strip_prefix("seed.") else { continue };
        let (seed, count) = rest.split_once('.').unwrap();
        let drawn = NoiseSource::Cpu.standard_normal(seed.parse().unwrap(), count.parse().unwrap());
        assert_close(&name, &vector(&drawn), &expected, Tolerance::Absolute(1e-6));
        cases += 1;
    }
    assert_eq!(cases, 44 + 16);
}

#[test]
fn one_generator_keeps_the_odd_number_between_calls() {
    let expected = tensors("noise.safetensors");
    let mut generator = CpuGenerator::new(77);
    for (i, count) in [3, 20, 2, 1, 33].into_iter().enumerate() {
        let drawn = generator.standard_normal(count);
        let name = format!("calls.{i}");
        assert_close(&name, &vector(&drawn), &expected[&name], Tolerance::Absolute(1e-6));
    }
    assert!(generator.standard_normal(0).is_empty());
}

/// Published numbers: the docstring of AUTOMATIC1111's `modules/rng_philox.py` (seed 0), and what
/// torch printed on NVIDIA devices in
/// <https://github.com/pytorch/pytorch/issues/79496> (seed 10) and
/// <https://github.com/pytorch/pytorch/issues/158398> (seed 42).
#[test]
fn noise_equals_torch_on_cuda() {
    let draw = |seed, count| CudaGenerator::new(seed, CudaGrid::UNLIMITED).standard_normal(count);
    let imitated = [
        -0.924_662_6,
        -0.425_344_15,
        -2.643_845_7,
        0.145_183_88,
        -0.120_866_47,
        -0.579_725_6,
        -0.622_851_2,
        -0.328_387_1,
        -1.074_542_3,
        -0.363_144_07,
        -1.671_050_7,
        2.265_505,
    ];
    let tolerance = Tolerance::Absolute(1e-6);
    assert_close("seed 0", &vector(&draw(0, 12)), &vector(&imitated), tolerance);
    let printed = Tolerance::Absolute(6e-5); // four digits
    assert_close("seed 10", &vector(&draw(10, 3)), &vector(&[-0.1029, 1.6810, -0.2708]), printed);
    // A tensor of 64 × 2048 on a device with 28 multiprocessors of 1536 threads.
    let grid = CudaGrid::of_device(28, 1536);
    let rows = NoiseSource::Cuda(grid).standard_normal(42, 64 * 2048);
    let check = |start: usize, numbers: [f32; 3]| {
        let found = &rows[start..start + 3];
        assert_close("seed 42", &vector(found), &vector(&numbers), printed);
    };
    check(0, [0.1940, 2.1614, -0.1721]);
    check(2048, [-0.4574, 0.8063, 0.1580]);
    check(61 * 2048, [-0.4861, 0.3358, 1.0578]);
    check(62 * 2048, [0.7881, 0.8339, -1.1424]);
    check(64 * 2048 - 3, [-0.4841, 1.2850, -0.0282]);
}
