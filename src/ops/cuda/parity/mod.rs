//! One suite of checks for the kernels, whatever they run on: the emulation, or a CUDA device.
//!
//! Each check compares a kernel with its plain version computed in float64. The rule: a kernel's error
//! is at most twice that of the plain version computed in bf16, in the root of the mean square, and at most
//! twice plus two units in the last place of the largest result at its worst number.

mod attention;
mod blas;
mod decode;
mod elementwise;
mod joined;
mod joint;
mod pictures;
mod products;
mod rounded;
mod tensors;

use candle_core::{DType, Device, Result, Tensor};

/// What a check found.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The operation.
    pub operation: &'static str,
    /// Sizes and variants.
    pub case: String,
    /// Root of the mean square of the kernel's errors, and its largest error.
    pub error: [f64; 2],
    /// What these may be.
    pub limit: [f64; 2],
    /// What went wrong, where the kernel did not run.
    pub failure: Option<String>,
}

impl Outcome {
    /// Whether the kernel follows the rule.
    #[must_use]
    pub fn passed(&self) -> bool {
        // Written so that NaN fails.
        self.failure.is_none()
            && self.error.iter().zip(self.limit).all(|(error, limit)| *error <= limit)
    }
}

/// Checks that belong together.
#[derive(Clone, Copy)]
pub struct Group {
    /// Its name.
    pub name: &'static str,
    check: fn(&mut Suite),
}

/// The checks of every operation.
pub const GROUPS: [Group; 7] = [
    Group {
        name: "joint attention",
        check: |suite| super::with_hopper(false, || joint::check(suite)),
    },
    Group {
        name: "attention",
        check: |suite| super::with_hopper(false, || attention::check(suite)),
    },
    Group { name: "elementwise", check: elementwise::check },
    Group { name: "pictures", check: pictures::check },
    Group { name: "products", check: products::check },
    Group { name: "decode", check: decode::check },
    Group { name: "tensors", check: tensors::check },
];

/// Runs the checks of every operation. On the CPU the kernels are emulated, with the threads of a block
/// in each of the `orders`; on a device give one.
#[must_use]
pub fn run(device: &Device, orders: &[u32]) -> Vec<Outcome> {
    GROUPS.iter().flat_map(|group| run_group(group, device, orders)).collect()
}

/// [`run`] for one group.
#[must_use]
pub fn run_group(group: &Group, device: &Device, orders: &[u32]) -> Vec<Outcome> {
    let (device, orders) = (device.clone(), orders.to_vec());
    let mut suite = Suite { device, orders, seed: 1, outcomes: Vec::new() };
    (group.check)(&mut suite);
    suite.outcomes
}

/// The checks of products by cuBLASLt. Where that is not there, in the emulation and on devices without
/// fp8, what it computes is composed of the other operations.
#[must_use]
pub fn run_blas(device: &Device, orders: &[u32]) -> Vec<Outcome> {
    let (device, orders) = (device.clone(), orders.to_vec());
    let mut suite = Suite { device, orders, seed: 3, outcomes: Vec::new() };
    blas::check(&mut suite);
    suite.outcomes
}

/// The checks of attention with Hopper's own instructions, which those of [`GROUPS`] do without.
#[must_use]
pub fn run_hopper(device: &Device, orders: &[u32]) -> Vec<Outcome> {
    let (device, orders) = (device.clone(), orders.to_vec());
    let mut suite = Suite { device, orders, seed: 2, outcomes: Vec::new() };
    super::with_hopper(true, || {
        joint::check(&mut suite);
        attention::check(&mut suite);
    });
    suite.outcomes
}

/// A run of the checks.
struct Suite {
    device: Device,
    orders: Vec<u32>,
    seed: u64,
    outcomes: Vec<Outcome>,
}

impl Suite {
    /// Numbers of about one, the same in every run, rounded to bf16.
    fn random(&mut self, dims: &[usize]) -> Tensor {
        let count = dims.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| self.number()).collect();
        let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu);
        tensor
            .and_then(|x| x.to_dtype(DType::BF16)?.to_dtype(DType::F32))
            .unwrap_or_else(|_| empty())
    }

    /// Roughly normal: the sum of twelve uniform numbers less six.
    fn number(&mut self) -> f32 {
        let mut sum = -6.0_f32;
        for _ in 0..12 {
            self.seed = self
                .seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let bits = u16::try_from(self.seed >> 48).unwrap_or(0);
            sum += f32::from(bits) / 65_536.0;
        }
        sum
    }

    /// Angles' cosines and sines, `[n, half]`.
    fn angles(&mut self, n: usize, half: usize) -> Result<[Tensor; 2]> {
        let angles: Vec<f32> = (0..n * half).map(|_| 3.0 * self.number()).collect();
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|angle| f(*angle)).collect();
            Tensor::from_vec(values, (n, half), &Device::Cpu)
        };
        Ok([table(f32::cos)?, table(f32::sin)?])
    }

    /// Compares `f` of `inputs` on the device in bf16 with `f` in float64 by the rule; the plain version
    /// is `f` in bf16 on the CPU, without kernels. Inputs in `wide` keep float32.
    fn compare<const N: usize>(
        &mut self,
        operation: &'static str,
        case: String,
        (inputs, wide): ([&Tensor; N], &[usize]),
        f: impl Fn([&Tensor; N]) -> Result<Tensor>,
    ) {
        let plain = || f(each(inputs, |i, x| narrow(wide, i, x))?.each_ref());
        let plain = super::not_emulated(plain);
        self.compare_to(operation, case, (inputs, wide), f, plain);
    }

    /// [`Self::compare`] with another plain version.
    fn compare_to<const N: usize>(
        &mut self,
        operation: &'static str,
        case: String,
        (inputs, wide): ([&Tensor; N], &[usize]),
        f: impl Fn([&Tensor; N]) -> Result<Tensor>,
        plain: Result<Tensor>,
    ) {
        let exact = || f(each(inputs, |_, x| x.to_dtype(DType::F64))?.each_ref());
        let kernel = |order: u32| {
            let inputs = each(inputs, |i, x| narrow(wide, i, x)?.to_device(&self.device))?;
            self.on_kernels(order, || f(inputs.each_ref()))
        };
        let expected = exact().and_then(|exact| Ok((exact, plain?)));
        let kernels: Vec<_> = self.orders.iter().map(|order| kernel(*order)).collect();
        self.judge(operation, &case, expected, kernels);
    }

    /// Runs `work` so that kernels are used.
    fn on_kernels<T>(&self, order: u32, work: impl FnOnce() -> T) -> T {
        #[cfg(feature = "cuda-emulation")]
        if self.device.is_cpu() {
            return super::emulated(order, work);
        }
        let _emulation_only = order;
        work()
    }

    /// Applies the rule to what the kernel gave in each order of threads; `expected` is the exact
    /// result and the plain version's.
    fn judge(
        &mut self,
        operation: &'static str,
        case: &str,
        expected: Result<(Tensor, Tensor)>,
        kernels: Vec<Result<Tensor>>,
    ) {
        let expected = expected.and_then(|(exact, plain)| {
            let dims = exact.dims().to_vec();
            let exact = values(&exact)?;
            let plain = errors(&exact, &values(&plain)?);
            Ok((dims, exact, plain))
        });
        let failed = |error: &candle_core::Error| Outcome {
            operation,
            case: case.to_owned(),
            error: [f64::INFINITY; 2],
            limit: [0.0; 2],
            failure: Some(error.to_string().lines().next().unwrap_or_default().to_owned()),
        };
        for kernel in kernels {
            let (dims, exact, plain) = match &expected {
                Ok((dims, exact, plain)) => (dims, exact, plain),
                Err(error) => {
                    self.outcomes.push(failed(error));
                    return;
                }
            };
            let error = kernel.and_then(|kernel| {
                if kernel.dims() != dims {
                    candle_core::bail!("{:?} instead of {dims:?}", kernel.dims());
                }
                Ok(errors(exact, &values(&kernel)?))
            });
            let outcome = match error {
                Ok(error) => {
                    let largest = exact.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
                    /// A unit in the last place of bf16, relative.
                    const UNIT: f64 = 1.0 / 128.0;
                    let limit =
                        [2.0 * plain[0] + 1e-6 * largest, 2.0 * (plain[1] + UNIT * largest)];
                    Outcome { operation, case: case.to_owned(), error, limit, failure: None }
                }
                Err(error) => failed(&error),
            };
            self.outcomes.push(outcome);
        }
    }
}

fn narrow(wide: &[usize], i: usize, x: &Tensor) -> Result<Tensor> {
    if wide.contains(&i) { Ok(x.clone()) } else { x.to_dtype(DType::BF16) }
}

fn empty() -> Tensor {
    Tensor::from_slice(&[0.0_f32; 0], 0, &Device::Cpu).unwrap_or_else(|_| unreachable!())
}

fn each<const N: usize>(
    inputs: [&Tensor; N],
    change: impl Fn(usize, &Tensor) -> Result<Tensor>,
) -> Result<[Tensor; N]> {
    let mut changed = inputs.map(Tensor::clone);
    for (i, x) in changed.iter_mut().enumerate() {
        *x = change(i, x)?;
    }
    Ok(changed)
}

fn values(x: &Tensor) -> Result<Vec<f64>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Root of the mean square and largest of the errors; infinite where NaN.
fn errors(exact: &[f64], found: &[f64]) -> [f64; 2] {
    let (mut squares, mut largest) = (0.0_f64, 0.0_f64);
    for (exact, found) in exact.iter().zip(found) {
        let error = (exact - found).abs();
        let error = if error.is_nan() { f64::INFINITY } else { error };
        squares += error * error;
        largest = largest.max(error);
    }
    #[expect(clippy::cast_precision_loss, reason = "a number of elements")]
    let count = exact.len().max(1) as f64;
    [(squares / count).sqrt(), largest]
}
