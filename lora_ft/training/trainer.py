"""SFTTrainer on rows that are already tokens and labels: fast, exact over any split of a batch, and silent.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTConfig, SFTTrainer

from lora_ft.data.collate import Collator
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.model.machine import choose_arithmetic
from lora_ft.recipe import check_buildable
from lora_ft.recipe_rules import library_part
from lora_ft.training.assemble import assemble_trainer, use_one_gpu
from lora_ft.training.attention import document_attention, keeps_documents_apart
from lora_ft.training.lasting import LastingTrainer
from lora_ft.training.loss import TokenScores, add_scoring, find_balancing
from lora_ft.training.meter import sum_rows
from lora_ft.training.optimizer import create_loraplus
from lora_ft.training.rows import RowJoiner, find_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class LoraTrainer(LastingTrainer, SFTTrainer):
    """`trl.SFTTrainer` with a loss of its own: only supervised tokens meet the head, documents attend apart, and every
    figure is a mean over tokens. Unlike its parent it leaves the adapter of a quantised base in float32, writes no
    model card into every checkpoint, and reports no run to its makers.

    `with_entropy` logs the entropy of the predictions too, for one more pass over the logits.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole step, not once more by its micro-batches

    def __init__(self, *args: Any, loraplus_ratio: float | None = None, with_entropy: bool = False, **kwargs: Any):
        model: PeftModel = kwargs["model"]
        self._loraplus_ratio, self._with_entropy = loraplus_ratio, with_entropy
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        with _hidden_head(model):
            super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            _refuse_unbalanced(model.get_base_model(), self.router_aux_loss_coef)
        for name, parameter in model.named_parameters():
            if name in trained:  # trl#7268: at a learning rate of 1e-5, bfloat16 rounds 98% of the updates away
                parameter.data = trained[name]
        self.model_accepts_loss_kwargs = True  # so that the tokens of a whole step are counted for `compute_loss`
        self.data_collator: Any = self.data_collator
        self._new_tokens: torch.Tensor | int = 0
        self._num_parameters: int | None = None
        add_scoring(model)
        self._join_rows(model.get_base_model())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; the model attends by document only meanwhile."""
        with document_attention(self.model.get_base_model()):
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The losses of tokens, summed, over the number of supervised tokens of the whole step on all ranks.

        A mean of the micro-batches' means gives a token more weight the fewer stand beside it (transformers#34191).
        """
        scores = model(**inputs, score=True, with_entropy=self._with_entropy)
        losses, whole_step = scores.loss, num_items_in_batch is not None
        if self.args.loss_type == "dft":
            losses = losses * torch.exp(-losses.detach())  # Wu et al. 2025, "On the Generalization of SFT", equation 9
        num_tokens = torch.as_tensor(num_items_in_batch if whole_step else losses.numel(), device=losses.device)
        loss = losses.sum() / num_tokens.clamp(min=1)
        if whole_step and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # ranks' gradients are averaged
        if scores.aux_loss is not None:
            steps = self.current_gradient_accumulation_steps if whole_step else 1
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / steps
        self._measure(scores, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Figures over a data set, each a mean over its supervised tokens, whatever the batch size and the ranks."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self._meters[False].read()
        figures.pop("num_tokens", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Validation batches; on several ranks never joined, so that rows repeated to fill the last one can be told."""
        joined = self.data_collator
        if isinstance(joined, RowJoiner) and self.accelerator.num_processes > 1:
            self.data_collator = Collator(joined.pad_token_id)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = joined

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One logged step, with figures over all tokens of all ranks since the last one."""
        if "loss" in logs:
            figures = self._meters[True].read(self.accelerator.reduce)
            logs.update({name: value for name, value in figures.items() if name != "loss"})
            logs["num_tokens"] = self._count_tokens()
        if "train_loss" in logs:  # the parent divides by the steps since a resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super(SFTTrainer, self).log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six operations a parameter and token; the parent counts the parameters anew at every batch."""
        if self._num_parameters is None:
            self._num_parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * self._num_parameters * inputs["input_ids"].numel()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._count_tokens()  # the state that is saved knows them, and a resumed run counts on
        super()._save_checkpoint(model, trial)

    def _mark_step(self) -> None:
        super()._mark_step()
        self._tokens_before = self._new_tokens

    def _reset_step(self) -> None:
        super()._reset_step()
        self._new_tokens = self._tokens_before

    def _join_rows(self, model: Any) -> None:
        """Batches of rows one after the other without padding, where the model can attend to each apart.

        NEFTune's noise shrinks with the width of a batch, so it would depend on how many rows are joined.
        """
        if keeps_documents_apart(model):
            fast = model.config._attn_implementation == "sdpa" or is_flash_attention_requested(model.config)
            if fast and self.args.neftune_noise_alpha is None and isinstance(self.data_collator, Collator):
                self.data_collator = RowJoiner(self.data_collator.pad_token_id)
        elif "seq_lengths" in (self.train_dataset.column_names or ()):
            rule = "This architecture carries something along the row, and documents would see each other."
            raise UserError("data.packing", True, rule, "Write packing: false.")

    def _measure(self, scores: TokenScores, inputs: dict[str, Any]) -> None:
        training, rows = self.model.training, sum_rows(scores, len(inputs["input_ids"]))
        if training:
            tokens = find_tokens(inputs)
            assert tokens is not None, "the collator says where tokens stand"
            self._new_tokens = self._new_tokens + tokens.sum()
        else:
            rows = self.accelerator.gather_for_metrics(rows)  # leaves out rows repeated to fill the last batch
        self._meters[training].add(rows, scores.aux_loss)

    def _count_tokens(self) -> int:
        """Tokens trained on so far, on all ranks and before a resume too; kept in the state of the trainer."""
        if self.args.include_num_input_tokens_seen == "no":  # else the parent counts them
            tokens = self.accelerator.reduce(torch.as_tensor(self._new_tokens, device=self.args.device))
            self.state.num_input_tokens_seen += int(tokens) // self.get_tp_size()
            self._new_tokens = 0
        return self.state.num_input_tokens_seen

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, beside the adapter, by `export.card`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments; with LoRA+, the same one with the learning rate of every B multiplied."""
        if getattr(self, "optimizer", None) is None and self._loraplus_ratio is not None:
            self.optimizer = create_loraplus(self, self._loraplus_ratio)
        return super().create_optimizer(model)


@contextmanager
def _hidden_head(model: PeftModel) -> Iterator[None]:
    """Hides the head from the parent's constructor, which refuses adapters on it: its own loss would not train them."""
    model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_output_embeddings


def _need_all_logits(arguments: SFTConfig) -> Iterator[Fault]:
    """Settings whose loss is made of the logits of every position."""
    if arguments.label_smoothing_factor > 0:
        rule = "Label smoothing needs the logits of every position, which are never held at once."
        yield Fault("training.label_smoothing_factor", arguments.label_smoothing_factor, rule, "Leave it out.")


def _refuse_unbalanced(model: Any, coefficient: float) -> None:
    """Nothing, if the use of a mixture's experts can be balanced, or a hybrid of the family has none.

    Raises:
        UserError: the architecture has no function for it.
    """
    if find_balancing(model) is None and getattr(model, "num_experts", None) != 0:
        rule = f"{type(model).__name__} has no loss that balances its experts."
        raise UserError("training.router_aux_loss_coef", coefficient, rule, "Write 0: they are not balanced then.")


def build_arguments(training: dict[str, Any], output_dir: Path) -> SFTConfig:
    """The `SFTConfig` of a recipe's `training` section, with what other sections own filled in.

    Under a launcher this also reads its DeepSpeed or FSDP settings, so it comes before the base is loaded.

    Raises:
        UserError: TRL refuses the values, or one of them needs the logits of every position.
    """
    owned = {
        "output_dir": str(output_dir),
        "max_length": None,  # rows come truncated
        "dataset_kwargs": {"skip_prepare_dataset": True},  # and tokenised
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,  # `Progress` draws the bar
    }
    arguments = use_one_gpu(check_buildable("training", SFTConfig, {**library_part(training), **owned}, "recipe"))
    raise_faults(_need_all_logits(arguments))
    return arguments


def build_trainer(*parts: Any, **options: Any) -> LoraTrainer:
    """A trainer over tokenised rows of text (`input_ids`, `labels`); see `assemble_trainer`."""
    return assemble_trainer(LoraTrainer, "TRL", *parts, **options)


def train_model(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, output_dir: str | Path, **training: Any
) -> LoraTrainer:
    """Trains a model with an adapter on tokenised rows, from a notebook; the trainer comes back, trained.

    `training` are fields of `trl.SFTConfig`, as in a recipe; `rows` come from `prepare_dataset`.

    Raises:
        UserError: the model has no adapter, TRL refuses the values, or there is nothing to train.
    """
    if not hasattr(model, "get_base_model"):
        kind = type(model).__name__
        raise UserError("train_model", kind, "It has no adapter to train.", "Give it one: lora_ft.attach_adapter.")
    dtype = str(model.dtype).removeprefix("torch.")
    chosen = {key: value for key, value, _ in choose_arithmetic(model.device.type, dtype)}
    arguments = build_arguments({**chosen, "report_to": "none", "save_strategy": "no", **training}, Path(output_dir))
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(model, tokenizer, rows, None, arguments)
    trainer.train()
    return trainer
