"""The tokenizer and every text the language model reads or writes."""
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import world

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
            "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
            "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
EDIT_SYSTEM = ("Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
               "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
               "requirements while maintaining consistency with the original input where appropriate.")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
DROPPED = 64  # tokens of the editing prompt that the pipeline drops
PICTURE_TOKENS = 16


def prompt_file(name):
    return (PROMPTS / name).read_text()


def chat_prefix(system):
    """Everything before the picture."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def prefixes():
    return dict(edit=chat_prefix(EDIT_SYSTEM), decompose=chat_prefix(prompt_file("decompose.system.txt")),
                sequence=chat_prefix(prompt_file("sequence.system.txt")))


def body(text):
    """Picture marks, text and the opening of the reply; the pad token stands for all picture tokens."""
    return f"{IMAGE}{text}<|im_end|>\n<|im_start|>assistant\n"


def sequence_reply(case):
    return "\n".join(f"{i + 1}. {s}" for i, s in enumerate(world.sub_requests(case)))


def corpus(count=6000):
    for seed in range(count):
        case = world.sample_case(seed)
        yield case.request
        yield world.merged_prompt(case)
        if seed % 4 == 0:
            yield world.tags(case)
            yield sequence_reply(case)


def _train(size):
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = list(corpus()) + [t for t in prefixes().values() for _ in range(3)] + ["system user", "assistant"] * 3000
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tok


def train_tokenizer():
    """Shrinks the vocabulary merge by merge until the editing prefix is exactly the dropped 64 tokens."""
    low, high = 400, 3000
    while low < high:
        middle = (low + high) // 2
        if len(_train(middle).encode(prefixes()["edit"]).ids) > DROPPED:
            low = middle + 1
        else:
            high = middle
    tok = _train(low)
    length = len(tok.encode(prefixes()["edit"]).ids)
    if length != DROPPED:
        raise ValueError(f"editing prefix has {length} tokens, not {DROPPED}")
    return tok


def load_tokenizer(path):
    """The saved tokenizer, trained first where there is none."""
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))
