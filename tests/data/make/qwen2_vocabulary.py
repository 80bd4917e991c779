"""The real Qwen2 vocabulary and what transformers makes of some texts. usage: qwen2_vocabulary.py GGUF OUT

GGUF is ggml-vocab-qwen2.gguf of llama.cpp (models/, with its .inp and .out cases beside it). In this vocabulary token
256 + i is the two parts of merge i put together, and the first 256 are the bytes, so the merges hold all of it.
"""
import gzip, json, os, random, shutil, sys, tempfile
import gguf
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
            "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
            "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
PLAIN = {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}

TEXTS = [
    "<|im_start|>system\nDescribe the image.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>make the coat red<|im_end|>\n<|im_start|>assistant\n",
    "Picture 1: <|vision_start|><|image_pad|><|image_pad|><|vision_end|>", "<tool_call>{\"name\": \"edit\"}</tool_call>", "<|im_start|", "< |im_end|>",
    "It's I'm we'll THEY'RE don't He'D", "'S 'ſ 'll'LL", "12345 6.78e-9 ١٢٣ ½ Ⅷ", "    four spaces", "tab\t\ttab \t ", "a\r\nb\n\n\nc\r\r d \n \n", "\n \n  x", "x   ",
    "e\u0301 vs \u00e9; \u1100\u1161\u11a8 vs \uac01; A\u030a", "\ufb01 \u00b2 \u2126 \u212b", "你好，世界！修改图像。", "日本語のテキスト", "한국어 텍스트", "नमस्ते दुनिया", "مرحبا بالعالم", "שלום עולם", "Ελληνικά Русский ไทย",
    "🙂👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 \U0001f999", "zero\u200bwidth\u200djoin\ufeffbom", "nbsp\u00a0x\u3000y\u2003z\u0085w\u2028v", "\x00\x01\x7f\x80", "\ud7ff\ue000\uffff\U0010ffff",
    "def f(x):\n    return {\"a\": [1, 2, 3]}  # comment\n", "https://example.org/a?b=c&d=%20#e", "C:\\path\\file.txt", "!!!??? ...---___===", "a" * 300, " " * 300, "ab" * 150, "\n" * 100, "中" * 120,
    "ᠠᠡ 𝒳𝓎 𐍈 ꙮ ﷽", "naïve café Ünïcödé ẞß İı ǅ", "",
]


def random_texts(count):
    r = random.Random(11)
    ranges = [(32, 126), (9, 13), (160, 255), (0x300, 0x36f), (0x400, 0x4ff), (0x4e00, 0x9fff), (0x1f300, 0x1f6ff), (0x2000, 0x206f), (0xac00, 0xd7a3), (48, 57)]
    for _ in range(count):
        kinds = r.sample(ranges, r.randint(1, 4))
        yield "".join(chr(r.randint(*r.choice(kinds))) for _ in range(r.randint(1, 40)))


gguf_path, out = sys.argv[1], sys.argv[2]
os.makedirs(out, exist_ok=True)
reader = gguf.GGUFReader(gguf_path)
strings = lambda name: [bytes(reader.fields[name].parts[i]).decode() for i in reader.fields[name].data]
tokens, merges = strings("tokenizer.ggml.tokens"), strings("tokenizer.ggml.merges")
alphabet = list(bytes_to_unicode().values())
vocab = {t: i for i, t in enumerate(alphabet + [m.replace(" ", "") for m in merges])}
assert list(vocab) == tokens[: len(vocab)]

with gzip.GzipFile(os.path.join(out, "merges.txt.gz"), "wb", 9, mtime=0) as f:
    f.write(("#version: 0.2\n" + "\n".join(merges) + "\n").encode())
for kind in ("inp", "out"):
    shutil.copy(f"{gguf_path}.{kind}", os.path.join(out, f"llama_cpp.{kind}"))
decoder = {str(len(vocab) + i): dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=s not in PLAIN) for i, s in enumerate(SPECIALS)}
config = dict(add_prefix_space=False, added_tokens_decoder=decoder, additional_special_tokens=[s for s in SPECIALS[1:14]], bos_token=None, eos_token="<|im_end|>",
              pad_token="<|endoftext|>", unk_token=None, tokenizer_class="Qwen2Tokenizer", errors="replace", split_special_tokens=False, model_max_length=131072)
json.dump(config, open(os.path.join(out, "tokenizer_config.json"), "w"), indent=1)

with tempfile.TemporaryDirectory() as folder:
    json.dump(vocab, open(os.path.join(folder, "vocab.json"), "w"), ensure_ascii=False)
    open(os.path.join(folder, "merges.txt"), "w").write("#version: 0.2\n" + "\n".join(merges) + "\n")
    shutil.copy(os.path.join(out, "tokenizer_config.json"), folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
cases = []
for text in TEXTS + list(random_texts(200)):
    ids = tokenizer(text)["input_ids"]
    cases.append(dict(text=text, ids=ids, decoded=tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)))
json.dump(cases, open(os.path.join(out, "cases.json"), "w"), ensure_ascii=True, separators=(",", ":"))
print(len(vocab), len(cases), {s: tokenizer.convert_tokens_to_ids(s) for s in SPECIALS[:3] + ["<|image_pad|>"]})
