"""Weight files as other makers write them, and what gguf-py reads from them.
usage: peers.py LLAMA_CPP LLAMA_QUANTIZE SD_CLI OUT

LLAMA_CPP is llama.cpp's source tree (its converter is run), LLAMA_QUANTIZE its program, SD_CLI the program of
stable-diffusion.cpp; both sources are in the archives of llama-cpp-python 0.3.36 and stable-diffusion-cpp-python 0.4.7. Needs
gguf 0.19, torch, diffusers, transformers 5 and numpy. The models are a vision-language model of two layers with random
weights and the tokenizer of tests/data/reference/tiny-qwen-edit, and a transformer of one block with random
weights. Writes GGUF files and, for each, the SHA-256 of every tensor's numbers as little-endian
float32, as gguf-py dequantizes them."""
import hashlib, json, pathlib, shutil, subprocess, sys, tempfile
import gguf, numpy as np, torch
from diffusers import QwenImageTransformer2DModel
from gguf import quants
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

llama, quantize, sd, out = sys.argv[1:5]
here = pathlib.Path(__file__).resolve().parents[1]
out = pathlib.Path(out)
out.mkdir(parents=True, exist_ok=True)
work = pathlib.Path(tempfile.mkdtemp())


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])


# llama.cpp: the language model with llama-quantize, the vision tower as its converter writes it.
torch.manual_seed(11)
folder = work / "hf"
config = Qwen2_5_VLConfig(
    text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                     vocab_size=526, max_position_embeddings=4096, bos_token_id=512, eos_token_id=514,
                     rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])),
    vision_config=dict(depth=3, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[2]),
    image_token_id=524, video_token_id=525, vision_start_token_id=521, vision_end_token_id=522)
model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
model.save_pretrained(folder)
reference = here / "reference" / "tiny-qwen-edit"
for part in ["tokenizer", "processor"]:
    for file in (reference / part).iterdir():
        shutil.copy(file, folder / file.name)
# The converter knows tokenizers by a hash; this one is made for the tests.
driver = work / "driver.py"
driver.write_text(f"""
import sys
sys.path.insert(0, {llama!r})
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
""")
run(sys.executable, driver, folder, "--outfile", work / "llm-f16.gguf", "--outtype", "f16")
run(sys.executable, driver, folder, "--outfile", out / "llama-mmproj-f16.gguf", "--outtype", "f16", "--mmproj")
run(quantize, work / "llm-f16.gguf", out / "llama-q5_1.gguf", "q5_1")

# stable-diffusion.cpp's convert mode.
model = QwenImageTransformer2DModel(patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=32,
                                    num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(8, 12, 12))
model.to(torch.bfloat16).save_pretrained(work / "transformer")
shutil.copy(work / "transformer" / "config.json", out / "config.json")
run(sd, "-M", "convert", "-m", work / "transformer" / "diffusion_pytorch_model.safetensors", "-o", out / "sd-q4_0.gguf",
    "--type", "q4_0")

digests = {}
for file in sorted(out.glob("*.gguf")):
    digests[file.name] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        numbers = quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4")
        digests[file.name][tensor.name] = hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()
(out / "digests.json").write_text(json.dumps(digests, indent=0, sort_keys=True) + "\n")
shutil.rmtree(work)
