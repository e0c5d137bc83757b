"""What makes a run this run and no other: what decides its adapter, and what may change while it is interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_ft.errors import Fault, raise_faults
from lora_ft.fingerprint import hash_tensors
from lora_ft.model.adapter import TENSORS_NAME
from lora_ft.recipe_rules import EXTENT, ends_by_steps
from lora_ft.sections import Recipe

HARMLESS = {
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "project",
    "report_to",
    "run_name",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "skip_memory_metrics",
    "trackio_space_id",
}
"""Training settings that change nothing about the adapter."""


@dataclass(frozen=True)
class Identity:
    """A run, as far as another one could be mistaken for it."""

    decisive: dict[str, Any]
    """What the adapter follows from, section by section."""
    extent: dict[str, Any]
    """How long training is."""
    harmless: dict[str, Any]
    """What may change at any time."""

    def starting_from(self, weights: str) -> Identity:
        """The same, with weights of that hash to begin with."""
        return replace(self, decisive={**self.decisive, "warm_start": weights})


def identify_run(
    recipe: Recipe, base_fingerprint: str, data_fingerprint: str, processes: int, strategy: str
) -> Identity:
    """The identity of the run of a settled recipe."""
    elsewhere = HARMLESS.union(EXTENT)
    return Identity(
        decisive=_as_json(
            {
                "base": base_fingerprint,
                "dtype": recipe.model.dtype,
                "attn_implementation": recipe.model.attn_implementation,
                "adapter": _hash_adapter(recipe.model.adapter),
                "quantization": recipe.quantization,
                "lora": recipe.lora,
                "data": data_fingerprint,
                "training": {key: value for key, value in recipe.training.items() if key not in elsewhere},
                "launch": {"processes": processes, "strategy": strategy},
            }
        ),
        extent={key: recipe.training[key] for key in EXTENT if key in recipe.training},
        harmless=_as_json(
            {
                **{key: value for key, value in recipe.training.items() if key in HARMLESS},
                **{f"guards.{key}": value for key, value in dataclasses.asdict(recipe.guards).items()},
            }
        ),
    )


def find_differences(path: Path, old: Identity, new: Identity) -> Iterator[Fault]:
    """One fault for each setting in which the run that lies in `path` differs from the one asked for."""
    for section in new.decisive:
        if section == "attn_implementation" and section not in old.decisive:
            continue  # runs were begun before it was written down
        before, after = old.decisive.get(section), new.decisive[section]
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted({*before, *after}):
                if before.get(key) != after.get(key):
                    can_be_named = section == "training" and before.get(key) is not None
                    fix = _two_ways(f"{section}.{key}={before[key]}" if can_be_named else None)
                    yield Fault(f"{section}.{key}", after.get(key), f"The run in {path} has {before.get(key)}.", fix)
        elif before != after:
            shown = None if section in {"base", "data", "adapter"} else after
            yield Fault(section, shown, f"The run in {path} was made with another {section}.", _two_ways())
    (said, before), (key, after) = _read_extent(old.extent), _read_extent(new.extent)
    if said != key:
        rule = f"The run in {path} ends by training.{said}."
        yield Fault(f"training.{key}", after, rule, _two_ways(f"training.{said}={before}"))
    elif not before <= after:
        rule = f"The run in {path} has {before}, and can only become longer."
        yield Fault(f"training.{key}", after, rule, _two_ways())


def _read_extent(extent: dict[str, Any]) -> tuple[str, float]:
    """What says how long a run is, and how long; transformers trains three epochs where nothing does."""
    if ends_by_steps(extent):
        return "max_steps", extent["max_steps"]
    return "num_train_epochs", extent.get("num_train_epochs", 3.0)


def _two_ways(setting: str | None = None) -> str:
    """What to do about a run that lies in the folder; `setting` is what makes this one the same again."""
    as_it_was = "as it was" if setting is None else f"as it was ({setting})"
    return f"Go on {as_it_was}, or give --fresh to start over, or --warm-start to begin a new run with its weights."


def find_changes(path: Path, manifest: dict[str, Any], base_fingerprint: str, data_fingerprint: str) -> Iterator[Fault]:
    """One fault for each thing that is no longer as the run in `path` had it; its test rows may be others now."""
    fix = "Bring back what it was trained with, the lora_ft that run.json names too, or train again."
    if manifest["base"]["fingerprint"] != base_fingerprint:
        yield Fault("model.base", None, f"The run in {path} was trained on other weights.", fix)
    if manifest["identity"]["decisive"]["data"] != data_fingerprint:
        yield Fault("data", None, f"The run in {path} was trained on other rows, or on rows prepared otherwise.", fix)


def refuse_disunity(identity: Identity, resume_from: Path | None) -> None:
    """Nothing, if all ranks are about to train this run; they compare their settings, data, base and checkpoint here.

    Each rank reads its own files and measures its own machine. Ranks that differ would wait for each other without end,
    or make one adapter of two runs.

    Raises:
        UserError: names all that another rank has otherwise than the first one, on every rank.
    """
    from accelerate.utils import gather_object

    known = {**_list_settings(identity), "checkpoint in output_dir": resume_from and resume_from.name}
    raise_faults(_find_disunity(gather_object([known])))


def _find_disunity(ranks: Sequence[dict[str, Any]]) -> Iterator[Fault]:
    """One fault for each setting in which the first rank that differs from rank 0 does so."""
    rank, other = next((pair for pair in enumerate(ranks) if pair[1] != ranks[0]), (0, ranks[0]))
    fix = "Give all machines the same recipe, data, base and output_dir; name what each measures, such as model.dtype."
    for name in sorted({*ranks[0], *other}):
        if ranks[0].get(name) != other.get(name):
            yield Fault(name, ranks[0].get(name), f"Rank {rank} has {other.get(name)}.", fix)


def _list_settings(identity: Identity) -> dict[str, Any]:
    """All that a run is known by, as `section.key`."""
    listed = {_name_setting(key): value for key, value in {**identity.extent, **identity.harmless}.items()}
    for section, value in identity.decisive.items():
        keys = value if isinstance(value, dict) else {}
        listed |= {f"{section}.{key}": each for key, each in keys.items()} or {section: value}
    return listed


def _name_setting(key: str) -> str:
    """What a recipe calls a setting that is kept by its key, unless that says its section already."""
    return key if "." in key else f"training.{key}"


def describe_changes(old: Identity, new: Identity) -> Iterator[str]:
    """A line for each setting that has changed and may: `training.save_steps: 5 → 10`."""
    for before, after in ((old.extent, new.extent), (old.harmless, new.harmless)):
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                yield f"{_name_setting(key)}: {before.get(key)} → {after.get(key)}"


def _hash_adapter(folder: str | None) -> str | None:
    """Hash of the weights of an adapter that goes on training; they may have been replaced under the same name."""
    weights = Path(folder or "") / TENSORS_NAME
    return hash_tensors(weights) if folder is not None and weights.is_file() else folder


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as a manifest gives it back, so that both can be compared."""
    return json.loads(json.dumps(value, default=str))
