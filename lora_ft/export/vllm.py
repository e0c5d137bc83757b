"""Whether vLLM serves an adapter as it was trained."""

from __future__ import annotations

from dataclasses import dataclass

from lora_ft.export.adapter import Adapter

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`. Source: vllm/config/lora.py."""


@dataclass(frozen=True)
class VllmFit:
    """How vLLM takes an adapter."""

    max_lora_rank: int | None
    """Smallest `--max-lora-rank` that does; None if no value does."""
    faults: tuple[str, ...]
    """What vLLM refuses, or passes over so that it would answer differently."""


def fit_vllm(adapter: Adapter) -> VllmFit:
    """Whether vLLM serves the adapter as it was trained, and with which rank limit.

    Source: vllm/lora/peft_helper.py reads r, lora_alpha, use_rslora and bias, refuses modules_to_save and DoRA, and
    passes over every other field.
    """
    config = adapter.config
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    limit = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
    faults = {
        f"rank {max(ranks)} is above its limit of {VLLM_RANKS[-1]}": limit is None,
        "it does not support DoRA": config.use_dora,
        "it does not support modules_to_save": config.modules_to_save,
        "it does not support biases": config.bias != "none" or config.lora_bias,
        "it passes over rank_pattern and alpha_pattern, and would scale updates wrongly": (
            config.rank_pattern or config.alpha_pattern
        ),
        "it passes over trainable_token_indices": config.trainable_token_indices,
        "it passes over target_parameters": config.target_parameters,
    }
    return VllmFit(limit, tuple(fault for fault, holds in faults.items() if holds))
