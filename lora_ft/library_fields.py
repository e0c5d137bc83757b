"""The fields that installed libraries accept, read from their source without importing them.

Importing trl takes seconds; a recipe's spelling mistake should cost a fraction of one. So the dataclasses that
`quantization`, `lora` and `training` are passed to are read as text, and a new option of theirs needs no change here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError

ANYTHING = typing.Any


@dataclass(frozen=True)
class LibraryClass:
    """A class of an installed library, and the classes it inherits fields from."""

    package: str
    """Distribution and top-level module, `peft`."""
    name: str
    """Class as a user knows it, `LoraConfig`."""
    sources: tuple[tuple[str, str, str], ...]
    """Where fields are declared: (module, file below it, class); later ones win, as in inheritance."""

    @property
    def title(self) -> str:
        """`peft.LoraConfig (0.21.2)`."""
        return f"{self.package}.{self.name} ({importlib.metadata.version(self.package)})"


LIBRARY_CLASSES = {
    "quantization": LibraryClass(
        "transformers",
        "BitsAndBytesConfig",
        (("transformers", "utils/quantization_config.py", "BitsAndBytesConfig"),),
    ),
    "lora": LibraryClass(
        "peft",
        "LoraConfig",
        (
            ("peft", "config.py", "PeftConfigMixin"),
            ("peft", "config.py", "PeftConfig"),
            ("peft", "tuners/lora/config.py", "LoraConfig"),
        ),
    ),
    "training": LibraryClass(
        "trl",
        "SFTConfig",
        (
            ("transformers", "training_args.py", "TrainingArguments"),
            ("trl", "trainer/base_config.py", "_BaseConfig"),
            ("trl", "trainer/sft_config.py", "SFTConfig"),
        ),
    ),
    "training/classification": LibraryClass(
        "transformers",
        "TrainingArguments",
        (("transformers", "training_args.py", "TrainingArguments"),),
    ),
    "training/seq2seq": LibraryClass(
        "transformers",
        "Seq2SeqTrainingArguments",
        (
            ("transformers", "training_args.py", "TrainingArguments"),
            ("transformers", "training_args_seq2seq.py", "Seq2SeqTrainingArguments"),
        ),
    ),
}
"""Section → the class its keys are fields of; behind a stroke, the task for which it is another one."""


def find_class(section: str, task: str) -> str:
    """The key in `LIBRARY_CLASSES` of a recipe's section."""
    return f"{section}/{task}" if f"{section}/{task}" in LIBRARY_CLASSES else section


@dataclass(frozen=True)
class LibraryField:
    """One field a library class accepts."""

    type: Any
    """A typing object; `Any` where the annotation names a class of the library's own."""
    choices: tuple[Any, ...] = ()
    """The only values allowed, where the library says so."""
    takes_null: bool = True
    """Whether null is a value, where `type` does not say: it is no member of an enumeration of the library's own."""


@cache
def read_fields(section: str) -> dict[str, LibraryField]:
    """Every field the library class behind a recipe section accepts, by name."""
    fields: dict[str, LibraryField] = {}
    for module, file, class_name in LIBRARY_CLASSES[section].sources:
        tree = ast.parse((_module_folder(module) / file).read_text(encoding="utf-8"))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        fields |= _dataclass_fields(body) or _constructor_fields(body)
    return fields


def accepts(expected: Any, value: Any) -> bool:
    """Whether `value`, as YAML gives it, may be passed where `expected` (a typing object) is declared.

    An int is a float, as in Python; a bool is neither; a list is a tuple, because YAML has no tuples.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is ANYTHING or isinstance(expected, typing.TypeVar):
        return True
    if origin is typing.Literal:
        return any(_is_choice(choice, value) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(accepts(arguments[0], item) for item in value)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(accepts(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            accepts(arguments[0], key) and accepts(arguments[1], item) for key, item in value.items()
        )
    if expected in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def describe(expected: Any) -> str:
    """A type as a person would say it: `a whole number`, `one of "a", "b"`, `text or null`."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return "one of " + ", ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"a list, each item {describe(arguments[0])}"
    if origin is dict or expected is dict:
        return "a mapping"
    if expected is list:
        return "a list"
    return plain.get(expected, "a value the library knows")


def _is_choice(choice: Any, value: Any) -> bool:
    """Whether `value` is that choice; PEFT writes `pissa_niter_[number of iters]` for a family of names."""
    if isinstance(choice, str) and isinstance(value, str) and "[" in choice:
        return value.startswith(choice.partition("[")[0])
    return bool(value == choice) and type(value) is type(choice)


def _module_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            "environment",
            module,
            f"The library {module} is not installed.",
            "Install lora-ft again: pip install lora-ft",
        )
    return Path(spec.origin).parent


def _dataclass_fields(body: ast.ClassDef) -> dict[str, LibraryField]:
    return {
        node.target.id: LibraryField(_to_type(node.annotation), _choices(node.value), _names_null(node))
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }


def _constructor_fields(body: ast.ClassDef) -> dict[str, LibraryField]:
    """The arguments of `__init__`; one without annotation has the type of its default, or any if that is None."""
    init = next(node for node in body.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = init.args.args[1:]
    defaults = [None] * (len(arguments) - len(init.args.defaults)) + [*init.args.defaults]
    fields = {}
    for argument, default in zip(arguments, defaults, strict=True):
        value = default.value if isinstance(default, ast.Constant) else None
        fields[argument.arg] = LibraryField(ANYTHING if value is None else type(value))
    return fields


def _choices(value: ast.expr | None) -> tuple[Any, ...]:
    """`metadata={"choices": [...]}` of a dataclass field, where it is written out as constants."""
    for node in ast.walk(value) if value else ():
        if isinstance(node, ast.Dict):
            for key, item in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    try:
                        return tuple(ast.literal_eval(item))
                    except ValueError:
                        return ()
    return ()


def _names_null(node: ast.AnnAssign) -> bool:
    """Whether None stands in a field's annotation or default, or the annotation leaves it open."""
    words = ast.unparse(node.annotation)
    return "None" in ast.unparse(node) or "Optional" in words or "Any" in words


_PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list, "None": type(None)}


def _to_type(node: ast.expr) -> Any:
    """The typing object an annotation stands for; names that only the library knows become `Any`."""
    if isinstance(node, ast.Constant):
        return _to_type(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else type(node.value)
    if isinstance(node, ast.Name):
        return _PLAIN.get(node.id, ANYTHING)
    if isinstance(node, ast.BinOp):
        return _union([_to_type(node.left), _to_type(node.right)])
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return _subscript(node.value.id, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])
    return ANYTHING


def _subscript(name: str, arguments: list[ast.expr]) -> Any:
    if name == "Literal":
        values = tuple(argument.value for argument in arguments if isinstance(argument, ast.Constant))
        return typing.Literal[values] if len(values) == len(arguments) else ANYTHING
    converted = [_to_type(argument) for argument in arguments]
    if name == "Optional":
        return _union([*converted, type(None)])
    if name == "Union":
        return _union(converted)
    if name.lower() == "list":
        return list[converted[0]]  # type: ignore[valid-type]
    if name.lower() == "tuple":
        return list[ANYTHING]
    if name.lower() == "dict" and len(converted) == 2:
        return dict[converted[0], converted[1]]  # type: ignore[valid-type]
    return ANYTHING


def _union(members: list[Any]) -> Any:
    return ANYTHING if ANYTHING in members else typing.Union[tuple(members)]  # noqa: UP007 - built at run time
