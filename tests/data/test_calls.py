"""Tools and calls reach the model, or the row is named; `test_render` has the masks of those that do."""

import pytest

from lora_ft.data.render import Renderer
from lora_ft.errors import Fault
from lora_ft.sections import DataSection
from tests.data.bases import MAIN, make_tokenizer
from tests.data.test_render import WEATHER, assistant, convert, user

ARGUMENTS = {"city": 'St. John\'s\n"Néw" & <b>', "days": 3, "exact": 0.1, "deep": {"names": ["日本", True, None]}}
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(row, template=None, name="chatml", **options):
    tokenizer = make_tokenizer(name)
    tokenizer.chat_template = template or tokenizer.chat_template
    (found,) = Renderer(tokenizer, DataSection((), **options)).render([convert(row)])
    return found


def call(arguments):
    calls = [{"function": {"name": "weather", "arguments": arguments}}]
    return [user("Weather?"), assistant("", tool_calls=calls), {"role": "tool", "content": "dry"}, assistant("Dry.")]


@pytest.mark.parametrize("name", MAIN)
def test_a_call_is_known_whatever_its_arguments_hold(name):
    assert not isinstance(render({"messages": call(ARGUMENTS), "tools": [WEATHER]}, name=name), Fault)


@pytest.mark.parametrize("written", ["call.arguments", "call.arguments | string", "call.arguments | tojson | tojson"])
def test_a_call_is_known_however_the_template_writes_its_arguments(written):
    said = (
        "{% for c in m.tool_calls or [] %}{% set call = c.function %}{{ call.name }}{{ " + written + " }}{% endfor %}"
    )
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + said)
    assert not isinstance(render({"messages": call(ARGUMENTS)}, template), Fault)


@pytest.mark.parametrize(("content", "written"), [("", ""), ("Let me look.", ""), ("", "{{ c.function.name }}")])
def test_a_call_that_the_template_leaves_out_is_named(content, written):
    messages = call({"city": "Rome"})[:2]
    messages[1]["content"] = content
    said = "{% for c in m.tool_calls or [] %}" + written + "{% endfor %}"
    fault = render({"messages": messages}, PLAIN.replace("{{ m.content }}", "{{ m.content }}" + said))
    field = "arguments" if written else "name"
    assert fault.place.endswith(f"messages[1].tool_calls[0].function.{field}") and "data.chat_template" in fault.fix


def test_a_tool_that_the_template_leaves_out_is_named_though_the_text_spells_it():
    row = {"messages": [user("weather?"), assistant("weather")], "tools": [WEATHER]}
    fault = render(row, PLAIN)
    assert fault.place.endswith("tools[0]") and fault.value == "weather" and "leaves out this tool" in fault.rule
    first = "{% if tools %}{{ (tools | first).function.name }}{% endif %}"
    fault = render({**row, "tools": [WEATHER, {**WEATHER, "function": {"name": "clock"}}]}, first + PLAIN)
    assert fault.place.endswith("tools[1]") and fault.value == "clock"


def test_a_call_that_is_not_learned_may_be_left_out():
    assert not isinstance(
        render({"messages": [*call({}), user("More?"), assistant("No.")]}, PLAIN, train_on="last"), Fault
    )
