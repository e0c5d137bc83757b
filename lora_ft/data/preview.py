"""Rows as the model will see them: each token in the colour of what happens to it.

read     the model is given it
learned  the model is taught to say it; for a classifier, the class behind the text
end      the terminator: the model is taught to stop

Where an encoder reads and a decoder writes, the answer's tokens follow those of the question.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.text import Text

from lora_ft.data.check import check_section
from lora_ft.data.ingest import read_source
from lora_ft.data.render import IGNORE_INDEX, Document, Renderer
from lora_ft.data.sources import Usage, find_source
from lora_ft.data.tasks import build_task
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["read", "learned", "end"]
STYLES: dict[Part, tuple[str, str]] = {
    "read": ("grey46", "grey62"),
    "learned": ("black on green3", "black on light_green"),
    "end": ("bold white on red", "bold white on red"),
}
"""Two styles for each part, for neighbouring tokens in turn."""
COLOURS: dict[Part, str] = {"read": "#f3f3f3", "learned": "#b9efc2", "end": "#ff9c8f"}


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token, or the few that make one character together."""

    text: str
    """What it says."""
    ids: tuple[int, ...]
    """Its ids."""
    part: Part
    """What happens to it."""


@dataclass(frozen=True)
class RowView:
    """One row that will be trained on."""

    place: str
    """Where it stands: `file:line`."""
    tokens: tuple[TokenView, ...]
    """All of it."""
    is_truncated: bool
    """Whether tokens were lost to fit `max_length`."""
    label: str | None = None
    """The class it is of, where that is what is learned."""

    @property
    def summary(self) -> str:
        """Its numbers in one line."""
        num_tokens = sum(len(token.ids) for token in self.tokens)
        num_learned = sum(len(token.ids) for token in self.tokens if token.part != "read")
        learned = f"{num_learned} learned" if self.label is None else f"class {self.label}"
        cut = ", truncated" if self.is_truncated else ""
        return f"{self.place}  {num_tokens} tokens, {learned}{cut}"


def preview_rows(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, count: int = 3, base_folder: Path | None = None
) -> list[RowView]:
    """The first `count` rows of the sources as they are trained on, without preparing the rest.

    Raises:
        UserError: a row among them is bad.
    """
    raise_faults(check_section(section))
    renderer = Renderer(tokenizer, section)
    sources = [find_source(source, base_folder) for source in section.sources]
    found = (item for source in sources for item in read_source(source, section, renderer.is_chat, Counter(), Usage()))
    views: list[RowView] = []
    for item in found:
        if isinstance(item, Fault):
            raise UserError.of([item])
        label = item.label if section.task == "classification" else None
        (fitted,) = build_task(section, tokenizer, renderer, {label: 0}).fit([item])
        if isinstance(fitted, Fault):
            raise UserError.of([fitted])
        for document in fitted.documents:
            tokens = view_tokens(document, section.task, tokenizer, renderer.stop_token_ids)
            views.append(RowView(document.place, tokens, fitted.is_truncated, label))
        if len(views) >= count:
            break
    return views[:count]


def view_tokens(
    document: Document, task: str, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> tuple[TokenView, ...]:
    """A document taken apart into tokens that can be shown."""
    read = [IGNORE_INDEX] * len(document.input_ids)
    runs = {
        "sft": [(document.input_ids, document.labels)],
        "classification": [(document.input_ids, read)],
        "seq2seq": [(document.input_ids, read), (document.labels, document.labels)],
    }
    tokens: list[TokenView] = []
    for input_ids, labels in runs[task]:
        before: list[int] = []
        for ids, label in _group_characters(zip(input_ids, labels, strict=True), tokenizer):
            part: Part = "read" if label == IGNORE_INDEX else "end" if label in stop_token_ids else "learned"
            text = tokenizer.decode(before + ids).removeprefix(tokenizer.decode(before))  # alone it loses a space
            tokens.append(TokenView(text, tuple(ids), part))
            before = ids
    return tuple(tokens)


def _group_characters(
    labelled: Iterable[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """(ids, label) of each token; tokens that are parts of one character come together."""
    waiting: list[int] = []
    label = IGNORE_INDEX
    for token, label in labelled:
        waiting.append(token)
        is_part = "\ufffd" in tokenizer.decode(waiting) and len(waiting) < 4
        if not is_part:
            yield waiting, label
            waiting = []
    if waiting:
        yield waiting, label


def print_preview(rows: Sequence[RowView], console: Console | None = None, show_ids: bool = False) -> None:
    """The rows in colour; line breaks are shown as ⏎, and end a line."""
    console = console or Console()
    legend = Text.assemble(*((f" {part} ", styles[0]) for part, styles in STYLES.items()))
    for row in rows:
        text = Text.assemble((row.summary, "bold"), "\n")
        for number, token in enumerate(row.tokens):
            text.append(token.text.replace("\n", "⏎\n"), STYLES[token.part][number % 2])
            if show_ids:
                text.append("".join(f" {number} " for number in token.ids), "italic blue")
        if row.label is not None:
            text.append(f" {row.label} ", STYLES["learned"][0])
        console.print(text, soft_wrap=True)
    console.print(legend)


def write_preview(rows: Sequence[RowView], path: Path) -> None:
    """The rows as one HTML file that needs nothing else; a token's ids appear under the pointer."""
    style = "".join(f".{part}{{background:{colour}}}" for part, colour in COLOURS.items())
    legend = " ".join(f'<span class="{part}">{part}</span>' for part in COLOURS)
    body = "".join(f"<h2>{html.escape(row.summary)}</h2><pre>{_mark_up(row)}</pre>" for row in rows)
    path.write_text(PAGE.format(style=style, legend=legend, body=body), encoding="utf-8")


def _mark_up(row: RowView) -> str:
    tokens = [*row.tokens, *([] if row.label is None else [TokenView(f" {row.label} ", (), "learned")])]
    return "".join(
        f'<span class="{token.part}" title="{" ".join(map(str, token.ids))}">'
        f"{html.escape(token.text).replace(chr(10), '⏎' + chr(10))}</span>"
        for token in tokens
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What the model learns</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
h2{{font-size:1rem;margin:2rem 0 .3rem}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.7 ui-monospace,monospace}}
span{{border-radius:3px;padding:1px 0;box-shadow:inset -1px 0 #fff}}
{style}
</style></head><body><h1>What the model learns</h1><p>{legend}</p>{body}</body></html>
"""
