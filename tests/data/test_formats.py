"""Every format reads its columns, and says what is wrong with a row that does not fit."""

import pytest

from lora_ft.data.example import Example
from lora_ft.data.formats import FORMATS, convert_row, find_format
from lora_ft.errors import Fault

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def convert(row, name="auto", chat=True):
    return convert_row(row, "rows.jsonl:7", name, chat)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"instruction": "", "input": "", "output": ""}, "alpaca"),
        ({"question": "", "context": "", "answer": ""}, "qa"),
        ({"text": "", "label": ""}, "classification"),
        ({"text": "", "meta": ""}, "text"),
        ({"messages": [], "text": ""}, "messages"),
        ({"anything": ""}, None),
    ],
)
def test_a_format_is_found_from_the_columns(row, name):
    assert find_format(row) == name
    assert find_format(dict.fromkeys(row)) == name


def test_columns_that_are_null_do_not_decide():
    example = convert({"messages": None, "prompt": "a", "completion": "b"})
    assert isinstance(example, Example) and example.completion == "b"


@pytest.mark.parametrize(
    ("row", "place", "reason"),
    [
        ({"messages": []}, "messages", "not empty"),
        ({"messages": None}, "messages", "list of messages"),
        ({"messages": "[{oops"}, "messages", "not JSON"),
        ({"messages": [USER]}, "messages", "no answer"),
        ({"messages": ["Hi"]}, "messages[0]", "is an object"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content", "empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "empty"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "messages[1].content", "must be text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "role is one of"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "role is one of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
            "messages[0].content[0].type",
            "Only text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0].function",
            "names",
        ),
        ({"messages": [USER, ANSWER], "tools": {"type": "function"}}, "tools", "list of function schemas"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from", "speaker"),
        ({"prompt": "a", "completion": ""}, "completion", "empty"),
        ({"prompt": "a", "completion": None}, "completion", "nothing in it"),
        ({"prompt": "a", "completion": 42}, "prompt", "both texts or both lists"),
        ({"prompt": [USER], "completion": "a"}, "prompt", "both texts or both lists"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "completion", "no answer"),
        ({"instruction": "a", "output": 42}, "output", "must be text"),
        ({"instruction": " ", "output": "a"}, "instruction", "empty"),
        ({"question": "a", "answer": "b", "context": 3.5}, "context", "must be text"),
        ({"text": "a", "label": None}, "label", "empty"),
        ({"text": "a", "label": 1.5}, "label", "must be text"),
        ({"text": "half \ud800"}, "text", "half a character"),
        ({"oops": 1}, "", "Accepted: messages (messages); "),
        ({}, "", "Accepted: "),
        ("just text", "", "A row is an object"),
        (None, "", "A row is an object"),
    ],
)
def test_what_is_wrong_with_a_row_is_named_by_line_and_field(row, place, reason):
    fault = convert(row)
    assert isinstance(fault, Fault)
    assert fault.place == f"rows.jsonl:7  {place}".rstrip() and reason in fault.rule and fault.fix


def test_a_named_format_names_the_columns_that_are_missing():
    fault = convert({"question": "a", "reply": "b"}, "qa")
    assert "missing: answer" in fault.rule and "question, reply" in fault.value


def test_openai_forms_are_read():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3", "name": None},
        {"role": "assistant", "content": "three", "tool_calls": []},
    ]
    example = convert({"messages": messages})
    assert example.messages[0]["content"] == "Hi you"
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}
    assert example.messages[1] == {"role": "assistant", "tool_calls": [call]}
    assert example.messages[2:] == (
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "three"},
    )


def test_messages_may_be_json_text():
    assert convert(
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'}
    ).messages


def test_sharegpt_speakers_and_calls():
    rows = [
        ("human", "Hi"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "3"),
        ("gpt", "three"),
    ]
    example = convert({"conversations": [{"from": who, "value": what} for who, what in rows], "system": "Be kind."})
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_a_system_prompt_shifts_muted_answers():
    rows = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}, {"from": "gpt", "value": "c"}]
    assert convert({"conversations": rows, "system": "s"}).muted == (2,)


@pytest.mark.parametrize("label", [1, "1", " 1 "])
def test_labels_are_text(label):
    assert convert({"text": "a", "label": label}).label == "1"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 + 2", "output": "3", "system": "Be brief."},
        {"question": "Is it dry?", "context": "In Paris it is dry.", "answer": "yes"},
        {"text": "You won!", "label": "spam"},
    ],
)
def test_question_and_reference(row, chat):
    example = convert(row, chat=chat)
    answer = row.get("output") or row.get("answer") or row.get("label")
    assert example.reference == answer
    assert all(value in example.question for value in row.values() if value != answer)
    assert answer in example.text and bool(example.messages) is chat


def test_examples_survive_their_json():
    example = convert({"messages": [USER, {**ANSWER, "train": False}, ANSWER], "tools": [{"type": "function"}]})
    assert Example.from_json(example.to_json()) == example


def test_every_format_is_described():
    assert all(form.required and form.convert.__doc__ for form in FORMATS.values())


@pytest.mark.parametrize(("key", "value"), [("train", "false"), ("weight", 0.5), ("weight", "0"), ("train", [])])
def test_a_flag_that_says_neither_yes_nor_no_is_refused(key, value):
    """The word "false" is true to Python, and what it stands beside would be learned."""
    fault = convert_row({"messages": [USER, {**ANSWER, key: value}]}, "rows:1", "auto", True)
    assert isinstance(fault, Fault) and fault.place.endswith(key) and "true and false" in fault.rule
    for said, muted in ((True, ()), (1, ()), (False, (1,)), (0, (1,)), (None, ())):
        example = convert({"messages": [USER, {**ANSWER, key: said}, USER, ANSWER]})
        assert example.muted == muted


@pytest.mark.parametrize("calls", [5, True, "true", {"name": "f"}, 0])
def test_tool_calls_that_are_no_list_are_named(calls):
    rows = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": calls}]
    fault = convert_row({"messages": rows}, "rows:1", "auto", True)
    assert isinstance(fault, Fault) and fault.place == "rows:1  messages[1].tool_calls" and "a list" in fault.rule


def test_the_older_form_of_a_call_is_a_call():
    call = {"name": "look", "arguments": '{"at": "Paris"}'}
    row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "function_call": call}]
    }
    example = convert_row(row, "rows:1", "auto", True)
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "look", "arguments": {"at": "Paris"}}}
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "what?", "answer": "red"},
        {"context": "it is red", "question": "what?", "text": "red"},
        {"prompt": [{"role": "user", "content": "what?"}], "completion": [{"role": "assistant", "content": "red"}]},
    ],
    ids=["qa", "squad", "prompt_completion"],
)
def test_a_system_message_beside_a_row_is_read(row):
    example = convert_row({"system": "be brief", **row}, "rows:1", "auto", True)
    assert example.messages[0] == {"role": "system", "content": "be brief"} and example.muted == ()
    plain = convert_row({"system": "be brief", **row}, "rows:1", "auto", False)
    assert "be brief" in plain.text


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"system": "be brief", "prompt": "what?", "completion": "red"}, "system"),
        ({"instruction": "what?", "output": "red", "history": [["hi", "hello"]]}, "history"),
    ],
)
def test_what_a_format_has_no_place_for_is_named(row, field):
    fault = convert_row(row, "rows:1", "auto", True)
    assert isinstance(fault, Fault) and fault.place == f"rows:1  {field}"
