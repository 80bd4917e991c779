#!/bin/sh
# Estimates which share of an edit planning takes at the published dimensions, from few layers.
#
#   benches/planning.sh WORK [ROUNDS] [RAW.csv]
#
# Times the language model at the 7B model's dimensions with 2 and with 4 layers, and the editor's
# transformer with 2 of its 60, all as Q8_0, in turn. A straight line through the two depths gives a
# layer and the rest (embedding and logits); 28 layers are that many times the one, 60 thirty times
# the two. WORK/published is made by make_published.py where it is not there. PYTHON names the
# interpreter (python3 if not set) with numpy, gguf, torch and diffusers.
set -eu

work=$1
rounds=${2:-3}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
prompt_tokens=512
answer_tokens=16

mkdir -p "$work"
work=$(cd "$work" && pwd)
for layers in 2 4; do
    [ -d "$work/lm-$layers/text_encoder" ] ||
        "$python" "$here/make_language_model.py" "$work/lm-$layers" --size 7b --layers "$layers"
done
[ -d "$work/published" ] || "$python" "$here/make_published.py" "$work/published"
bench() { # name
    cargo bench --bench "$1" --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*'"$1"'-[^"]*\)".*/\1/p' | tail -1
}
decode=$(bench decode)
forward=$(bench forward)

raw=${3:-$(mktemp)}
: >"$raw"
round=0
while [ "$round" -lt "$rounds" ]; do
    for layers in 2 4; do
        "$decode" "$work/lm-$layers" q8_0 $prompt_tokens $answer_tokens 1 |
            awk -F, -v layers="$layers" '{ print "prefill," layers "," $1; print "decode," layers "," $2 }' >>"$raw"
    done
    "$forward" "$work/published" transformer q8_0 1 | awk -F, '{ print "step,2," $1 }' >>"$raw"
    round=$((round + 1))
done
"$python" - "$raw" <<'SUMMARY'
import csv, statistics, sys
from collections import defaultdict

LAYERS, BLOCKS, STEPS = 28, 60, 40
PROMPTS, TOKENS = (640, 560), (60, 60)  # each agent: prompt with its picture, and reply

values = defaultdict(list)
for what, layers, number in csv.reader(open(sys.argv[1])):
    values[what, int(layers)].append(float(number))
median = {key: statistics.median(numbers) for key, numbers in values.items()}


def whole(what):
    """Seconds per token of all layers, from the line through 2 and 4 of them."""
    two, four = 1 / median[what, 2], 1 / median[what, 4]
    layer = (four - two) / 2
    return two + layer * (LAYERS - 2)


prefill, token, step = whole("prefill"), whole("decode"), median["step", 2] * BLOCKS / 2
planning = sum(PROMPTS) * prefill + sum(TOKENS) * token
edit = STEPS * step
for key in sorted(median):
    print(f"{key[0]:8} {key[1]} layers: {median[key]:.3f}", "s" if key[0] == "step" else "tokens/s")
print(f"{LAYERS} layers: prefill {1 / prefill:.1f} tokens/s, decode {1 / token:.2f} tokens/s")
print(f"{BLOCKS} blocks: {step:.1f} s a step")
print(f"planning: {sum(PROMPTS)} tokens read, {sum(TOKENS)} written: {planning:.0f} s")
print(f"editing: {STEPS} steps without guidance: {edit:.0f} s; planning adds {planning / edit:.1%}")
SUMMARY
