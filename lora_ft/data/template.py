"""A tokenizer's chat template, compiled once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lora_ft.data.example import Message
from lora_ft.data.fields import BadRow, shorten
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day printed by templates that print today's (Llama 3's fallback): the same rows give the same tokens tomorrow."""

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "lora ft probe"


class ChatTemplate:
    """Turns conversations into text. A conversation that the template refuses raises BadRow."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]):
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import _cached_compile_jinja_template as compile_anew
        from transformers.utils.chat_template_utils import _compile_jinja_template as compile_once

        self.source = source
        self.has_marks = GENERATION_MARK.search(source) is not None
        """Whether the template itself says what is learned, with `{% generation %}`."""
        try:
            self._compiled = compile_once(source)
            self._tracked = compile_anew(source) if self.has_marks else self._compiled
        except TemplateError as error:
            rule = f"The chat template is not Jinja: {error}."
            raise UserError("data.chat_template", None, rule, "Mend it, or give another.") from None
        self._tracking = Lock()
        """transformers notes marks in the template itself, whoever renders it: so one at a time, and no other there."""
        fixed = {"strftime_now": TEMPLATE_DATE.strftime, "documents": None, **variables}
        self._variables = {**self._compiled.globals, **tokenizer.special_tokens_map, **fixed}
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self._added = any_of(added)
        self.special = any_of(text for text, token in added.items() if token.special)
        """Finds special tokens in text."""
        self.terminator = self._find_terminator()
        """What ends an answer; nearly always one token."""
        self.stop_token = self._added.findall(self.terminator)[-1]
        """The terminator's last token."""
        self.terminator_takes_space = bool(added[self.stop_token].rstrip)
        """Whether the tokenizer counts white space behind the terminator to it."""

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = (), prompt: bool = False) -> str:
        """The conversation as `apply_chat_template` gives it; with `prompt`, the generation prompt at its end."""
        return self._guard(lambda values: "".join(_generate(self._compiled, values)), messages, tools, prompt)

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Message] = (), prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation, and the (start, end) of each stretch inside the template's generation marks."""
        return self._guard(self._render_tracked, messages, tools, prompt)

    def refuse_unread(self, names: Iterable[str], sources: Sequence[str]) -> None:
        """Nothing when one of the `sources` reads each variable.

        Raises:
            UserError: a name that changes nothing.
        """
        from jinja2.meta import find_undeclared_variables

        parse = self._compiled.environment.parse
        known = set().union(*(find_undeclared_variables(parse(source)) for source in sources))
        mine = sorted(known - {"messages", "tools", "add_generation_prompt", *self._compiled.globals})
        raise_faults(
            Fault(
                f"data.template_kwargs.{name}",
                None,
                f"The chat template reads no variable of that name. It reads {', '.join(mine) or 'none'}.",
                "Correct the name, or remove it.",
            )
            for name in names
            if name not in known
        )

    def _render_tracked(self, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        with self._tracking, self._tracked.environment.activate_tracker(blocks, marks):
            for block in _generate(self._tracked, values):
                blocks.append(block)  # one by one: the tracker reads off them where a mark starts
        return "".join(blocks), marks

    def _find_terminator(self) -> str:
        try:
            text = self.render([{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}])
        except BadRow as bad:
            raise UserError("data.chat_template", bad.value, bad.rule, bad.fix) from None
        behind = text[text.rfind(PROBE) + len(PROBE) :]
        found = re.search(f"(?:{self._added.pattern})+", behind)
        if found:
            return found.group()
        rule = "The chat template ends an answer without a token of its own, so that the model never learns to stop."
        fix = "Write {{ eos_token }} after each answer, in a file named in data.chat_template."
        raise UserError("data.chat_template", f"…{text[-60:]!r}", rule, fix)

    def _guard(self, run: Callable, messages: Sequence[Message], tools: Sequence[Message], prompt: bool) -> Any:
        given = {"messages": messages, "tools": list(tools) or None, "add_generation_prompt": prompt}
        try:
            return run({**self._variables, **given})
        except Exception as error:  # a template is a program, and may fail in any way
            rule = f"The chat template refuses the conversation: {shorten(str(error), 200)}."
            fix = "Change the messages to what it takes, or give another template (data.chat_template)."
            raise BadRow("messages", "roles " + ", ".join(m["role"] for m in messages), rule, fix) from None


def _generate(template: Template, values: dict[str, Any]) -> Iterator[str]:
    """What `Template.generate` gives; `values` hold the environment's globals, which it would copy every time."""
    environment = template.environment
    context = environment.context_class(environment, values, template.name, template.blocks)
    return template.root_render_func(context)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest where several fit."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def load_template(tokenizer: PreTrainedTokenizerBase, section: DataSection, tools: bool = False) -> ChatTemplate | None:
    """The chat template of the recipe, or else of the tokenizer, where some have one more for `tools`; None without."""
    if section.chat_template is not None:
        source = read_template(Path(section.chat_template))
        others = [source]
    elif tokenizer.chat_template is not None:
        source = tokenizer.get_chat_template(tools=[{}] if tools else None)
        named = tokenizer.chat_template
        others = list(named.values()) if isinstance(named, dict) else [source]
    else:
        return None
    template = ChatTemplate(source, tokenizer, section.template_kwargs)
    template.refuse_unread(section.template_kwargs, others)
    return template


def read_template(path: Path) -> str:
    """The text of a Jinja file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"The file cannot be read: {error}."
        raise UserError("data.chat_template", path, rule, "Name a Jinja file.") from None
