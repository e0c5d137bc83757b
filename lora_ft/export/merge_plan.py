"""Every tensor of a merged model before a byte of it is computed: from where, changed how, to which file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.export.checkpoint import FLOATS, Place, StoredTensor, count_elements, place_tensors
from lora_ft.export.requantize import Quantization
from lora_ft.export.targets import Changes
from lora_ft.export.updates import KINDS, Update
from lora_ft.fingerprint import CHUNK_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model."""

    name: str
    """Its key in the merged files."""
    file: str
    """The merged file it lies in."""
    dtype: str
    """safetensors' name of its type there."""
    source: StoredTensor
    """Its value before the updates: a tensor of the base, or one of the adapter that takes its place."""
    place: Place | None
    """Which part of which parameter it is; None for a tensor the model does not know."""
    updates: tuple[Update, ...]
    """What is done to it, in order."""
    quantization: Quantization | None = None
    """How the model held it that the updates were trained on; None to start from the weight as it is stored."""

    @property
    def num_bytes(self) -> int:
        """Bytes it has in the merged file."""
        return count_elements(self.source.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_replaced(self) -> bool:
        """Whether the adapter puts a weight of its own here."""
        return self.source.path.name != self.file

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay as they are."""
        return not (self.updates or self.quantization or self.source.parts) and self.dtype == self.source.dtype

    @property
    def needs_all(self) -> bool:
        """Whether it must be in memory in one piece: to be unpacked, quantised, or measured as a whole."""
        whole = any(KINDS[update.kind].whole for update in self.updates)
        return whole or self.quantization is not None or bool(self.source.parts)


@dataclass(frozen=True)
class MergePlan:
    """A merged model, not yet computed."""

    tensors: tuple[MergedTensor, ...]
    """All its tensors, file by file."""
    untied: tuple[str, ...]
    """Parameters that share the input embeddings in the base and get weights of their own."""
    left_out: tuple[str, ...]
    """Tensors of the base that the merged model has no place for, such as the language head under a classifier."""


@dataclass(frozen=True)
class Terms:
    """What holds for every tensor of a merge."""

    changes: Changes
    """What the adapters do."""
    dtype: str | None
    """safetensors' name of the type of all floating point tensors; as in the base if None."""
    quantized: Mapping[str, Quantization]
    """Parameters to be taken as a quantised model held them."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every parameter of the merged model."""


def plan_merge(
    checkpoint: Mapping[str, StoredTensor],
    model: PreTrainedModel,
    changes: Changes,
    dtype: str | None,
    keeps_class: bool,
    quantized: Mapping[str, Quantization],
) -> MergePlan:
    """What becomes of every tensor in `checkpoint`, and which tensors come on top.

    Args:
        model: the plain model, on the meta device, with the vocabulary and head of the tuned one.
        dtype: safetensors' name of the type of all floating point tensors; as in the base if None.
        keeps_class: whether the merged model is of the base's class, so that tensors `model` has no parameter for, such
            as the vision tower of a model trained on text, are copied; they are left out if not.
        quantized: parameters to be taken as a quantised model held them.

    Raises:
        UserError: a change of the adapter fits no tensor of the base.
    """
    places = place_tensors(checkpoint, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    terms = Terms(changes, dtype, quantized, shapes)
    values = {place.parameter: checkpoint[name] for name, place in places.items() if place}
    groups = [group for group in tied_groups(model) if not same_changes(changes, group)]
    tensors = [
        merged_tensor(stored, places[name], terms)
        for name, stored in checkpoint.items()
        if places[name] is not None or keeps_class
    ]
    for group in groups:
        owner = next(values[name] for name in group if name in values)
        tensors += [added_tensor(name, owner, owner, terms) for name in group if name not in values]
    shared = {name for group in tied_groups(model) for name in group}
    last = list(checkpoint.values())[-1]
    new_heads = changes.replacements.keys() - values.keys() - shared
    tensors += [added_tensor(name, None, last, terms) for name in sorted(new_heads)]
    refuse_unplaced(tensors, terms, shared)
    untied = tuple(name for group in groups for name in group)
    left_out = tuple(name for name in checkpoint if places[name] is None and not keeps_class)
    return MergePlan(tuple(sorted(tensors, key=lambda tensor: tensor.file)), untied, left_out)


def tied_groups(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Parameters that are one and the same in the base, by group: the input embeddings and the output layer."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    return [tuple(group) for group in groups.values()]


def merged_tensor(stored: StoredTensor, place: Place | None, terms: Terms) -> MergedTensor:
    """What becomes of one tensor of the base."""
    merged_dtype = terms.dtype if terms.dtype and stored.dtype in FLOATS else stored.dtype
    if place is None:
        return MergedTensor(stored.name, stored.path.name, merged_dtype, stored, place, ())
    updates = tuple(terms.changes.updates.get(place.parameter, ()))
    source = terms.changes.replacements.get(place.parameter, stored)
    quantization = terms.quantized.get(place.parameter) if source is stored else None
    if updates or quantization or source is not stored:
        refuse_misfit(stored, place, source, terms.shapes[place.parameter])
    return MergedTensor(stored.name, stored.path.name, merged_dtype, source, place, updates, quantization)


def added_tensor(parameter: str, value: StoredTensor | None, neighbour: StoredTensor, terms: Terms) -> MergedTensor:
    """A tensor the base's files do not have, a new head or a weight that was shared, put beside `neighbour`."""
    source = terms.changes.replacements.get(parameter, value)
    assert source is not None, f"{parameter} has no value"
    updates = tuple(terms.changes.updates.get(parameter, ()))
    dtype = terms.dtype or neighbour.dtype
    return MergedTensor(parameter, neighbour.path.name, dtype, source, Place(parameter), updates)


def refuse_misfit(stored: StoredTensor, place: Place, source: StoredTensor, shape: tuple[int, ...]) -> None:
    """Nothing if the tensor is such a part of its parameter that a change of the parameter can be told for it.

    Args:
        shape: that of the parameter.

    Raises:
        UserError: transformers computes the parameter from the stored tensors in a way that is not undone here.
    """
    if place.conversion is not None:
        rule = f"The base stores this weight in another form; transformers makes it by {place.conversion}."
        raise UserError(stored.name, None, rule, "Use it as an adapter.")
    if place.expert is not None and source is not stored:
        rule = "The adapter replaces a whole stack of experts, which the base stores one by one."
        raise UserError(stored.name, None, rule, "Use it as an adapter.")
    if place.expert is None and source.shape != shape:
        rule = f"The model needs {list(shape)} here; the adapter brings no weight of that shape."
        raise UserError(
            stored.name, list(source.shape), rule, "Save the adapter with the embeddings it was trained with."
        )


def refuse_unplaced(tensors: Sequence[MergedTensor], terms: Terms, shared: Collection[str]) -> None:
    """Nothing if every change has found all of its parameter.

    Raises:
        UserError: names what of the adapter would have been lost, or has another shape than the base.
    """
    found: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.place:
            found[tensor.place.parameter] += count_elements(tensor.source.shape)
    faults = []
    for parameter in sorted(terms.changes.updates.keys() | terms.changes.replacements.keys()):
        expected = count_elements(terms.shapes[parameter]) if parameter in terms.shapes else 0
        if parameter in shared and not found[parameter]:
            continue
        if found[parameter] != expected or not expected:
            rule = f"The adapter changes {expected} weights here; the merged files would hold {found[parameter]}."
            faults.append(Fault(parameter, None, rule, "Give the base the adapter was trained on with --base."))
    raise_faults(faults)


def same_changes(changes: Changes, group: Iterable[str]) -> bool:
    """Whether the same is done to all parameters of a group, so that they can go on sharing one weight."""
    first, *others = group
    return all(
        same_replacement(changes.replacements.get(first), changes.replacements.get(other))
        and same_updates(changes.updates.get(first, []), changes.updates.get(other, []))
        for other in others
    )


def same_replacement(one: StoredTensor | None, other: StoredTensor | None) -> bool:
    """Whether two tensors of an adapter hold the same bytes."""
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(one.read_chunks(CHUNK_BYTES), other.read_chunks(CHUNK_BYTES), strict=True)
    return all(chunk == other_chunk for chunk, other_chunk in pairs)


def same_updates(ones: Sequence[Update], others: Sequence[Update]) -> bool:
    """Whether two lists of updates come to the same; a LoRA on embeddings equals one on the output layer whose factors
    are its own, swapped and transposed."""
    return len(ones) == len(others) and all(map(same_update, ones, others))


def same_update(one: Update, other: Update) -> bool:
    """Whether two updates come to the same."""
    import torch

    if {one.kind, other.kind} == {"lora", "lora_transposed"}:
        mirrored = {"A": other.tensors["B"].T, "B": other.tensors["A"].T}
        return one.scale == other.scale and all(torch.equal(one.tensors[role], mirrored[role]) for role in mirrored)
    return (one.kind, one.scale, one.token_ids) == (other.kind, other.scale, other.token_ids) and all(
        torch.equal(tensor, other.tensors[role]) for role, tensor in one.tensors.items()
    )
