"""What the files of a base say of it before its weights are read, and what that settles in a recipe or rules out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.model.load import FLOATING_HEADS, build_quantization, is_local, read_config
from lora_ft.sections import Choice, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_ft.data.splits import Splits

ATTENTION = "model.attn_implementation"


def read_stored(base_folder: Path) -> dict[str, Any] | None:
    """How the weights of a base are quantised on disk, as its config says it; None where they are plain numbers."""
    settings = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    stored = settings.get("quantization_config")
    return {"quant_method": "bitsandbytes", **stored} if stored else None


def settle_attention(recipe: Recipe, attentions: tuple[str, ...]) -> Recipe:
    """The recipe with an attention that the architecture has, where it was chosen here and not asked for.

    Args:
        attentions: those that it has, the fastest first.

    Raises:
        UserError: the recipe asks for SDPA or FlashAttention, and the architecture has none.
    """
    asked = recipe.model.attn_implementation
    if asked not in ("sdpa", "flash_attention_2") or asked in attentions:
        return recipe
    best = next(name for name in attentions if name != "flash_attention_2")
    if ATTENTION not in {choice.key for choice in recipe.choices}:
        raise UserError(ATTENTION, asked, "This architecture has none.", f"Write {ATTENTION}: {best}, or leave it out.")
    choice = Choice(ATTENTION, best, f"the architecture has no {asked}")
    others = tuple(each for each in recipe.choices if each.key != ATTENTION)
    return replace(recipe, model=replace(recipe.model, attn_implementation=best), choices=(*others, choice))


def settle_quantization(recipe: Recipe, base_folder: Path) -> Recipe:
    """The recipe with what was chosen of `quantization` as the base is stored; that is how transformers reads it.

    Raises:
        UserError: the section asks for something else. transformers would warn, and not do it.
    """
    stored, asked = read_stored(base_folder), recipe.quantization
    if stored is None or not asked:
        return recipe
    chosen = {choice.key for choice in recipe.choices}
    open_keys = {key for key in asked if f"quantization.{key}" in chosen}
    refuse_requantising({key: value for key, value in asked.items() if key not in open_keys}, stored)
    own = _written_out(stored)
    choices = tuple(
        Choice(each.key, own[key], "as the base is stored")
        if (key := each.key.removeprefix("quantization.")) in open_keys
        else each
        for each in recipe.choices
    )
    return replace(recipe, quantization={**asked, **{key: own[key] for key in open_keys}}, choices=choices)


def refuse_requantising(asked: dict[str, Any], stored: dict[str, Any]) -> None:
    """Nothing, if a section `quantization` asks for what a base is stored as.

    Raises:
        UserError: names each field that it has another value of.
    """
    fix = "Remove the section quantization, and the base is read as it is stored; or name the base it was made of."
    if stored["quant_method"] != "bitsandbytes":
        raise UserError("quantization", None, f"This base is stored quantised by {stored['quant_method']}.", fix)
    own, wanted = _written_out(stored), _written_out(asked)
    raise_faults(
        Fault(f"quantization.{key}", asked[key], f"This base is stored quantised, and with {own[key]}.", fix)
        for key, value in asked.items()
        if value is not None and wanted[key] != own[key]
    )


def _written_out(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of BitsAndBytesConfig, as plain values; the layers left alone in order, heads among them."""
    config = build_quantization({key: value for key, value in fields.items() if not key.startswith("_")})
    assert config is not None
    skipped = sorted({*(config.llm_int8_skip_modules or ()), *FLOATING_HEADS})
    return {**config.to_dict(), "llm_int8_skip_modules": skipped}


def check_export(recipe: Recipe, base_folder: Path) -> Iterator[Fault]:
    """A fault for each thing the recipe wants made of its adapter that cannot be made on this base."""
    stored, run = read_stored(base_folder), recipe.output_dir
    if recipe.export.merge and stored:
        rule = f"This base is stored quantised by {stored['quant_method']}: no weights are there from before."
        fix = "Write false, and use the adapter as it is."
        if stored.get("load_in_4bit"):
            fix = "Write false, and merge into the rounded weights afterwards:"
            fix += f" lora-ft merge {run / 'adapter'} --onto quantized --out {run / 'merged'}"
        yield Fault("export.merge", True, rule, fix)
    repository = recipe.export.push_to
    if repository is not None and is_local(recipe.model.base):
        rule = "The adapter must name a base that others can load, and this one lies on this machine only."
        fix = f"Remove it, and publish afterwards: lora-ft push {run} {repository} --base-id ORG/NAME"
        yield Fault("export.push_to", repository, rule, fix)


def check_tokens(recipe: Recipe, base_folder: Path, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Nothing, if the base has a row of its embeddings for every token of the data.

    Raises:
        UserError: it has not; looking one up ends the run, on a GPU without a word of what it was.
    """
    rows = read_config(base_folder, recipe.model, recipe.data.task).get_text_config().vocab_size
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    largest = max(splits.largest_token, tokenizer.pad_token_id or 0)
    if largest >= rows:
        token = f'token {largest} ("{tokenizer.decode([largest])}")'
        rule = f"Rows and their padding have {token}, and the base knows {rows} tokens."
        fix = "Take the tokenizer the base was trained with, or give the base more: model.resize_token_embeddings."
        raise UserError("model.base", recipe.model.base, rule, fix)


def describe_reach(recipe: Recipe, base_folder: Path, longest: int) -> str | None:
    """What to know about rows that are longer than those a base with computed positions was trained on, if some are."""
    config = read_config(base_folder, recipe.model, recipe.data.task).get_text_config()
    reach = getattr(config, "max_position_embeddings", None)  # T5 has none: it counts how far apart tokens are
    if reach is None or longest <= reach:
        return None
    return (
        f"data.max_length: the longest row has {longest:,} tokens, and {recipe.model.base} was made for {reach:,}; "
        "what stands behind them it has never seen at such a place"
    )
