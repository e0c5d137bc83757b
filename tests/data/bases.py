"""Small tokenizers with the chat templates, special tokens and habits of well-known families."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"

SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": [
        "<|endoftext|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        AddedToken("<|end|>", rstrip=True, special=True),
    ],
}
"""Special tokens of each family."""
ENDS = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"},
    "phi3": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
FAMILY = {"chatml_marked": "chatml", "qwen3": "chatml"}
"""Templates that go with another family's tokens."""
TERMINATOR = {
    "chatml": "<|im_end|>",
    "chatml_marked": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "phi3": "<|end|>",
}
MAIN = ("chatml", "chatml_marked", "llama3", "mistral", "gemma")
"""Templates that take every kind of conversation."""
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's own pattern: line breaks stay together, so that a border between two is merged over."""
TEXT = [
    "Hello you, what is the answer? The answer is yes: no\n\nNo.\n\n12 + 30 = 42 “quotes” café naïve 日本語 😀",
    "user assistant system model tool name parameters Today Date: 26 Jul 2024 {}[]\"'` <think></think> call",
    "Instruction Input Response question context answer spam ham ### the weather in Paris is mild and dry today",
]


def read_template(name: str) -> str:
    """The Jinja text of a template in `templates/`."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(template: str | None, family: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as Llama 3, Qwen and GPT-2 have; it puts its BOS, if any, before plain text."""
    family = family or FAMILY.get(template, template)
    return _finish(_train_bytes(family), template, family)


def make_sentencepiece(template: str | None, family: str, habit: str) -> PreTrainedTokenizerFast:
    """One that writes spaces as ▁ and puts one first: `always`, at the `first` piece, or like `legacy` Llama 2."""
    return _finish(_train_sentencepiece(family, habit), template, family)


def _finish(core: str, template: str | None, family: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core), **ENDS[family])
    tokenizer.chat_template = read_template(template) if template else None
    return tokenizer


@cache
def _train_bytes(family: str) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return _train(core, family, SPECIAL[family], pre_tokenizers.ByteLevel.alphabet())


@cache
def _train_sentencepiece(family: str, habit: str) -> str:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if habit == "legacy" else habit)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    letters = {character for text in TEXT for character in text if character.isascii() and not character.isspace()}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(core, family, [*SPECIAL[family], "<unk>", *bytes_], [*sorted(letters), "▁"])
    if habit == "legacy":
        core.pre_tokenizer = pre_tokenizers.Sequence([])
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return core.to_str()


def _train(core: Tokenizer, family: str, special: list, alphabet: list) -> str:
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXT * 4, trainer)
    if bos := ENDS[family].get("bos_token"):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return core.to_str()
