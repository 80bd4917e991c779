//! Convolutions and norms of pictures against their definitions, in both layouts.

use candle_core::{Result, Tensor, bail};

use super::Suite;
use crate::ops::{
    Conv2dShape, NormedConv2d, PackedConv2d, Padding, Picture, ResidualConv2d,
    cuda::{takes, with_hopper},
    picture::Layout,
};

/// A picture for kernels, where they run.
fn picture(x: &Tensor) -> Result<Picture> {
    let picture = Picture::new(x.clone())?;
    if takes(&[x]) && matches!(picture.0, Layout::Planes(_)) {
        bail!("kernels were left out for {:?}", x.dims());
    }
    Ok(picture)
}

/// A convolution by kernels, where they run and it is not larger than they take.
fn convolution(weight: &Tensor, bias: &Tensor, shape: Conv2dShape) -> Result<PackedConv2d> {
    let conv = PackedConv2d::new(weight, Some(bias), shape)?;
    if takes(&[weight]) && weight.dim(3)? <= 3 && conv.stored().is_none() {
        bail!("kernels were left out for {:?}", weight.dims());
    }
    Ok(conv)
}

pub(super) fn check(suite: &mut Suite) {
    layouts(suite);
    norms(suite);
    convolutions(suite);
    normed(suite);
    residuals(suite);
}

/// Moved numbers are the same numbers.
fn layouts(suite: &mut Suite) {
    for dims in [[1, 1, 1, 1], [2, 17, 5, 7], [1, 96, 9, 31]] {
        let x = suite.random(&dims);
        let case = format!("{dims:?}");
        suite.compare("picture there and back", case.clone(), ([&x], &[]), |[x]| {
            picture(x)?.into_planes()
        });
        suite.compare("tokens of a picture", case, ([&x], &[]), |[x]| {
            let picture = picture(x)?;
            let tokens = picture.clone().into_tokens()?;
            picture.add_tokens(&tokens)?.into_tokens()
        });
    }
}

fn norms(suite: &mut Suite) {
    for dims in [[1, 1, 1, 1], [2, 17, 5, 7], [1, 96, 9, 31], [1, 384, 3, 5], [1, 1000, 2, 3]] {
        let (x, gamma) = (suite.random(&dims), suite.random(&dims[1..2]));
        for silu in [false, true] {
            let case = format!("{dims:?}, silu {silu}");
            suite.compare("norm of a picture", case, ([&x, &gamma], &[]), |[x, gamma]| {
                let picture = picture(x)?;
                let normed =
                    if silu { picture.rms_norm_silu(gamma) } else { picture.rms_norm(gamma) };
                normed?.into_planes()
            });
        }
    }
}

const HALVE: Conv2dShape =
    Conv2dShape { stride: 2, padding: Padding { top: 0, bottom: 1, left: 0, right: 1 } };

/// With zeros around the picture so that its sides stay.
const fn same(kernel: usize) -> Conv2dShape {
    Conv2dShape { stride: 1, padding: Padding::all(kernel >> 1) }
}

/// `work` with each kind of convolutions' kernels that `outs` has.
fn each_kind(outs: usize, mut work: impl FnMut(&'static str, bool)) {
    work("", false);
    if outs >= 64 {
        work(", for every architecture", true);
    }
}

fn of_kind<T>(general: bool, work: impl FnOnce() -> T) -> T {
    with_hopper(!general, work)
}

fn convolutions(suite: &mut Suite) {
    let odd = Conv2dShape { stride: 1, padding: Padding { top: 2, bottom: 0, left: 1, right: 3 } };
    let thirds = Conv2dShape { stride: 3, padding: Padding::all(1) };
    let cases = [
        ([1, 3, 5, 7], 4, [3, 3], same(3), false),
        ([1, 3, 18, 9], 96, [3, 3], same(3), false),
        ([2, 70, 9, 13], 130, [3, 3], same(3), false),
        ([1, 33, 12, 12], 20, [1, 1], same(1), false),
        ([1, 96, 20, 17], 3, [3, 3], same(3), false),
        ([2, 16, 11, 10], 16, [3, 3], HALVE, false),
        ([1, 96, 35, 20], 96, [3, 3], HALVE, false),
        ([1, 40, 34, 18], 192, [3, 3], same(3), false),
        ([1, 24, 9, 5], 200, [3, 3], same(3), true),
        ([1, 192, 6, 9], 96, [3, 3], same(3), true),
        ([1, 72, 16, 16], 192, [1, 1], same(1), false),
        ([1, 136, 5, 40], 192, [3, 3], HALVE, false),
        ([1, 20, 8, 9], 70, [2, 3], odd, false),
        ([1, 20, 8, 9], 40, [1, 2], odd, true),
        ([1, 12, 14, 20], 64, [3, 3], thirds, false),
        ([1, 5, 16, 16], 70, [4, 4], Conv2dShape { stride: 4, padding: Padding::all(0) }, false),
    ];
    for (dims, outs, [kh, kw], shape, enlarge) in cases {
        let x = suite.random(&dims);
        let weight = suite.random(&[outs, dims[1], kh, kw]);
        let bias = suite.random(&[outs]);
        each_kind(outs, |kind, general| {
            let stride = shape.stride;
            let large = if enlarge { ", enlarged," } else { "" };
            let case = format!("{dims:?}{large} to {outs}, {kh} × {kw}, stride {stride}{kind}");
            suite.compare("convolution", case, ([&x, &weight, &bias], &[]), |[x, weight, bias]| {
                let conv = convolution(weight, bias, shape)?;
                let x = picture(x)?;
                let apply = || if enlarge { conv.apply_enlarged(x) } else { conv.apply(&x) };
                of_kind(general, apply)?.into_planes()
            });
        });
    }
    let (x, weight) = (suite.random(&[1, 9, 6, 6]), suite.random(&[10, 9, 3, 3]));
    suite.compare("convolution", "of planes".to_owned(), ([&x, &weight], &[]), |[x, weight]| {
        PackedConv2d::new(weight, None, same(3))?.forward(x)
    });
}

fn normed(suite: &mut Suite) {
    // 24, 96 and 192 outputs are all in one block, the last on Hopper alone; 200 and 384 are not.
    let cases = [
        ([1, 5, 5, 7], 3, same(3)),
        ([2, 9, 17, 5], 17, same(3)),
        ([1, 40, 34, 18], 96, same(3)),
        ([1, 24, 18, 35], 92, HALVE),
        ([2, 70, 9, 13], 64, same(3)),
        ([1, 30, 19, 17], 192, same(3)),
        ([1, 72, 16, 16], 190, same(1)),
        ([1, 16, 9, 11], 200, same(3)),
        ([1, 16, 6, 5], 384, same(3)),
    ];
    for (dims, outs, shape) in cases {
        let side = 1 + 2 * shape.padding.left.max(shape.padding.right);
        let x = suite.random(&dims);
        let weight = suite.random(&[outs, dims[1], side, side]);
        let (bias, gamma) = (suite.random(&[outs]), suite.random(&[outs]));
        each_kind(outs, |kind, general| {
            let case =
                format!("{dims:?} to {outs}, {side} × {side}, stride {}{kind}", shape.stride);
            let work = |[x, weight, bias, gamma]: [&Tensor; 4]| -> Result<Tensor> {
                let conv = convolution(weight, bias, shape)?;
                let conv = NormedConv2d::new(conv, gamma.clone())?;
                of_kind(general, || conv.apply(picture(x)?))?.into_planes()
            };
            let inputs = [&x, &weight, &bias, &gamma];
            suite.compare("convolution and norm", case, (inputs, &[]), work);
        });
    }
}

fn residuals(suite: &mut Suite) {
    // The channels of the convolution's input and result, and of the shortcut where it is no sum.
    let cases = [
        ([1, 16, 9, 11], 16, None),
        ([1, 96, 34, 17], 96, None),
        ([2, 64, 17, 9], 192, Some(40)),
        ([1, 20, 5, 6], 36, Some(20)),
        ([1, 96, 7, 20], 200, Some(96)),
        ([1, 24, 16, 18], 192, None),
    ];
    for (dims, outs, channels) in cases {
        let [b, input, h, w] = dims;
        let x = suite.random(&dims);
        let beside = suite.random(&[b, channels.unwrap_or(outs), h, w]);
        let weight = suite.random(&[outs, input, 3, 3]);
        let matrix = suite.random(&[outs, channels.unwrap_or(1), 1, 1]);
        let [bias, other] = [0, 1].map(|_| suite.random(&[outs]));
        each_kind(outs, |kind, general| {
            let case = format!("{dims:?} to {outs} beside {channels:?}{kind}");
            let inputs = [&x, &beside, &weight, &matrix, &bias, &other];
            let work = |[x, beside, weight, matrix, bias, other]: [&Tensor; 6]| -> Result<Tensor> {
                let conv = convolution(weight, bias, same(3))?;
                let shortcut = convolution(matrix, other, same(1));
                let shortcut = channels.map(|_| shortcut).transpose()?;
                let conv = ResidualConv2d::new(conv, shortcut)?;
                let (x, beside) = (picture(x)?, picture(beside)?);
                of_kind(general, || conv.apply(x, beside))?.into_planes()
            };
            suite.compare("convolution beside a shortcut", case, (inputs, &[]), work);
        });
    }
}
