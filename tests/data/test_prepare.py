"""From files to splits on disk: every row is accounted for, caches are believed only when whole."""

import json
import multiprocessing
import threading
from dataclasses import replace

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_ft.data import prepare as prepare_room
from lora_ft.data.ingest import _normalise
from lora_ft.data.prepare import build_splits, prepare_dataset
from lora_ft.data.render import IGNORE_INDEX, render_example, render_prompt
from lora_ft.data.split import SPLITS
from lora_ft.data.store import CHUNK_ROWS, ArrowWriter
from lora_ft.errors import UserError
from lora_ft.sections import DataSection, SourceSection, SplitSection
from tests.data.bases import MAIN, TERMINATOR, make_tokenizer

ROWS = [{"prompt": f"question {n}: ", "completion": f"answer {n}"} for n in range(40)]


def chat(question, *answers):
    messages = [{"role": "user", "content": question}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "More?"}]
    return {"messages": messages[:-1]}


def dealt(splits) -> dict[str, int]:
    return {name: len(getattr(splits, name)) for name in SPLITS}


def test_splits_hold_tokens_and_know_their_examples(write_rows):
    section, tokenizer = write_rows(ROWS), make_tokenizer("llama3")
    splits = build_splits(section, tokenizer)
    assert dealt(splits) == {"train": 32, "validation": 4, "test": 4}
    for name in SPLITS:
        rows, examples = getattr(splits, name), splits.examples(name)
        assert rows.column_names == ["input_ids", "labels"] and len(rows) == len(examples)
        for row, example in zip(rows, examples, strict=True):
            document = render_example(example, tokenizer, section)
            assert (row["input_ids"], row["labels"]) == (document.input_ids, document.labels)
            prompt = render_prompt(example, tokenizer, section)
            assert row["input_ids"][: len(prompt)] == prompt
    places = sorted(int(example.place.rpartition(":")[2]) for name in SPLITS for example in splits.examples(name))
    assert places == list(range(1, 41))


def test_examples_are_a_sequence(write_rows):
    examples = build_splits(write_rows(ROWS), make_tokenizer("llama3")).examples("train")
    assert [example.place for example in examples[:2]] == [examples[0].place, examples[1].place]
    assert examples[-1].place.endswith(":40") or examples[-1].reference.startswith("answer")


def test_empty_splits_are_empty_data_sets(write_rows):
    splits = build_splits(write_rows(ROWS, split=SplitSection(0, 0)), make_tokenizer("llama3"))
    assert dealt(splits) == {"train": 40, "validation": 0, "test": 0}
    assert isinstance(splits.test, datasets.Dataset) and splits.test.column_names == ["input_ids", "labels"]


def test_files_may_be_splits_of_their_own(write_rows):
    train = write_rows(ROWS[:20], "train.jsonl", {"split": "train"})
    test = write_rows(ROWS[20:], "test.jsonl", {"split": "test"})
    splits = build_splits(replace(train, sources=train.sources + test.sources), make_tokenizer("llama3"))
    assert dealt(splits) == {"train": 20, "validation": 0, "test": 20}


def test_copies_stay_on_one_side(write_rows):
    splits = build_splits(write_rows(ROWS + ROWS[:10] + ROWS[:5]), make_tokenizer("llama3"))
    sides = [{example.text for example in splits.examples(name)} for name in SPLITS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sum(dealt(splits).values()) == splits.report.num_read == 55


def test_packed_splits_hold_whole_documents(write_rows):
    section = write_rows(ROWS, max_length=64, packing=True)
    packed, plain = (build_splits(replace(section, packing=which), make_tokenizer("llama3")) for which in (True, False))
    assert packed.train.column_names == packed.validation.column_names == ["input_ids", "labels", "seq_lengths"]
    assert packed.test.column_names == ["input_ids", "labels"]
    documents = []
    for row in packed.train:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 64
        at = 0
        for length in row["seq_lengths"]:
            documents.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    assert sorted(documents) == sorted((row["input_ids"], row["labels"]) for row in plain.train)
    counts = packed.report.splits["train"]
    assert counts.num_packed_rows == len(packed.train) < counts.num_documents == 32
    assert counts.packed_share == pytest.approx(counts.num_tokens / (64 * len(packed.train)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.one_of(
            st.builds(chat, st.sampled_from(["Hi", "What?", "x" * 300]), st.sampled_from(["yes", "no " * 50, ""])),
            st.builds(chat, st.text(min_size=1, max_size=20), st.text(max_size=20), st.text(max_size=20)),
            st.just({"oops": 1}),
        ),
        max_size=12,
    ),
    template=st.sampled_from(MAIN),
    max_length=st.sampled_from([24, 60, 400]),
    truncation=st.sampled_from(["keep_start", "keep_end", "drop", "split", "context"]),
    packing=st.booleans(),
    train_on=st.sampled_from(["assistant", "last", "all"]),
)
def test_kept_and_skipped_add_up_and_only_answers_are_learned(
    tmp_path, rows, template, max_length, truncation, packing, train_on
):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    section = DataSection(
        (SourceSection(str(path)),), max_length=max_length, truncation=truncation, packing=packing, on_bad_row="skip"
    )
    section = replace(section, train_on=train_on, split=SplitSection(0.2, 0.2))
    tokenizer = make_tokenizer(template)
    try:
        splits = build_splits(section, tokenizer)
    except UserError as error:
        assert "No row is left" in str(error) or "no row" in str(error) or "empty" in str(error)
        return
    report = splits.report
    assert report.num_kept + report.num_skipped == report.num_read == len(rows)
    assert sum(split.num_rows for split in report.splits.values()) == report.num_kept
    for name in SPLITS:
        check_split(splits, name, tokenizer, section, template)


def check_split(splits, name, tokenizer, section, template):
    counts, rows, examples = splits.report.splits[name], getattr(splits, name), splits.examples(name)
    lost = counts.num_dropped_too_long + counts.num_dropped_unsupervised + counts.num_dropped_refused
    assert counts.num_documents + lost == counts.num_rows
    assert counts.num_documents == len(examples)
    assert counts.num_tokens == sum(len(row["input_ids"]) for row in rows)
    assert counts.num_supervised_tokens == sum(len(row["labels"]) - row["labels"].count(IGNORE_INDEX) for row in rows)
    if section.packing and name != "test":
        return
    for row, example in zip(rows, examples, strict=True):
        whole = render_example(example, tokenizer, section)
        assert len(row["input_ids"]) <= section.max_length
        if section.train_on != "all" and len(whole.input_ids) <= section.max_length:
            said = tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX])
            answers = [example.messages[index]["content"].strip() for index in example.answers]
            answers = answers[-1:] if section.train_on == "last" else answers
            assert squeeze(said) == squeeze("".join(answer + TERMINATOR[template] for answer in answers))


def squeeze(text: str) -> str:
    return "".join(text.split())


def test_bad_rows_are_refused_together_and_named(write_rows):
    rows = [*ROWS, {"oops": 1}, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": 5}]
    with pytest.raises(UserError) as error:
        build_splits(write_rows(rows), make_tokenizer("llama3"))
    assert [fault.place.rpartition("rows.jsonl:")[2][:2] for fault in error.value.faults[:3]] == ["41", "42", "43"]
    assert "on_bad_row: skip" in str(error.value)


def test_a_message_shows_twenty_bad_rows_at_most(write_rows):
    with pytest.raises(UserError) as error:
        build_splits(write_rows([{"oops": 1}] * 500), make_tokenizer("llama3"))
    assert len(error.value.faults) == 21


def test_bad_rows_are_skipped_and_counted(write_rows):
    section = write_rows([*ROWS, {"oops": 1}, {"prompt": "a", "completion": ""}], on_bad_row="skip")
    report = build_splits(section, make_tokenizer("llama3")).report
    assert (report.num_read, report.num_kept, report.num_skipped) == (42, 40, 2)
    assert "rows.jsonl:41" in report.faults[0] and "rows.jsonl:42  completion" in report.faults[1]


def test_rows_that_the_template_refuses_follow_the_same_policy(write_rows):
    late = [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    rows = [chat(f"question {n}", "yes") for n in range(9)] + [{"messages": late}]
    with pytest.raises(UserError, match="Only user, assistant and tool"):
        build_splits(write_rows(rows), make_tokenizer("mistral"))
    report = build_splits(write_rows(rows, on_bad_row="skip"), make_tokenizer("mistral")).report
    assert sum(split.num_dropped_refused for split in report.splits.values()) == 1


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (ROWS, {"max_length": 8, "truncation": "drop"}, "32 rows dealt to train, 32 dropped too long"),
        ([{"prompt": "x " * 50, "completion": "y"}] * 3, {"max_length": 8}, "dropped unsupervised"),
        (
            [{"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": "b", "train": False}]}],
            {},
            "unsup",
        ),
    ],
)
def test_nothing_left_to_learn_is_refused(write_rows, rows, options, reason):
    with pytest.raises(UserError, match=reason):
        build_splits(write_rows(rows, **options), make_tokenizer("llama3"))


def test_there_is_nothing_to_balance_without_labels(write_rows):
    with pytest.raises(UserError, match=r"data\.balance.*\n.*No row has a label"):
        build_splits(write_rows(ROWS, balance=True), make_tokenizer("llama3"))


def test_a_file_of_blank_lines_holds_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n\n")
    with pytest.raises(UserError, match="no row"):
        build_splits(DataSection((SourceSection(str(tmp_path / "a.jsonl")),)), make_tokenizer("llama3"))


def test_strict_refuses_answers_that_are_cut_and_leaks(write_rows):
    tokenizer = make_tokenizer("llama3")
    section = write_rows(ROWS, max_length=12)
    assert build_splits(section, tokenizer).report.splits["train"].num_answers_cut
    with pytest.raises(UserError, match=r"(?s)answers cut.*teach the model not to stop"):
        build_splits(replace(section, strict=True), tokenizer)
    train, test = (write_rows(ROWS[:9], f"{name}.jsonl", {"split": name}, strict=True) for name in ("train", "test"))
    with pytest.raises(UserError, match="9 held-out questions asked in training too"):
        build_splits(replace(train, sources=train.sources + test.sources), tokenizer)
    assert build_splits(replace(train, split=SplitSection(0, 0)), tokenizer)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_length": 1}, "data.max_length"),
        ({"split": SplitSection(0.5, 0.5)}, "data.split"),
        ({"sources": (SourceSection("x", weight=0),)}, r"data.sources\[0\].weight"),
        ({"sources": (SourceSection("x", format="alpca"),)}, r"data.sources\[0\].format"),
        ({"task": "classification", "packing": True}, "data.packing"),
        ({"task": "classification", "truncation": "split"}, "data.truncation"),
        ({"task": "seq2seq", "train_on": "all"}, "data.train_on"),
        ({"max_target_length": 5}, "data.max_target_length"),
        ({"task": "seq2seq", "max_target_length": 0}, "data.max_target_length"),
        ({"split": SplitSection(seed=-1)}, "data.split.seed"),
        ({"split": SplitSection(validation=float("nan"))}, "data.split"),
        ({"sources": (SourceSection("x", weight=float("nan")),)}, r"data.sources\[0\].weight"),
        ({"sources": (SourceSection("x", weight=float("inf")),)}, r"data.sources\[0\].weight"),
        ({"sources": (SourceSection("x", weight=3, split="test"),)}, r"data.sources\[0\].weight"),
        ({"sources": (SourceSection("x", columns={"inptu": "x"}),)}, r"data.sources\[0\].columns: inptu"),
        ({"sources": (SourceSection("x", format="qa", columns={"input": "x"}),)}, r"data.sources\[0\].columns: input"),
        ({"task": "classification", "sources": (SourceSection("x", format="qa"),)}, r"data.sources\[0\].format"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_read(options, field):
    with pytest.raises(UserError, match=field):
        build_splits(DataSection(**{"sources": (SourceSection("x"),), **options}), None)


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a folder was really prepared."""
    built = []
    real = prepare_room.prepare_folder
    monkeypatch.setattr(prepare_room, "prepare_folder", lambda *rest: (built.append(1), real(*rest)))
    return built


def test_the_same_data_is_prepared_once(write_rows, builds):
    section = write_rows(ROWS)
    first, again = (build_splits(section, make_tokenizer("llama3")) for _ in range(2))
    assert len(builds) == 1 and first.fingerprint == again.fingerprint and first.report == again.report
    assert first.train[:] == again.train[:]


@pytest.mark.parametrize(
    "options",
    [{"max_length": 33}, {"train_on": "all"}, {"template_kwargs": {"bos_token": "x"}}, {"split": SplitSection(seed=1)}],
)
def test_other_options_give_another_fingerprint(write_rows, options):
    tokenizer = make_tokenizer("llama3")
    one, other = build_splits(write_rows(ROWS), tokenizer), build_splits(write_rows(ROWS, **options), tokenizer)
    assert one.fingerprint != other.fingerprint and one.folder != other.folder


def test_other_rows_tokenizers_and_templates_give_another_fingerprint(write_rows):
    tokenizers = [make_tokenizer("llama3"), make_tokenizer("gemma"), make_tokenizer("llama3")]
    tokenizers[2].chat_template += " "
    found = {build_splits(write_rows(ROWS), tokenizer).fingerprint for tokenizer in tokenizers}
    assert len(found | {build_splits(write_rows(ROWS[1:]), tokenizers[0]).fingerprint}) == 4


def test_moving_a_file_changes_its_places_and_not_the_fingerprint(write_rows):
    tokenizer = make_tokenizer("llama3")
    one, other = (
        build_splits(write_rows(ROWS, "a.jsonl"), tokenizer),
        build_splits(write_rows(ROWS, "b.jsonl"), tokenizer),
    )
    assert one.fingerprint == other.fingerprint
    assert "a.jsonl" in one.examples("train")[0].place and "b.jsonl" in other.examples("train")[0].place


def test_a_damaged_folder_is_built_again(write_rows, builds):
    section, tokenizer = write_rows(ROWS), make_tokenizer("llama3")
    splits = build_splits(section, tokenizer)
    expected = splits.train[:]
    for number, path in enumerate(sorted(splits.folder.iterdir()), 2):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert build_splits(section, tokenizer).train[:] == expected
        assert len(builds) == number
    (splits.folder / "train.arrow").unlink()
    assert build_splits(section, tokenizer).train[:] == expected


def test_a_cache_that_cannot_be_written_is_refused(write_rows, tmp_path):
    (tmp_path / "file").write_text("in the way")
    section = write_rows(ROWS, cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data\.cache_dir.*file"):
        build_splits(section, make_tokenizer("llama3"))


def test_a_full_disk_is_a_message(write_rows, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_room, "write_documents", fill)
    with pytest.raises(UserError, match="No space left"):
        build_splits(write_rows(ROWS), make_tokenizer("llama3"))


def test_a_failed_preparation_leaves_nothing(write_rows, cache_folder):
    with pytest.raises(UserError):
        build_splits(write_rows([{"oops": 1}]), make_tokenizer("llama3"))
    assert not [path for path in cache_folder.iterdir() if path.is_dir()]


def test_threads_that_prepare_at_once_build_once(write_rows, builds):
    section = write_rows(ROWS)
    threads = [threading.Thread(target=build_splits, args=(section, make_tokenizer("llama3"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def _prepare_elsewhere(section, queue):
    queue.put((build_splits(section, make_tokenizer("llama3")).train[:], len(list(section.sources))))


def test_processes_that_prepare_at_once_do_not_collide(write_rows):
    section = write_rows(ROWS * 50)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_prepare_elsewhere, args=(section, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] and found[0][0] == build_splits(section, make_tokenizer("llama3")).train[:]


# --- a user's own rows ------------------------------------------------------------------------------------------


def test_rows_in_memory(builds):
    tokenizer = make_tokenizer("llama3")
    from_list, from_data_set = (
        prepare_dataset(rows, tokenizer, max_length=64) for rows in (ROWS, datasets.Dataset.from_list(ROWS))
    )
    assert from_list[:] == from_data_set[:] and len(from_list) == 40
    streamed = prepare_dataset(datasets.IterableDataset.from_generator(lambda: iter(ROWS)), tokenizer, max_length=64)
    generated = prepare_dataset((row for row in ROWS[:20]), tokenizer, max_length=64)
    assert streamed[:] == from_list[:] and generated[:] == from_list[:20]
    assert prepare_dataset((row for row in ROWS[20:]), tokenizer, max_length=64)[:] == from_list[20:]
    assert prepare_dataset(ROWS, tokenizer, packing=True, max_length=64).column_names[-1] == "seq_lengths"
    with pytest.raises(UserError, match="rows:2"):
        prepare_dataset([ROWS[0], {"oops": 1}], tokenizer)


def test_small_chunks_are_written_together(tmp_path):
    """Every chunk costs pages where it is mapped; a tenth of the rows came in as many chunks as all of them."""
    path, schema = tmp_path / "rows.arrow", pa.schema({"number": pa.int32()})
    with ArrowWriter(path, schema) as writer:
        for start in range(0, 2550, 50):
            writer.append(pa.record_batch([pa.array(range(start, start + 50), pa.int32())], schema=schema))
    chunks = list(pa.ipc.open_stream(pa.OSFile(str(path))))
    assert [chunk.num_rows for chunk in chunks] == [CHUNK_ROWS, CHUNK_ROWS, 550]
    assert [number for chunk in chunks for number in chunk.column(0).to_pylist()] == list(range(2550))


@given(st.text(st.sampled_from([chr(number) for number in range(128)] + list("ßİé   \n"))))
def test_ascii_is_normalised_as_all_text_is(text):
    assert _normalise(text) == " ".join(text.split()).casefold().encode()


@pytest.mark.parametrize(
    "options",
    [
        {"train_on": "answers"},
        {"truncation": "keep-end"},
        {"on_bad_row": "raise"},
        {"task": "sfft"},
        {"packing": "yes"},
        {"max_len": 3},
        {"max_length": "64"},
        {"template_kwargs": {"enable_thinkng": False}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_from_a_program_are_held_to_what_recipes_are(options):
    rows = [chat("What?", "That.")] * 3
    with pytest.raises(UserError, match=next(iter(options))):
        prepare_dataset(rows, make_tokenizer("qwen3"), **options)
