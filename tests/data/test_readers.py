"""Files of every kind become rows as they are, and damaged ones become messages."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_ft.data.files import Row
from lora_ft.data.formats import convert_row
from lora_ft.data.readers import READERS, read_file
from lora_ft.errors import Fault, UserError

ROWS = [{"prompt": "2024-01-02", "completion": "007"}, {"prompt": "é 日本 😀", "completion": "yes\nno"}]


def read(path) -> list[Row | Fault]:
    return list(read_file(path))


def fields(path) -> list:
    found = read(path)
    assert all(isinstance(row, Row) for row in found), found
    return [row.fields for row in found]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows=ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl()),
        ("a.ndjson", jsonl()),
        ("bom.jsonl", "\ufeff" + jsonl()),
        ("crlf.jsonl", jsonl().replace("\n", "\r\n")),
        ("blank.jsonl", "\n \n" + jsonl().replace("\n", "\n\n")),
        ("no_last_break.jsonl", jsonl().rstrip("\n")),
        ("utf16.jsonl", jsonl().encode("utf-16")),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("compact.json", json.dumps(ROWS)),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("lines.json", jsonl()),
        ("arrays.json", json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:], indent=1) + "[ ]\n"),
        ("a.csv", 'prompt,completion\r\n2024-01-02,007\r\né 日本 😀,"yes\nno"\r\n'),
        ("bom.csv", '\ufeffprompt,completion\n2024-01-02,007\n\né 日本 😀,"yes\nno"\n'),
        ("quoted.tsv", 'prompt\tcompletion\n"2024-01-02"\t"007"\né 日本 😀\t"yes\nno"\n'),
    ],
)
def test_text_stays_the_text_it_is(tmp_path, name, content):
    assert fields(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    assert fields(write(tmp_path / f"a.jsonl.{suffix}", compress(jsonl().encode()))) == ROWS


def test_zstandard_files(tmp_path):
    with pa.output_stream(str(tmp_path / "a.csv.zst"), compression="zstd") as stream:
        stream.write(b"prompt,completion\n2024-01-02,007\n")
    assert fields(tmp_path / "a.csv.zst") == ROWS[:1]


def test_parquet_files(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == ROWS
    assert read(tmp_path / "a.parquet")[1].place.endswith("a.parquet:2")


def test_parquet_fills_that_typed_columns_bring_are_taken_out(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "Eve"}]}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet")[0]["messages"][0] == {"role": "user", "content": "a"}


def test_a_date_column_is_named_and_not_turned_into_text(tmp_path):
    import datetime

    pq.write_table(
        pa.Table.from_pylist([{"prompt": "when?", "completion": datetime.date(2024, 1, 2)}]), tmp_path / "a.parquet"
    )
    fault = convert_row(read(tmp_path / "a.parquet")[0].fields, "a.parquet:1", "auto", True)
    assert isinstance(fault, Fault)


def test_text_files_are_one_text_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\ntwo\u2028still two\n")
    assert [row.place.rpartition(":")[2] for row in read(path)] == ["1", "3"]
    assert fields(path) == [{"text": "one"}, {"text": "two\u2028still two"}]


def test_places_name_the_line_a_row_starts_on(tmp_path):
    path = write(tmp_path / "a.json", '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]')
    assert [row.place.rpartition(":")[2] for row in read(path)] == ["2", "4", "5"]
    path = write(tmp_path / "a.csv", 'a,b\n1,"x\ny"\n3,z\n')
    assert [row.place.rpartition(":")[2] for row in read(path)] == ["2", "4"]
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [row.place.rpartition(":")[2] for row in read(path)] == ["1", "3"]


def test_a_json_array_larger_than_the_buffer_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ft.data.json_stream.CHUNK_CHARACTERS", 7)
    rows = [{"text": "x" * n, "n": n} for n in range(40)]
    assert fields(write(tmp_path / "a.json", json.dumps(rows, indent=1))) == rows
    assert fields(write(tmp_path / "b.json", jsonl(rows))) == rows


def test_late_columns_and_late_nulls_are_fine(tmp_path):
    rows = [*ROWS, {"prompt": None, "completion": "late"}, {"prompt": "a", "completion": "b", "extra": {"deep": [1]}}]
    assert fields(write(tmp_path / "a.jsonl", jsonl(rows))) == rows


def test_unquoted_tabs_keep_their_quotes(tmp_path):
    content = 'ham\t"Hi" she said\nspam\t"Win now\nham\tok "then\nspam\tdouble ""quotes""\n'
    rows = fields(write(tmp_path / "a.tsv", content))
    assert [row["text"] for row in rows] == ['"Hi" she said', '"Win now', 'ok "then', 'double ""quotes""']
    assert [row["label"] for row in rows] == ["ham", "spam", "ham", "spam"]


@pytest.mark.parametrize(
    "content", ["text,label\na,x\nb,y\nc,x\nd,y\n", "a,x\nb,y\nc,x\nd,y\ne,x\nf,x\n", "x,a\ny,b\nx,c\ny,d\nx,e\nx,f\n"]
)
def test_a_table_without_names_is_known_by_its_labels(tmp_path, content):
    rows = fields(write(tmp_path / "a.csv", content))
    assert {row["label"] for row in rows} == {"x", "y"}
    assert {"a", "b", "c", "d"} <= {row["text"] for row in rows}


def test_a_row_of_another_width_is_a_fault_of_its_line(tmp_path):
    found = read(write(tmp_path / "a.csv", "prompt,completion\na,b\na,b,c\na\n"))
    assert [type(row) for row in found] == [Row, Fault, Fault]
    assert found[1].place.endswith("a.csv:3") and "3 cells" in found[1].rule


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{oops}\n', "a.jsonl:2", "not JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl:1", "not JSON"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', "a.jsonl:1", "not JSON"),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\xff"}', "a.jsonl:2", "not JSON"),
        ("a.csv", b'a,b\nc,"d\n', "a.csv:2", "cannot be read"),
        ("a.jsonl", b"[" * 5000 + b"\n", "a.jsonl:1", "not JSON"),
    ],
)
def test_bad_lines_are_faults_with_file_and_line(tmp_path, name, content, place, reason):
    fault = read(write(tmp_path / name, content))[-1]
    assert isinstance(fault, Fault) and fault.place.endswith(place) and reason in fault.rule


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", b"", "empty"),
        ("empty.parquet", b"", "empty"),
        ("a.parquet", b"PAR1 but not really", "cannot be read"),
        ("a.jsonl.gz", b"not gzip at all", "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(jsonl().encode() * 99)[:-20], "cannot be read"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00 broken", "cannot be read"),
        ("a.jsonl.bz2", b"BZh9 broken", "cannot be read"),
        ("a.csv.zst", b"(\xb5/\xfd broken", "cannot be read"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "comma"),
        ("a.json", b'[{"a": 1},\n{"a": ', "not JSON"),
        ("a.json", b'[{"a": 1},\n', "does not end"),
        ("a.json", b'{"a": "b', "not JSON"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}', "a.json:2\n.*no array"),
        ("a.json", b'[{"a": 1}] nonsense', "no array"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "more digits"),
        ("a.csv", b'prompt,completion\na,b\n"c","d\n' + b"e,f\n" * 1000, "a.csv:3\n.*takes in 1,001 lines, 3 to 1003"),
        ("a.csv", b'prompt,completion\n"a","b\nc,d\ne,"f"\ng,h\n', "takes in 3 lines, 2 to 4"),
        ("deep.json", b"[" * 100_000, "nested too deep"),
        ("odd.jsonl", "x".encode("utf-16")[:3], "cannot be read"),
        ("a.csv", b"text,label,text\na,b,c\n", "Two columns have one name"),
        ("a.docx", b"x", "read by suffix"),
        ("a", b"x", "read by suffix"),
    ],
)
def test_bad_files_are_refused_with_a_reason(tmp_path, name, content, reason):
    with pytest.raises(UserError, match=reason) as error:
        read(write(tmp_path / name, content))
    assert name in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_a_gigantic_line_does_not_fill_memory(tmp_path, monkeypatch):
    for module in ("files", "readers"):
        monkeypatch.setattr(f"lora_ft.data.{module}.MAX_ROW_CHARACTERS", 1000)
    found = read(write(tmp_path / "a.jsonl", '{"a": "' + "x" * 100_000 + '"}\n{"a": 1}\n'))
    assert isinstance(found[0], Fault) and "1,000 characters or more" in found[0].rule
    assert found[1].fields == {"a": 1} and found[1].place.endswith(":2")


@pytest.mark.parametrize("suffix", [*READERS, ".jsonl.gz", ".csv.xz", ".txt.bz2", ".tsv.zst"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=400), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
)
def test_any_bytes_give_rows_or_messages(tmp_path, suffix, content):
    path = write(tmp_path / f"fuzz{suffix}", content)
    try:
        for row in read(path):
            if isinstance(row, Row):
                convert_row(row.fields, row.place, "auto", True)
    except UserError as error:
        assert error.exit_code == 2 and str(path) in str(error)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "output", "question"])
        | st.sampled_from(["answer", "context", "text", "label", "tools", "system", "input"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(["role", "content", "from", "value", "tool_calls", "function"]), inner
                )
            ),
            max_leaves=12,
        ),
    ),
    chat=st.booleans(),
)
def test_any_row_gives_an_example_or_a_fault(fields, chat):
    found = convert_row(fields, "rows.jsonl:1", "auto", chat)
    if not isinstance(found, Fault):
        assert found.reference.strip()


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_columns_that_another_separator_divides_are_told_once(tmp_path, mark):
    path = write(tmp_path / "a.csv", f"prompt{mark}completion\nwhat, now?{mark}this\nand{mark}that\n")
    with pytest.raises(UserError, match=r"a\.csv:1: prompt.*\n  Its columns seem to be separated by") as error:
        read(path)
    assert len(error.value.faults) == 1
    (row,) = fields(write(tmp_path / "b.csv", f"text\nwhat{mark} now\n"))
    assert row == {"text": f"what{mark} now"}
