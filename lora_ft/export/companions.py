"""What a model needs beside its weights: tokenizer, chat template, generation config, custom code, licence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.data.render import Renderer
from lora_ft.errors import UserError
from lora_ft.sections import DataSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

GENERATION_NAME = "generation_config.json"
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
)
"""Without one of these there is no tokenizer in a folder."""
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
"""All that tokenizers of transformers write, and no more: these may be published."""
OTHER_COMPANIONS = (
    GENERATION_NAME,
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
CONVERSATION = ("messages", "tools", "add_generation_prompt")
"""Variables that are of the row and not of the recipe, in training too."""


def save_companions(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    template_kwargs: Mapping[str, Any],
) -> None:
    """What a reload needs beside an adapter's weights, so that it renders and stops as in training."""
    if tokenizer is not None:
        tokenizer = with_defaults(tokenizer, template_kwargs)
        tokenizer.save_pretrained(str(folder))
    base = model.get_base_model()
    generation = copy.deepcopy(getattr(base, "generation_config", None))
    if generation is None:
        return
    if tokenizer is not None and not base.config.is_encoder_decoder:
        generation.eos_token_id = join_stops(generation.eos_token_id, tokenizer)
    # Not save_pretrained, which refuses a changed config for settings of the base that it loads with a warning.
    generation.to_json_file(folder / GENERATION_NAME, keys_to_pop=["compile_config"])


def join_stops(found: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """The ids a base stops on, and those that end an answer in training."""
    stops = [found] if isinstance(found, int) else list(found or [])
    with suppress(UserError):  # a template that ends no answer: no run gets as far as this with one
        stops += Renderer(tokenizer, DataSection(())).stop_token_ids
    stops = list(dict.fromkeys(stops))
    return stops if len(stops) > 1 else stops[0] if stops else None


def with_defaults(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with templates that set `variables` themselves, where who renders them does not."""
    if not variables or not tokenizer.chat_template:
        return tokenizer
    tokenizer, templates = copy.copy(tokenizer), tokenizer.chat_template
    lines = set_defaults(variables, tokenizer.special_tokens_map)
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: lines + text for name, text in templates.items()}
    else:
        tokenizer.chat_template = lines + templates
    return tokenizer


def set_defaults(variables: Mapping[str, Any], special_tokens: Mapping[str, Any]) -> str:
    """Lines of Jinja that write nothing: transformers takes out the end of a line that a block ends.

    {% set enable_thinking = enable_thinking if enable_thinking is defined else False %}

    Special tokens and `documents` are given to every template anyway; what was trained with takes their place.
    """
    lines = ""
    for name, value in variables.items():
        if name.isidentifier() and name not in CONVERSATION:
            literal = ascii(json.loads(json.dumps(value, default=str)))
            given = "" if name in special_tokens or name == "documents" else f"{name} if {name} is defined else "
            lines += f"{{% set {name} = {given}{literal} %}}\n"
    return lines


def copy_companions(base: Path, adapter: Path, folder: Path) -> None:
    """What comes along to a merged model: of base and adapter together, the tokenizer of one of them alone."""
    own_tokenizer = any(path for pattern in VOCABULARY_FILES for path in adapter.glob(pattern))
    everything = (*TOKENIZER_FILES, "tokenizer*", *OTHER_COMPANIONS)
    copy_files(base, OTHER_COMPANIONS if own_tokenizer else everything, folder)
    copy_files(adapter, everything, folder)


def copy_files(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    """The files of `source` that match a pattern, where they were; one of the same name is replaced."""
    for pattern in patterns:
        for path in filter(Path.is_file, source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
