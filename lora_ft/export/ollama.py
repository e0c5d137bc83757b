"""A merged model handed to llama.cpp's converter and to Ollama: its chat template and stop tokens in a Modelfile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lora_ft.errors import UserError
from lora_ft.fingerprint import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE_NAME = "Modelfile"
GGUF_NAME = "model.gguf"
ROLES = ("system", "user", "assistant")
FIVE_TURNS = ("system", "user", "assistant", "user", "assistant")
"""Roles of the conversation a template is read off from."""
TRIALS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello there"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}),
    (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "two,\nthree"},
        {"role": "user", "content": "four"},
    ),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    ),
)
"""Conversations that both forms of a template must write alike."""


@dataclass(frozen=True)
class Turns:
    """A chat template that is nothing but turns: what stands before and after each content.

    <|im_start|>user\\n Hello <|im_end|>\\n        before["user"], content, after["user"]
    """

    opening: str
    """What stands before the first turn, if a system message is given."""
    default_system: str
    """What stands there if none is given, beyond `opening`."""
    before: dict[str, str]
    """By role."""
    after: dict[str, str]
    """By role."""
    generation_prompt: str
    """What makes the model answer, after the last turn."""

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation whose answer is wanted."""
        has_system = messages[0]["role"] == "system"
        turns = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return self.opening + ("" if has_system else self.default_system) + "".join(turns) + self.generation_prompt

    def to_go(self) -> str:
        """The same as a Go template of Ollama, which fills in `.Messages` and cuts where the answer begins."""
        system, user, assistant = (f"{self.before[role]}{{{{ .Content }}}}" for role in ROLES)
        default = f"{{{{ if not .System }}}}{self.default_system}{{{{ end }}}}" if self.default_system else ""
        last = f"{{{{ if not $last }}}}{self.after['assistant']}{{{{ end }}}}"
        return (
            f"{self.opening}{default}"
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "system" }}}}{system}{self.after["system"]}'
            f'{{{{ else if eq .Role "user" }}}}{user}{self.after["user"]}'
            f"{{{{ if $last }}}}{self.generation_prompt}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{last}'
            "{{ end }}{{ end }}"
        )


def find_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The turns of the tokenizer's chat template, read off what it renders.

    Raises:
        UserError: there is no template, or it does more than put text around contents.
    """
    if not tokenizer.chat_template:
        raise UserError("chat template", None, "The tokenizer has none.", "Write the Modelfile's TEMPLATE by hand.")
    try:
        turns = read_turns(tokenizer)
        for messages in TRIALS:
            if turns.render(messages) != render(tokenizer, messages, True):
                raise ValueError(f"{len(messages)} messages come out otherwise")
    except (ValueError, TemplateError) as error:
        rule = f"It is no plain sequence of turns ({error})."
        raise UserError("chat template", None, rule, "Write the Modelfile's TEMPLATE by hand.") from error
    return turns


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """What the template writes around five marked contents, taken apart.

        opening+before[system] S after[system]+before[user] U after[user]+before[assistant] A after[assistant]…

    Raises:
        ValueError: the text around a role is not the same everywhere.
    """
    conversation = [{"role": role, "content": f"\x02{index}\x03"} for index, role in enumerate(FIVE_TURNS)]
    marks = [message["content"] for message in conversation]
    start, system_user, user_assistant, assistant_user, _, end = split_at(render(tokenizer, conversation, False), marks)
    before_user = strip_start(assistant_user, end)
    after_user = split_at(render(tokenizer, conversation[:2], False), marks[:2])[-1]
    asked = split_at(render(tokenizer, conversation[:2], True), marks[:2])[-1]
    alone = split_at(render(tokenizer, conversation[1:2], False), marks[1:2])[0]
    opening = tokenizer.bos_token if tokenizer.bos_token and start.startswith(tokenizer.bos_token) else ""
    return Turns(
        opening=opening,
        default_system=strip_start(strip_end(alone, before_user), opening),
        before={
            "system": strip_start(start, opening),
            "user": before_user,
            "assistant": strip_start(user_assistant, after_user),
        },
        after={"system": strip_end(system_user, before_user), "user": after_user, "assistant": end},
        generation_prompt=strip_start(asked, after_user),
    )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], ask: bool) -> str:
    """The conversation as the template writes it, with the generation prompt if an answer is wanted."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))


def split_at(text: str, marks: Sequence[str]) -> list[str]:
    """The pieces of `text` between `marks`, in this order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError("a content does not appear once")
        piece, text = text.split(mark)
        pieces.append(piece)
    return [*pieces, text]


def strip_start(text: str, start: str) -> str:
    """`text` without `start`, which it must start with."""
    if not text.startswith(start):
        raise ValueError(f"{text!r} does not start with {start!r}")
    return text[len(start) :]


def strip_end(text: str, end: str) -> str:
    """`text` without `end`, which it must end with."""
    if not text.endswith(end):
        raise ValueError(f"{text!r} does not end with {end!r}")
    return text[: len(text) - len(end)]


def stop_texts(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """The tokens that end an answer, as text: those of the generation config, and the tokenizer's own."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    ids = settings.get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return [tokenizer.decode([token]) for token in dict.fromkeys(ids)]


def render_modelfile(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Ollama's Modelfile for the GGUF file that llama.cpp's converter makes of `folder`.

    A beginning-of-sequence token that the tokenizer adds itself is left out of the template, as Ollama adds it too.

    Raises:
        UserError: the chat template cannot be said in Ollama's.
    """
    turns = find_turns(tokenizer)
    if turns.opening and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]:
        turns = replace(turns, opening="")
    written = (
        turns.opening,
        turns.default_system,
        turns.generation_prompt,
        *turns.before.values(),
        *turns.after.values(),
    )
    if any("{{" in text or '"""' in text for text in written):
        rule = "It has text that means something else in a Modelfile."
        raise UserError("chat template", None, rule, "Write the Modelfile's TEMPLATE by hand.")
    stops = "".join(
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in stop_texts(tokenizer, folder)
    )
    return f'FROM ./{GGUF_NAME}\n\nTEMPLATE """{turns.to_go()}"""\n\n{stops}'


def write_modelfile(folder: Path) -> str:
    """`Modelfile` beside the merged model in `folder`; returned is what became of it, in a sentence."""
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")):
        return "no Modelfile for Ollama: there is no tokenizer"
    try:
        text = render_modelfile(AutoTokenizer.from_pretrained(str(folder)), folder)
    except UserError as error:
        return f"no Modelfile for Ollama: {error.faults[0].rule}"
    (folder / MODELFILE_NAME).write_text(text, encoding="utf-8")
    return f"python convert_hf_to_gguf.py . --outfile {GGUF_NAME}, then ollama create NAME -f {MODELFILE_NAME}"
