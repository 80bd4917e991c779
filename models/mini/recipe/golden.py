"""Writes what ports of the world must reproduce: requests, plans and pixel hashes of some seeds."""
import json
import sys
from pathlib import Path

import world


def fnv1a(data):
    """64-bit FNV-1a hash, as hexadecimal digits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & world.MASK
    return f"{value:016x}"


def row(seed, **how):
    case = world.sample_case(seed, **how)
    before, after = world.render(case.scene), world.render(case.target)
    return dict(seed=seed, **how, request=case.request, sub_requests=world.sub_requests(case), tags=world.tags(case),
                clause_ends=case.clause_ends, input=fnv1a(before.tobytes()), target=fnv1a(after.tobytes()))


def main(path):
    rows = [row(seed) for seed in range(20)]
    rows += [row(100 + i, count=1, op=o["name"], style=s) for i, o in enumerate(world.OPERATIONS) for s in ("direct", "indirect", "picture")]
    rows += [row(world.held_out_seed(9, i), count=i % 4, style="any", held_out=True) for i in range(12)]
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
