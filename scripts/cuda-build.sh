#!/usr/bin/env bash
# Builds the program with CUDA into target/cuda (or CARGO_TARGET_DIR), on a machine with or without CUDA
# and a GPU.
# A CUDA that is installed already (nvcc on PATH) is used; otherwise the toolchain script brings one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v nvcc >/dev/null; then
  scripts/cuda-toolchain.sh
  eval "$(scripts/cuda-toolchain.sh --env)"
fi
target=${CARGO_TARGET_DIR:-target/cuda}
cargo build --release --features cuda --target-dir "$target" "$@"
find "$target/release" -maxdepth 1 -type f -executable -exec ls -l {} +
