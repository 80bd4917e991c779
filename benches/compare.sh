#!/bin/sh
# Times pentimento and diffusers in turn on the same folder, and prints ratios of medians.
#
#   benches/compare.sh FOLDER [ROUNDS] [RAW.csv]
#
# FOLDER comes from benches/make_published.py. PYTHON names the interpreter that has torch and
# diffusers (python3 if not set). Each round runs every contestant once, in a process of its own that
# repeats its work a few times.
set -eu

folder=$1
rounds=${2:-3}
here=$(cd "$(dirname "$0")" && pwd)
raw=${3:-$(mktemp)}
python=${PYTHON:-python3}
threads=2
export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads

cargo build --quiet --profile bench --bench forward
forward=$(cargo build --quiet --profile bench --bench forward --message-format=json |
    sed -n 's/.*"executable":"\([^"]*forward-[^"]*\)".*/\1/p' | tail -1)

run() { # side, what, type, repeats
    case $1 in
    pentimento) "$forward" "$folder" "$2" "$3" "$4" ;;
    diffusers) "$python" "$here/peer.py" "$folder" "$2" "$3" "$4" 2>/dev/null ;;
    esac | sed "s/^/$1,$2,$3,/" >>"$raw"
}

echo "side,what,type,seconds,peak_bytes,checksum" >"$raw"
round=0
while [ "$round" -lt "$rounds" ]; do
    run pentimento transformer q8_0 3
    run diffusers transformer bf16 3
    run pentimento transformer f32 2
    run diffusers transformer f32 2
    run pentimento transformer bf16 2
    run pentimento autoencoder f32 2
    run diffusers autoencoder f32 2
    round=$((round + 1))
done
"$python" "$here/summary.py" "$raw"
