#!/usr/bin/env bash
# Checks and times the CUDA kernels where there is a GPU and neither cargo nor a network.
#   scripts/gpu-check.sh pack [FILE]   builds the program here, with CUDA or without one, and packs
#                                      it with all that it needs (default: target/gpu-check.tar.xz)
#   scripts/gpu-check.sh run [ARGS]    runs what is packed, from the unpacked folder or, after `pack`, from
#                                      the tree; ARGS go to the program, such as --correctness-only
# `run` writes benches/results/<date>-<gpu>/{report.md,raw.csv,pytorch.csv} and exits with the program's
# code: 0 all checks passed, 1 a check failed, 2 wrong arguments or a file that cannot be written, 3 no
# GPU or no CUDA 13 libraries that can be used.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-target/cuda}
no_gpu=3
bytes_max=$((60 << 20))

pack() {
  local file=${1:-target/gpu-check.tar.xz}
  cd "$root"
  scripts/cuda-build.sh --bin pentimento-gpu-check
  local folder
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' RETURN
  mkdir -p "$folder"/gpu-check/{bin,scripts,benches,references} "$(dirname "$file")"
  cp "$target/release/pentimento-gpu-check" "$folder/gpu-check/bin/"
  strip "$folder/gpu-check/bin/pentimento-gpu-check"
  cp scripts/gpu-check.sh "$folder/gpu-check/scripts/"
  cp benches/peer_gpu.py "$folder/gpu-check/benches/"
  cp -rL tests/data/reference/. "$folder/gpu-check/references/"
  XZ_OPT=${XZ_OPT:--T0} tar -C "$folder" -cJf "$file" gpu-check
  local bytes
  bytes=$(stat -c %s "$file")
  echo "$file: $bytes bytes"
  if ((bytes > bytes_max)); then
    echo "error: more than $bytes_max bytes" >&2
    return 2
  fi
}

# Folders with CUDA 13's runtime libraries: where the loader looks, toolkits, PyTorch's wheels.
library_folders() {
  local python
  ls -d /usr/local/cuda-13*/lib64 /usr/local/cuda/lib64 /usr/local/nvidia/lib64 2>/dev/null || true
  if [[ -n ${CUDA_HOME:-} ]]; then echo "$CUDA_HOME/lib64"; fi
  python=$(command -v "${PYTHON:-python3}") || return 0
  "$python" - <<'PY' || true
import glob, site, sys
for base in [*site.getsitepackages(), site.getusersitepackages(), *sys.path]:
    for folder in sorted(glob.glob(f"{base}/nvidia/*/lib")):
        print(folder)
PY
}

run() {
  local program=$root/bin/pentimento-gpu-check references=$root/references
  if [[ ! -x $program ]]; then
    program=$(cd "$root" && realpath -m "$target")/release/pentimento-gpu-check
    references=$root/tests/data/reference
  fi
  if [[ ! -x $program ]]; then
    echo "error: no program; run 'scripts/gpu-check.sh pack' where it can be built" >&2
    return 2
  fi
  local folders
  folders=$(library_folders | awk '!seen[$0]++' | paste -sd:)
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folders
  local missing
  missing=$(ldd "$program" | awk '/not found/ { print $1 }' | sort -u | paste -sd' ')
  if [[ -n $missing ]]; then
    echo "no GPU that can be used: $missing not found (a driver, and CUDA 13's libraries, are needed)" >&2
    return $no_gpu
  fi
  local gpu out code=0
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1) || gpu=
  gpu=$(tr 'A-Z ' 'a-z-' <<<"${gpu:-gpu}" | tr -cd 'a-z0-9-')
  out=${OUT:-$root}/benches/results/$(date +%F)-$gpu
  "$program" --references "$references" --out "$out" "$@" || code=$?
  if ((code == no_gpu || code == 2)); then return "$code"; fi
  local python
  if python=$(command -v "${PYTHON:-python3}") && "$python" -c 'import torch' 2>/dev/null; then
    "$python" "$root/benches/peer_gpu.py" "$out/pytorch.csv" || echo "PyTorch's times failed" >&2
  else
    echo "no PyTorch here: its times are left out"
  fi
  return "$code"
}

case ${1:-} in
  pack | run) "$@" ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
