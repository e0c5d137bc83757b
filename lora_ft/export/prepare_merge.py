"""A merge thought through before a byte is written: which adapters, which base, what becomes of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import UserError
from lora_ft.export.adapter import TENSORS_NAME, open_adapter, refuse_changed
from lora_ft.export.base import base_of_adapter
from lora_ft.export.checkpoint import DTYPES, read_checkpoint
from lora_ft.export.merge_plan import MergePlan, plan_merge
from lora_ft.export.merge_report import Onto
from lora_ft.export.mergeable import refuse_unmergeable
from lora_ft.export.reload import WeightedAdapter
from lora_ft.export.requantize import quantized_parameters, recorded_arithmetic
from lora_ft.export.skeleton import CLASSIFIER_TASKS, build_plain, build_skeleton, refuse_unmatched
from lora_ft.export.targets import combine_changes, find_changes
from lora_ft.fingerprint import BaseIdentity, hash_json, hash_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Merge:
    """A merge that is known to be possible."""

    parts: tuple[WeightedAdapter, ...]
    """The adapters, each with its weight."""
    base: BaseIdentity
    """What they are merged into."""
    onto: Onto
    """Whether the base is taken as stored, or as the quantised model saw it in training."""
    dtype: str | None
    """torch's name of the type of all merged weights; None if each keeps its own."""
    model: PreTrainedModel
    """The merged architecture, on the meta device."""
    plan: MergePlan
    """What becomes of every tensor."""

    @cached_property
    def adapter_hashes(self) -> tuple[str, ...]:
        """`hash_tensors` of each adapter."""
        return tuple(hash_tensors(part.adapter.folder / TENSORS_NAME) for part in self.parts)

    @property
    def weighted_hashes(self) -> tuple[tuple[str, float], ...]:
        """`hash_tensors` of each adapter, and its weight."""
        return tuple(zip(self.adapter_hashes, (part.weight for part in self.parts), strict=True))

    @property
    def task_type(self) -> str | None:
        """PEFT's name of what the merged model is for; None where the adapter does not say."""
        return self.parts[0].adapter.config.task_type

    @property
    def is_classifier(self) -> bool:
        """Whether the merged model answers with a label."""
        return self.task_type in CLASSIFIER_TASKS

    @property
    def stored_dtype(self) -> str:
        """torch's name of the type most merged weights have."""
        sizes: dict[str, int] = {}
        for tensor in self.plan.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
        return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]

    def identity(self) -> str:
        """A hash of everything the merged weights depend on."""
        configs = [(part.adapter.config.to_dict(), part.weight) for part in self.parts]
        layout = [(tensor.file, tensor.name, tensor.dtype, tensor.source.shape) for tensor in self.plan.tensors]
        return hash_json([self.base.fingerprint, self.adapter_hashes, configs, self.onto, layout])


def prepare_merge(
    adapter: Path | Sequence[tuple[Path, float]],
    base: str | None,
    dtype: str | None,
    onto: Onto,
    trust_remote_code: bool,
) -> Merge:
    """The merge, with all that could make it impossible looked at before a byte is written."""
    pairs = [(adapter, 1.0)] if isinstance(adapter, Path) else adapter
    parts = [WeightedAdapter(open_adapter(folder, trust_remote_code), weight) for folder, weight in pairs]
    for part in parts:
        refuse_changed(part.adapter.folder)
        refuse_unmergeable(part.adapter)
    identity = base_of_adapter(parts[0].adapter, base)
    for part in parts[1:]:
        refuse_other_base(identity, base_of_adapter(part.adapter, base), part)
    changes = []
    for part in parts:
        skeleton = build_skeleton(identity.folder, part.adapter)
        refuse_unmatched(part.adapter, skeleton)
        changes.append(find_changes(skeleton, part.adapter, part.weight))
    first = parts[0].adapter
    model = build_plain(identity.folder, first)
    checkpoint = read_checkpoint(identity.folder)
    keeps_class = first.config.task_type not in CLASSIFIER_TASKS
    is_packed = any(tensor.parts for tensor in checkpoint.values())
    refuse_original(is_packed and onto == "original", identity)
    quantized = {}
    if onto == "quantized" and not is_packed:
        quantized = quantized_parameters(build_plain(identity.folder, first), recorded_arithmetic(first))
    plan = plan_merge(checkpoint, model, combine_changes(changes), stored_name(dtype), keeps_class, quantized)
    return Merge(tuple(parts), identity, onto, dtype, model, plan)


def refuse_other_base(base: BaseIdentity, other: BaseIdentity, part: WeightedAdapter) -> None:
    """Nothing if two adapters are for one base.

    Raises:
        UserError: they are not.
    """
    if other.fingerprint != base.fingerprint:
        rule = f"Adapters that are summed must be for one base; the first one is for {base.name}."
        raise UserError(str(part.adapter.folder), other.name, rule, "Merge it alone.")


def refuse_original(is_wanted: bool, base: BaseIdentity) -> None:
    """Nothing unless weights are wanted that the base does not have.

    Raises:
        UserError: the base is stored in 4 bit, and its weights before that were asked for.
    """
    if is_wanted:
        rule = "This base is stored in 4 bit; it has no weights from before the rounding that could be added to."
        raise UserError(base.name, "--onto original", rule, "Merge with --onto quantized.")


def stored_name(dtype: str | None) -> str | None:
    """safetensors' name of a type a user asks for.

    Raises:
        UserError: it is none of those a model is stored in.
    """
    names = {DTYPES[stored]: stored for stored in ("F32", "F16", "BF16")}
    if dtype is not None and dtype not in names:
        raise UserError("--dtype", dtype, f"A merged model is stored as {', '.join(names)}.", "Choose one of these.")
    return None if dtype is None else names[dtype]
