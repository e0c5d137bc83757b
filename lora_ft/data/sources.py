"""Where rows come from: files, folders, globs, built-in data and data sets of the Hub, as one stream of Examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from lora_ft.builtin import is_builtin, locate_data
from lora_ft.data.example import Example
from lora_ft.data.files import Row, Rows, drop_fillers
from lora_ft.data.formats import FORMATS, convert_row, find_format
from lora_ft.data.readers import read_file
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.fingerprint import hash_file, hash_json
from lora_ft.recipe_paths import split_suffixes
from lora_ft.sections import SourceSection


@dataclass(frozen=True)
class Source:
    """A source whose files were found; what a Hub data set holds is known only when it is read."""

    section: SourceSection
    """The recipe's lines about it."""
    files: tuple[Path, ...] = ()
    """Its files, in order; empty for a data set of the Hub and for rows in memory."""
    rows: Iterable[Any] | None = None
    """Its rows, where they are no file: mappings, which can be gone through more than once."""

    def read(self) -> Iterator[Rows]:
        """The rows of each of its files, with the columns named as the format wants them."""
        if self.files:
            parts: Iterable[Rows] = (read_file(path) for path in self.files)
        else:
            parts = [number_rows(load_hub(self.section) if self.rows is None else self.rows, self.section.path)]
        if not self.section.columns:
            yield from parts
            return
        renamer = ColumnRenamer(self.section)
        for rows in parts:
            yield map(renamer.rename, rows)
        renamer.refuse_unknown()

    def fingerprint(self) -> list[str]:
        """Hashes of what would be read."""
        if self.files:
            return [hash_file(path) for path in self.files]
        rows = load_hub(self.section) if self.rows is None else self.rows
        known = getattr(rows, "_fingerprint", None)  # datasets' own hash of how the rows came about
        return [known] if known else [hash_json(row) for row in rows]


def find_source(section: SourceSection, base_folder: Path | None = None) -> Source:
    """The source with its files; of a folder those that are not hidden, as `.ipynb_checkpoints` is.

    Raises:
        UserError: there is no such file, or none of a kind that is read; settings of a Hub data set for a file.
    """
    path = Path(section.path)
    if is_builtin(section.path):
        path = locate_data(section.path)
    elif base_folder is not None:
        path = base_folder / path
    if has_magic(str(path)) and not path.exists():
        files = [file for file in find_matches(path) if file.is_file()]
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if split_suffixes(file)[0] and file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.is_file() or not _may_be_hub_id(section.path):
        files = [path]
    else:
        return Source(section)
    if not files or not files[0].exists():
        rule = "No file of a known kind lies there." if path.is_dir() else "There is no such file."
        raise UserError("data.sources", section.path, rule, "Correct data.sources[].path.")
    raise_faults([*check_names(files), *check_local(section)])
    return Source(section, tuple(files))


def find_matches(pattern: Path) -> list[Path]:
    """The paths that a glob finds; its folders that are there as they are written may hold `[` themselves."""
    folder = next(parent for parent in pattern.parents if parent.exists())
    return [Path(name) for name in sorted(glob(str(escape(str(folder)) / pattern.relative_to(folder)), recursive=True))]


def check_names(files: Iterable[Path]) -> Iterator[Fault]:
    """Names of files that no text can hold, so that their rows could not be named."""
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            yield Fault("data.sources", ascii(str(file)), "The file's name is not UTF-8.", "Rename it.")


def check_local(section: SourceSection) -> Iterator[Fault]:
    """Settings that only a data set of the Hub has a use for."""
    default = SourceSection(section.path)
    for name in ("name", "hub_split"):
        if (value := getattr(section, name)) != getattr(default, name):
            rule = f"{section.path} is a file here, and only a data set of the Hub has a {name}."
            yield Fault(f"data.sources[].{name}", value, rule, "Leave it out.")


def _may_be_hub_id(path: str) -> bool:
    """Whether a path could name a data set of the Hub: `NAME` or `ORG/NAME`, and nothing like a file."""
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and split_suffixes(Path(path))[0] is None


class ColumnRenamer:
    """Gives the columns of a source the names that its format wants, and notes which were never there."""

    def __init__(self, section: SourceSection):
        self._columns = section.columns
        """Field of the format → column of the file."""
        self._path = section.path
        self._missing, self._found = set(section.columns.values()), dict[str, None]()

    def rename(self, row: Row | Fault) -> Row | Fault:
        """The row with the columns renamed that are to be; others stay."""
        if isinstance(row, Fault) or not isinstance(row.fields, dict):
            return row
        if self._missing:
            self._missing.difference_update(row.fields)
            self._found.update(dict.fromkeys(row.fields))
        columns = self._columns
        kept = {name: value for name, value in row.fields.items() if name not in columns.values()}
        return Row(row.place, {**kept, **{field: row.fields[c] for field, c in columns.items() if c in row.fields}})

    def refuse_unknown(self) -> None:
        """Nothing when each column stood in a row; otherwise an error. To be asked behind the last row."""
        found = ", ".join(map(str, self._found))
        raise_faults(
            Fault(
                "data.sources[].columns",
                f"{field}: {column}",
                f"No row of {self._path} has a column {column}; there are {found}.",
                "Write field of the format: column of the file.",
            )
            for field, column in self._columns.items()
            if found and column in self._missing
        )


def load_hub(section: SourceSection) -> Any:
    """A data set of the Hub."""
    import datasets

    try:
        return datasets.load_dataset(section.path, section.name, split=section.hub_split)
    except Exception as error:  # whatever the Hub's client, its file formats or the network raise
        rule = f"It is no file here, and as a data set of the Hub it cannot be read: {error}."
        raise UserError("data.sources", section.path, rule, "Correct data.sources[].path, name or hub_split.") from None


def number_rows(rows: Iterable[Any], name: str) -> Rows:
    """Rows that are not in a file, with their numbers as places."""
    is_typed = hasattr(rows, "features")  # a datasets.Dataset
    for number, fields in enumerate(rows, 1):
        yield Row(f"{name}:{number}", drop_fillers(fields) if is_typed else fields)


class Usage:
    """What rows were read as, and which of their columns no format reads."""

    def __init__(self) -> None:
        self.formats, self.unread = Counter[str](), Counter[str]()
        """Rows by format; rows that hold something in a column, by column."""

    def note(self, fields: object, name: str) -> None:
        """One more row that was read in the format `name`."""
        if name in FORMATS and isinstance(fields, Mapping):
            self.formats[name] += 1
            for column in fields.keys() - FORMATS[name].columns:
                self.unread[column] += fields[column] not in (None, "", [], {})


def read_examples(source: Source, format_name: str, chat: bool, usage: Usage) -> Iterator[Example | Fault]:
    """An Example for every row, or what is wrong with it; with `auto`, a file's first row tells the format of all."""
    for rows in source.read():
        name = format_name
        for row in rows:
            if isinstance(row, Fault):
                yield row
                continue
            if name == "auto" and isinstance(row.fields, dict):
                name = find_format(row.fields) or "auto"
            usage.note(row.fields, name)
            yield convert_row(row.fields, row.place, name, chat)
