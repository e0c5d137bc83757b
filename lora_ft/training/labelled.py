"""Trainers for tasks whose labels stand apart from their inputs: a class for every row, or an answer for a decoder.

                    input_ids [B, S]       labels                        logits
    classification  text                   class [B]                     [B, C]
    seq2seq         question, context      answer [B, T], padded -100    [B, T, V]

Shapes: B rows, S positions, T positions of the longest answer, C classes, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

from lora_ft.data.render import IGNORE_INDEX
from lora_ft.recipe import check_buildable
from lora_ft.recipe_rules import library_part
from lora_ft.training.assemble import assemble_trainer, use_one_gpu
from lora_ft.training.lasting import LastingTrainer
from lora_ft.training.optimizer import create_loraplus


class LabelledTrainer(LastingTrainer):
    """`transformers.Trainer` whose losses are summed and divided by the labels of the whole step.

    The models' own losses are means over a micro-batch, so that a label would weigh more the fewer stand beside it.
    """

    loss_is_scaled_for_ga = True  # divided by the labels of the whole step, not once more by its micro-batches
    accuracy_name = "accuracy"
    """What the share of labels that were the first choice is called in the log."""

    def __init__(self, *args: Any, loraplus_ratio: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that the labels of a whole step are counted for `compute_loss`
        self._loraplus_ratio = loraplus_ratio

    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model is given of a batch: no labels, as it would make a loss of its own."""
        return {name: tensor for name, tensor in inputs.items() if name != "labels"}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The losses of all labels, summed, over the number of labels of the whole step on all ranks."""
        labels = inputs["labels"]
        outputs = model(**self.forward_inputs(inputs))
        losses = score_labels(outputs.logits, labels, self.args.label_smoothing_factor)
        whole_step = num_items_in_batch is not None
        count = torch.as_tensor(num_items_in_batch if whole_step else (labels != IGNORE_INDEX).sum())
        loss = losses.sum() / count.to(losses.device).clamp(min=1)
        if whole_step and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # ranks' gradients are averaged
        self._measure(outputs.logits, labels, losses.detach())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Figures over a data set, each a mean over its labels, whatever the batch size and the ranks."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self._read(training=False)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One logged step, with the share of right labels of all ranks since the last one."""
        if "loss" in logs:
            figures = self._read(training=True)
            logs.update({name: value for name, value in figures.items() if name != "loss"})
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments; with LoRA+, the same one with the learning rate of every B multiplied."""
        if getattr(self, "optimizer", None) is None and self._loraplus_ratio is not None:
            self.optimizer = create_loraplus(self, self._loraplus_ratio)
        return super().create_optimizer(model)

    def _measure(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        is_label = labels != IGNORE_INDEX
        is_right = (logits.argmax(-1) == labels) & is_label
        columns = [losses, is_right, is_label, torch.zeros_like(losses)]
        rows = torch.stack([column.float().view(len(labels), -1).sum(1) for column in columns], dim=1)
        training = self.model.training
        if not training:
            rows = self.accelerator.gather_for_metrics(rows)  # leaves out rows repeated to fill the last batch
        self._meters[training].add(rows)

    def _read(self, training: bool) -> dict[str, float]:
        figures = self._meters[training].read(self.accelerator.reduce) if training else self._meters[False].read()
        if "mean_token_accuracy" in figures:
            figures[self.accuracy_name] = figures.pop("mean_token_accuracy")
        return figures


class AnswerTrainer(LabelledTrainer, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for answers that a decoder writes."""

    accuracy_name = "mean_token_accuracy"

    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The question, and for the decoder the answer one place to the right."""
        return answer_inputs(self.model, inputs)


def score_labels(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of every label, in nats and fp32, in the shape of `labels`; 0 where none is learned."""
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        label_smoothing=smoothing,
    )
    return losses.view(labels.shape)


def answer_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an encoder-decoder is given of a batch.

    labels              A  B  </s>  -100
    decoder_input_ids   <s> A  B  </s>         each place sees what stands before its label
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {**inputs, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


OWNED = {"remove_unused_columns": False, "logging_nan_inf_filter": False, "disable_tqdm": True}
"""Arguments that no recipe sets: rows have the columns they need, and `Progress` draws the bar."""


def build_class_arguments(training: dict[str, Any], output_dir: Path) -> TrainingArguments:
    """The `TrainingArguments` of a recipe's `training` section.

    Raises:
        UserError: transformers refuses the values.
    """
    fields = fill_in(training, output_dir)
    return use_one_gpu(check_buildable("training/classification", TrainingArguments, fields, "recipe"))


def build_answer_arguments(training: dict[str, Any], output_dir: Path) -> Seq2SeqTrainingArguments:
    """The `Seq2SeqTrainingArguments` of a recipe's `training` section.

    Raises:
        UserError: transformers refuses the values.
    """
    fields = fill_in(training, output_dir)
    return use_one_gpu(check_buildable("training/seq2seq", Seq2SeqTrainingArguments, fields, "recipe"))


def fill_in(training: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The keys of a recipe that are the library's own, with what other sections own."""
    return {**library_part(training), **OWNED, "output_dir": str(output_dir)}


def build_class_trainer(*parts: Any, **options: Any) -> LabelledTrainer:
    """A trainer over rows of `input_ids` and a class; see `assemble_trainer`."""
    return assemble_trainer(LabelledTrainer, "transformers", *parts, **options)


def build_answer_trainer(*parts: Any, **options: Any) -> AnswerTrainer:
    """A trainer over rows of `input_ids` and an answer's tokens; see `assemble_trainer`."""
    return assemble_trainer(AnswerTrainer, "transformers", *parts, **options)
