"""A tokenizer's twin in tiktoken: the same tokens for a sixth of the processor time, where that is proved beforehand.

A byte-level tokenizer splits text by a regular expression, and merges the bytes of each part pair by pair. It takes the
pair that stands first in its list of merges; tiktoken takes the pair that makes the token of the lowest number,
whether the list has it or not. Both do the same if

    - the list has its merges in the order of the tokens that they make, and
    - each token's own text is merged to that token.

For what stands between two borders that no merge has crossed is merged as if it stood alone. So, once all merges before
those of a token are done, two neighbours that spell it are what its own text is by then: a pair in the list. Any other
pair that would make a token never stands side by side.

Both conditions are looked at, and so are the parts of a tokenizer. Regular expressions are tried on text at random.
Only ASCII is given to the twin, since two libraries may know different editions of Unicode.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How `ByteLevel` splits text where it does so by itself."""
PLAIN_PATTERN = re.compile(
    r"(?!.*[\d,]\}\+)(?:\\p\{\w+\}|\\[sSrn]|\(\?(?:i:|:|!)|\((?!\?)|\[\^?|[^\\(\[^$.])*", re.ASCII | re.DOTALL
)
"""Expressions of what all libraries read alike: no anchors, no looking behind, no `{1,3}+`, no escapes of their own."""
PLAIN_ASCII = (None, "NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that leave ASCII as it is."""
SEPARATOR = "\ue000"
"""Stands between texts; no text has it, since all are ASCII."""
NUM_PROBES, PROBE_CHARACTERS = 2000, 24
PROBE_ALPHABET = [chr(number) for number in range(128)] + list("  \n\n\r\t''asTZ09.,!-_<|>") * 8


class Twin:
    """Tokenises ASCII texts as their tokenizer does, outside of Python's lock."""

    def __init__(self, encoding: Encoding):
        """`encoding` knows SEPARATOR as its token with the highest number."""
        self._encoding = encoding

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, all of them ASCII, without special tokens that it does not spell."""
        if not texts:
            return []
        joined = SEPARATOR.join(texts)
        ids = self._encoding.encode_to_numpy(joined, allowed_special="all", disallowed_special=())
        borders = np.flatnonzero(ids == self._encoding.max_token_value).tolist()
        flat = ids.tolist()
        return [flat[start + 1 : end] for start, end in pairwise([-1, *borders, len(flat)])]


def find_twin(backend: Tokenizer) -> Twin | None:
    """The tokenizer's twin; None where it has parts that tiktoken has not, or where the two might differ."""
    from tiktoken import Encoding

    described = orjson.loads(backend.to_str())
    pattern = find_pattern(described["normalizer"], described["pre_tokenizer"])
    special = find_special(described["added_tokens"])
    if pattern is None or special is None or backend.encode_special_tokens:
        return None
    added = {token["content"] for token in described["added_tokens"]}
    ranks = find_ranks(described["model"], added)
    if ranks is None:
        return None
    separator = 1 + max(*ranks.values(), *special.values(), 0)
    try:
        encoding = Encoding(
            "twin", pat_str=pattern, mergeable_ranks=ranks, special_tokens={**special, SEPARATOR: separator}
        )
    except ValueError:  # an expression that tiktoken's library does not know
        return None
    twin, probes = Twin(encoding), make_probes(list(special))
    expected = [found.ids for found in backend.encode_batch_fast(probes, add_special_tokens=False)]
    return twin if twin.encode(probes) == expected else None


def find_pattern(normalizer: Mapping[str, Any] | None, splitter: Mapping[str, Any] | None) -> str | None:
    """The regular expression that splits ASCII text, if nothing else is done to the text before bytes are merged."""
    if (normalizer and normalizer["type"]) not in PLAIN_ASCII or splitter is None:
        return None
    *before, last = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) != (not last["use_regex"]):
        return None
    if not before:
        return GPT2_PATTERN
    (split,) = before
    is_isolated = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    pattern = split["pattern"].get("Regex") if is_isolated else None
    return pattern if pattern and is_plain(pattern) else None


def is_plain(pattern: str) -> bool:
    """Whether tiktoken is sure to read the expression as the tokenizer does, and no match is empty."""
    import regex

    return PLAIN_PATTERN.fullmatch(pattern) is not None and regex.fullmatch(pattern, "") is None


def find_special(added: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Numbers of the added tokens that ASCII text can spell; None where it is not plain where one begins and ends."""
    found = {token["content"]: token["id"] for token in added if token["content"].isascii()}
    takes_more = any(token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word"))
    begins, within = {text[:1] for text in found}, {character for text in found for character in text[1:]}
    is_prefix = any(longer.startswith(text) for text, longer in pairwise(sorted(found)))
    return None if takes_more or begins & within or is_prefix else found


def find_ranks(model: Mapping[str, Any], added: set[str]) -> dict[bytes, int] | None:
    """The number of each token by its bytes, where the two conditions hold."""
    from tokenizers import Tokenizer, models
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model[name] for name in odd):
        return None
    byte_of = {character: number for number, character in bytes_to_unicode().items()}
    numbers = {token: number for token, number in model["vocab"].items() if token not in added}
    if not byte_of.keys() <= numbers.keys() or not byte_of.keys() >= set("".join(numbers)):
        return None
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    made = [numbers.get("".join(pair), -1) for pair in merges]
    in_order = all(before <= after for before, after in pairwise([0, *made]))
    if not in_order or not numbers.keys() >= {part for pair in merges for part in pair}:
        return None
    merged = Tokenizer(models.BPE(numbers, merges)).encode_batch_fast(list(numbers), add_special_tokens=False)
    if any(found.ids != [number] for found, number in zip(merged, numbers.values(), strict=True)):
        return None
    return {bytes(map(byte_of.__getitem__, token)): number for token, number in numbers.items()}


def make_probes(special: Sequence[str]) -> list[str]:
    """Texts at random, the same every time; control characters, white space and special tokens are frequent."""
    dice = random.Random(0)
    pool = [*PROBE_ALPHABET, *special[:8]]
    return ["".join(dice.choices(pool, k=dice.randint(1, PROBE_CHARACTERS))) for _ in range(NUM_PROBES)]
