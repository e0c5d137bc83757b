"""The base as a quantised model saw it: each weight quantised, and turned back into numbers.

An adapter trained on a 4-bit base has learnt to make up for its rounding. `--onto original` adds it to the weights
before rounding, which are the better ones; `--onto quantized` adds it to the weights it was trained with, which gives
the very model that was evaluated in training, stored in 16 bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ft.errors import UserError
from lora_ft.export.adapter import Adapter
from lora_ft.export.manifest import Arithmetic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Quantization:
    """How one weight was held in training."""

    fields: dict[str, Any]
    """Fields of `transformers.BitsAndBytesConfig`."""
    dtype: str
    """torch's name of the type it was quantised from, and is turned back into."""
    transposed: bool
    """Whether it was quantised transposed, as GPT-2's Conv1D is."""


def recorded_arithmetic(adapter: Adapter) -> Arithmetic:
    """How the quantised base was held while `adapter` was trained.

    Raises:
        UserError: it was not quantised, or that was not recorded.
    """
    arithmetic = adapter.manifest.arithmetic if adapter.manifest else None
    if arithmetic is None or arithmetic.quantization is None:
        rule = "The adapter does not say that it was trained on a quantised base."
        raise UserError("--onto", "quantized", rule, "Merge it with --onto original.")
    return arithmetic


def quantized_parameters(model: PreTrainedModel, arithmetic: Arithmetic) -> dict[str, Quantization]:
    """Parameter → how it is held, for every weight that transformers quantises in `model` (on the meta device).

    transformers itself replaces the layers, so its rules on heads and skipped modules hold; `model` is changed.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    assert arithmetic.quantization is not None
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**arithmetic.quantization), pre_quantized=False)
    with torch.device("meta"):
        quantizer.preprocess_model(model, device_map=None)
    return {
        f"{name}.weight": Quantization(arithmetic.quantization, arithmetic.dtype, issubclass(module.source_cls, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
    }


def round_trip(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """`weight`, quantised and turned back, in the type it is held in."""
    import torch

    weight = weight.to(getattr(torch, quantization.dtype))
    weight = weight.T.contiguous() if quantization.transposed else weight
    held = round_trip_4bit if quantization.fields.get("load_in_4bit") else round_trip_8bit
    weight = held(weight, quantization.fields)
    return weight.T.contiguous() if quantization.transposed else weight


def round_trip_4bit(weight: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """`weight` through bitsandbytes' 4-bit format."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**fields)
    packed = Params4bit(
        weight,
        requires_grad=False,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
    ).to(weight.device)
    return dequantize_4bit(packed.data, packed.quant_state)


def round_trip_8bit(weight: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """`weight` through bitsandbytes' LLM.int8 format, with one scale a row."""
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params

    packed = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    return int8_vectorwise_dequant(packed.CB, packed.SCB).to(weight.dtype)
