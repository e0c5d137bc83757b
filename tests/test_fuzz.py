"""Whatever a file holds, readers give values or one clear error; the long run is scripts/fuzz.py."""

import json

import pytest

from lora_ft.errors import UserError
from lora_ft.fingerprint import list_weight_files
from lora_ft.recipe import load_recipe
from scripts.fuzz import fuzz


def test_readers_survive_what_nobody_should_write():
    seen = fuzz(1000, first_seed=1)
    assert seen.counts["recipes refused"] > 100 and seen.counts["recipes accepted"] > 5
    assert seen.counts["rows read"] > 50 and seen.counts["rows at fault"] > 50 and seen.counts["files refused"] > 20


@pytest.mark.parametrize(
    "value",
    [
        "hf_" + "a1" * 15,
        "https://me:secret@example.org/rows.jsonl",
        "sk-" + "a1" * 20,
        "ghp_" + "a1" * 18,
        "AIza" + "a1" * 17 + "_",
        "xoxb-" + "1234567890",
    ],
)
def test_credentials_are_refused_and_not_shown(recipe_file, value):
    for section, overrides in (({"run_name": value}, []), ({}, [f"model.base={value}"])):
        with pytest.raises(UserError, match="looks like a token or a password") as caught:
            load_recipe(recipe_file(training=section), overrides)
        assert value not in str(caught.value) and len(caught.value.faults) == 1


def test_index_cannot_name_files_elsewhere(tmp_path):
    """A merge writes under the names of the base's files."""
    index = {"weight_map": {"a": "../../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="An index names files beside it"):
        list_weight_files(tmp_path)


def test_recipe_of_aliases_within_aliases(tmp_path):
    """A few lines that stand for a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="at most 20000 values"):
        load_recipe(path)
