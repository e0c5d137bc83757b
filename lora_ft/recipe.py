"""A YAML file and overrides → one checked `Recipe`; all faults come in one message.

Nothing heavy is imported: the fields of bitsandbytes, PEFT and TRL are read from their source (`library_fields`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_ft.builtin import is_builtin, locate_recipe
from lora_ft.credentials import find_credentials
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.library_fields import LIBRARY_CLASSES, LibraryField, accepts, describe, find_class, read_fields
from lora_ft.recipe_paths import resolve_paths
from lora_ft.sections import (
    DEFAULT_TARGET_LENGTH,
    Choice,
    DataSection,
    EvaluationSection,
    ExportSection,
    GuardsSection,
    ModelSection,
    Recipe,
)
from lora_ft.yaml_lines import Document, Dumper, Key, dotted, parse_scalar, read_yaml

OUR_SECTIONS: dict[str, Any] = {
    "model": ModelSection,
    "data": DataSection,
    "evaluation": EvaluationSection,
    "guards": GuardsSection,
    "export": ExportSection,
}
UNMEASURED = {"classification": ("generate", "metrics", "max_new_tokens", "general"), "seq2seq": ("general",)}
"""`data.task` → keys of `evaluation` that say nothing there: a class is not written, and an answer is no text."""
IDLE = {
    "load_in_4bit": ("llm_int8_threshold", "llm_int8_has_fp16_weight"),
    "load_in_8bit": ("bnb_4bit_",),
}
"""How weights are read → how the keys of `quantization` begin that say nothing then."""
INDEX = re.compile("[0-9]{1,9}")
"""A number in the way to a value: the place in a list."""
REQUIRED = ("output_dir", "model", "data")

LORAPLUS = "loraplus_lr_ratio"
"""The one key under `lora` that is no LoraConfig field: it goes to `peft.optimizers.create_loraplus_optimizer`."""

EARLY_STOPPING = "early_stopping_patience"
"""The one key under `training` that is no SFTConfig field: `LoraTrainer` goes by it, over a resume too."""

INERT = {
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
}
"""What a config that transformers wrote says of keys that say nothing there."""
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

OUR_FIELDS: dict[str, dict[str, LibraryField]] = {
    "lora": {LORAPLUS: LibraryField(float)},
    "training": {
        "per_device_train_batch_size": LibraryField(int | Literal["auto"]),
        EARLY_STOPPING: LibraryField(int),
        "optim": LibraryField(str, takes_null=False),
        "gradient_checkpointing_kwargs": LibraryField(dict[str, Any] | None),
        "activation_checkpointing_kwargs": LibraryField(dict[str, Any] | None),
        "log_level": LibraryField(LogLevel),
        "log_level_replica": LibraryField(LogLevel),
        "include_num_input_tokens_seen": LibraryField(bool | Literal["all", "non_padding", "no"]),
    },
}
"""Fields of the libraries' sections that are ours, that take more than the library does, or whose values it names only
in words."""

RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Newest names of transformers, and those that TRL, PEFT and everything here know."""

TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "seq2seq": {"max_length": 512, "max_target_length": DEFAULT_TARGET_LENGTH, "truncation": "context"},
}
"""Values of the data section that a task has where a recipe says nothing: T5 was trained on 512 tokens, and a question
that loses its end is another question."""


def library_part(values: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of a `lora` or `training` section that are the library's own."""
    return {key: value for key, value in (values or {}).items() if key not in (LORAPLUS, EARLY_STOPPING)}


OWNED_ELSEWHERE: dict[str, dict[str, str]] = {
    "quantization": {},
    "lora": {
        "task_type": "data.task",
        "peft_type": "the section's name",
        "base_model_name_or_path": "model.base",
        "revision": "model.revision",
        "inference_mode": "the command: train, or chat",
    },
    "training": {
        "output_dir": "output_dir",
        "max_length": "data.max_length",
        "packing": "data.packing",
        "packing_strategy": "data.packing",
        "eval_packing": "data.packing",
        "padding_free": "data.packing",
        "assistant_only_loss": "data.train_on",
        "completion_only_loss": "data.train_on",
        "truncation_mode": "data.truncation",
        "dataset_text_field": "data.sources.0.columns",
        "dataset_kwargs": "data",
        "dataset_num_proc": "data",
        "shuffle_dataset": "data.split.seed",
        "chat_template_path": "data.chat_template",
        "eos_token": "data.chat_template",
        "pad_token": "the tokenizer of model.base",
        "model_init_kwargs": "model",
        "trust_remote_code": "model.trust_remote_code",
        "resume_from_checkpoint": "output_dir: an unfinished run there is continued",
        "push_to_hub": "export.push_to",
        "hub_model_id": "export.push_to",
        "hub_token": "the environment variable HF_TOKEN",
        "hub_private_repo": "export",
        "hub_strategy": "export",
        "hub_always_push": "export",
        "hub_revision": "export",
        "do_train": "the command: lora-ft train",
        "do_eval": "evaluation",
        "do_predict": "evaluation.generate",
        "predict_with_generate": "evaluation.generate",
        "generation_max_length": "evaluation.max_new_tokens",
        "generation_num_beams": "the base's generation_config.json",
        "generation_config": "the base's generation_config.json",
        "remove_unused_columns": "data",
        "logging_nan_inf_filter": "nothing: a loss that is not finite ends the run",
        "deepspeed": "the file given to accelerate launch --config_file",
        "fsdp": "the file given to accelerate launch --config_file",
        "fsdp_config": "the file given to accelerate launch --config_file",
        "local_rank": "accelerate launch",
    },
}


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "data.max_length": (lambda v: v >= 8, "A row has room for at least 8 tokens.", "Write 1024, say."),
    "data.sources": (lambda v: len(v) > 0, "At least one source is needed.", "Write - {path: data.jsonl}"),
    "data.split.validation": (lambda v: 0 <= v < 1, "A share lies between 0 and 1.", "Write 0.1 for a tenth."),
    "data.split.test": (lambda v: 0 <= v < 1, "A share lies between 0 and 1.", "Write 0.1 for a tenth."),
    "data.split.seed": (lambda v: v >= 0, "A seed is not negative.", "Write 42, say."),
    "evaluation.generate": (lambda v: v == "all" or v >= 0, "A number of rows is not negative.", "Write 32, or all."),
    "evaluation.max_new_tokens": (lambda v: v > 0, "An answer has at least one token.", "Write 128, say."),
    "evaluation.batch_size": (lambda v: v > 0, "A batch has at least one row.", "Write 16, say."),
    "guards.skip_non_finite": (lambda v: v >= 0, "A number of steps is not negative.", "Write 0, or 3."),
    "guards.stall_minutes": (lambda v: v >= 0, "A time is not negative.", "Write 15, or 0 for never."),
    "quantization.bnb_4bit_compute_dtype": (
        lambda v: v in ("bfloat16", "float16", "float32"),
        "Expected one of bfloat16, float16, float32.",
        "Choose one, or leave it out for model.dtype.",
    ),
    "quantization.bnb_4bit_quant_type": (lambda v: v in ("nf4", "fp4"), "Expected one of nf4, fp4.", "Choose one."),
    "export.push_to": (_is_repository, "A repository on the Hub is named ORG/NAME.", "Give both parts."),
    "lora.r": (lambda v: v > 0, "A rank is at least 1.", "Write 16, say."),
    "lora.lora_dropout": (lambda v: 0 <= v < 1, "A probability lies between 0 and 1.", "Write 0.05, or leave it out."),
    "lora.lora_alpha": (lambda v: v > 0, "At 0 the adapter would do nothing.", "Write 32, say."),
    **dict.fromkeys(
        ("lora.kasa_config", "lora.velora_config", "lora.monteclora_config", "lora.arrow_config"),
        (
            lambda _: False,
            "This kind of LoRA wants a loss, other adapters, or values of weights that no plan of memory has.",
            "Leave it out, and train plain LoRA, or with use_dora or use_rslora.",
        ),
    ),
    "lora.loraplus_lr_ratio": (lambda v: v > 0, "A ratio of learning rates is above 0.", "Write 16, say."),
    "training.learning_rate": (lambda v: 0 < v < 10, "A learning rate lies above 0 and below 10.", "Write 2e-4, say."),
    "training.num_train_epochs": (
        lambda v: 0 < v < math.inf,
        "At least part of an epoch is trained, and the last one ends.",
        "Write 3, say.",
    ),
    "training.max_steps": (lambda v: v == -1 or v > 0, "At least one step is trained.", "Write 100, say, or -1."),
    **dict.fromkeys(
        ("training.seed", "training.data_seed"),
        (lambda v: 0 <= v < 2**32, "A seed is not negative, and has at most 32 bits.", "Write 42, say."),
    ),
    **dict.fromkeys(
        ("training.logging_steps", "training.eval_steps", "training.save_steps"),
        (lambda v: 0 <= v < math.inf, "A number of steps is not negative, and ends.", "Write 10, say."),
    ),
    "training.pad_to_multiple_of": (
        lambda _: False,
        "Rows are joined, or padded to the longest of their batch and no further.",
        "Leave it out.",
    ),
    "training.parallelism_config": (
        lambda _: False,
        "It is an object of accelerate, which a recipe cannot write.",
        "Leave it out; devices share a training as accelerate launch --config_file says.",
    ),
    "training.save_total_limit": (lambda v: v > 0, "At least one checkpoint is kept.", "Write 2, or null for all."),
    "training.max_grad_norm": (lambda v: v >= 0, "A norm is not negative.", "Write 1.0, or 0 to clip nothing."),
    "training.neftune_noise_alpha": (
        lambda v: 0 <= v < math.inf,
        "Noise is not negative, and finite.",
        "Write 5, or leave it out.",
    ),
    "training.dataloader_num_workers": (lambda v: v >= 0, "A number of processes is not negative.", "Write 0, or 2."),
    "training.dataloader_prefetch_factor": (lambda v: v > 0, "A worker reads ahead a batch at least.", "Write 2, say."),
    "training.per_device_train_batch_size": (
        lambda v: v == "auto" or v > 0,
        "A batch has at least one row.",
        "Write 4, say, or auto for the largest that fits.",
    ),
    "training.per_device_eval_batch_size": (lambda v: v > 0, "A batch has at least one row.", "Write 4, say."),
    "training.early_stopping_patience": (lambda v: v > 0, "Validation is waited for at least once.", "Write 2, say."),
    "training.gradient_accumulation_steps": (lambda v: v > 0, "A step has at least one batch.", "Write 1, say."),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path` (or `builtin:NAME`) with `section.key=value` overrides applied.

    Paths of inputs are relative to the recipe's folder, those given as overrides and `output_dir` to the working
    folder.

    Raises:
        UserError: with every fault of the recipe, each with file, line, value, rule and fix.
    """
    file = locate_recipe(str(path)) if is_builtin(str(path)) else Path(path)
    document = read_yaml(file, str(path))
    overridden = _apply_overrides(document, overrides)
    faults = list(document.faults)
    raise_faults(find_credentials(document))  # alone, as other faults show values
    recipe = _build_recipe(document, faults)
    raise_faults(faults)
    assert recipe is not None
    return resolve_paths(recipe, file.resolve().parent, overridden)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; what was chosen for the machine has its reason beside it."""
    sections = {
        "output_dir": str(recipe.output_dir),
        "model": dataclasses.asdict(recipe.model),
        "quantization": recipe.quantization,
        "lora": recipe.lora,
        "data": _plain(dataclasses.asdict(recipe.data)),
        "training": recipe.training,
        "evaluation": _plain(dataclasses.asdict(recipe.evaluation)),
        "guards": dataclasses.asdict(recipe.guards),
        "export": dataclasses.asdict(recipe.export),
    }
    filled = {key: value for key, value in sections.items() if value is not None}
    text = yaml.dump(filled, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    reasons = {choice.key: choice.reason for choice in recipe.choices}
    lines, section = [], ""
    for line in text.splitlines():
        name = line.strip().partition(":")[0]
        if not line.startswith(" "):
            section = name
        elif line.startswith("  ") and not line.startswith("   ") and (why := reasons.get(f"{section}.{name}")):
            line = f"{line}  # chosen: {why}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _apply_overrides(document: Document, overrides: Iterable[str]) -> set[Key]:
    """Writes each `section.key=value` into the document; a number in the way is an index of a list."""
    overridden: set[Key] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        key: Key = tuple(int(part) if INDEX.fullmatch(part) else part for part in name.split("."))
        if not equals or not all(str(part) for part in key):
            document.faults.append(
                Fault(
                    f"command line  {override}",
                    None,
                    "An override is section.key=value.",
                    "Write training.seed=1, say.",
                )
            )
            continue
        try:
            _set_value(document.values, key, parse_scalar(text))
        except (KeyError, IndexError, TypeError, ValueError, RecursionError, yaml.YAMLError, UserError):
            document.faults.append(
                Fault(
                    f"command line  {override}",
                    None,
                    "No such place, or not a YAML value.",
                    "Check the key and quotes.",
                )
            )
            continue
        document.places = {k: v for k, v in document.places.items() if k[: len(key)] != key}
        for depth in range(1, len(key) + 1):
            document.places.setdefault(key[:depth], "command line")
        overridden.add(key)
    return overridden


def _set_value(values: Any, key: Key, value: Any) -> None:
    *way, last = key
    for part in way:
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[part]
    values[last] = value


def _build_recipe(document: Document, faults: list[Fault]) -> Recipe | None:
    values = document.values
    known = [field.name for field in dataclasses.fields(Recipe) if field.name != "choices"]
    for name in values:
        if name not in known:
            faults.append(_unknown(document, (name,), values[name], known, "A recipe has no section of that name."))
    for name in REQUIRED:
        if values.get(name) is None:
            faults.append(
                Fault(
                    document.path,
                    None,
                    f"The section {name} is missing.",
                    "Copy one to start from: lora-ft recipes quickstart",
                )
            )
    if values.get("output_dir") is not None and not isinstance(values["output_dir"], str):
        faults.append(Fault(document.place(("output_dir",)), values["output_dir"], "A folder is text.", "Quote it."))
    task = values["data"].get("task", "sft") if isinstance(values.get("data"), dict) else "sft"
    defaults = TASK_DEFAULTS.get(task, {}) if isinstance(task, str) else {}
    left_open = {name: value for name, value in defaults.items() if name not in values["data"]}
    if left_open:
        values = {**values, "data": {**values["data"], **left_open}}
    sections: dict[str, Any] = {
        name: _build_section(cls, values[name], (name,), document, faults)
        for name, cls in OUR_SECTIONS.items()
        if values.get(name) is not None
    }
    for name in OWNED_ELSEWHERE:
        if values.get(name) is not None:
            sections[name] = _check_library_section(name, task, values[name], document, faults)
    _check_together(values, document, faults)
    if faults:
        return None
    choices = tuple(Choice(f"data.{name}", value, f"the default of {task}") for name, value in left_open.items())
    return Recipe(output_dir=Path(values["output_dir"]), choices=choices, **sections)


def _build_section(cls: Any, values: Any, key: Key, document: Document, faults: list[Fault]) -> Any:
    """An instance of one of our dataclasses; what is wrong is added to `faults`, and None comes back."""
    if not isinstance(values, dict):
        rule = f"{dotted(key)} is a mapping of keys to values."
        faults.append(Fault(document.place(key), values, rule, "Indent its keys below it."))
        return None
    hints = typing.get_type_hints(cls)
    before, built = len(faults), {}
    for name, value in values.items():
        inner = (*key, name)
        if name not in hints:
            faults.append(_unknown(document, inner, value, hints, f"{dotted(key)} has no key of that name."))
        elif dataclasses.is_dataclass(hints[name]):
            built[name] = _build_section(hints[name], value, inner, document, faults)
        elif (item := _item_class(hints[name])) and isinstance(value, list):
            built[name] = tuple(_build_section(item, v, (*inner, i), document, faults) for i, v in enumerate(value))
            _check_range(inner, value, document, faults)
        elif _check_value(inner, value, LibraryField(hints[name]), document, faults):
            built[name] = tuple(value) if isinstance(value, list) else value
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            faults.append(Fault(document.place((*key, field.name)), None, "The key is missing.", f"Add {field.name}."))
    return cls(**built) if len(faults) == before else None


def _item_class(hint: Any) -> Any:
    """The dataclass of the items, for a tuple of sections."""
    arguments = typing.get_args(hint)
    is_items = typing.get_origin(hint) is tuple and arguments and dataclasses.is_dataclass(arguments[0])
    return arguments[0] if is_items else None


def _check_library_section(
    name: str, task: str, values: Any, document: Document, faults: list[Fault]
) -> dict[str, Any]:
    if not isinstance(values, dict):
        faults.append(Fault(document.place((name,)), values, f"{name} is a mapping.", "Indent its keys below it."))
        return {}
    library, owners = find_class(name, task), OWNED_ELSEWHERE[name]
    title, fields = LIBRARY_CLASSES[library].title, read_fields(library) | OUR_FIELDS.get(name, {})
    for key, value in values.items():
        place = document.place((name, key))
        if key in owners:
            faults.append(Fault(place, value, f"This is decided by {owners[key]}.", "Set it there and remove it here."))
        elif key not in fields:
            known = [field for field in fields if field not in owners]
            faults.append(_unknown(document, (name, key), value, known, f"{title} has no field of that name."))
        elif RENAMED.get(key) in values:
            faults.append(Fault(place, value, f"This is {RENAMED[key]}, which is there too.", "Remove one of them."))
        else:
            _check_value((name, key), value, fields[key], document, faults)
    kept: dict[str, Any] = {key: value for key, value in values.items() if key not in RENAMED or value is not None}
    return {RENAMED.get(key, key): value for key, value in kept.items()}


def _check_value(key: Key, value: Any, field: LibraryField, document: Document, faults: list[Fault]) -> bool:
    place = document.place(key)
    if value is None and not field.takes_null:
        faults.append(Fault(place, "null", "This field has no empty value.", "Leave it out, and it gets its default."))
        return False
    if not accepts(field.type, value):
        shown = f'"{value}"' if isinstance(value, str) else value
        faults.append(Fault(place, shown, f"Expected {describe(field.type)}.", "Change the value."))
        return False
    if field.choices and value is not None and value not in field.choices:
        choices = ", ".join(str(choice) for choice in field.choices)
        faults.append(Fault(place, value, f"Expected one of {choices}.", "Choose one."))
        return False
    return _check_range(key, value, document, faults)


def _check_range(key: Key, value: Any, document: Document, faults: list[Fault]) -> bool:
    inside, rule, fix = RANGES.get(dotted(key), (None, "", ""))
    if inside is None or value is None or inside(value):
        return True
    faults.append(Fault(document.place(key), value, rule, fix))
    return False


def _check_together(values: dict[str, Any], document: Document, faults: list[Fault]) -> None:
    """Rules about two keys at once; what is no mapping has been named already."""

    def section(name: str) -> dict[str, Any]:
        found = values.get(name)
        return found if isinstance(found, dict) else {}

    adapter, lora, quantization = section("model").get("adapter"), section("lora"), section("quantization")
    if adapter and lora:
        rule = "An adapter that goes on training keeps its own LoRA settings (model.adapter is set)."
        faults.append(Fault(document.place(("lora",)), None, rule, "Remove the section lora, or model.adapter."))
    if not adapter and not lora:
        rule = "The section lora is missing: there would be nothing to train."
        faults.append(Fault(document.path, None, rule, "Add lora: {r: 16, lora_alpha: 32, target_modules: all-linear}"))
    _check_quantization(quantization, document, faults)
    training = section("training")
    for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
        if training.get(key) and not training.get("dataloader_num_workers"):
            rule = "Without training.dataloader_num_workers there is no worker."
            faults.append(Fault(document.place(("training", key)), training[key], rule, "Write 2 there, say."))
    task = section("data").get("task", "sft")
    for key in UNMEASURED.get(str(task), ()):
        default = getattr(EvaluationSection, key)
        value = section("evaluation").get(key)
        if value not in (None, default, list(default) if isinstance(default, tuple) else default):
            rule = f"It has no meaning for task {task}."
            faults.append(Fault(document.place(("evaluation", key)), value, rule, "Leave it out."))
    split = section("data").get("split")
    shares = [split.get(name, 0.1) for name in ("validation", "test")] if isinstance(split, dict) else []
    if all(isinstance(share, (int, float)) for share in shares) and sum(shares) >= 1:
        rule = "All shares together must leave rows for training."
        faults.append(Fault(document.place(("data", "split")), sum(shares), rule, "Write 0.1 for a tenth."))


def _check_quantization(quantization: dict[str, Any], document: Document, faults: list[Fault]) -> None:
    bits = [name for name in IDLE if quantization.get(name)]
    if quantization and len(bits) != 1:
        rule = (
            "Weights are read in 4 bit or in 8 bit."
            if bits
            else "Without load_in_4bit or load_in_8bit it does nothing."
        )
        fix = "Set one of load_in_4bit and load_in_8bit, or remove the section."
        faults.append(Fault(document.place(("quantization",)), None, rule, fix))
        return
    for key, value in quantization.items():
        if str(key).startswith(IDLE[bits[0]]) and value not in (None, INERT.get(str(key))):
            rule = f"It does nothing beside {bits[0]}."
            faults.append(Fault(document.place(("quantization", key)), value, rule, "Leave it out."))


def _unknown(document: Document, key: Key, value: Any, known: Iterable[str], rule: str) -> Fault:
    """A fault for a name that is not known, with the nearest known one if there is one."""
    names = sorted(known)
    close = difflib.get_close_matches(str(key[-1]), names, n=1, cutoff=0.6)
    shown = value if not isinstance(value, (dict, list)) else None
    fix = (
        f'Did you mean "{close[0]}"?' if close else f"Known: {', '.join(names[:12])}{', …' if len(names) > 12 else '.'}"
    )
    return Fault(document.place(key), shown, rule, fix)


def check_buildable(section: str, build: Callable[..., Any], values: dict[str, Any], place: str) -> Any:
    """The library object of a verbatim section; what the library itself refuses becomes a `UserError`.

    Raises:
        UserError: the library's own constructor refused, with an error of any kind that libraries refuse with.
    """
    try:
        return build(**values)
    except (ValueError, TypeError, ImportError, LookupError, AttributeError, OSError, RuntimeError) as fault:
        rule = f"{LIBRARY_CLASSES[section].title} refuses these values: {str(fault).strip()}"
        raise UserError(f"{place}  {section.partition('/')[0]}", None, rule, "Change the value it names.") from fault
