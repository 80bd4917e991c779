#!/usr/bin/env bash
# What a step of the denoising loop, and a token of the language model, ask of the host: runs the real code on a driver and libraries that do nothing but
# count (scripts/cuda-stand-in). Needs a C compiler and what scripts/cuda-build.sh built; no GPU.
#   scripts/cuda-host-work.sh [PROGRAM] [CASE]     (default: target/cuda/release/pentimento-gpu-check, no names)
# Prints microseconds and calls of a layer, and of a recorded step of 60 layers, and fails where a step waits for the
# device, copies from or to the host or loads a module, where models need kernels that a driver compiles for seconds, where a recorded step makes more than a few calls, and where a run
# does not go on when the driver refuses to record. Calls of a case, or of `all`, are listed by name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program=$(realpath "${1:-target/cuda/release/pentimento-gpu-check}")
cuda=$(scripts/cuda-toolchain.sh --where)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stand_in=scripts/cuda-stand-in

# Every other name of the driver, as a call that is counted and succeeds.
scripts/cuda-driver-stubs.py "$cuda/include/cuda.h" "COUNTED; return SUCCESS;" "$stand_in/driver.c" |
  cat "$stand_in/driver.c" - > "$work/driver.c"
cc -O2 -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$work/libcuda.so.1" "$work/driver.c"
for library in libcublas.so.13 libcublasLt.so.13 libcurand.so.10; do
  echo "$library { global: *; };" > "$work/version"
  cc -O2 -shared -fPIC -Wl,-soname,$library -Wl,--version-script="$work/version" -o "$work/$library" \
    "$stand_in/libraries.c" "$work/libcuda.so.1" -lm
done

# Where the driver does not record, or not to the end, steps are computed one by one, and nothing else happens.
for call in cuStreamBeginCapture_v2 cuStreamEndCapture cuGraphInstantiateWithFlags cuGraphUpload cuGraphLaunch; do
  FAILS=$call LD_LIBRARY_PATH=$work:$cuda/lib64 timeout 60 "$program" --scratch "$work/scratch" --part recorded --inner \
    > "$work/rows"
  python3 - "$work/rows" "$call" <<'PY'
import json
import sys

rows = [json.loads(line[4:]) for line in open(sys.argv[1]) if line.startswith("row ")]
failed = [row for row in rows if "Checked" not in row["finding"]]
wrong = [row for row in rows if row not in failed and float(row["finding"]["Checked"]["value"]) != 0]
alike = all("recorded steps" in row["name"] and "CUDA_ERROR" in row["finding"]["Failed"] for row in failed)
if len(failed) * 4 != len(rows) or not rows or not alike or wrong:
    print("FAIL", sys.argv[2], "fails, and:", wrong or rows)
    sys.exit(1)
PY
done

# What a driver compiles at first use: of candle's kernels only casts and fills, which take it a moment.
rm -f "$work/modules"
MODULES=$work/modules LD_LIBRARY_PATH=$work:$cuda/lib64 timeout 120 "$program" --scratch "$work/scratch" \
  --references tests/data/reference --part models --inner > "$work/rows"
MODULES=$work/modules LD_LIBRARY_PATH=$work:$cuda/lib64 timeout 120 "$program" --scratch "$work/scratch" \
  --part "a token of the host" --inner >> "$work/rows"
python3 - "$work/rows" "$work/modules" <<'PY'
import sys

rows, modules = ([line.strip() for line in open(path)] for path in sys.argv[1:])
long = sorted({first for first in modules if not first.startswith(("cast_", "fill_"))})
if not any(row.startswith("row ") for row in rows) or not modules or long:
    print("FAIL compiled at first use:", long or modules or rows[-3:])
    sys.exit(1)
print("at first use a driver compiles", len(set(modules)), "files of kernels:", ", ".join(sorted(set(modules))))
PY

# A token of the language model, also where the driver does not map the host's memory.
for call in none cuMemHostGetDevicePointer_v2; do
  rm -f "$work/counts"
  FAILS=$call COUNTS=$work/counts LD_LIBRARY_PATH=$work:$cuda/lib64 timeout 60 "$program" --scratch "$work/scratch" \
    --part "a token of the host" --inner > "$work/rows"
  python3 - "$work/rows" "$work/counts" "$call" <<'PY'
import json
import sys

rows = [json.loads(line[4:]) for line in open(sys.argv[1]) if line.startswith("row ")]
tokens = [json.loads(line) for line in open(sys.argv[2])]
wanted = {"cuLaunchKernelEx": 1, "cuStreamSynchronize": 1}
if sys.argv[3] != "none":
    wanted |= {"cuMemcpyDtoHAsync_v2": 1, "cuStreamWaitEvent": 1}
ASKS = ("cuCtxGetCurrent", "cuEventSynchronize")  # whose context it is, and an event that nothing waits for
faults = [row for row in rows if "Timed" not in row["finding"]]
# The first one prepares the pass.
for token in tokens[1:]:
    calls = {call: count for call, count in token["calls"].items() if call not in ASKS}
    if calls != wanted:
        faults.append(calls)
if faults or len(rows) != 1 or len(tokens) < 2:
    print("FAIL", sys.argv[3], "fails, and a token:", faults or len(tokens))
    sys.exit(1)
print(f"a token, where {sys.argv[3]} fails: {sum(tokens[-1]['calls'].values())} calls, of which",
      ", ".join(f"{call} {count}" for call, count in wanted.items()))
PY
done

rm -f "$work/counts"
COUNTS=$work/counts LD_LIBRARY_PATH=$work:$cuda/lib64 timeout 120 "$program" --scratch "$work/scratch" \
  --part "time of the host" --inner > "$work/rows"
python3 - "$work/rows" "$work/counts" "${2:-}" <<'PY'
import json
import statistics
import sys

rows, counts, wanted = sys.argv[1:]
rows = [json.loads(line[4:]) for line in open(rows) if line.startswith("row ")]
ranges = [json.loads(line) for line in open(counts)]
STEPS = 6  # of src/check/host.rs
# Waits, copies from and to the host, and what is loaded. Copies within the device are not among them.
FORBIDDEN = ("Synchronize", "Query", "HtoD", "DtoH", "HtoA", "AtoH", "ModuleLoad", "LibraryLoad", "Link")
# The last call of a step waits for it, so that it can be told.
ALLOWED = {"cuStreamSynchronize": 1}
AHEAD = 8  # Blocks in the queue, of src/diffusion/qwen_image/model.rs: the host waits for the one before them.
BLAS = "cublasLtMatmul"
# All calls of a recorded step, those of its end among them.
RECORDED_CALLS_MAX = 40
RECORDED_WITHOUT = ("cuMemAlloc_v2", "cuStreamBeginCapture", "cuGraphInstantiate", "cuGraphUpload", BLAS)

def fail(why):
    print("FAIL", why)
    sys.exit(1)

failed = [row for row in rows if "Timed" not in row["finding"]]
if failed or not rows or len(rows) % 3:
    fail(f"the program: {failed or 'no rows'}")
if len(ranges) != len(rows) * STEPS:
    fail(f"{len(ranges)} steps were seen of {len(rows) * STEPS}")
faults = []
steps = [ranges[i : i + STEPS] for i in range(0, len(ranges), STEPS)]
print("case: us a layer (beside the layers), kernels, products by cuBLASLt, allocations, all calls a layer; "
      "us and calls of a recorded step")
for row_few, row_many, row_whole, few, many, whole in zip(rows[::3], rows[1::3], rows[2::3], steps[::3], steps[1::3],
                                                         steps[2::3]):
    layers = [int(row["name"].split()[0]) for row in (row_few, row_many)]
    name = row_many["name"].split(", ", 1)[1]
    # The first step warms up, and the first and the last look whether numbers are finite.
    few, many, whole = few[1:-1], many[1:-1], whole[1:-1]
    for step in whole:
        for call, count in step["calls"].items():
            if any(word in call for word in FORBIDDEN + RECORDED_WITHOUT) and count > ALLOWED.get(call, 0):
                faults.append(f"{name}: {count} {call} in a recorded step")
        if step["calls"].get("cuGraphLaunch") != 1:
            faults.append(f"{name}: a step is not started as a whole")
        if sum(step["calls"].values()) > RECORDED_CALLS_MAX:
            faults.append(f"{name}: {sum(step['calls'].values())} calls in a recorded step: {step['calls']}")
        if step["last"] != "cuStreamSynchronize":
            faults.append(f"{name}: a recorded step ends with {step['last']}")
    for of, step in [(layers[0], step) for step in few] + [(layers[1], step) for step in many]:
        waits = step["calls"].pop("cuEventSynchronize", 0)
        if waits != max(of - AHEAD, 0):
            faults.append(f"{name}: {waits} waits for earlier blocks in a step of {of}")
        for call, count in step["calls"].items():
            if any(word in call for word in FORBIDDEN) and count > ALLOWED.get(call, 0):
                faults.append(f"{name}: {count} {call} in a step")
        if step["last"] != "cuStreamSynchronize":
            faults.append(f"{name}: a step ends with {step['last']}")
    apart = layers[1] - layers[0]
    times = [statistics.median(step["us"] for step in some) for some in (few, many)]
    each = (times[1] - times[0]) / apart
    whole_us = statistics.median(step["us"] for step in whole)
    few, many, whole = few[-1], many[-1], whole[-1]

    def a_layer(kind):
        found = {of: (n - few[kind].get(of, 0)) / apart for of, n in many[kind].items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    calls, kernels = a_layer("calls"), a_layer("kernels")
    def some(*words):
        return sum(n for of, n in calls.items() if any(word in of for word in words))

    launches, allocations = some("cuLaunchKernel"), some("cuMemAlloc")
    print(f"{name}: {each:.0f} us ({times[1] - each * layers[1]:.0f}), {launches:g}, {calls.get(BLAS, 0):g}, "
          f"{allocations:g}, {sum(calls.values()):g}; {whole_us:.0f} us, {sum(whole['calls'].values())}")
    if BLAS not in calls:
        faults.append(f"{name}: no products by cuBLASLt")
    if wanted in (name, "all"):
        def beside(kind, each):
            return {of: n - each.get(of, 0) * layers[1] for of, n in many[kind].items()}

        for title, found in (("calls", calls), ("kernels", kernels), ("calls beside", beside("calls", calls)),
                             ("kernels beside", beside("kernels", kernels)),
                             ("calls of a recorded step", whole["calls"]), ("its kernels", whole["kernels"])):
            print(f"  {title}: " + ", ".join(f"{of} {n:g}" for of, n in found.items() if n))
if faults:
    fail("\n     ".join(dict.fromkeys(faults)))
print("ok   no step waits but for blocks queued long before, copies from or to the host, or loads a module; a recorded "
      "step is a few calls")
PY
