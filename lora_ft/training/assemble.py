"""A trainer of any task from its parts: what all of them log, show and refuse alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import PrinterCallback

from lora_ft.data.collate import Collator
from lora_ft.errors import UserError
from lora_ft.model.load import refuse_repacked
from lora_ft.model.machine import choose_mapped_bytes, map_large_pieces
from lora_ft.training.guards import LossNotes
from lora_ft.training.progress import LogFile, Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments


def use_one_gpu(arguments: Any) -> Any:
    """The arguments, of which each process takes one GPU, also where no launcher told it which.

    transformers would deal out each batch to all GPUs it sees (`nn.DataParallel`): rows times as many as were asked for
    and planned, on a base that lies on one of them.
    """
    if arguments.n_gpu > 1:
        number = arguments.n_gpu
        print(f"one of {number} GPUs is used; for all: accelerate launch … scripts/sft.py RECIPE", file=sys.stderr)
        arguments._n_gpu = 1
    return arguments


def assemble_trainer(
    kind: Any,
    library: str,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    validation_rows: Dataset | None,
    arguments: TrainingArguments,
    *,
    quiet: bool = False,
    **options: Any,
) -> Any:
    """A trainer of `kind` over tokenised rows (`input_ids`, `labels`), which validates on the others, if there are any.

    `library` is whose refusals are passed on; `options` are what `kind` takes beside the parts: `loraplus_ratio`, and
    `patience`, `guards` and `name_row` of `LastingTrainer`.

    Raises:
        UserError: nothing to train on, or the library refuses the combination; or 4-bit weights are not what they were.
    """
    refuse_repacked(model)
    if len(train_rows) == 0:
        raise UserError("data.sources", None, "No row is left for training.", "Lower data.split, or add rows.")
    mapped = choose_mapped_bytes(arguments.device.type, model.dtype, arguments.gradient_checkpointing)
    if mapped is not None:
        map_large_pieces(mapped)
    log = LogFile(Path(arguments.output_dir) / "log.jsonl")
    try:
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=validation_rows if validation_rows is not None and len(validation_rows) else None,
            processing_class=tokenizer,
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=[log, LossNotes(log.write_line), *([] if quiet else [Progress()])],
            **options,
        )
    except (ValueError, ImportError, TypeError) as fault:
        rule = f"{library} refuses this combination: {str(fault).strip()}"
        raise UserError("training", None, rule, "Change the setting it names.") from fault
    trainer.remove_callback(PrinterCallback)  # a Python dict on stdout at every logged step
    return trainer
