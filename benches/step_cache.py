"""What --cache-mode first-block costs and saves on the miniature pack.

    benches/step_cache.py [CASES A ROW] [STEPS] [SEED]

One line a threshold: processor seconds of the run, predictions that were left out, pictures that are
exactly right by the strict readout, mean error outside the edited places. Needs a release build.
"""
import json, resource, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
count, steps, seed = (sys.argv[1:] + ["30", "20", "7"][len(sys.argv) - 1:])[:3]


def line(name, *flags):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [ROOT / "target/release/pentimento", "eval", "scenes", "--only", "single", "--count", count,
               "--steps", steps, "--seed", seed, "--json", "--quiet", *flags]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    reuse, single = report.get("reuse", {"reused": 0, "of": 0}), report["single"]
    print(f"{name:>5}  {after.ru_utime - before.ru_utime:6.1f} s  left out {reuse['reused']} of {reuse['of']}  "
          f"exact {single['all']['right']} of {single['all']['of']}  "
          f"outside {single['outside_error_levels']:.2f} levels", flush=True)


line("off")
for threshold in ["0.05", "0.1", "0.2", "0.3", "0.5"]:
    line(threshold, "--cache-mode", "first-block", "--cache-option", f"threshold={threshold}")
