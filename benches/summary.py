#!/usr/bin/env python3
"""Print medians, peak memory and ratios from compare.sh's raw.csv as a Markdown table."""

import csv
import statistics
import sys
from collections import defaultdict

# Ours against theirs; what the first is allowed to cost at most.
PAIRS = [
    (("pentimento", "transformer", "q8_0"), ("diffusers", "transformer", "bf16"), 1.0),
    (("pentimento", "transformer", "bf16"), ("diffusers", "transformer", "bf16"), None),
    (("pentimento", "transformer", "f32"), ("diffusers", "transformer", "f32"), None),
    (("pentimento", "autoencoder", "f32"), ("diffusers", "autoencoder", "f32"), 0.5),
]


def main() -> None:
    seconds, peaks = defaultdict(list), defaultdict(int)
    with open(sys.argv[1], newline="") as file:
        for row in csv.DictReader(file):
            key = (row["side"], row["what"], row["type"])
            seconds[key].append(float(row["seconds"]))
            peaks[key] = max(peaks[key], int(row["peak_bytes"]))
    print("| model | pentimento | diffusers | ratio | required | peak memory |")
    print("|---|---|---|---|---|---|")
    for ours, theirs, limit in PAIRS:
        if not seconds[ours] or not seconds[theirs]:
            continue
        a, b = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
        required = "" if limit is None else f"at most {limit}"
        memory = f"{peaks[ours] / 1e9:.2f} GB against {peaks[theirs] / 1e9:.2f} GB"
        print(f"| {ours[1]} | {ours[2]} {a:.3f} s | {theirs[2]} {b:.3f} s | {a / b:.2f} | {required} | {memory} |")


if __name__ == "__main__":
    main()
