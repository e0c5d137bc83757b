"""The house stands: a room imports only from its own floor or above, there are no drawers, and no room is endless."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_ft"
FLOORS = {
    "errors": 0,
    "fingerprint": 0,
    "sections": 0,
    "builtin": 0,
    "library_fields": 0,
    "yaml_lines": 0,
    "credentials": 0,
    "libraries": 0,
    "recipe": 0,
    "recipe_paths": 0,
    "recipe_rules": 0,
    "data": 1,
    "model": 2,
    "training": 3,
    "evaluation": 4,
    "export": 5,
    "tasks": 6,
    "settle": 6,
    "evaluate": 6,
    "run": 6,
    "summary": 7,
    "watch": 7,
    "sweep": 7,
    "chat": 7,
    "commands": 8,
    "cli": 9,
    "__main__": 10,
}
ROOMS = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_by(path: Path) -> set[str]:
    """The floors (`lora_ft.FLOOR…`) that a room imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("lora_ft.")}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_rooms_import_from_their_floor_or_above(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    below = {name for name in imported_by(path) if FLOORS[name] > FLOORS[own]}
    assert not below, f"{path.name} on floor {FLOORS[own]} imports from below: {below}"


def test_no_drawers():
    assert not [path for path in ROOMS if path.stem in {"utils", "helpers", "common", "misc"}]
