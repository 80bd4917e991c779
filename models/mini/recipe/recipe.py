"""Makes the miniature pack: autoencoder, language model, transformer, export, check. Run it again to go on after a stop.

    python recipe.py            # the pack, into the folder above this one
    python recipe.py --from-pack --stages lm dit export check   # goes on from the pack that is there
    python recipe.py --smoke    # every stage for a few seconds, into the run folder; proves that the recipe runs
"""
import argparse
import os
import shutil
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import check  # noqa: E402  (the thread limits above must come first)
import export  # noqa: E402
import packed  # noqa: E402
import train_dit  # noqa: E402
import train_lm  # noqa: E402
import train_vae  # noqa: E402
import warm  # noqa: E402
from training import launch  # noqa: E402

HERE = Path(__file__).resolve().parent
STAGES = ("vae", "lm", "dit", "export", "check")
BUDGETS_S = dict(vae=1400, lm=1800, dit=7200)  # processor seconds of one process
CASES = dict(vae=300, lm=200, dit=50, check=30)
SMOKE_S = dict(vae=4, lm=4, dit=4)
SMOKE_CASES = dict(vae=4, lm=4, dit=2, check=1)


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=HERE.parents[2] / "checkpoints" / "mini", help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder of the pack")
    parser.add_argument("--processes", type=int, default=2, help="one-thread processes that train together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--budget", type=float, help="processor seconds per training stage, instead of the recipe's")
    parser.add_argument("--from-pack", action="store_true", help="fill the run folder from the pack in --out first")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def train(stage, args, budgets, cases):
    module = dict(vae=train_vae, lm=train_lm, dit=train_dit)[stage]
    budget = args.budget or budgets[stage]
    launch(module.train, (str(args.run), budget, cases[stage]), args.processes)


def main():
    args = options()
    budgets, cases = (SMOKE_S, SMOKE_CASES) if args.smoke else (BUDGETS_S, CASES)
    if args.smoke:
        args.run = args.run / "smoke"
        shutil.rmtree(args.run, ignore_errors=True)
        args.out = args.run / "pack"
    args.run.mkdir(parents=True, exist_ok=True)
    packed.unpack(args.out)
    if args.from_pack:
        warm.from_pack(args.out, args.run)
    for stage in args.stages:
        if stage in budgets:
            train(stage, args, budgets, cases)
        elif stage == "export":
            export.main(args.run, args.out)
        else:
            check.main(args.out, cases["check"])


if __name__ == "__main__":
    main()
