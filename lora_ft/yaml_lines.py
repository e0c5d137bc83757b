"""YAML read safely, with the line of every key kept, so that a fault can name its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_ft.errors import Fault, UserError

Key = tuple[str | int, ...]
"""The way to a value: `("data", "sources", 0, "path")`."""

MAX_BYTES = 200_000
MAX_VALUES = 20_000


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `2e-4` is a number, and `no` is a word (`eval_strategy: no`), as in YAML 1.2."""


READ_OTHERWISE = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in READ_OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _read_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if found := re.search("[\0\ud800-\udfff]", node.value):
        raise ValueError(f"{found.group()!a} is no character of a text")
    return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:str", _read_text)


@dataclass
class Document:
    """The values of a YAML file and where each stands."""

    path: str
    """The file as the user named it, or `command line`."""
    values: Any = None
    """Plain dicts, lists and scalars."""
    places: dict[Key, str] = field(default_factory=dict)
    """`recipe.yaml:9` for every key, `command line` for an override."""
    faults: list[Fault] = field(default_factory=list)
    """What is wrong with the text itself, such as a key that stands twice."""

    def place(self, key: Key) -> str:
        """`recipe.yaml:9  lora.r`; of a key that is absent, the place of the nearest section above it."""
        near = key
        while near and near not in self.places:
            near = near[:-1]
        return f"{self.places.get(near, self.path)}  {dotted(key)}".rstrip()


def dotted(key: Key) -> str:
    """`data.sources.0.path`."""
    return ".".join(str(part) for part in key)


def read_yaml(path: Path, shown: str) -> Document:
    """The file as a `Document`.

    Raises:
        UserError: the file is absent, too large, not UTF-8, not YAML, or not a mapping at its top.
    """
    document = Document(shown)
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_BYTES:
            raise UserError(shown, f"{len(raw)} bytes", f"A recipe has at most {MAX_BYTES} bytes.", "Name the recipe.")
        node = yaml.compose(raw.decode("utf-8-sig"), _Loader)
        document.values = {} if node is None else _to_value(node, (), document)
    except OSError as fault:
        raise UserError(shown, None, f"The recipe cannot be read: {fault.strerror}.", "Check the path.") from None
    except UnicodeDecodeError as fault:
        raise UserError(shown, None, f"Byte {fault.start} is not UTF-8.", "Save the recipe as UTF-8.") from None
    except (yaml.MarkedYAMLError, yaml.reader.ReaderError) as fault:
        raise _syntax_error(shown, fault) from None
    except RecursionError:
        raise UserError(shown, None, "The recipe is nested too deeply.", "Write it flat.") from None
    if not isinstance(document.values, dict):
        raise UserError(
            shown, type(document.values).__name__, "A recipe is a mapping of sections.", "See: lora-ft recipes"
        )
    return document


def parse_scalar(text: str) -> Any:
    """A value from the command line, read as YAML would read it in the file: `2e-4`, `[q_proj, v_proj]`, `null`."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _to_value(node: yaml.Node, key: Key, document: Document) -> Any:
    document.places.setdefault(key, f"{document.path}:{node.start_mark.line + 1}")
    if len(document.places) > MAX_VALUES:
        raise UserError(document.path, None, f"A recipe has at most {MAX_VALUES} values.", "Write it without aliases.")
    if node.tag not in _Loader.yaml_constructors:
        fault = Fault(document.place(key), node.tag, "This YAML tag is not read.", "Write a plain value.")
        document.faults.append(fault)
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_to_value(item, (*key, index), document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _to_mapping(node, key, document)
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    except ValueError as fault:
        shown = node.value if node.value.isprintable() else ascii(node.value)
        document.faults.append(Fault(document.place(key), shown, f"{fault}.", "Quote it, or mend it."))
        return None
    finally:
        loader.dispose()


def _to_mapping(node: yaml.MappingNode, key: Key, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else "?"
        inner = (*key, name)
        place = f"{document.path}:{name_node.start_mark.line + 1}"
        if name in values:
            first = document.places[inner].rpartition(":")[2]
            document.faults.append(
                Fault(f"{place}  {dotted(inner)}", None, f"The key stands twice, first in line {first}.", "Keep one.")
            )
            continue
        document.places[inner] = place
        values[name] = _to_value(value_node, inner, document)
    return values


def _syntax_error(shown: str, fault: yaml.YAMLError) -> UserError:
    mark = getattr(fault, "problem_mark", None)
    place = f"{shown}:{mark.line + 1}" if mark else shown
    problem = getattr(fault, "problem", None) or getattr(fault, "reason", "not YAML")
    return UserError(
        place, None, f"This is not YAML: {problem}.", "Check indentation, quotes and colons near this line."
    )
