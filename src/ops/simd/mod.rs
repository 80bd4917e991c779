//! Vectorised inner loops of the CPU's operations. The instruction set (AVX-512, AVX2 with FMA,
//! NEON, or none) is found at run time, once per operation.

pub(super) mod bf16;
pub(super) mod blocks;
pub(super) mod hugepage;
pub(super) mod lanes;
pub(super) mod math;
pub(super) mod prefetch;
pub(super) mod product;
pub(super) mod tiles;
pub(super) mod transpose;

pub(super) use pulp::Arch;

/// Every instruction set that this machine has, to test each.
#[cfg(test)]
pub(super) fn all_archs() -> Vec<Arch> {
    let mut archs = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        archs.extend(pulp::x86::V4::try_new().map(Arch::V4));
    }
    archs
}
