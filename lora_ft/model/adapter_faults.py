"""Settings of the section `lora` that cannot work on a base, or would be passed over without a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_ft.errors import Fault
from lora_ft.model.load import CLASSIFIER_HEADS

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def find_impossible(model: Any, lora: Mapping[str, Any]) -> Iterator[Fault]:
    """What cannot be trained on this base, which has no adapter yet; `lora` are fields of a LoraConfig."""
    yield from _check_start(model, lora)
    if lora.get("loftq_config"):
        rule = "LoftQ is one step here, on the base as section quantization has it: these bits and steps are not taken."
        yield Fault("lora.loftq_config", lora["loftq_config"], rule, "Remove it.")
    for key, start in START_SETTINGS.items():
        if lora.get(key) and not str(lora.get("init_lora_weights")).startswith(start):
            yield Fault(f"lora.{key}", None, f"It is read with init_lora_weights: {start} alone.", "Remove it.")
    if isinstance(lora.get("runtime_config"), dict):
        rule = "PEFT takes an object of its own there, which a recipe cannot write."
        yield Fault("lora.runtime_config", lora["runtime_config"], rule, "Remove it.")
    if lora.get("alora_invocation_tokens") is not None:
        rule = "An activated LoRA must be told where these tokens stand in each row, which is not done here."
        yield Fault("lora.alora_invocation_tokens", lora["alora_invocation_tokens"], rule, "Remove it: plain LoRA.")
    yield from _check_tokens(model, lora.get("trainable_token_indices"))


def find_idle(model: PeftModel, lora: Mapping[str, Any]) -> Iterator[Fault]:
    """Names in `lora` that match nothing of the base; PEFT passes over them, or warns among other warnings.

    Each is matched as PEFT matches it: list entries of targets against whole parts of a name, those of
    `modules_to_save` against its end, patterns as regular expressions of which the first that fits counts.
    """
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import get_pattern_key

    adapted = [*model.base_model.targeted_module_names, *model.base_model.targeted_parameter_names]
    modules = [name for name, _ in model.get_base_model().named_modules()]
    whole = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    asked = model.active_peft_config.target_modules or ()  # PEFT has put those of fused experts elsewhere
    heads = CLASSIFIER_HEADS if any(name.endswith(CLASSIFIER_HEADS) for name in whole) else ()  # PEFT names them all
    fits: dict[str, Callable[[str], bool]] = {
        "target_modules": lambda entry: entry not in asked or _ends_with_part(adapted, entry),
        "target_parameters": lambda entry: _ends_with_part(adapted, entry),
        "exclude_modules": lambda entry: _ends_with_part(modules, entry),
        "modules_to_save": lambda entry: entry in heads or any(name.endswith(entry) for name in whole),
        "layers_to_transform": lambda number: any(str(number) in name.split(".") for name in adapted),
    }
    for key in ("rank_pattern", "alpha_pattern"):
        chosen = {get_pattern_key(list(lora.get(key) or ()), name) for name in adapted}
        fits[key] = chosen.__contains__
    for key, does_fit in fits.items():
        given = lora.get(key, ())
        given = [given] if isinstance(given, int) else given or ()
        if isinstance(given, str):  # "all-linear", or one regular expression
            idle = [given] * (key == "exclude_modules" and not any(re.fullmatch(given, name) for name in modules))
        else:
            idle = [entry for entry in given if not does_fit(entry)]
        for entry in idle:
            rule = RULES.get(key, "This base has no such module, or another setting keeps it out.")
            yield Fault(f"lora.{key}", entry, rule, "Correct the name, or remove it.")
    biases = [name for name, parameter in model.named_parameters() if name.endswith("bias") and parameter.requires_grad]
    if lora.get("bias", "none") != "none" and not biases:
        yield Fault("lora.bias", lora["bias"], "None of these layers has a bias.", "Write none.")


RULES = {
    "layers_to_transform": "No layer of this number gets LoRA; they are numbered from 0.",
    "exclude_modules": "This base has no such module.",
    "rank_pattern": "It is the first to fit no module that gets LoRA.",
    "alpha_pattern": "It is the first to fit no module that gets LoRA.",
}
"""Key → what is wrong with an entry that does nothing."""


START_SETTINGS = {"corda_config": "corda", "eva_config": "eva", "lora_ga_config": "lora_ga"}
"""Key → the start of an adapter that it is about."""


def rewrites_base(lora: Mapping[str, Any]) -> bool:
    """Whether the adapter's start takes part of the base's weights out of them."""
    start = lora.get("init_lora_weights", True)
    return isinstance(start, str) and start.partition("_")[0] in {"pissa", "olora", "corda"}


def is_quantised(model: Any) -> bool:
    """Whether bitsandbytes holds the model's matrices."""
    return getattr(model, "quantization_method", None) is not None


def _check_start(model: Any, lora: Mapping[str, Any]) -> Iterator[Fault]:
    """Starts that read or rewrite the base's weights, where those are not there to be read."""
    start = lora.get("init_lora_weights", True)
    if rewrites_base(lora) and is_quantised(model):
        rule = "It decomposes the base's weights, and quantised ones cannot be decomposed."
        yield Fault("lora.init_lora_weights", start, rule, "Write loftq, or leave the section quantization out.")
    if start == "loftq" and not is_quantised(model):
        rule = "LoftQ makes up for the error of quantisation, and the base is not quantised."
        yield Fault("lora.init_lora_weights", start, rule, "Add quantization: {load_in_4bit: true}, or write pissa.")
    if start == "eva":
        rule = "EVA needs a pass over the data before training, which is not done here."
        yield Fault("lora.init_lora_weights", start, rule, "Write true, pissa or olora.")


def _check_tokens(model: Any, indices: Any) -> Iterator[Fault]:
    """Tokens that have no row in the table they are to be trained in."""
    by_table = indices if isinstance(indices, Mapping) else {None: indices or ()}
    for name, tokens in by_table.items():
        tables = [model.get_input_embeddings()] if name is None else _modules_ending(model, name)
        rows = min((_count_rows(table) for table in tables), default=None)
        outside = [token for token in tokens if rows is not None and not 0 <= token < rows]
        if outside:
            place = "lora.trainable_token_indices" + (f".{name}" if name else "")
            rule = f"Tokens are numbered from 0, and this base has {rows} of them."
            yield Fault(place, ", ".join(map(str, outside)), rule, "Name tokens of its vocabulary.")


def _modules_ending(model: Any, name: str) -> list[nn.Module]:
    """Modules as PEFT finds them for a table's name; where there is none it says so itself."""
    return [module for path, module in model.named_modules() if path.endswith(name) and hasattr(module, "weight")]


def _count_rows(table: Any) -> int:
    return int(getattr(table.weight, "ds_shape", table.weight.shape)[0])  # a shard of ZeRO-3 has no rows


def _ends_with_part(names: Iterable[str], entry: str) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for name in names)
