#!/usr/bin/env bash
# What --cache-mode first-block costs and saves on the miniature pack: one line a threshold, with the
# seconds of the whole run, the exactly right pictures and the predictions that were left out.
# Usage: benches/step_cache.sh [CASES A ROW] [STEPS] [SEED]; build with `cargo build --release` first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
count=${1:-30} steps=${2:-20} seed=${3:-7}
program=target/release/pentimento

line() {
  local start end report
  start=$(date +%s.%N)
  report=$("$program" eval scenes --only single --count "$count" --steps "$steps" \
    --seed "$seed" --json --quiet "${@:2}")
  end=$(date +%s.%N)
  python3 - "$1" "$start" "$end" <<'PY' "$report"
import json, sys
name, start, end, report = sys.argv[1:]
report = json.loads(report)
reuse = report.get("reuse", {"reused": 0, "of": 0})
single = report["single"]
right, outside = single["all"], single["outside_error_levels"]
print(f"{name:>5}  {float(end) - float(start):6.1f} s  left out {reuse['reused']}/{reuse['of']}  "
      f"exact {right['right']}/{right['of']}  outside {outside:.2f} levels")
PY
}

line off
for threshold in 0.05 0.1 0.2 0.3 0.5; do
  line "$threshold" --cache-mode first-block --cache-option "threshold=$threshold"
done
