"""Where the paths of a recipe lead: to a file, or to the Hub."""

from pathlib import Path

import pytest

from lora_ft.data.files import OPENERS
from lora_ft.data.readers import READERS
from lora_ft.errors import UserError
from lora_ft.recipe import load_recipe
from lora_ft.recipe_paths import COMPRESSIONS, KINDS, split_suffixes
from tests.test_recipe import GOOD, write


@pytest.mark.parametrize(
    ("path", "is_hub"),
    [
        ("teknium/OpenHermes-2.5", True),
        ("org/rows", True),
        ("data/rows.jsonl", False),
        ("data/rows.csv.gz", False),
        ("data/*", False),
        ("here/rows.v2", False),
        ("./rows.v2", False),
    ],
)
def test_a_dot_in_a_name_makes_no_file(tmp_path, path, is_hub):
    (tmp_path / "here" / "rows.v2").mkdir(parents=True)
    recipe = load_recipe(write(tmp_path, GOOD.replace("rows.jsonl", path)))
    assert recipe.data.sources[0].path == (path if is_hub else str(tmp_path / path))


def test_the_kinds_of_files_are_those_that_are_read():
    assert set(KINDS) == set(READERS) and set(COMPRESSIONS) == set(OPENERS)
    assert split_suffixes(Path("a.b.JSONL.gz")) == (".jsonl", ".gz") and split_suffixes(Path("a-2.5")) == (None, None)


def test_a_seed_is_not_negative(tmp_path):
    with pytest.raises(UserError, match=r"data\.split\.seed: -1"):
        load_recipe(write(tmp_path, GOOD), ["data.split.seed=-1"])
