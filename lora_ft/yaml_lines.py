"""YAML read safely, with the line of every key kept, so that a fault can name its place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_ft.errors import Fault, UserError, raise_faults

Key = tuple[str | int, ...]
"""The way to a value: `("data", "sources", 0, "path")`."""

MAX_BYTES = 200_000
MAX_VALUES = 20_000


class _Loader(yaml.SafeLoader):
    """PyYAML's, but plain words are read as in YAML 1.2: `2e-4` and `010` are numbers, `no` and `1:30` are text."""


class Dumper(yaml.SafeDumper):
    """PyYAML's, which also puts into quotes what only `_Loader` takes for a number."""


PLAIN_WORDS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""Tag → how a word without quotes is written to have it, and the characters it begins with: YAML 1.2, chapter 10.3."""
READ_OTHERWISE = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", *PLAIN_WORDS)}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in READ_OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in PLAIN_WORDS.items():
    for _kind in (_Loader, Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _read_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if found := re.search("[\0\ud800-\udfff]", node.value):
        raise ValueError(f"{found.group()!a} is no character of a text")
    return str(node.value)


def _read_whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


def _read_number(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


_Loader.add_constructor("tag:yaml.org,2002:str", _read_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _read_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _read_number)


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
    """A value from the command line, read as it would be in the file: `2e-4`, `[q_proj, v_proj]`, `null`.

    Raises:
        UserError: a value is not what its tag says, or there are too many.
        yaml.YAMLError: it is not YAML.
    """
    document = Document("command line")
    node = yaml.compose(text, _Loader)
    value = None if node is None else _to_value(node, (), document)
    raise_faults(document.faults)
    return value


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
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError) as fault:
        shown = node.value if node.value.isprintable() else ascii(node.value)
        rule = str(fault) if isinstance(fault, ValueError) else f"This is no {node.tag.rpartition(':')[2]}"
        document.faults.append(Fault(document.place(key), shown, f"{rule}.", "Quote it, or mend it."))
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
