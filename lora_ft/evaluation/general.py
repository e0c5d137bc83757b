"""Text that has nothing to do with the task: what the base could, and should still be able to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_ft.data.prepare import build_splits
from lora_ft.sections import DataSection, EvaluationSection, SourceSection

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare_general(
    section: EvaluationSection, data: DataSection, tokenizer: PreTrainedTokenizerBase
) -> Dataset | None:
    """The rows of `evaluation.general`, tokenised like the task's own; None where the recipe or the task has none.

    Raises:
        UserError: the file is missing, or its rows fit no format.
    """
    if section.general is None or data.task != "sft":
        return None
    source = SourceSection(section.general, split="train")
    own = DataSection(
        (source,), max_length=data.max_length, template_kwargs=data.template_kwargs, cache_dir=data.cache_dir
    )
    return build_splits(own, tokenizer).train
