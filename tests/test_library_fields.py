"""The fields read from source are the fields the libraries have."""

import dataclasses
import inspect
import typing

import pytest

from lora_ft.library_fields import accepts, describe, read_fields
from lora_ft.recipe_rules import LogLevel


def test_fields_agree_with_the_imported_classes():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    assert set(read_fields("lora")) == {field.name for field in dataclasses.fields(LoraConfig)}
    training = {field.name for field in dataclasses.fields(SFTConfig) if field.init and not field.name.startswith("_")}
    assert set(read_fields("training")) == training
    arguments = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(read_fields("quantization")) == arguments


def test_every_default_is_accepted():
    """A type read wrongly would refuse the library's own default."""
    from peft import LoraConfig
    from trl import SFTConfig

    for section, cls in {"lora": LoraConfig, "training": SFTConfig}.items():
        fields = read_fields(section)
        for field in dataclasses.fields(cls):
            plain = isinstance(field.default, (int, float, str, bool, list, dict)) and not hasattr(
                field.default, "value"
            )
            if plain and field.name in fields:
                assert accepts(fields[field.name].type, field.default), (section, field.name)


@pytest.mark.parametrize(
    ("expected", "value", "fits"),
    [
        (int, 3, True),
        (int, 3.0, False),
        (int, True, False),
        (float, 3, True),
        (float, "3", False),
        (bool, 1, False),
        (typing.Optional[int], None, True),  # noqa: UP045
        (typing.Union[list[str], str], ["a"], True),  # noqa: UP007
        (typing.Union[list[str], str], [1], False),  # noqa: UP007
        (typing.Literal["a", "pissa_niter_[n]"], "pissa_niter_4", True),
        (typing.Literal[False], 0, False),
        (dict[str, list[int]], {"a": [1]}, True),
        (dict[str, list[int]], {"a": ["1"]}, False),
        (tuple[str, ...], ["a"], True),
    ],
)
def test_accepts(expected, value, fits):
    assert accepts(expected, value) is fits


def test_describe():
    assert describe(typing.Union[list[str], str, None]) == "a list, each item text or text or null"  # noqa: UP007


def test_levels_of_the_log_are_those_of_transformers():
    from transformers.training_args import trainer_log_levels

    assert set(typing.get_args(LogLevel)) == set(trainer_log_levels)
