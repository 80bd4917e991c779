#!/bin/sh
# Times pentimento's language model and llama.cpp in turn, on the same weights, and prints ratios of
# medians.
#
#   benches/llama_cpp.sh WORK [ROUNDS] [RAW.csv]
#
# WORK is a folder for everything that is built; what is there already is used again. PYTHON names
# the interpreter (python3 if not set) that has pip, numpy, gguf, cmake, ninja and scikit-build-core.
# llama.cpp is the one in the source archive of llama-cpp-python, built for this processor. THREADS
# lists the numbers of threads to compare with ("1 2" if not set), PRIORITY is put before both
# programs ("nice -n -15", say), DECODE is our program where it is built already.
set -eu

work=$1
rounds=${2:-3}
here=$(cd "$(dirname "$0")" && pwd)
raw=${3:-$(mktemp)}
python=${PYTHON:-python3}
prompt_tokens=256
answer_tokens=64
repeats=2

mkdir -p "$work"
work=$(cd "$work" && pwd)
if [ ! -x "$work/build/bin/llama-quantize" ]; then
    "$python" -m pip download --quiet --no-binary llama-cpp-python --no-deps --no-build-isolation \
        --dest "$work" llama-cpp-python
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    "$python" -m cmake -S "$work"/llama_cpp_python-*/vendor/llama.cpp -B "$work/build" -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    "$python" -m cmake --build "$work/build" --target llama-bench llama-quantize
fi
model=$work/lm
[ -f "$model/model-bf16.gguf" ] || "$python" "$here/make_language_model.py" "$model"
for type in q4_k q8_0; do
    [ -f "$model/model-$type.gguf" ] || "$work/build/bin/llama-quantize" --pure \
        "$model/model-bf16.gguf" "$model/model-$type.gguf" "$type" >"$work/quantize.log" 2>&1
done
decode=${DECODE:-$(cargo bench --bench decode --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*decode-[^"]*\)".*/\1/p' | tail -1)}

ours() { # type, threads
    RAYON_NUM_THREADS=$2 ${PRIORITY:-} "$decode" "$model" "$1" $prompt_tokens $answer_tokens $repeats |
        awk -F, -v key="pentimento,$1,$2" '{ print key ",prefill," $1; print key ",decode," $2 }'
}

theirs() { # type, threads
    ${PRIORITY:-} "$work/build/bin/llama-bench" -m "$model/model-$1.gguf" -t "$2" -r $repeats \
        -p $prompt_tokens -n $answer_tokens -o jsonl 2>"$work/llama-bench.log" |
        "$python" -c '
import json, sys
for line in sys.stdin:
    run = json.loads(line)
    what = "prefill" if run["n_prompt"] else "decode"
    for speed in run["samples_ts"]:
        print(f"llama.cpp,{sys.argv[1]},{sys.argv[2]},{what},{speed:.3f}")
' "$1" "$2"
}

echo "side,type,threads,what,tokens_per_second" >"$raw"
round=0
while [ "$round" -lt "$rounds" ]; do
    for threads in ${THREADS:-1 2}; do
        for type in q4_k q8_0; do
            ours "$type" "$threads" >>"$raw"
            theirs "$type" "$threads" >>"$raw"
        done
    done
    round=$((round + 1))
done
"$python" - "$raw" <<'SUMMARY'
import csv, statistics, sys
from collections import defaultdict

speeds = defaultdict(list)
with open(sys.argv[1], newline="") as file:
    for row in csv.DictReader(file):
        key = (row["what"], row["type"], row["threads"], row["side"])
        speeds[key].append(float(row["tokens_per_second"]))
print("| work | weights | threads | pentimento | llama.cpp | ratio of speeds |")
print("|---|---|---|---|---|---|")
for what, kind, threads in sorted({key[:3] for key in speeds}):
    ours, theirs = (
        statistics.median(speeds[what, kind, threads, side]) for side in ("pentimento", "llama.cpp")
    )
    print(f"| {what} | {kind} | {threads} | {ours:.1f} tokens/s | {theirs:.1f} tokens/s | {ours / theirs:.2f} |")
SUMMARY
