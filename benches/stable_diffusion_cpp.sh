#!/bin/sh
# Builds stable-diffusion.cpp for this processor, its program (WORK/build/bin/sd-cli), and the program that
# times its Qwen-Image transformer, WORK/sd-forward.
#
#   benches/stable_diffusion_cpp.sh WORK
#
# What is built already is used again. PYTHON names the interpreter (python3 if not set) that has pip,
# cmake, ninja and scikit-build-core. The sources are those in the archive of
# stable-diffusion-cpp-python on PyPI.
set -eu

work=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$work"
work=$(cd "$work" && pwd)
PATH=$(dirname "$(command -v "$python")"):$PATH

if [ ! -f "$work/build/bin/sd-cli" ]; then
    "$python" -m pip download --quiet --no-binary :all: --no-deps --no-build-isolation \
        --dest "$work" stable-diffusion-cpp-python
    tar -xzf "$work"/stable_diffusion_cpp_python-*.tar.gz -C "$work"
    cmake -S "$work"/stable_diffusion_cpp_python-*/vendor/stable-diffusion.cpp -B "$work/build" \
        -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DSD_BUILD_EXAMPLES=ON \
        -DSD_WEBP=OFF -DSD_WEBM=OFF
    cmake --build "$work/build" --target sd-cli
fi
source=$(echo "$work"/stable_diffusion_cpp_python-*/vendor/stable-diffusion.cpp)
libraries=$(find "$work/build" -name 'libzip*.a')
# shellcheck disable=SC2086
"${CXX:-g++}" -O2 -march=native -std=c++17 -DGGML_MAX_NAME=128 -I"$source/src" -I"$source/include" \
    -I"$source/ggml/include" -I"$source/thirdparty" "$here/stable_diffusion_cpp.cpp" \
    "$work/build/libstable-diffusion.a" $libraries "$work/build/ggml/src/libggml.a" \
    "$work/build/ggml/src/libggml-cpu.a" "$work/build/ggml/src/libggml-base.a" \
    -fopenmp -lpthread -ldl -o "$work/sd-forward"
echo "$work/sd-forward"
