"""From an adapter's keys to what it does to each parameter of the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from lora_ft.errors import UserError
from lora_ft.export.adapter import KEY_PREFIX, TENSORS_NAME, Adapter
from lora_ft.export.checkpoint import StoredTensor, stored_tensors
from lora_ft.export.updates import KINDS, Update

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

WRAPPERS = (".base_layer", ".token_adapter", ".modules_to_save", ".original_module")
"""Names PEFT puts between a module and its parameter."""
NAME = "default"
"""What PEFT calls the adapter in a skeleton."""
Found: TypeAlias = "tuple[str, Update, set[str]]"
"""A parameter of the model, what is done to it, and the adapter's keys that say so."""


@dataclass(frozen=True)
class Changes:
    """What an adapter does to its base."""

    updates: dict[str, list[Update]]
    """Parameter of the model → what is done to it, in this order."""
    replacements: dict[str, StoredTensor]
    """Parameter → the tensor in the adapter's file that takes its place, before any update."""


def find_changes(skeleton: PeftModel, adapter: Adapter, weight: float = 1.0) -> Changes:
    """What `adapter` does to each parameter, its LoRA scaled by `weight`.

    Raises:
        UserError: an adapted module is of a kind that is not merged here.
    """
    tensors = adapter.read()
    unused = set(tensors)
    updates: dict[str, list[Update]] = {}
    modules = dict(skeleton.base_model.model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    for name, module in modules.items():
        if getattr(module, "tied_adapter", None) is not None:
            owner = names[id(module.tied_adapter)]
            tensors[f"{name}.trainable_tokens_delta"] = tensors[f"{owner}.trainable_tokens_delta"]
        for parameter, update, keys in module_updates(name, module, tensors):
            if weight != 1.0 and not KINDS[update.kind].adds:
                refuse_combination(parameter, "The adapter does more here than add")
            scaled = dataclasses.replace(update, scale=update.scale * weight)
            updates.setdefault(parameter, []).insert(0, scaled)
            unused -= keys
    stored = stored_tensors(adapter.folder / TENSORS_NAME)
    replacements = {plain_name(key): stored[KEY_PREFIX + key] for key in unused if ".original_module" not in key}
    if weight != 1.0 and replacements:
        refuse_combination(min(replacements), "The adapter puts a weight of its own here")
    return Changes(updates, replacements)


def combine_changes(changes: Sequence[Changes]) -> Changes:
    """What several adapters do together, which is the sum of what each does.

    Raises:
        UserError: two adapters change a parameter in a way that does not add up.
    """
    combined = Changes({}, {})
    for one in changes:
        for parameter in one.updates.keys() | one.replacements.keys():
            before, found = combined.updates.get(parameter, []), one.updates.get(parameter, [])
            shared = bool(before) or parameter in combined.replacements
            if shared and (parameter in one.replacements or parameter in combined.replacements):
                refuse_combination(parameter, "An adapter puts a weight of its own here")
            if shared and not all(KINDS[update.kind].adds for update in (*before, *found)):
                refuse_combination(parameter, "An adapter does more here than add")
            combined.updates[parameter] = [*before, *found]
        combined.replacements.update(one.replacements)
    return combined


def refuse_combination(parameter: str, reason: str) -> NoReturn:
    """The error for adapters that cannot be combined, or weighted, in `parameter`."""
    rule = f"{reason}, so it has no sum with that of another adapter and no fraction of it."
    raise UserError("adapters", parameter, rule, "Merge this adapter alone and with weight 1.")


def module_updates(name: str, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[Found]:
    """What is done to the parameters of one module of the skeleton: parameter, update, keys of the adapter used."""
    from peft.tuners.lora import Embedding, Linear, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    finders: dict[type, Callable[..., list[Found]]] = {
        Linear: linear_updates,
        Embedding: embedding_updates,
        ParamWrapper: parameter_updates,
        TrainableTokensLayer: token_updates,
    }
    if not isinstance(module, BaseTunerLayer):
        return []
    finder = finders.get(type(module))
    if finder is None:
        rule = f"Updates of {type(module).__name__} are not merged; {', '.join(c.__name__ for c in finders)} are."
        raise UserError("target_modules", plain_name(name), rule, "Use it as an adapter.")
    return finder(name, module, tensors)


def linear_updates(name: str, module: Any, tensors: Mapping[str, torch.Tensor]) -> list[Found]:
    """LoRA or DoRA on nn.Linear, or on GPT-2's Conv1D, which keeps its weight transposed."""
    keys = {"A": f"{name}.lora_A.weight", "B": f"{name}.lora_B.weight"}
    found = [(f"{plain_name(name)}.weight", *factor_update(name, module, tensors, keys, module.fan_in_fan_out))]
    if module.lora_bias[NAME]:
        if module.get_base_layer().bias is None:
            rule = "lora_bias adds to a bias, and this layer of the base has none to add to."
            raise UserError("lora_bias", plain_name(name), rule, "Use it as an adapter.")
        key = f"{name}.lora_B.bias"
        update = Update("lora_bias", module.scaling[NAME], {"bias": tensors[key]})
        found.append((f"{plain_name(name)}.bias", update, {key}))
    return found


def embedding_updates(name: str, module: Any, tensors: Mapping[str, torch.Tensor]) -> list[Found]:
    """LoRA or DoRA on embeddings [V, D], whose factors are those of the transposed weight."""
    keys = {"A": f"{name}.lora_embedding_A", "B": f"{name}.lora_embedding_B"}
    return [(f"{plain_name(name)}.weight", *factor_update(name, module, tensors, keys, True))]


def factor_update(
    name: str, module: Any, tensors: Mapping[str, torch.Tensor], keys: dict[str, str], transposed: bool
) -> tuple[Update, set[str]]:
    """The update two factors stand for, with a magnitude beside them under DoRA."""
    kind = "lora"
    if NAME in module.lora_magnitude_vector:
        kind, keys = "dora", {**keys, "magnitude": f"{name}.lora_magnitude_vector"}
    roles = {role: tensors[key] for role, key in keys.items()}
    return Update(kind + "_transposed" * transposed, module.scaling[NAME], roles), set(keys.values())


def parameter_updates(name: str, module: Any, tensors: Mapping[str, torch.Tensor]) -> list[Found]:
    """LoRA on a bare parameter: a matrix, or a stack of experts, which some models keep transposed."""
    keys = {"A": f"{name}.lora_A.weight", "B": f"{name}.lora_B.weight"}
    roles = {role: tensors[key] for role, key in keys.items()}
    parameter = f"{plain_name(name)}.{module.parameter_name}"
    stacked = module.get_param().ndim == 3
    transposed = stacked and not module._did_swap_in_out_features
    kind = ("lora_experts" if stacked else "lora") + "_transposed" * transposed
    update = Update(kind, module.scaling[NAME], roles, experts=module.num_experts)
    return [(parameter, update, set(keys.values()))]


def token_updates(name: str, module: Any, tensors: Mapping[str, torch.Tensor]) -> list[Found]:
    """Trained rows of an embedding matrix; a tied output layer shows the rows of the input layer."""
    key = f"{name}.trainable_tokens_delta"
    token_ids = tuple((module.tied_adapter or module).token_indices[NAME])
    update = Update("trainable_tokens", 1.0, {"rows": tensors[key]}, token_ids=token_ids)
    return [(f"{plain_name(name)}.weight", update, {key})]


def plain_name(name: str) -> str:
    """The base's own name of a module or parameter, without what PEFT puts in between."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
