"""Base, adapter and merged model as stock transformers and PEFT load them.

A base in 4 bit is read from the weights that were kept of it, which are, bit for bit, what transformers makes of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import UserError
from lora_ft.export.adapter import Adapter
from lora_ft.export.manifest import Arithmetic
from lora_ft.export.skeleton import (
    CLASSIFIER_TASKS,
    architecture_class,
    model_class,
    read_config,
    resize_embeddings,
    tuned_config,
)
from lora_ft.fingerprint import BaseIdentity
from lora_ft.model.load import use_safe_4bit_kernels
from lora_ft.model.machine import place_untrained, probe_machine
from lora_ft.model.quant_cache import load_quantised

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


PORTABLE_ATTENTION = ("sdpa", "eager")
"""Attention that every device has; any other is used again only on a GPU, as all compute the same."""


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter, and how much of it is wanted."""

    adapter: Adapter
    """The adapter."""
    weight: float = 1.0
    """What its LoRA is multiplied by."""


def load_tuned(adapter: Adapter, base: BaseIdentity, arithmetic: Arithmetic) -> PeftModel:
    """`base` with `adapter` on it, in evaluation mode, held as `arithmetic` says."""
    return load_combined([WeightedAdapter(adapter)], base, arithmetic)


def load_combined(parts: Sequence[WeightedAdapter], base: BaseIdentity, arithmetic: Arithmetic) -> PeftModel:
    """`base` with several adapters on it at once, each with its weight; the first one says what kind of model it is."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    first = parts[0].adapter
    config, options = tuned_config(base.folder, first), {"trust_remote_code": first.trust_remote_code}
    if first.config.task_type in CLASSIFIER_TASKS:
        options["config"] = config  # which names its labels
    model = load_model(model_class(first.config), base.folder, arithmetic, first.shapes.keys(), base, **options)
    resize_embeddings(model, first)
    names = ["default", *(f"adapter_{index}" for index in range(1, len(parts)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, str(first.folder))
        for name, part in zip(names[1:], parts[1:], strict=True):
            tuned.load_adapter(str(part.adapter.folder), name)
    if len(parts) > 1:
        tuned.base_model.set_adapter(names)
    for name, part in zip(names, parts, strict=True):
        for module in tuned.modules():
            if isinstance(module, LoraLayer) and part.weight != 1.0:
                module.set_scale(name, part.weight)
    return tuned.eval()


def load_merged(folder: Path, arithmetic: Arithmetic, trust_remote_code: bool = False) -> PreTrainedModel:
    """The merged model in `folder`, as the class its config names, in evaluation mode."""
    config = read_config(folder, trust_remote_code)
    cls = architecture_class(config)
    return load_model(cls, folder, arithmetic, config=config, trust_remote_code=trust_remote_code)


def load_model(
    cls: Any,
    folder: Path,
    arithmetic: Arithmetic,
    replaced: Collection[str] = (),
    base: BaseIdentity | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The weights in `folder` on this machine's device, held as `arithmetic` says, in evaluation mode.

    Args:
        replaced: parameters that need not be there, as an adapter brings them.
        base: what is known of a base that was identified; quantised weights are then those that are kept of it.

    Raises:
        UserError: weights are missing or of another shape; transformers itself only warns, and invents them.
    """
    import torch
    from transformers import BitsAndBytesConfig

    options |= {"dtype": getattr(torch, arithmetic.dtype), "device_map": place_untrained(), "local_files_only": True}
    if arithmetic.attention in PORTABLE_ATTENTION or probe_machine().device.startswith("cuda"):
        options["attn_implementation"] = arithmetic.attention
    if base is not None and arithmetic.quantization is not None:
        model, info = load_quantised(cls, base, BitsAndBytesConfig(**arithmetic.quantization), options)
    else:
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    faults = [*sorted(info["missing_keys"] - set(replaced)), *map(str, info["mismatched_keys"])]
    if faults:
        rule = f"The files do not hold the weights that {type(model).__name__} needs."
        raise UserError(str(folder), faults[0], rule, "Fetch or merge it again.")
    use_safe_4bit_kernels(model)
    return model.eval()
