"""Stretches of text tokenised one by one, such that their tokens joined are the tokens of one running text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lora_ft.data.encoder import BatchEncoder
from lora_ft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (("Hello", " world"), ("(", "a"), ("1", "b"), (":", "yes"), ("Hello", "\n"), (".", "Q"))
"""Texts in two halves; where a token ends with the first half, continuing it must give the tokens of the second."""
ANCHORS = ("", "\ue000", "\n")
"""Texts to continue behind, by preference: none, what merges with nothing, what every vocabulary has."""


class PieceEncoder:
    """Tokenises pieces of text with a fast tokenizer, without special tokens of its own.

    SentencePiece-like tokenizers put a space before whatever they are given. A piece that goes on where another ended
    must not get one, so that such pieces are tokenised behind an anchor, whose tokens are then taken away. Behind a
    special token the anchor is that token, since some tokenizers put a space there too.

        whole     "Hello world"      ▁Hello ▁world
        alone     "world"            ▁world
        anchored  "\\ue000 world"     ▁ <0xEE> <0x80> <0x80> | ▁world
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            rule = "The tokenizer has no fast form (tokenizer.json), without which rows cannot be cut exactly."
            raise UserError("model.base", type(tokenizer).__name__, rule, "Choose a base that has one.")
        self._backend = tokenizer.backend_tokenizer
        self._ids = BatchEncoder(self._backend).encode
        self._begin_ids, self._bos = find_frame(tokenizer)[0], tokenizer.bos_token
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added_at_end = re.compile(f"(?:{'|'.join(map(re.escape, added)) or '(?!)'})$")
        self._anchor = self._find_anchor()
        self._anchor_lengths = {anchor: len(self._ids([anchor])[0]) for anchor in (*ANCHORS, *added)}

    def begin_ids(self, text: str) -> list[int]:
        """What the tokenizer puts before a plain text (BOS, mostly); nothing where the text brings its own."""
        return [] if self._bos and text.startswith(self._bos) else self._begin_ids

    def encode(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of every piece of every row; a row's pieces are one running text."""
        if not self._anchor:
            known = self._known_ids(piece for row in rows for piece in row)
            return [[known[piece] for piece in row] for row in rows]
        anchors = [["", *map(self._anchor_behind, row[:-1])][: len(row)] for row in rows]
        paired = [list(zip(*row, strict=True)) for row in zip(anchors, rows, strict=True)]
        known = self._known_ids(anchor + piece for row in paired for anchor, piece in row)
        return [[known[anchor + piece][self._anchor_lengths[anchor] :] for anchor, piece in row] for row in paired]

    def _anchor_behind(self, piece: str) -> str:
        special = self._added_at_end.search(piece)
        return special.group() if special else self._anchor

    def _known_ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of each text; what comes again and again (the end of a turn, a system prompt) is tokenised once."""
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, self._ids(unique), strict=True))

    def _find_anchor(self) -> str:
        for anchor in ANCHORS:
            if all(self._continues(anchor, left, right) for left, right in PROBES):
                return anchor
        rule = "The tokenizer cannot go on in the middle of a text, so that an answer's tokens are not known."
        raise UserError("model.base", None, rule, "Choose a base with another tokenizer.")

    def _continues(self, anchor: str, left: str, right: str) -> bool:
        """Whether `right` behind `anchor` has the tokens it has behind `left`; true where no token ends with `left`."""
        whole = self._backend.encode(left + right, add_special_tokens=False)
        before = next((i for i, (start, _) in enumerate(whole.offsets) if start == len(left)), None)
        if before is None or whole.ids[:before] != self._ids([left])[0]:
            return True
        anchor_ids, anchored = self._ids([anchor, anchor + right])
        return anchored == anchor_ids + whole.ids[before:]


def find_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a plain text: `<s>`, `[CLS]`; `</s>`, `[SEP]`; often nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
    return dressed[:start], dressed[start + len(bare) :]
