"""A tokenizer's twin in tiktoken: the same tokens, or no twin."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lora_ft.data import encoder
from lora_ft.data.encoder import BatchEncoder
from lora_ft.data.prepare import build_splits
from lora_ft.data.twin import find_twin
from lora_ft.sections import DataSection, SourceSection
from tests.data.bases import LLAMA3_WORDS, SPECIAL, TEXT, make_sentencepiece, make_tokenizer

QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def split_by(pattern: str, behavior: str = "isolated"):
    parts = [pre_tokenizers.Split(Regex(pattern), behavior), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def train(splitter=None, normalizer=None, special=("<|im_end|>",)) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        core.normalizer = normalizer
    names = [text if isinstance(text, str) else text.content for text in special]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=ALPHABET, show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    core.add_special_tokens([text for text in special if not isinstance(text, str)])
    return core


def change(core: Tokenizer, **model) -> Tokenizer:
    """The tokenizer with parts of its model put in place of others."""
    described = json.loads(core.to_str())
    described["model"].update(model)
    return Tokenizer.from_str(json.dumps(described))


def spell_special(core: Tokenizer) -> Tokenizer:
    core.encode_special_tokens = True
    return core


def add_plain(core: Tokenizer, text: str) -> Tokenizer:
    core.add_tokens([text])
    return core


def from_merges(*merges: str) -> Tokenizer:
    """A tokenizer that knows all bytes and these merges, numbered in their order."""
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = dict.fromkeys([*sorted(ALPHABET), *map("".join, pairs)])
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return core


def ids(core: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in core.encode_batch(texts, add_special_tokens=False)]


TWINS = {
    "gpt2": train(),
    "llama3": make_tokenizer("llama3").backend_tokenizer,
    "mistral": make_tokenizer("mistral").backend_tokenizer,
    "gemma": make_tokenizer("gemma").backend_tokenizer,
    "qwen": train(split_by(QWEN_WORDS), normalizers.NFC(), SPECIAL["chatml"]),
    "foreign": train(special=("<｜Assistant｜>", "<|im_end|>")),
    "every pair listed": from_merges("a b", "b c", "ab c", "a bc"),
}


CHARACTERS = [chr(number) for number in range(128)] + list("  \n's1a<|") * 6


@cache
def find_twin_of(name: str):
    return find_twin(TWINS[name])


@pytest.mark.parametrize("name", TWINS)
@given(texts=st.lists(st.text(st.sampled_from(CHARACTERS), max_size=60), max_size=5))
def test_twins_give_the_same_tokens(name, texts):
    texts = [*texts, "".join(f"{text}<|im_end|>" for text in texts), "abc aabcc bcab", "</s>[INST]<s>"]
    assert find_twin_of(name).encode(texts) == ids(TWINS[name], texts)


OTHERS = {
    "spaces as ▁": lambda: make_sentencepiece("gemma", "gemma", "always").backend_tokenizer,
    "white space belongs to a special token": lambda: make_tokenizer("phi3").backend_tokenizer,
    "only whole words are special": lambda: train(special=(AddedToken("<|im_end|>", single_word=True),)),
    "a special token begins as another does": lambda: train(special=("<|a|>", "<|a|>b")),
    "a special token begins within another": lambda: train(special=("<|a<|", "<|b|>")),
    "a space first": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "a string, no expression": lambda: train(
        pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False)])
    ),
    "split twice": lambda: train(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])),
    "not split": lambda: train(pre_tokenizers.ByteLevel(False, use_regex=False)),
    "what splits is left out": lambda: train(split_by(r"\s+", "removed")),
    "parts that no match covers": lambda: train(split_by(r"[a-z]+")),
    "an expression that tiktoken might not know": lambda: train(split_by(r"(?~x)|x")),
    "an expression that tiktoken might read otherwise": lambda: train(split_by(r"a+$|[\s\S]")),
    "a count that is possessive in one of the two": lambda: train(split_by(r"\p{N}{1,3}+|[\s\S]")),
    "empty matches": lambda: train(split_by(r"a*|[\s\S]")),
    "special tokens are plain text": lambda: spell_special(train()),
    "lower case": lambda: train(normalizer=normalizers.Lowercase()),
    "chance": lambda: change(train(), dropout=0.5),
    "a sign behind words": lambda: change(train(), end_of_word_suffix="#"),
    "no merges at all": lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
    "a byte without a token": lambda: Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])),
    "merges of a token that text never reaches": lambda: add_plain(from_merges("a b", "ab c"), "ab"),
    "merges out of order": lambda: from_merges("a b", "ab c", "a b"),
    "a pair that no merge joins": lambda: from_merges("b c", "a b", "ab c"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_twin_where_they_might_differ(name):
    core = OTHERS[name]()
    if core.pre_tokenizer is None:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_twin(core) is None


def test_why_each_token_must_be_merged_to_itself():
    """a|bc spells a token, but no merge joins the two: tiktoken would."""
    core = OTHERS["a pair that no merge joins"]()
    assert ids(core, ["abc"]) == [[core.token_to_id("a"), core.token_to_id("bc")]]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(encoder, "SECONDS_PER_TOKEN", 1e-12)


def test_the_twin_takes_over_in_the_middle(hasty):
    core = TWINS["llama3"]
    encode = BatchEncoder(core)
    texts = ["Hello you", "café", "", "the weather<|eot_id|>", "日本語", "a  b\n\n"]
    assert encode._twin is None
    found = [encode.encode(texts) for _ in range(3)]
    assert encode._twin is not None
    assert encode.encode([]) == encode._twin.encode([]) == []
    assert found == [ids(core, texts)] * 3


def test_few_texts_need_no_twin():
    encode = BatchEncoder(TWINS["llama3"])
    assert encode.encode(["Hello"]) == ids(TWINS["llama3"], ["Hello"])
    assert encode.encode([]) == []
    assert encode._twin is None


@pytest.mark.parametrize("text", [" " * 2_000_000 + "x", "\n" * 1_000_000, "a" * 300_000, "<|im_en" * 50_000])
def test_long_runs_are_no_trap(text, hasty):
    """tiktoken gives up on a million spaces; the tokenizer does not."""
    encode = BatchEncoder(TWINS["qwen"])
    encode.encode(["Hello"])
    assert encode._twin is not None
    assert encode.encode(["Hello", text]) == ids(TWINS["qwen"], ["Hello", text])


def test_truncation_left_behind_cuts_nothing(hasty):
    tokenizer = make_tokenizer("llama3")
    encode = BatchEncoder(tokenizer.backend_tokenizer)
    for _ in range(3):
        tokenizer(["the weather in Paris"] * 2, truncation=True, max_length=3, padding="max_length")
        assert [len(found) > 3 for found in encode.encode(["the weather in Paris", "café is what the answer"])] == [
            True
        ] * 2


def test_threads_share_one(hasty):
    core = TWINS["gpt2"]
    encode = BatchEncoder(core)
    batches = [
        [f"{text} {number} ü" if number % 3 else f"{number} {text[:9]}" for text in TEXT] for number in range(60)
    ]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode.encode, batches)) == [ids(core, batch) for batch in batches]


def test_prepared_rows_are_the_same(hasty, monkeypatch, tmp_path):
    """With a twin from the second chunk on, and without one."""
    rows = [
        f"({number}) the weather in Paris {'é' * (number % 7 == 0)}\n\n{number * 7} is dry" for number in range(2500)
    ]
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": row[5:]}]} for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def prepare(name):
        section = DataSection((SourceSection(str(path)),), cache_dir=str(tmp_path / name))
        splits = build_splits(section, make_tokenizer("chatml"))
        return [getattr(splits, split).data.table for split in ("train", "validation", "test")]

    used = []
    monkeypatch.setattr(encoder, "find_twin", lambda backend: used.append(find_twin(backend)) or used[-1])
    with_twin = prepare("one")
    assert used and used[0] is not None
    monkeypatch.setattr(encoder, "find_twin", lambda backend: None)
    for one, two in zip(with_twin, prepare("two"), strict=True):
        assert pa.Table.equals(one, two)
