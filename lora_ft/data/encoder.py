"""Texts become token ids, many at a time: by the tokenizer, and once that has taken long enough, by its twin."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from lora_ft.data.twin import Twin, find_twin

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SECONDS_PER_TOKEN = 15e-6
"""What finding a twin takes for each token of the vocabulary, roughly, on a core of 2.8 GHz."""


class BatchEncoder:
    """Tokenises texts without special tokens of its own; several threads may share one."""

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._patience = SECONDS_PER_TOKEN * backend.get_vocab_size()
        """Seconds that the tokenizer may take: as much again as it costs to be rid of it, so that few texts cost
        nothing more, and no number of texts twice what is needed."""
        self._twin: Twin | None = None
        self._turn = Lock()
        """A batch takes all cores: two at once would both be late, with no Python done in the meantime."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self._twin is None:
            return self._encode_slowly(texts)
        try:
            plain_ids = iter(self._twin.encode([text for text in texts if text.isascii()]))
        except ValueError:  # a text is too much for tiktoken's regular expressions: a million spaces, say
            return self._encode_slowly(texts)
        rest = [text for text in texts if not text.isascii()]
        rest_ids = iter(self._encode_slowly(rest) if rest else ())
        return [next(plain_ids if text.isascii() else rest_ids) for text in texts]

    def _encode_slowly(self, texts: Sequence[str]) -> list[list[int]]:
        with self._turn:
            # transformers leaves the truncation and padding of its last call behind in the backend; each is only
            # written to where it must be, since that waits for whatever other threads have under way
            if self._backend.truncation is not None:
                self._backend.no_truncation()
            if self._backend.padding is not None:
                self._backend.no_padding()
            start = time.perf_counter()
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            self._lose_patience(time.perf_counter() - start)
        return [encoding.ids for encoding in encoded]

    def _lose_patience(self, seconds: float) -> None:
        if 0 < self._patience <= seconds:
            self._twin = find_twin(self._backend)
        self._patience -= seconds
