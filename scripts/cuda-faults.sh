#!/usr/bin/env bash
# Runs the CUDA program on machines that it cannot use: with drivers that are stand-ins and answer
# wrongly on purpose. Needs a C compiler and what scripts/cuda-build.sh built; no GPU.
#   scripts/cuda-faults.sh [PROGRAM]     (default: target/cuda/release/pentimento)
# Each fault must end within a minute in an error with a way out, or in the fall-back that is stated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program=$(realpath "${1:-target/cuda/release/pentimento}")
cuda=$(scripts/cuda-toolchain.sh --where)
picture=models/mini/samples/add.png
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# A driver's library with every name that the program asks for. A call returns what FAULT says for its
# name, else what it says for `others`.
cat > "$work/driver.c" <<'C'
#include <stdlib.h>
#include <string.h>
static int code(const char* name) {
  const char* fault = getenv("FAULT");
  char key[256];
  strcpy(key, name);
  strcat(key, "=");
  const char* at = fault ? strstr(fault, key) : 0;
  if (!at) at = fault ? strstr(fault, "others=") : 0;
  return at ? atoi(strchr(at, '=') + 1) : 100;
}
int cuGetErrorString(int e, const char** s) { *s = "a stand-in"; return 0; }
int cuGetErrorName(int e, const char** s) { *s = "a stand-in"; return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
C
scripts/cuda-driver-stubs.py "$cuda/include/cuda.h" "return code(__func__);" "$work/driver.c" > "$work/stubs.c"
cat "$work/stubs.c" >> "$work/driver.c"
mkdir "$work/driver" "$work/empty"
cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$work/driver/libcuda.so.1" "$work/driver.c"

# expect NAME FAULT WANTED-CODE WORDS ARGUMENTS..: the program's exit code, and what it says.
expect() {
  local name=$1 fault=$2 wanted=$3 words=$4 code=0
  shift 4
  FAULT=$fault LD_LIBRARY_PATH=$work/driver:$cuda/lib64 timeout 60 "$program" "$@" \
    >"$work/out" 2>&1 || code=$?
  if ((code != wanted)) || ! grep -qi -- "$words" "$work/out"; then
    failures=$((failures + 1))
    echo "FAIL $name: exit code $code, not $wanted, or no '$words':"
    sed 's/^/     /' "$work/out"
  else
    echo "ok   $name: $(grep -i -m1 -- "$words" "$work/out")"
  fi
}

edit=(edit -i "$picture" -p "make it night" -o "$work/out.png" --seed 1 --steps 1 --strategy direct)
gpu=("${edit[@]}" --device cuda:0)
expect "no device" "others=100" 1 "CUDA_VISIBLE_DEVICES" "${gpu[@]}"
# CUDA_VISIBLE_DEVICES= leaves a driver without devices.
expect "no visible device" "cuInit=0,others=101" 1 "CUDA_VISIBLE_DEVICES" "${gpu[@]}"
expect "driver of another version" "others=803" 1 "too old" "${gpu[@]}"
expect "driver too old for the GPU's mode" "others=804" 1 "for CUDA 12.4" "${gpu[@]}"
expect "GPU that another process has" "cuInit=0,others=46" 1 "compute mode" "${gpu[@]}"
expect "GPU whose memory is taken" "cuInit=0,cuDeviceGet=0,others=2" 1 "other programs" "${gpu[@]}"
expect "GPU that fell off the bus" "cuInit=0,others=999" 1 "--device cpu" "${gpu[@]}"
expect "doctor" "others=100" 0 "cuda:0: " doctor
expect "fall-back" "others=100" 0 "the CPU computes" "${edit[@]}"
test -s "$work/out.png" || { echo "FAIL no picture by the fall-back"; failures=$((failures + 1)); }
code=0
LD_LIBRARY_PATH=$work/empty timeout 60 "$program" --version >"$work/out" 2>&1 || code=$?
if ((code == 127)) && grep -q "libcu" "$work/out"; then
  echo "ok   no driver: $(head -1 "$work/out")"
else
  echo "note: this machine has the driver's library on its path: $(head -1 "$work/out")"
fi
((failures == 0)) || { echo "$failures failed" >&2; exit 1; }
