//! Build script: unpacks and lists the files of the miniature pack, so that the feature `mini` can
//! compile them into the crate, and compiles the kernels beside it: for GPUs with the feature `cuda`, for the
//! emulation with `cuda-emulation`.
#![expect(clippy::disallowed_methods, reason = "a build script reads cargo's environment")]

use std::{env, error::Error, path::PathBuf};

#[cfg(feature = "mini")]
#[path = "mini.rs"]
mod mini;
#[path = "nvcc.rs"]
mod nvcc;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=models/mini");
    #[cfg(feature = "cuda-emulation")]
    emulation();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        nvcc::fatbin(&out.join("kernels.fatbin"))?;
    }
    #[cfg(feature = "mini")]
    mini::list(&out)?;
    Ok(())
}

/// The kernels as C++ for this machine.
#[cfg(feature = "cuda-emulation")]
fn emulation() {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).flag_if_supported("-fno-strict-aliasing");
    // Not linked with the sanitizer's library: the emulation has the functions that accesses call.
    let kernels = build
        .clone()
        .flag("-fsanitize=thread")
        .flag_if_supported("--param=tsan-instrument-func-entry-exit=0")
        .file("kernels/host/kernels.cpp")
        .compile_intermediates();
    build.file("kernels/host/emulation.cpp").objects(kernels).compile("pentimento_emulation");
}
