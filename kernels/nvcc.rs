//! Compiles the kernels for all wanted GPUs into one file.

use std::{env, error::Error, path::Path, process::Command};

/// Compute capabilities that get machine code: Ampere, Ada, Hopper with its own instructions, consumer
/// Blackwell. Others from 8.0 on compile the first one's PTX when the module is loaded.
const ARCHITECTURES: &str = "80 86 89 90a 120";

/// Writes machine code for the architectures of `PENTIMENTO_CUDA_ARCHS` (separated by spaces or
/// commas, such as `80 90a`), or all that the compiler knows, to `out`.
pub(crate) fn fatbin(out: &Path) -> Result<(), Box<dyn Error>> {
    for name in ["PENTIMENTO_CUDA_ARCHS", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let nvcc = match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => "nvcc".into(),
    };
    let listed = Command::new(&nvcc).arg("--list-gpu-arch").output().map_err(|error| {
        let nvcc = nvcc.display();
        format!(
            "{nvcc}: {error}. The feature `cuda` needs CUDA's compiler: put nvcc on the PATH, set \
             CUDA_HOME, or build with scripts/cuda-build.sh, which installs one"
        )
    })?;
    let known = String::from_utf8(listed.stdout)?;
    let wanted = env::var("PENTIMENTO_CUDA_ARCHS").ok().filter(|list| !list.trim().is_empty());
    let list = wanted.as_deref().unwrap_or(ARCHITECTURES);
    let mut architectures: Vec<&str> =
        list.split([' ', ',']).map(str::trim).filter(|name| !name.is_empty()).collect();
    if wanted.is_none() {
        let is_known = |name: &&str| {
            let plain = format!("compute_{}", name.trim_end_matches('a'));
            known.lines().any(|line| line.trim() == plain)
        };
        architectures.retain(is_known);
    }
    let Some(first) = architectures.first() else {
        return Err(format!("{}: knows none of {list}, but\n{known}", nvcc.display()).into());
    };
    if architectures.contains(&"90a") {
        println!("cargo::rustc-env=PENTIMENTO_HAS_HOPPER=1");
    }
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--threads", "2", "-o"]).arg(out);
    for name in &architectures {
        command.arg(format!("-gencode=arch=compute_{name},code=sm_{name}"));
    }
    command.arg(format!("-gencode=arch=compute_{first},code=compute_{first}"));
    let status = command.arg("kernels/kernels.cu").status()?;
    if !status.success() {
        return Err(format!("nvcc failed on kernels/kernels.cu for {list}: {status}").into());
    }
    Ok(())
}
