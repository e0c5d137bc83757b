"""From a recipe to a memory plan, and from a plan that does not fit to the settings that would.

The rows of an optimizer step stay as they are: what a batch loses, accumulation gains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError
from lora_ft.model.adapter import CONFIG_NAME, read_lora
from lora_ft.model.adapter_faults import rewrites_base
from lora_ft.model.load import read_config, unreadable
from lora_ft.model.machine import prefers_fused_layers
from lora_ft.model.memory import OFFLOADABLE, STAGES, Hardware, MemoryPlan, Workload, plan_step
from lora_ft.model.profile import ModelProfile, profile_model
from lora_ft.model.stored import read_stored, settle_attention, settle_quantization
from lora_ft.sections import Choice, Recipe

AUTO = "auto"
DEFAULT_ROWS = 16
"""Rows a device puts into an optimizer step where the batch size is `auto` and nothing else is said."""
SHORTEST, LOWEST_RANK, LARGEST_BATCH = 128, 4, 65_536
"""No shorter row, no lower rank and no larger batch is proposed."""
OFFLOAD_FILE = "accelerate_configs/zero3_offload.yaml"
LORA_SHAPE = (
    "r",
    "target_modules",
    "rank_pattern",
    "modules_to_save",
    "use_dora",
    "lora_dropout",
    "layers_to_transform",
)
"""Settings of a saved adapter that decide how large it is."""


@dataclass(frozen=True)
class Change:
    """Settings under which the step fits, ready to paste."""

    settings: dict[str, Any]
    """`section.key` → value; `--config_file` is for accelerate launch."""
    plan: MemoryPlan
    """What the step takes then."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"settings": self.settings, "peak_bytes": self.plan.peak_bytes, "fits": self.plan.fits}

    def __str__(self) -> str:
        words = [f"{key} {value}" if key.startswith("--") else f"{key}={value}" for key, value in self.settings.items()]
        return f"{' '.join(words)}  ({self.plan.peak_bytes / 2**30:.1f} GiB)"


@dataclass(frozen=True)
class RecipePlan:
    """What a recipe takes on some hardware."""

    recipe: Recipe
    """The recipe, with `auto` settled and checkpointing chosen."""
    work: Workload
    """Its largest step."""
    plan: MemoryPlan
    """Of its largest step."""
    changes: tuple[Change, ...]
    """What would make it fit, if it does not."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.plan.to_json(), "changes": [change.to_json() for change in self.changes]}


def plan_memory(recipe: Recipe, base_folder: Path, hardware: Hardware, longest: int | None = None) -> RecipePlan:
    """The memory plan of a recipe, from the config of its base alone.

    Rows have `longest` tokens where the data are known, and else as many as `data.max_length` allows.

    What the recipe leaves open is settled on the way: attention and 4-bit arithmetic are those the base has, gradient
    checkpointing is chosen only if the step does not fit without, and `per_device_train_batch_size: auto` becomes the
    largest batch that fits.

    Raises:
        UserError: the base is of no architecture that can learn the task, or has not what the recipe asks of it.
    """
    recipe = settle_quantization(recipe, base_folder)
    profile = profile_recipe(recipe, base_folder, hardware)
    if longest is not None and profile.positions is not None and longest > profile.positions:
        rule = f"The longest row has {longest} tokens, and the base learned {profile.positions} positions."
        raise UserError("data.max_length", recipe.data.max_length, rule, f"Write {profile.positions}, or less.")
    recipe = settle_attention(recipe, profile.attentions)
    work = describe_work(recipe, longest)
    work = replace(work, quantization=read_stored(base_folder) or work.quantization)
    recipe, work = _settle_checkpointing(*_settle_batch(recipe, work, profile, hardware), profile, hardware)
    plan = plan_step(profile, work, hardware)
    step, rank = Step(profile, work, hardware), (recipe.lora or {}).get("r", 8)
    changes = () if plan.fits else find_changes(step, rank, partial(_takes, recipe))
    return RecipePlan(recipe, work, plan, changes)


def refuse_unfit(planned: RecipePlan) -> Recipe:
    """The recipe of a plan that fits.

    Raises:
        UserError: a step does not fit; with what takes the memory, and what would make it fit.
    """
    if planned.plan.fits:
        return planned.recipe
    largest = sorted(planned.plan.causes, key=lambda cause: -cause.num_bytes)[:3]
    takes = ", ".join(f"{cause.name} {cause.num_bytes / 2**30:.1f} GiB" for cause in largest)
    peak, limit = (size / 2**30 for size in (planned.plan.peak_bytes, planned.plan.limit_bytes))
    rule = f"A step takes about {peak:.1f} GiB here, and {limit:.1f} GiB are there. Most of it: {takes}."
    fix = " or ".join(str(change) for change in planned.changes) or "No setting is enough; take a smaller base."
    raise UserError("training", None, rule, f"Fits with: {fix}" if planned.changes else fix)


def parse_memory(text: str) -> int:
    """Bytes in `24 GiB`, `80GB` or `16 g`.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError("--device", text, "This is no size of memory.", 'Write "24 GiB", say.')
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower()))


def profile_recipe(recipe: Recipe, base_folder: Path, hardware: Hardware) -> ModelProfile:
    """The profile of the recipe's base with its adapter, with the layers it has on some hardware.

    Raises:
        UserError: transformers has no model of this architecture for the task, or PEFT no such adapter for it.
    """
    model, task, lora = recipe.model, recipe.data.task, recipe.lora
    config = read_config(base_folder, model, task)
    if lora is None:
        assert model.adapter is not None, "a recipe has a section lora, or goes on with an adapter"
        folder = Path(model.adapter)
        if not (folder / CONFIG_NAME).is_file():
            is_run = (folder / "adapter" / CONFIG_NAME).is_file()
            fix = f"Write {folder / 'adapter'}." if is_run else "Name the adapter/ folder of a run."
            raise UserError("model.adapter", str(folder), "No adapter lies there.", fix)
        lora = {key: value for key, value in read_lora(folder).to_dict().items() if key in LORA_SHAPE}
    dtype = model.dtype if model.dtype != AUTO else "bfloat16"
    quantization = read_stored(base_folder) or recipe.quantization or {}
    is_plain = not quantization or quantization.get("load_in_4bit", False)  # other layers keep PEFT's forward
    is_fused = is_plain and prefers_fused_layers(hardware.kind) and STAGES[hardware.sharding] < 3
    skipped = tuple(quantization.get("llm_int8_skip_modules") or ())
    try:
        return profile_model(config, dtype, lora, skipped, task, model.trust_remote_code, is_fused)
    except (OSError, ValueError, ImportError) as fault:
        raise unreadable(model, task, fault) from fault
    except (RuntimeError, AttributeError, LookupError, ArithmeticError) as fault:
        rule = f"No such adapter can be put on this base: {str(fault).partition(chr(10))[0].rstrip('.')}."
        raise UserError("lora", None, rule, "Change the setting it names, or leave it out.") from fault


def describe_work(recipe: Recipe, longest: int | None = None) -> Workload:
    """The largest step of a recipe: every row as long as the longest, or as `data.max_length`."""
    training = recipe.training
    batch = training.get("per_device_train_batch_size", 8)
    return Workload(
        batch_size=1 if batch == AUTO else batch,
        length=longest or recipe.data.max_length,
        quantization=recipe.quantization,
        checkpointing=bool(training.get("gradient_checkpointing", False)),
        accumulation=training.get("gradient_accumulation_steps", 1),
        optimizer=training.get("optim", "adamw_torch_fused"),
        attention=recipe.model.attn_implementation or "sdpa",
    )


def _settle_batch(recipe: Recipe, work: Workload, profile: ModelProfile, hardware: Hardware) -> tuple[Recipe, Workload]:
    """With `auto`, the largest batch that divides the rows of a step and fits; without checkpointing, if one does."""
    if recipe.training.get("per_device_train_batch_size") != AUTO:
        return recipe, work
    rows = recipe.training.get("gradient_accumulation_steps", DEFAULT_ROWS)
    options = [False, True] if _is_open(recipe, "gradient_checkpointing") else [work.checkpointing]
    for checkpointing in options:
        for batch in _divide(rows, rows):
            tried = replace(work, batch_size=batch, accumulation=rows // batch, checkpointing=checkpointing)
            if plan_step(profile, tried, hardware).fits:
                return _write_batch(recipe, tried), tried
    return _write_batch(recipe, replace(work, accumulation=rows)), replace(work, accumulation=rows)


def _divide(rows: int, most: int) -> Iterator[int]:
    """Batches of at most so many rows that a step of `rows` is made of, the largest first."""
    return (size for size in range(min(most, LARGEST_BATCH), 0, -1) if rows % size == 0)


def _write_batch(recipe: Recipe, work: Workload) -> Recipe:
    sizes = {"per_device_train_batch_size": work.batch_size, "gradient_accumulation_steps": work.accumulation}
    reasons = {
        "per_device_train_batch_size": "the largest that fits, by the memory plan",
        "gradient_accumulation_steps": f"for {work.batch_size * work.accumulation} rows a step",
    }
    choices = tuple(Choice(f"training.{key}", value, reasons[key]) for key, value in sizes.items())
    return replace(recipe, training={**recipe.training, **sizes}, choices=(*recipe.choices, *choices))


def _is_open(recipe: Recipe, key: str) -> bool:
    """Whether the recipe itself says nothing about a key of `training`."""
    return key not in recipe.training or f"training.{key}" in {choice.key for choice in recipe.choices}


def _settle_checkpointing(
    recipe: Recipe, work: Workload, profile: ModelProfile, hardware: Hardware
) -> tuple[Recipe, Workload]:
    if not _is_open(recipe, "gradient_checkpointing"):
        return recipe, work
    without = plan_step(profile, replace(work, checkpointing=False), hardware)
    peak, limit = (f"{size / 2**30:.1f} GiB" for size in (without.peak_bytes, without.limit_bytes))
    verb = "takes" if without.fits else "would take"
    choice = Choice("training.gradient_checkpointing", not without.fits, f"a step {verb} {peak} of {limit} without")
    training = {**recipe.training, "gradient_checkpointing": not without.fits}
    others = (each for each in recipe.choices if each.key != choice.key)
    settled = replace(recipe, training=training, choices=(*others, choice))
    return settled, replace(work, checkpointing=not without.fits)


Shrunk = Iterator[tuple[dict[str, Any], "Step"]]


@dataclass(frozen=True)
class Step:
    """A training step somewhere."""

    profile: ModelProfile
    """The model."""
    work: Workload
    """What it is given."""
    hardware: Hardware
    """Where it runs."""

    def plan(self) -> MemoryPlan:
        """Its memory."""
        return plan_step(self.profile, self.work, self.hardware)


def _takes(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Whether a change would not be refused beside what else the recipe says."""
    lora = recipe.lora
    if "lora.r" in settings:
        return lora is not None and not lora.get("rank_pattern")  # an adapter that goes on training keeps its rank
    if "quantization.load_in_4bit" in settings:
        return not rewrites_base(lora or {})
    if settings.get("--config_file") == OFFLOAD_FILE:
        return recipe.training.get("optim", OFFLOADABLE[0]) in OFFLOADABLE
    return True


def find_changes(
    step: Step, rank: int, takes: Callable[[dict[str, Any]], bool] = lambda settings: True
) -> tuple[Change, ...]:
    """For each single way of making the step fit, the least that does; where none does, the shortest heap of ways.

    `takes` says which settings the recipe can be given.
    """
    singles = []
    for shrink in SHRINKS:
        ways = [way for way in shrink(step, rank) if takes(way[0])]
        fitting = (Change(settings, smaller.plan()) for settings, smaller in ways if smaller.plan().fits)
        singles += list(fitting)[:1]
    if singles:
        return tuple(singles)
    settings: dict[str, Any] = {}
    for shrink in SHRINKS:
        ways = [way for way in shrink(step, rank) if takes(way[0])]
        if ways:
            added, step = ways[-1]
            settings |= added
            if step.plan().fits:
                return (Change(settings, step.plan()),)
    return ()


def _checkpoint(step: Step, rank: int) -> Shrunk:
    if not step.work.checkpointing:
        yield {"training.gradient_checkpointing": True}, replace(step, work=replace(step.work, checkpointing=True))


def _smaller_batch(step: Step, rank: int) -> Shrunk:
    rows = step.work.batch_size * step.work.accumulation
    for batch in _divide(rows, step.work.batch_size - 1):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rows // batch}
        work = replace(step.work, batch_size=batch, accumulation=rows // batch)
        yield {f"training.{key}": size for key, size in sizes.items()}, replace(step, work=work)


def _quantise(step: Step, rank: int) -> Shrunk:
    held = step.work.quantization or {}
    if "quant_method" not in held and not held.get("load_in_4bit"):  # a base that is stored quantised stays so
        fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings: dict[str, Any] = {f"quantization.{key}": value for key, value in fields.items()}
        if held.get("load_in_8bit"):
            settings["quantization.load_in_8bit"] = False
        yield settings, replace(step, work=replace(step.work, quantization=fields))


def _shard(step: Step, rank: int) -> Shrunk:
    if step.hardware.num_devices > 1:
        for stage in ("zero2", "zero3"):
            if STAGES[stage] > STAGES[step.hardware.sharding]:
                launch = {"--config_file": f"accelerate_configs/{stage}.yaml"}
                yield launch, replace(step, hardware=replace(step.hardware, sharding=stage))


def _shorter_rows(step: Step, rank: int) -> Shrunk:
    length = step.work.length // 2
    while length >= SHORTEST:
        yield {"data.max_length": length}, replace(step, work=replace(step.work, length=length))
        length //= 2


def _lower_rank(step: Step, rank: int) -> Shrunk:
    lower = rank // 2
    while lower >= LOWEST_RANK:
        fewer = step.profile.rank_parameters * (rank - lower) // rank
        trained = step.profile.trained_parameters - fewer
        yield {"lora.r": lower}, replace(step, profile=replace(step.profile, trained_parameters=trained))
        lower //= 2


def _offload(step: Step, rank: int) -> Shrunk:
    if step.hardware.kind == "cuda" and not step.hardware.offload:
        hardware = replace(step.hardware, sharding="zero3", offload=("optimizer", "parameters"))
        yield {"--config_file": OFFLOAD_FILE}, replace(step, hardware=hardware)


SHRINKS: tuple[Callable[[Step, int], Shrunk], ...] = (
    _checkpoint,
    _smaller_batch,
    _quantise,
    _shard,
    _shorter_rows,
    _lower_rank,
    _offload,
)
"""Ways to make a step smaller, those that change least about the result first; each goes from the least to the most."""
