"""The audit counts what is there, and calls it by name."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lora_ft.data.audit import LEAKS, find_script
from lora_ft.data.audit_table import print_audit
from lora_ft.data.prepare import check_data
from lora_ft.data.split import SPLITS
from lora_ft.errors import UserError
from lora_ft.sections import SourceSection, SplitSection
from tests.data.bases import make_tokenizer

NAMES = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "islet", "jetty"]
ROWS = [
    {"prompt": f"Where does the {one} meet the {other} today? ", "completion": f"At the {other} of the {one}."}
    for one in NAMES
    for other in NAMES
    if one != other
]


def audit(write_rows, rows=ROWS, template="chatml", **options):
    return check_data(write_rows(rows, **options), make_tokenizer(template))[1]


def count(report, name) -> int:
    return next(check.count for check in report.checks if check.name == name)


def printed(report) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_audit(report, console)
    return console.file.getvalue()


def test_clean_data_has_no_warning(write_rows):
    report = audit(write_rows, split=SplitSection(0, 0))
    assert not report.warnings and report.data.num_read == 90
    lengths = report.lengths["train"]
    assert sum(lengths.histogram) == 90 and lengths.shortest <= lengths.median <= lengths.longest
    assert 0 <= lengths.padded_share < 0.5 and 0.7 < lengths.packed_share <= 1
    assert "90 rows read · 90 dealt to splits" in printed(report) and "No warnings" in printed(report)


def test_the_report_is_json(write_rows):
    report = audit(write_rows)
    assert json.loads(json.dumps(report.to_json()))["data"]["num_read"] == 90


def test_leaks_between_files_are_found(write_rows):
    near = [{**row, "prompt": row["prompt"].replace("today", "at present today")} for row in ROWS[20:25]]
    long = "when the boats come in and the lamps are lit along the quay and people gather near the water to talk "
    rows = [{**row, "prompt": long + row["prompt"]} for row in ROWS[:40]]
    near = [{**row, "prompt": row["prompt"].replace("lamps", "lights")} for row in rows[10:15]]
    train = write_rows(rows, "train.jsonl", {"split": "train"})
    test = write_rows(rows[:3] + near, "test.jsonl", {"split": "test"})
    report = check_data(replace(train, sources=train.sources + test.sources), make_tokenizer("chatml"))[1]
    assert count(report, "held-out questions asked in training too") == 3
    assert count(report, "held-out rows much like training rows") >= 4
    assert [check.verdict for check in report.checks][:2] == ["warning", "warning"]
    assert "test.jsonl:1" in printed(report)


def test_a_conversation_that_goes_on_where_another_ends_is_on_its_side(write_rows):
    turns = [
        [{"role": "user", "content": f"{row['prompt']} {row['completion']}"}, {"role": "assistant", "content": "Yes."}]
        for row in ROWS
    ]
    chats = [turn if n < 45 else [*turns[n - 45], *turn] for n, turn in enumerate(turns)]
    rows = [{"messages": messages} for messages in chats]
    section = write_rows(rows, split=SplitSection(0.2, 0.2))
    splits, report = check_data(section, make_tokenizer("chatml"))
    sides = [{example.messages[0]["content"] for example in splits.examples(name)} for name in SPLITS]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert count(report, LEAKS[0]) == 0 and count(report, "copies of earlier rows") == 0
    train, test = (
        write_rows(part, f"{name}.jsonl", {"split": name}) for name, part in (("train", rows[45:]), ("test", rows[:9]))
    )
    report = check_data(replace(train, sources=train.sources + test.sources), make_tokenizer("chatml"))[1]
    assert count(report, LEAKS[0]) == 9


def test_copies_are_noted(write_rows):
    report = audit(write_rows, ROWS + ROWS[:7])
    assert count(report, "copies of earlier rows") == 7
    assert count(report, "held-out questions asked in training too") == 0


def test_secrets_are_a_warning_and_personal_data_a_note(write_rows):
    rows = [
        *ROWS,
        {"prompt": "key? ", "completion": "sk-abcdefghijklmnopqrstuvwxyz12"},
        {"prompt": "mail? ", "completion": "a@example.org"},
    ]
    report = audit(write_rows, rows, split=SplitSection(0, 0))
    assert [check.name for check in report.warnings] == ["rows with secrets"]
    assert count(report, "rows with personal data") == 1 and "EMAIL 1" in printed(report)
    masked = audit(write_rows, rows, split=SplitSection(0, 0), redact=True)
    assert not masked.warnings and masked.data.redacted == {"API_KEY": 1, "EMAIL": 1}


def test_odd_rows_are_noted(write_rows):
    odd = {
        "mojibake": {"prompt": "say ", "completion": "cafÃ© is open"},
        "lost characters": {"prompt": "speak ", "completion": "caf\ufffd is open"},
        "control characters": {"prompt": "tell ", "completion": "a\x00b"},
        "answers that repeat the question": {"prompt": "echo this please", "completion": "echo this please "},
    }
    report = audit(write_rows, [*ROWS, *odd.values()])
    assert [count(report, name) for name in odd] == [1, 1, 1, 1]
    turns = [{"role": "user", "content": "spell <|im_end|>"}, {"role": "assistant", "content": "no"}]
    report = audit(write_rows, [{"messages": turns}] * 3, split=SplitSection(0, 0))
    assert count(report, "rows that spell special tokens") == 3


def test_a_template_that_leaves_out_the_bos_is_noted(write_rows):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(9)
    ]
    section, tokenizer = write_rows(rows, split=SplitSection(0, 0)), make_tokenizer("gemma")
    assert count(check_data(section, tokenizer)[1], "chat template without BOS") == 0
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "")
    assert count(check_data(section, tokenizer)[1], "chat template without BOS") == 1


def test_losses_are_warnings(write_rows):
    rows = [*ROWS, {"prompt": "x " * 60, "completion": "yes"}, {"oops": 1}]
    report = audit(write_rows, rows, max_length=40, on_bad_row="skip", split=SplitSection(0, 0))
    assert count(report, "bad rows skipped") == 1 and count(report, "rows without a supervised token") == 1
    assert {"bad rows skipped", "rows without a supervised token"} <= {check.name for check in report.warnings}
    assert "rows.jsonl:91" in printed(report), "the row that lost its answer is named"


def test_labels_are_counted_and_unevenness_noted(write_rows):
    rows = [{"text": f"text {n}", "label": "rare" if n < 5 else "common"} for n in range(50)]
    report = audit(write_rows, rows, task="classification")
    assert report.labels == {"rare": 5, "common": 45} and count(report, "uneven labels") == 1
    assert "common 45 (90%)" in printed(report)
    assert count(audit(write_rows, rows, task="classification", balance=True), "uneven labels") == 0


@pytest.mark.parametrize(
    ("labels", "is_told"),
    [
        (["spam", "Spam", "ham"], True),
        (["not spam", "not_spam", "Not-Spam"], True),
        (["1", "01"], True),
        (["c", "c++", "c#"], False),
        (["-1", "1", "1-2", "12"], False),
        (["level 1", "level_1", "level-1"], True),
        (["a1", "a-1"], False),
        (["resent", "re-sent"], False),
    ],
    ids=str,
)
def test_labels_that_may_be_one_are_named(write_rows, labels, is_told):
    rows = [{"text": f"text {number}", "label": label} for number in range(20) for label in labels]
    report = audit(write_rows, rows, task="classification")
    assert count(report, "labels that look alike") == is_told
    said = " ".join(printed(report).split())
    assert not is_told or all(repr(label) in said for label in labels if label != "ham")


def test_one_label_teaches_nothing(write_rows):
    rows = [{"text": f"text {number}", "label": "spam"} for number in range(20)]
    with pytest.raises(UserError, match=r"data\.sources: spam\n  All rows have this label"):
        audit(write_rows, rows, task="classification")


def test_packed_and_unpacked_data_have_the_same_lengths(write_rows):
    packed, plain = (audit(write_rows, packing=which, max_length=128) for which in (True, False))
    assert packed.lengths["train"].histogram == plain.lengths["train"].histogram
    assert packed.lengths["train"].packed_share == pytest.approx(packed.data.splits["train"].packed_share)


@pytest.mark.parametrize(
    ("text", "script"),
    [("1. Hello", "Latin"), ("Привет", "Cyrillic"), ("日本", "Cjk"), ("12", "None"), ("שלום", "Hebrew")],
)
def test_scripts(text, script):
    assert find_script(text) == script


def test_real_data_is_audited(shared_data, write_rows):
    section = write_rows([], max_length=4096)
    for name, warnings in {
        "gsm8k_train.json": set(),
        "SMSSpamCollection.tsv": {"held-out rows much like training rows"},
    }.items():
        source = replace(section.sources[0], path=str(shared_data / name), weight=1.0 if "SMS" in name else 0.2)
        report = check_data(replace(section, sources=(source,)), make_tokenizer("chatml"))[1]
        assert {check.name for check in report.warnings} == warnings


def test_columns_and_formats_beside_what_is_read_are_noted(write_rows):
    rows = [{"question": f"what is {n}?", "answer": f"red {n}", "id": n, "note": None} for n in range(20)]
    report = audit(write_rows, rows)
    (unread,) = [check for check in report.checks if check.name == "columns not read"]
    assert (unread.count, unread.verdict) == (1, "note") and "id (20)" in unread.meaning
    assert count(report, "formats of rows") == 0
    section = write_rows(rows)
    notes = Path(section.sources[0].path).with_name("notes.txt")
    notes.write_text("a note\n")
    mixed = replace(section, sources=(*section.sources, SourceSection(str(notes))))
    _, report = check_data(mixed, make_tokenizer("chatml"))
    (formats,) = [check for check in report.checks if check.name == "formats of rows"]
    assert formats.count == 2 and "qa (20), text (1)" in formats.meaning
