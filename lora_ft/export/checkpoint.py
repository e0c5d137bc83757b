"""A base's weights on disk: every tensor's place in the files, and the parameter of the model it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import UserError
from lora_ft.fingerprint import list_weight_files, read_json, read_safetensors_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' name of a type → torch's name; others are not read here."""
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    """Its key in the file."""
    path: Path
    """The file."""
    dtype: str
    """safetensors' name of its type, such as `BF16`."""
    shape: tuple[int, ...]
    """Its shape."""
    offset: int
    """Where its bytes start in the file."""
    num_bytes: int
    """How many bytes it has."""
    parts: tuple[StoredTensor, ...] = ()
    """Tensors that say what its bytes mean, if it is packed in 4 bit; `dtype` and `shape` are of the numbers then."""

    def read_chunks(self, chunk_bytes: int) -> Iterator[bytearray]:
        """All its bytes, some at a time."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            for start in range(0, self.num_bytes, chunk_bytes):
                yield bytearray(stream.read(min(chunk_bytes, self.num_bytes - start)))


@dataclass(frozen=True)
class Place:
    """Which part of a model's parameter a stored tensor is.

    file:   experts.0.w1  experts.0.w3  experts.1.w1  experts.1.w3      each [I, D]
    model:  gate_up_proj  [2 experts, 2·I rows, D]
    places: (expert 0, first_row 0) (expert 0, first_row I) (expert 1, first_row 0) (expert 1, first_row I)
    """

    parameter: str
    """Name in the model's state dict."""
    expert: int | None = None
    """Index along the parameter's first dimension, where the file keeps one tensor an expert."""
    first_row: int = 0
    """Row of the parameter (of that expert) at which the tensor starts."""
    conversion: str | None = None
    """What transformers does to the tensor on the way, where that is more than the above; it is only copied then."""


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, in the order of their bytes."""
    header, data_start = read_safetensors_header(path)
    tensors = {
        name: StoredTensor(
            name,
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            data_start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a base, by its name in the files; those packed by bitsandbytes in 4 bit are joined.

    Raises:
        UserError: the weights are missing, or stored in a form that cannot be added to.
    """
    from lora_ft.export.packed import join_packed

    tensors: dict[str, StoredTensor] = {}
    for path in list_weight_files(folder):
        tensors |= stored_tensors(path)
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is not None:
        if not quantization.get("load_in_4bit"):
            method = quantization.get("quant_method")
            rule = "An update cannot be added to weights that are stored in this form."
            raise UserError(str(folder), f"quantised with {method}", rule, "Use the adapter as it is.")
        tensors = join_packed(tensors)
    strange = sorted({tensor.dtype for tensor in tensors.values()} - DTYPES.keys())
    if strange:
        rule = "An update cannot be added to weights of this type."
        raise UserError(str(folder), ", ".join(strange), rule, "Use the adapter as it is.")
    return tensors


def read_stored(tensor: StoredTensor) -> torch.Tensor:
    """All of a tensor's values."""
    import torch

    with open(tensor.path, "rb", buffering=0) as stream:
        return read_values(stream, tensor, 0, torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype)))


def read_values(stream: FileIO, tensor: StoredTensor, first_element: int, into: torch.Tensor) -> torch.Tensor:
    """`into`, filled with a run of a tensor's values that starts at `first_element`; its file is open as `stream`."""
    import torch

    stream.seek(tensor.offset + first_element * into.itemsize)
    view = memoryview(into.view(-1).view(torch.uint8).numpy())
    while view:
        count = stream.readinto(view)  # one system call reads 2 GiB at most
        assert count, "the file is as long as its header says"
        view = view[count:]
    return into


def extremes(value: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest value, NaN if there is one: much faster than to ask each whether it is finite."""
    low, high = value.aminmax()
    return low.item(), high.item()


def place_tensors(tensors: Mapping[str, StoredTensor], model: PreTrainedModel) -> dict[str, Place | None]:
    """Name in the files → its part of a parameter of `model` (on the meta device); None where the model has none.

    transformers' own rules rename, stack and fuse, in the order it loads them.
    Source: transformers 5.23, core_model_loading.py, `convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    places: dict[str, Place | None] = {}
    stacks: dict[str, dict[str, list[str]]] = {}
    prefix = model.base_model_prefix
    for name in sorted(tensors, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        if parameter not in state:
            places[name] = None
        elif pattern is None:
            places[name] = Place(parameter)
        else:
            stacks.setdefault(parameter, {}).setdefault(pattern, []).append(name)
    for parameter, parts in stacks.items():
        converter = by_pattern[next(iter(parts))]
        places |= place_stack(parameter, parts, converter, tensors)
    return places


def place_stack(
    parameter: str, parts: Mapping[str, list[str]], converter: object, tensors: Mapping[str, StoredTensor]
) -> dict[str, Place]:
    """Places of the tensors that become one parameter: one an expert, or two an expert that are laid row on row.

    Args:
        parts: the converter's source pattern → names in the files, in the order of the experts.
    """
    operations = [repr(operation) for operation in converter.operations]  # type: ignore[attr-defined]
    stacked = operations == ["MergeModulelist(dim=0)"]
    fused = operations == ["MergeModulelist(dim=0)", "Concatenate(dim=1)"]
    if not stacked and not fused:
        conversion = ", ".join(operations)
        return {name: Place(parameter, conversion=conversion) for names in parts.values() for name in names}
    places: dict[str, Place] = {}
    first_row = 0
    for pattern in converter.source_patterns:  # type: ignore[attr-defined]
        names = parts.get(pattern, [])
        places |= {name: Place(parameter, expert, first_row) for expert, name in enumerate(names)}
        first_row += tensors[names[0]].shape[0] if names else 0
    return places


def count_elements(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of that shape."""
    return math.prod(shape)


def torch_dtype(name: str) -> torch.dtype:
    """torch's type for safetensors' name of it."""
    import torch

    return getattr(torch, DTYPES[name])
