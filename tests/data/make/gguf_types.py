"""One tensor of each GGUF type with the numbers that gguf-py reads from it. usage: gguf_types.py OUT

Needs `pip install gguf` (0.19). Writes OUT/types.gguf (two rows of 256 numbers of each type, and a key of each type of
metadata) and OUT/types.safetensors (the same tensors as float32). Quantized blocks are random bytes, redrawn until all their
numbers are finite, so that every bit of a block matters."""
import os, struct, sys
import json
import numpy as np
import gguf
from gguf import GGMLQuantizationType as T, quants

out = sys.argv[1]
os.makedirs(out, exist_ok=True)
rng = np.random.default_rng(20)
ROWS, WIDTH = 2, 256


def blocks(kind):
    """Random rows of blocks, all numbers finite and none zero throughout."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.zeros((ROWS * WIDTH // numbers, size), np.uint8)
    for row in rows:
        while True:
            row[:] = rng.integers(0, 256, size, dtype=np.uint8)
            with np.errstate(all="ignore"):
                if np.isfinite(quants.dequantize(row[None], kind)).all():
                    break
    return rows.reshape(ROWS, -1)


writer = gguf.GGUFWriter(os.path.join(out, "types.gguf"), "test")
for name, value in [("uint8", 200), ("int8", -100), ("uint16", 60000), ("int16", -30000), ("uint32", 4000000000), ("int32", -2000000000),
                    ("float32", 1.5), ("uint64", 2**63 + 5), ("int64", -2**62), ("float64", 0.1), ("bool", True), ("string", "é 你好")]:
    getattr(writer, f"add_{name}")(f"value.{name}", value)
writer.add_array("list.text", ["a", "", "Ġé"])
writer.add_array("list.int", [1, -2, 3])
writer.add_array("list.bool", [True, False])
writer.add_array("list.float", [0.5, 2.25])
writer.add_array("comfy.gguf.orig_shape.shaped", [2, 1, 4, 8, 8])

expected = {}
plain = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
half = plain.astype(np.float16)
brain = quants.quantize(plain, T.BF16)
for name, data, kind, values in [("F32", plain, None, plain), ("F16", half, None, half.astype(np.float32)),
                                 ("BF16", brain, T.BF16, quants.dequantize(brain, T.BF16))]:
    writer.add_tensor(name, data, raw_dtype=kind)
    expected[name] = values
for name in ["Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_K", "Q4_0", "Q4_1", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"]:
    data = blocks(T[name])
    writer.add_tensor(name, data, raw_dtype=T[name])
    expected[name] = quants.dequantize(data, T[name])
    assert expected[name].shape == (ROWS, WIDTH)
data = blocks(T.Q4_K)
writer.add_tensor("shaped", data, raw_dtype=T.Q4_K)
expected["shaped"] = quants.dequantize(data, T.Q4_K).reshape(2, 1, 4, 8, 8)
writer.add_tensor("three.axes", plain[0, :24].reshape(2, 3, 4).copy())
expected["three.axes"] = plain[0, :24].reshape(2, 3, 4)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()

header, at = {}, 0
for name, values in expected.items():
    assert values.dtype == np.float32
    header[name] = dict(dtype="F32", shape=list(values.shape), data_offsets=[at, at + values.nbytes])
    at += values.nbytes
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(os.path.join(out, "types.safetensors"), "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for values in expected.values():
        file.write(np.ascontiguousarray(values).tobytes())
