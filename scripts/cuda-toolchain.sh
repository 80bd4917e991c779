#!/usr/bin/env bash
# Puts a CUDA 13 compiler, headers and link libraries into one folder, from the wheels that NVIDIA
# publishes on PyPI, so that `--features cuda` builds on a machine without CUDA and without a GPU.
#   scripts/cuda-toolchain.sh [DIR]          install (default DIR: ~/.cache/pentimento/cuda-13.0)
#   eval "$(scripts/cuda-toolchain.sh --env [DIR])"   the variables that a build needs
#   scripts/cuda-toolchain.sh --where        the folder that has CUDA's headers: CUDA_HOME, this one or nvcc's
# The program built this way runs where there is a driver and libcudart, libcublas and libcurand 13.
set -euo pipefail

default_dir=$HOME/.cache/pentimento/cuda-13.0
wheels=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
  nvidia-cuda-crt==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-nvrtc==13.0.88
  nvidia-cublas==13.0.2.14
  nvidia-curand==10.4.0.35
)

if [[ ${1:-} == --env ]]; then
  dir=${2:-$default_dir}
  cat <<ENV
export CUDA_HOME='$dir' CUDA_PATH='$dir' CUDA_ROOT='$dir' CUDA_TOOLKIT_ROOT_DIR='$dir'
export PATH='$dir/bin':"\$PATH"
export LIBRARY_PATH='$dir/lib64:$dir/lib64/stubs'\${LIBRARY_PATH:+:\$LIBRARY_PATH}
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
ENV
  exit
fi

if [[ ${1:-} == --where ]]; then
  dir=${CUDA_HOME:-$default_dir}
  if [[ ! -e $dir/include/cuda.h ]] && command -v nvcc >/dev/null; then
    dir=$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")
  fi
  echo "$dir"
  exit
fi

dir=${1:-$default_dir}
if [[ -x $dir/bin/nvcc && -e $dir/lib64/stubs/libcuda.so ]]; then
  echo "already there: $dir"
  exit
fi

python=$(command -v python3) || { echo "error: python3 is needed to install the wheels" >&2; exit 1; }
mkdir -p "$dir/lib64/stubs"
"$python" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "${wheels[@]}"
packages=$(echo "$dir"/venv/lib/python3*/site-packages/nvidia/cu13)

for part in bin include nvvm; do ln -sfn "$packages/$part" "$dir/$part"; done
for library in "$packages"/lib/*.so.* "$packages"/lib/*.a; do ln -sf "$library" "$dir/lib64/"; done
for name in cublas cublasLt curand nvrtc cudart; do
  ln -sfn "$(find "$packages/lib" -name "lib$name.so.*" | sort | head -1)" "$dir/lib64/lib$name.so"
done

# The driver's library comes with a driver. The linker only needs its names; every stub returns
# CUDA_ERROR_NO_DEVICE.
"$python" "$(dirname "${BASH_SOURCE[0]}")/cuda-driver-stubs.py" "$dir/include/cuda.h" "return 100;" > "$dir/stub.c"
cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$dir/lib64/stubs/libcuda.so.1" "$dir/stub.c"
ln -sfn libcuda.so.1 "$dir/lib64/stubs/libcuda.so"
"$dir/bin/nvcc" --version | tail -1
echo "ready: $dir"
