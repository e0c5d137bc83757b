"""Paths of every kind lead to rows, or to a message."""

import json
import os
from pathlib import Path

import datasets
import pytest

from lora_ft.data.example import Example
from lora_ft.data.files import Row
from lora_ft.data.sources import Source, Usage, find_source, read_examples
from lora_ft.errors import Fault, UserError
from lora_ft.sections import SourceSection

ROW = {"prompt": "a", "completion": "b"}


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        path = tmp_path / "rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**ROW, "prompt": name}) + "\n")
    (tmp_path / "rows" / "README").write_text("not rows")
    return tmp_path / "rows"


def read(source: Source) -> list[Row]:
    return [row for rows in source.read() for row in rows]


def prompts(source: Source) -> list[str]:
    return [row.fields["prompt"] for row in read(source)]


def test_a_file_a_folder_and_a_glob(folder):
    assert prompts(find_source(SourceSection(str(folder / "a.jsonl")))) == ["a.jsonl"]
    assert prompts(find_source(SourceSection(str(folder)))) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert prompts(find_source(SourceSection(str(folder / "*.jsonl")))) == ["a.jsonl", "b.jsonl"]
    assert prompts(find_source(SourceSection(str(folder / "**" / "*.jsonl")))) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]


def test_a_path_relative_to_a_folder(folder):
    assert prompts(find_source(SourceSection("rows/a.jsonl"), folder.parent)) == ["a.jsonl"]


def test_a_file_whose_name_looks_like_a_glob(folder):
    path = folder / "[x].jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    assert prompts(find_source(SourceSection(str(path)))) == ["a"]


def test_built_in_data():
    source = find_source(SourceSection("builtin:halden/test.jsonl"))
    assert len(read(source)) == 158


@pytest.mark.parametrize("path", ["none.jsonl", "./none", "/none/at/all", "none/*.jsonl", "builtin:none/none.jsonl"])
def test_what_is_not_there_is_refused(path):
    with pytest.raises(UserError):
        find_source(SourceSection(path))


def test_a_folder_without_rows_is_refused(tmp_path):
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(UserError, match="No file of a known kind"):
        find_source(SourceSection(str(tmp_path)))


def test_columns_are_mapped_and_the_rest_stays():
    source = Source(
        SourceSection("rows", columns={"answer": "text", "question": "q"}), rows=[{"q": "1", "text": "2", "id": "3"}]
    )
    assert read(source)[0].fields == {"answer": "2", "question": "1", "id": "3"}


def test_columns_can_be_swapped_and_one_may_come_late():
    columns = {"prompt": "completion", "completion": "prompt", "tools": "late"}
    source = Source(SourceSection("rows", columns=columns), rows=[ROW, {**ROW, "late": "[]"}])
    swapped = {"prompt": "b", "completion": "a"}
    assert [row.fields for row in read(source)] == [swapped, {**swapped, "tools": "[]"}]


def test_a_column_that_no_row_has_is_refused_by_name(folder):
    columns = {"question": "prompt", "answer": "completion", "context": "contxt"}
    with pytest.raises(UserError) as error:
        read(find_source(SourceSection(str(folder), columns=columns)))
    assert len(error.value.faults) == 1 and error.value.faults[0].value == "context: contxt"
    assert "there are prompt, completion" in error.value.faults[0].rule


@pytest.mark.parametrize("options", [{"hub_split": "test"}, {"name": "small"}])
def test_settings_of_a_hub_data_set_are_refused_for_a_file(folder, options):
    with pytest.raises(UserError, match=rf"data.sources\[\].{next(iter(options))}.*\n.*is a file here"):
        find_source(SourceSection(str(folder), **options))


def test_a_glob_below_a_folder_whose_name_looks_like_one(folder):
    odd = folder / "pr[1]"
    odd.mkdir()
    (odd / "d.jsonl").write_text(json.dumps(ROW) + "\n")
    assert prompts(find_source(SourceSection(str(odd / "*.jsonl")))) == ["a"]
    assert prompts(find_source(SourceSection("pr[1]/*.jsonl"), folder)) == ["a"]


def test_hidden_files_and_folders_are_left_alone(folder):
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "deep/.c.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(ROW) + "\n")
    assert prompts(find_source(SourceSection(str(folder)))) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert prompts(find_source(SourceSection(str(folder / ".ipynb_checkpoints")))) == ["a"]


def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/d\xf6n.jsonl")
    Path(path).write_text(json.dumps(ROW) + "\n")
    for source in (path, str(tmp_path)):
        with pytest.raises(UserError, match=r"(?s)d\\udcf6n.*not UTF-8"):
            find_source(SourceSection(source))


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([ROW, {**ROW, "prompt": "z"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = find_source(SourceSection("org/rows", name="small", hub_split="train[:2]"))
    assert prompts(source) == ["a", "z"] and asked == [("org/rows", "small", "train[:2]")]
    assert [row.place for row in read(source)] == ["org/rows:1", "org/rows:2"]
    assert source.fingerprint() == source.fingerprint()


def test_a_data_set_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(UserError, match="offline"):
        read(find_source(SourceSection("org/rows")))


def test_rows_in_memory_lose_the_fillers_of_typed_columns():
    rows = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "Eve"}]}]
    )
    (row,) = read(Source(SourceSection("rows"), rows=rows))
    assert row.fields["messages"][0] == {"role": "user", "content": "a"}


def test_the_fingerprint_follows_the_bytes(folder):
    before = find_source(SourceSection(str(folder))).fingerprint()
    (folder / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    assert find_source(SourceSection(str(folder))).fingerprint() != before


def test_the_first_row_of_a_file_tells_the_format_of_all(folder):
    for name, rows in {"x": [{"text": "a", "label": "b"}, {"text": "c"}], "y": [ROW, {"text": "d"}]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_examples(find_source(SourceSection(str(folder / "[xy].jsonl"))), "auto", True, Usage()))
    assert [type(item) for item in found] == [Example, Fault, Example, Fault]
    assert found[1].place.endswith("x.jsonl:2") and "Format classification" in found[1].rule
    assert found[3].place.endswith("y.jsonl:2") and "missing: prompt, completion" in found[3].rule


def test_real_data_is_read_whole(shared_data):
    spam = read(find_source(SourceSection(str(shared_data / "SMSSpamCollection.tsv"))))
    assert len(spam) == 5574 and sum(row.fields["label"] == "spam" for row in spam) == 747
    raw = [line.split("\t", 1) for line in (shared_data / "SMSSpamCollection.tsv").read_text("utf-8").splitlines()]
    assert [[row.fields["label"], row.fields["text"]] for row in spam] == raw
    source = find_source(SourceSection(str(shared_data / "gsm8k_train.json")))
    examples = list(read_examples(source, "auto", True, Usage()))
    expected = json.loads(Path(shared_data / "gsm8k_train.json").read_text("utf-8"))
    assert [example.reference for example in examples] == [row["output"] for row in expected]
    assert examples[1].place.endswith("gsm8k_train.json:7")
