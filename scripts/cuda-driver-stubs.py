#!/usr/bin/env python3
"""Print C functions for all names of CUDA's driver, each with the same body.

    cuda-driver-stubs.py cuda.h BODY [WRITTEN.c]

Names that WRITTEN.c has already are left out. `__func__` in BODY is a function's own name.
"""

import re
import sys

header, body, *written = sys.argv[1:]
header = open(header).read()
names = set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", header))
for macro, target in re.findall(r"#define\s+(cu\w+)\s+(?:__CUDA_API_PTD?S?Z?\()?(cu\w+)", header):
    names |= {macro, target}
for path in written:
    names -= set(re.findall(r"\b(cu[A-Z]\w*)\(", open(path).read()))
for name in sorted(names):
    print(f"int {name}(void) {{ {body} }}")
