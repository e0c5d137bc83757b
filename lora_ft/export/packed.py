"""Weights that a base stores in 4 bit, in bitsandbytes' format: several tensors of the file that are one weight.

q_proj.weight  q_proj.weight.absmax  q_proj.weight.quant_map  q_proj.weight.quant_state.bitsandbytes__nf4
└ packed, two numbers a byte          └ code of each number     └ JSON: shape, type, block size
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_ft.export.checkpoint import DTYPES, StoredTensor, read_stored

if TYPE_CHECKING:
    import torch

MARK = ".quant_state.bitsandbytes__"
"""In the name of the tensor that says how another one is packed."""


def join_packed(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with those that are one weight joined to one, in its true shape and type."""
    stored_names = {torch_name: name for name, torch_name in DTYPES.items()}
    joined = dict(tensors)
    for mark in [name for name in tensors if MARK in name]:
        weight = mark.partition(MARK)[0]
        parts = tuple(tensor for name, tensor in tensors.items() if name.startswith(f"{weight}."))
        state = json.loads(b"".join(tensors[mark].read_chunks(tensors[mark].num_bytes)))
        dtype, shape = stored_names[state["dtype"]], tuple(state["shape"])
        joined[weight] = replace(tensors[weight], dtype=dtype, shape=shape, parts=parts)
        for part in parts:
            del joined[part.name]
    return joined


def unpack(stored: StoredTensor) -> torch.Tensor:
    """The numbers a packed weight stands for, as a model that computes with it sees them."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = read_stored(replace(stored, dtype="U8", shape=(stored.num_bytes, 1)))
    parts = {part.name: read_stored(part) for part in stored.parts}
    return dequantize_4bit(packed, QuantState.from_dict(parts, device=packed.device))
