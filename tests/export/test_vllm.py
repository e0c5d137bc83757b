"""What vLLM makes of an adapter is said before anyone serves it."""

from dataclasses import replace

import pytest

from lora_ft.export.adapter import open_adapter
from lora_ft.export.vllm import fit_vllm


def fit(plain, **fields):
    """How vLLM takes the plain adapter with some fields of its config changed."""
    adapter = open_adapter(plain.adapter)
    for name, value in fields.items():
        setattr(adapter.config, name, value)
    return fit_vllm(replace(adapter))


@pytest.mark.parametrize(("rank", "limit"), [(4, 8), (16, 16), (17, 32), (300, 320), (600, None)])
def test_the_rank_limit_is_the_smallest_that_vllm_has(plain, rank, limit):
    found = fit(plain, r=rank)
    assert found.max_lora_rank == limit
    assert bool(found.faults) == (limit is None)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ],
)
def test_what_vllm_refuses_or_passes_over_is_named(plain, fields, fault):
    assert any(fault in found for found in fit(plain, **fields).faults)
