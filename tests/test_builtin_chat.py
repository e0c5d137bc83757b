"""The embedded conversations: made again, and held apart."""

import json
from pathlib import Path

import pytest

from tests.test_builtin import ROOT, SPLITS, run_script

DATA = ROOT / "lora_ft" / "builtin" / "data"


def read_rows(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["halden_chat"])
def test_data_are_made_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    run_script(f"generate_{name}.py", "--out", str(tmp_path))
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"train.jsonl", "validation.jsonl", "test.jsonl", "provenance.json"}
    for file, content in made.items():
        assert content == (DATA / name / file).read_bytes(), file


def test_a_conversation_begins_with_the_desk_and_repeats_the_facts() -> None:
    answers = {}
    for split in SPLITS:
        rows = read_rows("halden_chat", split)
        roles = [[message["role"] for message in row["messages"]] for row in rows]
        assert all(found == ["system", *["user", "assistant"] * (len(found) // 2)] for found in roles)
        assert max(map(len, roles)) == 9
        said = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
        answers[split] = set(said)
    assert answers["train"] == answers["test"] == answers["validation"]
