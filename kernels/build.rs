//! Build script: lists the files of the miniature pack, so that the feature `mini` can compile
//! them into the crate, and compiles the kernels beside it: for GPUs with the feature `cuda`, for the
//! emulation with `cuda-emulation`.
#![expect(clippy::disallowed_methods, reason = "a build script reads cargo's environment")]

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// What lies beside the pack's own files and is not part of it.
const NOT_PACKED: &[&str] = &["README.md", "recipe", "samples", "world.json"];

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
    list_mini(&out.join("mini_files.rs"))
}

/// The kernels as C++ for this machine.
#[cfg(feature = "cuda-emulation")]
fn emulation() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag_if_supported("-fno-strict-aliasing")
        .file("kernels/host/emulation.cpp")
        .compile("pentimento_emulation");
}

/// Writes the list of the miniature pack's files.
fn list_mini(out: &Path) -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("models/mini");
    let mut code = String::from("&[\n");
    for file in files(&root)? {
        let path = file.strip_prefix(&root)?.to_string_lossy().replace('\\', "/");
        let top = path.split('/').next().unwrap_or_default();
        if !NOT_PACKED.contains(&top) {
            writeln!(
                code,
                "  EmbeddedFile {{ path: {path:?}, bytes: include_bytes!({file:?}) }},"
            )?;
        }
    }
    code.push_str("]\n");
    fs::write(out, code)?;
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
