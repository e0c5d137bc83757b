"""How this process was launched, and which launches cannot give what the recipe asks for.

Nothing of torch is imported: what a launcher decided stands in the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.model.machine import Machine, probe_machine
from lora_ft.model.memory import OFFLOADABLE, Hardware
from lora_ft.sections import Choice, Recipe

DEEPSPEED_TWINS: dict[str, tuple[str, object]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", 8),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "gradient_clipping": ("max_grad_norm", 1.0),
    "bf16.enabled": ("bf16", False),
    "fp16.enabled": ("fp16", False),
}
"""DeepSpeed's key → the field of `training` that must say the same, and what that is where a recipe leaves it out."""

REPLACED = {
    "optimizer": "training.optim, its learning rates and lora.loraplus_lr_ratio",
    "scheduler": "training.lr_scheduler_type and its warmup",
}
"""Block of a DeepSpeed config → what of the recipe would be passed over where it is given."""

SHARDINGS = ("zero1", "zero2", "zero3", "fsdp")
"""Strategies that share out what plain data parallelism keeps on every rank."""

INTEGER_STORAGE = ("uint8", "int8")
"""Types of packed 4-bit weights that are bytes to everybody, and that no cast can touch."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What the launcher told DeepSpeed."""

    stage: int
    """What ZeRO shards: 1 optimizer state, 2 gradients too, 3 parameters too; 0 nothing."""
    offloads_optimizer: bool
    """Whether optimizer state lies in the machine's memory or on its disk."""
    fixed: Mapping[str, object]
    """Settings it fixes to a value of its own, by DeepSpeed's key; left out are those it leaves to the recipe."""
    offloads_parameters: bool = False
    """Whether the base lies there too."""
    replaced: tuple[str, ...] = ()
    """What of the recipe it would put its own in the place of: `optimizer`, `scheduler`."""


@dataclass(frozen=True)
class FsdpSettings:
    """What the launcher told PyTorch's FSDP."""

    version: int
    """1 (flat parameters) or 2 (one sharded tensor a parameter)."""
    state_dict_type: str
    """How checkpoints are written: `FULL_STATE_DICT`, `SHARDED_STATE_DICT` or `LOCAL_STATE_DICT`."""
    activation_checkpointing: bool
    """Whether FSDP itself computes activations again in the backward pass."""


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process."""

    strategy: str
    """`single`, `ddp`, `zero0` … `zero3`, or `fsdp`."""
    world_size: int = 1
    """Processes of the run."""
    local_world_size: int = 1
    """Those of them on this machine."""
    rank: int = 0
    """Number of this one, from 0."""
    local_rank: int = 0
    """Its number on this machine, from 0; the GPU it computes on."""
    mixed_precision: str = "no"
    """`no`, `bf16`, `fp16` or `fp8`, as the launcher has it; it counts where `training` has neither bf16 nor fp16."""
    forces_cpu: bool = False
    """Whether the launcher keeps this process from a GPU."""
    deepspeed: DeepSpeedSettings | None = None
    """Settings of DeepSpeed, where it is used."""
    fsdp: FsdpSettings | None = None
    """Settings of FSDP, where it is used."""


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch, from the variables that `accelerate launch` and `torchrun` set.

    Raises:
        UserError: they name a DeepSpeed file that cannot be read.
    Source: accelerate 1.15, `utils/launch.py` (what is set) and `utils/dataclasses.py` (what an unset one means).
    """
    world_size = int(environ.get("WORLD_SIZE", "1"))
    deepspeed = _read_deepspeed(environ) if _is_on(environ, "ACCELERATE_USE_DEEPSPEED") else None
    fsdp = _read_fsdp(environ) if _is_on(environ, "ACCELERATE_USE_FSDP") else None
    if deepspeed is not None:
        strategy = f"zero{deepspeed.stage}"
    elif fsdp is not None:
        strategy = "fsdp"
    else:
        strategy = "ddp" if world_size > 1 else "single"
    return Launch(
        strategy,
        world_size=world_size,
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
        rank=int(environ.get("RANK", "0")),
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        forces_cpu=_is_on(environ, "ACCELERATE_USE_CPU"),
        deepspeed=deepspeed,
        fsdp=fsdp,
    )


def settle_launch(recipe: Recipe, launch: Launch) -> Recipe:
    """The recipe with bf16 as this launch needs it, where the recipe left it open.

    DeepSpeed's bf16 mode casts the adapter too, and FSDP's rounds the loss; without it arithmetic follows `model.dtype`
    all the same. Only ZeRO-3 builds an unquantised base in the type of its mode, and leaves the adapter alone.
    """
    chosen = {choice.key for choice in recipe.choices}
    shards = launch.deepspeed is not None or launch.fsdp is not None
    if not shards or "training.bf16" not in chosen:
        return recipe
    builds_base = launch.strategy == "zero3" and not recipe.quantization
    value = builds_base and recipe.model.dtype == "bfloat16"
    reason = "ZeRO-3 builds the base in this type" if builds_base else "so that the adapter stays float32 when sharded"
    others = tuple(choice for choice in recipe.choices if choice.key != "training.bf16")
    choices = (*others, Choice("training.bf16", value, reason))
    return replace(recipe, training={**recipe.training, "bf16": value}, choices=choices)


def check_launch(launch: Launch, recipe: Recipe) -> None:
    """Nothing, if this launch can train the settled `recipe`.

    Raises:
        UserError: with every combination that would fail, do something else, or train on garbage.
    """
    faults = [*_check_devices(launch, recipe), *_check_precision(launch, recipe), *_check_saving(launch, recipe)]
    if launch.strategy == "ddp":
        faults += _check_ddp(recipe)
    if launch.deepspeed is not None:
        faults += _check_deepspeed(launch.deepspeed, recipe)
    if launch.strategy == "zero3":
        faults += _check_zero3(recipe)
    if launch.fsdp is not None:
        faults += _check_fsdp(launch.fsdp, recipe)
    raise_faults(faults)


def describe_hardware(machine: Machine, launch: Launch) -> Hardware:
    """What a launch computes on; the memory of a CPU's machine is shared by the processes on it."""
    settings = launch.deepspeed
    offload = {"optimizer": settings.offloads_optimizer, "parameters": settings.offloads_parameters} if settings else {}
    kind = machine.device.partition(":")[0]
    return Hardware(
        kind,
        machine.memory_bytes // (launch.local_world_size if kind == "cpu" else 1),
        launch.world_size,
        launch.strategy if launch.strategy in SHARDINGS else "none",
        tuple(name for name, is_on in offload.items() if is_on),
    )


def end_sharding() -> None:
    """Lets this process build and read models by itself again, once training is over.

    While DeepSpeed's ZeRO-3 settings live, transformers shards every model it builds, which takes all ranks.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in {"1", "true", "yes", "y", "on", "t"}


def _read_deepspeed(environ: Mapping[str, str]) -> DeepSpeedSettings:
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return _read_deepspeed_file(Path(file))
    variables = {
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    }
    named = {key: environ[name] for key, name in variables.items() if environ.get(name, "auto") != "auto"}
    return DeepSpeedSettings(
        stage=int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")),
        offloads_optimizer=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none",
        offloads_parameters=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none",
        fixed={key: json.loads(value) for key, value in named.items()},
    )


def _read_deepspeed_file(file: Path) -> DeepSpeedSettings:
    place = "accelerate config  deepspeed_config.deepspeed_config_file"
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as fault:
        rule = f"It cannot be read as a JSON object: {fault}."
        raise UserError(place, str(file), rule, "The path is relative to the folder you launch from.") from None
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict):
        raise UserError(place, str(file), "It has no zero_optimization.", 'Add "zero_optimization": {"stage": 2}.')
    settings.setdefault("gradient_accumulation_steps", 1)  # as accelerate's DeepSpeedPlugin does
    flat = {**settings, **{f"{name}.enabled": _block(settings, name).get("enabled") for name in ("bf16", "fp16")}}
    return DeepSpeedSettings(
        stage=zero.get("stage", 0),
        offloads_optimizer=_block(zero, "offload_optimizer").get("device", "none") != "none",
        offloads_parameters=_block(zero, "offload_param").get("device", "none") != "none",
        fixed={key: flat[key] for key in DEEPSPEED_TWINS if flat.get(key) not in (None, "auto")},
        replaced=tuple(name for name in REPLACED if settings.get(name)),
    )


def _block(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of that name; none where it is absent, null or a single word."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _read_fsdp(environ: Mapping[str, str]) -> FsdpSettings:
    version = int(environ.get("FSDP_VERSION", "1"))
    default = "FULL_STATE_DICT" if version == 1 else "SHARDED_STATE_DICT"
    return FsdpSettings(
        version=version,
        state_dict_type=environ.get("FSDP_STATE_DICT_TYPE", default).upper(),
        activation_checkpointing=_is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING"),
    )


def _check_devices(launch: Launch, recipe: Recipe) -> Iterator[Fault]:
    """On a CPU, accelerate knows DDP and DeepSpeed; everything else quietly becomes DDP, or no team at all."""
    use_cpu = recipe.training.get("use_cpu")
    if launch.fsdp is not None and (use_cpu or launch.forces_cpu):
        rule = "On a CPU, accelerate runs FSDP as plain DDP: nothing would be sharded."
        yield Fault("accelerate config  distributed_type", "FSDP", rule, "Use accelerate_configs/cpu_ddp.yaml.")
    if launch.deepspeed is not None and launch.forces_cpu:
        rule = "With it, accelerate runs DeepSpeed as plain DDP: nothing would be sharded."
        yield Fault("environment  ACCELERATE_USE_CPU", "true", rule, "Unset it; training.use_cpu is enough.")
    if launch.world_size > 1 and use_cpu is False and not launch.forces_cpu and probe_machine().device == "cpu":
        rule = f"There is no GPU here, so all {launch.world_size} processes would train alone, into one folder."
        yield Fault("training.use_cpu", False, rule, "Remove it.")
    loading = recipe.training.get("accelerator_config")
    if launch.world_size > 1 and isinstance(loading, dict) and loading.get("even_batches") is False:
        rule = "Ranks with a batch less would be waited for without end."
        yield Fault("training.accelerator_config.even_batches", False, rule, "Remove it.")


def _check_precision(launch: Launch, recipe: Recipe) -> Iterator[Fault]:
    """Mixed precision that the recipe does not ask for, or that casts packed 4-bit weights as if they were numbers."""
    mode = _mixed_precision(recipe)
    if launch.mixed_precision not in ("no", mode):
        place, fix = "accelerate config  mixed_precision", 'Write "no": the recipe decides.'
        rule = f"By training.bf16 and training.fp16 the recipe asks for {mode}, and one of the two would be ignored."
        yield Fault(place, launch.mixed_precision, rule, fix)
    storage = _storage(recipe)
    casts = launch.deepspeed is not None or launch.fsdp is not None
    if casts and mode != "no" and storage not in (None, *INTEGER_STORAGE, _dtype_of(mode)):
        rule = f"{mode} casts every parameter, and packed 4-bit weights stored as {storage} would turn into garbage."
        yield Fault("quantization.bnb_4bit_quant_storage", storage, rule, f"Write {_dtype_of(mode)}.")


def _check_saving(launch: Launch, recipe: Recipe) -> Iterator[Fault]:
    sharded = launch.deepspeed is not None or launch.fsdp is not None
    if sharded and recipe.training.get("save_only_model") and recipe.training.get("load_best_model_at_end"):
        rule = "The best model is read back from a whole checkpoint when parameters or optimizer state are sharded."
        yield Fault("training.save_only_model", True, rule, "Remove it.")


def _check_ddp(recipe: Recipe) -> Iterator[Fault]:
    training = recipe.training
    reentrant = (training.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant")
    if training.get("gradient_checkpointing") and reentrant and training.get("ddp_find_unused_parameters") is not False:
        rule = "Reentrant checkpointing under DDP ends the first step: a parameter is marked ready twice."
        yield Fault("training.gradient_checkpointing_kwargs.use_reentrant", True, rule, "Write false, or leave it out.")


def _check_deepspeed(settings: DeepSpeedSettings, recipe: Recipe) -> Iterator[Fault]:
    for key, value in settings.fixed.items():
        name, default = DEEPSPEED_TWINS[key]
        asked = recipe.training.get(name, default)
        if value != asked:
            rule = f"The recipe has training.{name}: {asked}, and transformers stops where the two differ."
            yield Fault(f"DeepSpeed config  {key}", value, rule, "Write auto, or leave it out.")
    for name in settings.replaced:
        rule = f"DeepSpeed's own would take the place of {REPLACED[name]}."
        yield Fault(f"DeepSpeed config  {name}", None, rule, "Remove the block.")
    optimizer = recipe.training.get("optim", OFFLOADABLE[0])
    if settings.offloads_optimizer and optimizer not in OFFLOADABLE:
        rule = "Where the optimizer is offloaded, accelerate puts DeepSpeed's Adam in the place of any other."
        yield Fault("training.optim", optimizer, rule, "Write adamw_torch, or do not offload the optimizer.")
    if recipe.guards.skip_non_finite:
        rule = "DeepSpeed takes its step before anybody can look at the gradient, so none can be left out."
        yield Fault("guards.skip_non_finite", recipe.guards.skip_non_finite, rule, "Write 0.")


def _check_zero3(recipe: Recipe) -> Iterator[Fault]:
    if recipe.training.get("auto_find_batch_size"):
        rule = "ZeRO-3 cannot start over with another batch size."
        yield Fault("training.auto_find_batch_size", True, rule, "Remove it, or use ZeRO-2.")
    if recipe.quantization and recipe.lora and recipe.lora.get("use_dora"):
        rule = "DoRA reads quantised weights where ZeRO-3 has none on this rank, and the first step fails."
        yield Fault("lora.use_dora", True, rule, "Use ZeRO-2, DDP or FSDP 2, or leave the section quantization out.")
    built = _dtype_of(_mixed_precision(recipe))
    if not recipe.quantization and built != recipe.model.dtype:
        rule = f"ZeRO-3 builds an unquantised base in the type of DeepSpeed's mode, here {built}."
        yield Fault("model.dtype", recipe.model.dtype, rule, "Leave training.bf16 and training.fp16 out.")


def _check_fsdp(settings: FsdpSettings, recipe: Recipe) -> Iterator[Fault]:
    if settings.version == 1:
        rule = "FSDP 1 joins the weights of a layer in one flat tensor, and no adapter is saved out of those."
        yield Fault("accelerate config  fsdp_config.fsdp_version", 1, rule, "Write 2.")
        return
    if settings.state_dict_type != "FULL_STATE_DICT":
        place, rule = "accelerate config  fsdp_config.fsdp_state_dict_type", "Its checkpoints hold no adapter."
        yield Fault(place, settings.state_dict_type, rule, "Write FULL_STATE_DICT.")
    if settings.activation_checkpointing and recipe.training.get("gradient_checkpointing"):
        rule = "Activations would be computed again twice: transformers refuses the pair."
        yield Fault("accelerate config  fsdp_config.fsdp_activation_checkpointing", True, rule, "Write false.")
    if recipe.quantization and recipe.quantization.get("load_in_8bit"):
        rule = "FSDP cannot shard 8-bit weights: their scales get lost."
        yield Fault("quantization.load_in_8bit", True, rule, "Write load_in_4bit, or use DDP or ZeRO.")
    if (storage := _storage(recipe)) in INTEGER_STORAGE:  # peft#1432, trl#1723
        rule = "FSDP 2 shards no integers: every GPU would keep the whole 4-bit base."
        fix = f"Write {recipe.model.dtype}, as model.dtype."
        yield Fault("quantization.bnb_4bit_quant_storage", storage, rule, fix)


def _mixed_precision(recipe: Recipe) -> str:
    """`fp16`, `bf16` or `no`, as transformers reads `training`."""
    return next((name for name in ("fp16", "bf16") if recipe.training.get(name)), "no")


def _dtype_of(mode: str) -> str:
    return {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[mode]


def _storage(recipe: Recipe) -> Any:
    """Type in which packed 4-bit weights lie in memory; None without any."""
    quantization = recipe.quantization or {}
    return quantization.get("bnb_4bit_quant_storage", "uint8") if quantization.get("load_in_4bit") else None
