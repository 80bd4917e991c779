#!/usr/bin/env python3
"""Print medians, peak memory and ratios from compare.sh's raw.csv as a Markdown table."""

import csv
import statistics
import sys
from collections import defaultdict

# Ours against theirs, and how many times as fast the first is meant to be.
PAIRS = [
    (("pentimento", "transformer", "q8_0"), ("diffusers", "transformer", "bf16"), 3.0),
    (("pentimento", "transformer", "q4_k"), ("diffusers", "transformer", "bf16"), None),
    (("pentimento", "transformer", "q8_0"), ("stable-diffusion.cpp", "transformer", "q8_0"), 6.0),
    (("pentimento", "transformer", "q8_0"), ("stable-diffusion.cpp", "transformer", "q8_0-fa"), 6.0),
    (("pentimento", "transformer", "bf16"), ("diffusers", "transformer", "bf16"), None),
    (("pentimento", "transformer", "f32"), ("diffusers", "transformer", "f32"), None),
    (("pentimento", "encode", "f32"), ("diffusers", "encode", "f32"), 3.0),
    (("pentimento", "decode", "f32"), ("diffusers", "decode", "f32"), 3.0),
]


def main() -> None:
    seconds, peaks = defaultdict(list), defaultdict(int)
    with open(sys.argv[1], newline="") as file:
        for row in csv.DictReader(file):
            key = (row["side"], row["what"], row["type"])
            seconds[key].append(float(row["seconds"]))
            peaks[key] = max(peaks[key], int(row["peak_bytes"]))
    print("| work | pentimento | peer | times as fast | meant | peak memory |")
    print("|---|---|---|---|---|---|")
    for ours, theirs, goal in PAIRS:
        if not seconds[ours] or not seconds[theirs]:
            continue
        a, b = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
        meant = "" if goal is None else f"{goal:g}"
        memory = f"{peaks[ours] / 1e9:.2f} GB against {peaks[theirs] / 1e9:.2f} GB"
        print(
            f"| {ours[1]} | {ours[2]} {a:.3f} s | {theirs[0]} {theirs[2]} {b:.3f} s "
            f"| {b / a:.2f} | {meant} | {memory} |"
        )


if __name__ == "__main__":
    main()
