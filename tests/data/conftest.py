"""What the tests of the data floor share: sections, and a cache folder that is thrown away."""

import json

import pytest

from lora_ft.sections import DataSection, SourceSection


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Prepared data goes to the test's own folder."""
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes rows as JSONL and returns a section that reads them; options are fields of the section."""

    def write(rows, name="rows.jsonl", source=(), **options) -> DataSection:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DataSection(sources=(SourceSection(str(path), **dict(source)),), **options)

    return write
