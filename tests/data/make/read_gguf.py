"""Reads GGUF files with gguf-py and shows what is in them. usage: read_gguf.py FILE…

Needs gguf 0.19. Fails on a file that gguf-py does not read, or whose numbers are not finite."""
import collections, sys
import gguf, numpy as np
from gguf import quants

for path in sys.argv[1:]:
    reader = gguf.GGUFReader(path)
    kinds = collections.Counter()
    for tensor in reader.tensors:
        numbers = quants.dequantize(tensor.data, tensor.tensor_type)
        assert numbers.size == tensor.n_elements and np.isfinite(numbers).all(), tensor.name
        kinds[tensor.tensor_type.name] += 1
    general = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
    print(path, dict(kinds), general)
