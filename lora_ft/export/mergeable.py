"""Which adapters are a fixed change of their base's weights; all others are refused by name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lora_ft.errors import Fault, raise_faults
from lora_ft.export.adapter import CONFIG_NAME, Adapter

if TYPE_CHECKING:
    from peft import LoraConfig

MERGEABLE_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is."""
MERGEABLE_VARIANTS = ("use_dora",)
"""PEFT's LoRA variants whose effect is one fixed weight, known to `updates.KINDS`."""
REFUSED_FIELDS = {
    "layer_replication": "It runs layers several times, each with an update of its own.",
    "megatron_config": "Megatron keeps other weights than transformers.",
    "use_qalora": "It adds to a pooled input, which no weight of the base stands for.",
}
"""Field of LoraConfig → why an adapter with it is no fixed change of the base's weights."""


def refuse_unmergeable(adapter: Adapter) -> None:
    """Nothing if the adapter is a fixed change of the base's weights.

    Raises:
        UserError: names every setting that makes it none.
    """
    config, place = adapter.config, str(adapter.folder / CONFIG_NAME)
    reasons = {name: reason for name, reason in REFUSED_FIELDS.items() if getattr(config, name)}
    for name in unknown_variants(config):
        reasons[name] = "Its effect depends on the input, or it changes the base's weights: no merged weight equals it."
    faults = [Fault(f"{place}: {name}", None, reason, "Use it as an adapter.") for name, reason in reasons.items()]
    if config.init_lora_weights not in MERGEABLE_INITS:
        rule = "This initialisation changed the base's weights, so the adapter alone does not say what was trained."
        fix = "Save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        faults.append(Fault(f"{place}: init_lora_weights", config.init_lora_weights, rule, fix))
    raise_faults(faults)


def unknown_variants(config: LoraConfig) -> list[str]:
    """Variants of LoRA that are switched on and not known to be a fixed weight; PEFT marks its variants itself."""
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    return [name for name in variants if getattr(config, name) and name not in MERGEABLE_VARIANTS]
