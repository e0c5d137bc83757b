"""A YAML file and overrides → one checked `Recipe`; all faults come in one message.

Nothing heavy is imported: the fields of bitsandbytes, PEFT and TRL are read from their source (`library_fields`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_ft.builtin import is_builtin, locate_recipe
from lora_ft.credentials import find_credentials
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.library_fields import LIBRARY_CLASSES, LibraryField, accepts, describe, find_class, read_fields
from lora_ft.recipe_paths import resolve_paths
from lora_ft.recipe_rules import (
    EXTENT,
    FORMER,
    IDLE,
    INERT,
    OUR_FIELDS,
    OWNED_ELSEWHERE,
    RANGES,
    RENAMED,
    TASK_DEFAULTS,
    UNMEASURED,
    ends_by_steps,
)
from lora_ft.sections import (
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
INDEX = re.compile("[0-9]{1,9}")
"""A number in the way to a value: the place in a list."""
REQUIRED = ("output_dir", "model", "data")


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
    _replace_extent(document.values.get("training"), [key for key in EXTENT if ("training", key) in overridden])
    return overridden


def _replace_extent(training: Any, overridden: list[str]) -> None:
    """How long a run is, if one way of saying so was overridden: the file's other way is taken out."""
    if isinstance(training, dict) and len(overridden) == 1 and training.get(overridden[0]) not in (None, -1):
        for key in EXTENT:
            if key not in overridden:
                training.pop(key, None)


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


def build_options(cls: Any, values: dict[str, Any], place: str) -> Any:
    """A section from a user's own program, held to what a recipe's is held to; `place` is what the user called.

    Raises:
        UserError: with every fault.
    """
    faults: list[Fault] = []
    section = _build_section(cls, values, (), Document(place, values), faults)
    raise_faults(faults)
    return section


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
        elif key not in fields and key in FORMER:
            rule = f"{title} has no field of that name."
            faults.append(Fault(place, value, rule, f"What is meant is {FORMER[key]}."))
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
    if training.get("num_train_epochs") is not None and ends_by_steps(training):
        rule = "training.max_steps says how long the run is, and this does nothing beside it."
        place = document.place(("training", "num_train_epochs"))
        faults.append(Fault(place, training["num_train_epochs"], rule, "Remove one of them."))
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
