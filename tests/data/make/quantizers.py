"""What ggml's quantizers make of a matrix. usage: quantizers.py GGML_LIBRARIES OUT

GGML_LIBRARIES is the folder with libggml-base.so of llama.cpp (llama-cpp-python 0.3.36's archive). Writes
OUT/quantizers.safetensors: the matrix `x` in bf16 (normal, heavy-tailed and shifted rows of 256), and for each type the bytes
of ggml_quantize_chunk."""
import ctypes, pathlib, sys
import numpy as np, torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from safetensors.torch import save_file

libraries, out = map(pathlib.Path, sys.argv[1:3])
ggml = ctypes.CDLL(str(libraries / "libggml-base.so"))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
                                     ctypes.c_void_p]
ROWS, WIDTH = 24, 256
g = torch.Generator().manual_seed(4)
x = torch.randn(ROWS, WIDTH, generator=g)
x[1::3] /= torch.rand(ROWS // 3, WIDTH, generator=g) * 0.9 + 0.1
x[2::3] += 0.5
x = (x * 0.03).to(torch.bfloat16)
wide = np.ascontiguousarray(x.float().numpy())
tensors = {"x": x}
for name in "q8_0 q6_k q5_k q5_0 q5_1 q4_k q4_0 q4_1 q3_k q2_k".split():
    kind = T[name.upper()]
    block, size = GGML_QUANT_SIZES[kind]
    made = np.zeros(ROWS * WIDTH // block * size, np.uint8)
    assert ggml.ggml_quantize_chunk(int(kind), wide.ctypes.data, made.ctypes.data, 0, ROWS, WIDTH, None) == made.size
    tensors[name] = torch.from_numpy(made)
out.mkdir(parents=True, exist_ok=True)
save_file(tensors, out / "quantizers.safetensors")
