#!/usr/bin/env python3
"""Time one whole edit with each program on the same files, in turn: pentimento and stable-diffusion.cpp.

    whole_edit.py FOLDER PENTIMENTO SD_CLI [--steps 2] [--rounds 1] [--side 512] [--raw RAW.csv]

FOLDER comes from make_full_size.py: a transformer, a language model with its vision tower and an autoencoder as
users have them, with random weights. PENTIMENTO and SD_CLI are the programs; `-` leaves one out. Each edit is a
process of its own, from its start to the picture in its file: no planner, no guidance, two threads. The
first process of each program reads the files from the disk if the system does not hold them; read them
before (`cat FOLDER/* >/dev/null`) where they fit.

Prints seconds of the whole process, of its stages as it tells them, and its peak of resident memory.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

THREADS = "2"
# What stable-diffusion.cpp calls the stages, and how it tells their time.
PEER_STAGES = [
    ("load", r"loading tensors completed, taking ([\d.]+)(m?s)"),
    ("condition", r"get_learned_condition completed, taking ([\d.]+) ?(m?s)"),
    ("encode", r"encode_first_stage completed, taking ([\d.]+) ?(m?s)"),
    ("denoise", r"sampling completed, taking ([\d.]+) ?(m?s)"),
    ("decode", r"decode_first_stage completed, taking ([\d.]+) ?(m?s)"),
]


def picture(path, side):
    """A ramp with some texture, as PPM."""
    rows = bytearray(f"P6 {side} {side} 255\n".encode())
    for y in range(side):
        for x in range(side):
            rows += bytes(((x * 255) // side, (y * 255) // side, (x * x + y * y) % 256))
    path.write_bytes(rows)


def run(command):
    """Output of a process, its seconds and its peak of resident memory in bytes."""
    begin = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - begin
    if status != 0:
        raise SystemExit(f"{command[0]} ended with {status}:\n{output[-2000:]}")
    return output, seconds, usage.ru_maxrss * 1024


def ours(program, folder, image, out, options):
    output, seconds, peak = run([
        program, "edit", "-i", image, "-o", out, "--force", "--json", "--strategy", "direct",
        "-p", "make the coat red", "--seed", "1", "--steps", str(options.steps), "--threads", THREADS,
        "-W", str(options.side), "-H", str(options.side),
        "--diffusion-model", folder / "qwen-image-edit-2511-Q4_K.gguf",
        "--llm", folder / "Qwen2.5-VL-7B-Instruct-Q4_K.gguf",
        "--mmproj", folder / "mmproj-F16.gguf", "--vae", folder / "qwen_image_vae.safetensors",
    ])
    report = json.loads(output[output.index("{"):output.rindex("}") + 1])
    stages = {stage["stage"]: stage["elapsed_ms"] / 1e3 for stage in report["stages"]}
    return seconds, peak, stages


def peer(program, folder, image, out, options):
    output, seconds, peak = run([
        program, "-r", image, "-o", out, "-p", "make the coat red", "-s", "1", "-t", THREADS, "-v",
        "--steps", str(options.steps), "-W", str(options.side), "-H", str(options.side),
        "--cfg-scale", "1", "--sampling-method", "euler", "--diffusion-fa", "--qwen-image-zero-cond-t",
        "--diffusion-model", folder / "qwen-image-edit-2511-Q4_K.gguf",
        "--llm", folder / "Qwen2.5-VL-7B-Instruct-Q4_K.gguf",
        "--llm_vision", folder / "mmproj-F16.gguf", "--vae", folder / "qwen_image_vae.safetensors",
    ])
    stages = {}
    for name, pattern in PEER_STAGES:
        for number, unit in re.findall(pattern, output):
            stages[name] = stages.get(name, 0) + float(number) / (1000 if unit == "ms" else 1)
    return seconds, peak, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pentimento")
    parser.add_argument("sd_cli")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--raw", type=Path)
    options = parser.parse_args()
    sides = [("pentimento", options.pentimento, ours), ("stable-diffusion.cpp", options.sd_cli, peer)]
    rows = [["side", "what", "seconds", "peak_bytes"]]
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "in.ppm"
        picture(image, options.side)
        for _ in range(options.rounds):
            for name, program, edit in sides:
                if program == "-":
                    continue
                out = Path(scratch) / "out.png"
                seconds, peak, stages = edit(program, options.folder, image, out, options)
                rows.append([name, "whole", f"{seconds:.2f}", peak])
                rows += [[name, stage, f"{taken:.2f}", ""] for stage, taken in stages.items()]
                for row in rows[-1 - len(stages):]:
                    print(*row, sep=",", flush=True)
    if options.raw:
        with options.raw.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
