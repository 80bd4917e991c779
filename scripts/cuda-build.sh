#!/usr/bin/env bash
# Builds the program with CUDA into target/cuda, on a machine with or without CUDA and a GPU.
# A CUDA that is installed already (nvcc on PATH) is used; otherwise the toolchain script brings one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v nvcc >/dev/null; then
  scripts/cuda-toolchain.sh
  eval "$(scripts/cuda-toolchain.sh --env)"
fi
cargo build --release --features cuda --target-dir target/cuda "$@"
ls -l target/cuda/release/pentimento
