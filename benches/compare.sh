#!/bin/sh
# Times pentimento, diffusers and stable-diffusion.cpp in turn on the same weights, and prints ratios
# of medians.
#
#   benches/compare.sh FOLDER [ROUNDS] [RAW.csv]
#
# FOLDER comes from benches/make_published.py. PYTHON names the interpreter that has torch and
# diffusers (python3 if not set). SD_FORWARD is the program that benches/stable_diffusion_cpp.sh
# builds; without it that side is left out. FORWARD is our program where it is built already. RUN is
# put before every program ("nice -n -15", say). Each round runs every contestant once, in a process
# of its own that repeats its work a few times. WHAT lists what is compared.
set -eu

folder=$1
rounds=${2:-3}
here=$(cd "$(dirname "$0")" && pwd)
raw=${3:-$(mktemp)}
python=${PYTHON:-python3}
what=${WHAT:-transformer encode decode}
threads=2
export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads

forward=${FORWARD:-$(cargo build --profile bench --bench forward --message-format=json |
    sed -n 's/.*"executable":"\([^"]*forward-[^"]*\)".*/\1/p' | tail -1)}
inputs=$(mktemp -d)
trap 'rm -r "$inputs"' EXIT
sizes=$("$python" "$here/raw_inputs.py" "$folder" "$inputs")

run() { # side, what, type, repeats
    case $1 in
    pentimento) ${RUN:-} "$forward" "$folder" "$2" "$3" "$4" ;;
    diffusers) ${RUN:-} "$python" "$here/peer.py" "$folder" "$2" "$3" "$4" 2>/dev/null ;;
    stable-diffusion.cpp)
        [ -n "${SD_FORWARD:-}" ] || return 0
        # shellcheck disable=SC2086
        ${RUN:-} "$SD_FORWARD" "$folder/transformer/diffusion_pytorch_model.safetensors" "$inputs" \
            $sizes $threads "$3" "$4" 2>/dev/null | grep -E '^[0-9.]+,[0-9]+,[0-9.]+$'
        ;;
    esac | sed "s/^/$1,$2,$3,/" >>"$raw"
}

[ -s "$raw" ] || echo "side,what,type,seconds,peak_bytes,checksum" >"$raw"
round=0
while [ "$round" -lt "$rounds" ]; do
    for part in $what; do
        case $part in
        transformer)
            run pentimento transformer q8_0 4
            run pentimento transformer q4_k 4
            run diffusers transformer bf16 3
            run stable-diffusion.cpp transformer q8_0 1
            run stable-diffusion.cpp transformer q8_0-fa 1
            ;;
        plain)
            run pentimento transformer bf16 2
            run pentimento transformer f32 2
            run diffusers transformer f32 2
            ;;
        encode | decode)
            run pentimento "$part" f32 2
            run diffusers "$part" f32 2
            ;;
        *)
            echo "$part: expected transformer, plain, encode or decode" >&2
            exit 2
            ;;
        esac
    done
    round=$((round + 1))
done
"$python" "$here/summary.py" "$raw"
