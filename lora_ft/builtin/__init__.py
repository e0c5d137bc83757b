"""What travels in the wheel: a small base, instruction data, and recipes, addressed as `builtin:NAME`."""

from __future__ import annotations

from pathlib import Path

from lora_ft.errors import UserError

PREFIX = "builtin:"
HERE = Path(__file__).parent
MODELS = HERE / "models"
DATA = HERE / "data"
RECIPES = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parents[1] / "recipes"
"""In a wheel the recipes lie inside the package; in a checkout, beside it."""


def is_builtin(address: str) -> bool:
    """Whether `address` names something that travels in the wheel."""
    return address.startswith(PREFIX)


def locate_model(address: str) -> Path:
    """The folder of an embedded base: `builtin:wren`."""
    return _locate(address, MODELS, sorted(path.name for path in MODELS.glob("*") if path.is_dir()))


def locate_data(address: str) -> Path:
    """The file of an embedded data set: `builtin:halden/train.jsonl`."""
    return _locate(address, DATA, sorted(path.relative_to(DATA).as_posix() for path in DATA.glob("*/*.jsonl")))


def locate_recipe(address: str) -> Path:
    """The file of an embedded recipe: `builtin:quickstart`."""
    return _locate(address, RECIPES, list_recipes(), suffix=".yaml")


def list_recipes() -> list[str]:
    """The names of the embedded recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe_recipe(name: str) -> str:
    """What a recipe says of itself: the first line of its opening comment."""
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def _locate(address: str, folder: Path, known: list[str], suffix: str = "") -> Path:
    name = address.removeprefix(PREFIX)
    if name not in known:
        rule = f"Nothing of that name is embedded; there are: {', '.join(known)}."
        raise UserError(address, None, rule, "Choose one of these, or give a path.")
    return folder / f"{name}{suffix}"
