"""A trainer that can be killed, stopped or broken at any moment, and goes on as if nothing had been."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from lora_ft.errors import Interrupted, RunFailed, UserError
from lora_ft.model.fused_layers import fused_layers
from lora_ft.model.machine import prefers_fused_layers
from lora_ft.sections import GuardsSection
from lora_ft.training.checkpoint import (
    PREFIX,
    SAVING,
    draft_checkpoint,
    find_damage,
    list_checkpoints,
    rotate_checkpoints,
    seal_checkpoint,
)
from lora_ft.training.guards import FiniteGuard, non_finite, refuse_nan_metrics
from lora_ft.training.meter import TokenMeter, wide_float
from lora_ft.training.progress import Progress
from lora_ft.training.steering import is_out_of_patience, rank_steps
from lora_ft.training.stopping import StopRequest
from lora_ft.training.watchdog import Watchdog


class LastingTrainer(Trainer):
    """`transformers.Trainer`, or one on it, whose checkpoints are whole or invisible, whose resumed runs repeat the
    uninterrupted one to the last bit (where arithmetic does), and which stops at signals and at numbers that are none.

    Saving is the parent's own, sent to a folder where nobody looks; see `checkpoint`.
    """

    def __init__(
        self,
        *args: Any,
        patience: int | None = None,
        guards: GuardsSection | None = None,
        name_row: Callable[[int], str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._meters = {True: TokenMeter(), False: TokenMeter()}
        guards = guards or GuardsSection()
        self._patience = patience
        self._finite = FiniteGuard(guards.skip_non_finite, name_row)
        self._stop = StopRequest()
        self._is_stopping = False
        self._watchdog = Watchdog(guards.stall_minutes)
        self.add_callback(self._watchdog)
        self._is_saving = False
        self._saved_step = self._postponed_step = -1
        self._is_save_postponed = False
        self._loss_before: torch.Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains to the end, or to a signal.

        Raises:
            Interrupted: a signal asked for it; a checkpoint is saved.
            RunFailed: a loss, gradient or evaluation is not finite, or a checkpoint could not be written.
        """
        try:
            with self._stop.listening(), self._watchdog.watching(), self._fused_layers():
                return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()

    def _fused_layers(self) -> AbstractContextManager[Any]:
        """Within it the model's layers go the short way, where that pays and no sharding needs their own call."""
        is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if is_sharded or not prefers_fused_layers(self.args.device.type):
            return nullcontext()
        return fused_layers(self.model, self.args.gradient_checkpointing)

    # --- a step -----------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a batch, as the parent has it."""
        if self._loss_before is None:
            self._loss_before = self._tr_loss.clone()
            self._mark_step()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.add_batch(inputs, loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm, looked at before the optimizer takes the gradient; ranks agree on what to do."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        fault = self._finite.find_fault(grad_norm, scaled=self.args.fp16)
        faulty, self._is_stopping = self._agree(fault is not None, self._stop.signal is not None)
        if faulty:
            if not self._finite.may_skip():
                raise self._fail(fault)
            self._leave_out(model, fault)
            grad_norm = 0.0
        self._finite.forget_step()
        self._loss_before = None
        return grad_norm

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag, true on all ranks if it is on any."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        summed = self.accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self.args.device), "sum")
        return [count > 0 for count in summed.tolist()]

    def _fail(self, fault: str | None) -> RunFailed:
        from accelerate.utils import gather_object

        run = Path(self.args.output_dir)
        places = self._finite.name_rows(self.train_dataset) if fault is not None else []
        faults = gather_object([(fault, places)])
        what = next(name for name, _ in faults if name is not None)
        saved = next((path.name for path in list_checkpoints(run)), None)
        everywhere = list(dict.fromkeys(place for _, named in faults for place in named))
        return non_finite(self.state.global_step + 1, what, everywhere, run, saved)

    def _leave_out(self, model: Any, fault: str | None) -> None:
        """Goes on as if the step's batches had not been; the step counts, and the learning rate moves on."""
        model.zero_grad()  # to None, and an optimizer leaves weights without a gradient alone, moments and decay too
        assert self._loss_before is not None
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # the mean that is logged is over one step less
        self._reset_step()
        rows = ", ".join(self._finite.name_rows(self.train_dataset)[:3]) if fault is not None else "another rank's"
        step = self.state.global_step + 1
        print(f"\nstep {step} is left out: its {fault or 'loss'} is not finite; rows {rows}", file=sys.stderr)

    def _mark_step(self) -> None:
        """Remembers what is measured, before a step."""
        self._sums_before = self._meters[True].sums

    def _reset_step(self) -> None:
        """Takes back what was measured since `_mark_step`."""
        self._meters[True].sums = self._sums_before

    def _run_epoch(self, **kwargs: Any) -> None:
        """An epoch; none for a run that was killed after its last step, where the parent would make one step more."""
        if self.state.global_step >= self.state.max_steps or self._is_out_of_patience():
            self.control.should_training_stop = True
            self._restore_counters(kwargs["resume_from_checkpoint"])
            return
        super()._run_epoch(**kwargs)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's figures, every one a number."""
        metrics = super().evaluate(*args, **kwargs)
        refuse_nan_metrics(metrics, self.state.global_step)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; the parent divides the loss of all steps by those since a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What is due; `eval_on_start` is, at the start of a run and not of every resume."""
        if kwargs.get("skip_scheduler") and self.state.global_step > 0:
            return {}
        return super()._evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best one. The best is saved at once, or another step's weights would be kept
        under its name."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        self.control.should_training_stop |= self._is_out_of_patience()
        return is_best

    def _is_out_of_patience(self) -> bool:
        metric, patience = self.args.metric_for_best_model, self._patience
        if metric is None or patience is None:
            return False
        return is_out_of_patience(self.state.log_history, metric, bool(self.args.greater_is_better), patience)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Logs, evaluates and saves what is due. At the end of an epoch the parent calls this twice, for the step and
        for the epoch: what is saved in between would not know of the epoch's evaluation, so saving waits.
        """
        step, control = self.state.global_step, self.control
        if self._postponed_step != step and (control.should_training_stop or float(self.state.epoch).is_integer()):
            self._postponed_step, self._is_save_postponed = step, control.should_save
            control.should_save = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        control.should_save |= self._is_save_postponed
        self._is_save_postponed = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if control.should_training_stop or self.accelerator.num_processes == 1:
            # after the last step a signal would be forgotten; on one process, asking costs nothing
            (self._is_stopping,) = self._agree(self._stop.signal is not None)
        if self._is_stopping:
            if self.args.save_only_model:  # what is gone on from needs the rest too
                self.args.save_only_model, self._saved_step = False, -1
            self._save_checkpoint(args[2] if len(args) > 2 else kwargs["model"], None)
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        name = self._stop.signal.name if self._stop.signal is not None else "a signal to another rank"
        step, run = self.state.global_step, self.args.output_dir
        rule = f"Stopped by {name} after step {step} of {self.state.max_steps}; {PREFIX}{step} is saved."
        return Interrupted(run, None, rule, "The same command goes on from there.")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / SAVING) if self._is_saving else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves all of the run's state, whole or not at all.

        Raises:
            RunFailed: the disk is full, say; what was saved before is as it was.
        """
        run, step = Path(self.args.output_dir), self.state.global_step
        if self._saved_step == step:
            return
        try:
            self._write_checkpoint(run, step, model, trial)
        except (OSError, SafetensorError, RuntimeError) as fault:
            if isinstance(fault, RuntimeError) and "write" not in str(fault):  # torch's word for a full disk
                raise
            rule = f"It could not be written: {fault}. What was saved before is as it was."
            fix = "Make room, then go on with the same command."
            raise RunFailed(str(run / f"{PREFIX}{step}"), None, rule, fix) from fault
        self._saved_step = step

    def _write_checkpoint(self, run: Path, step: int, model: Any, trial: Any) -> None:
        is_writer = self.is_world_process_zero()
        if is_writer:
            draft = draft_checkpoint(run, step)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        best = self.state.best_global_step
        if best is not None:  # the parent looks for it beside the draft
            self.state.best_model_checkpoint = str(run / f"{PREFIX}{best}")
        if is_writer:
            (draft / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nobody needs
            self.state.save_to_json(str(draft / TRAINER_STATE_NAME))
            saved = seal_checkpoint(draft, weights_only=self.args.save_only_model)
            rotate_checkpoints(run, self.args.save_total_limit, saved, self._best_steps())
        self.accelerator.wait_for_everyone()

    def _best_steps(self) -> list[int]:
        """Evaluated steps, the best first; none where no metric says which is better."""
        metric = self.args.metric_for_best_model
        if metric is None:
            return []
        return rank_steps(self.state.log_history, metric, bool(self.args.greater_is_better))

    def _init_training_state(self, *args: Any) -> Any:
        """The parent's state, with this recipe's intervals, and the best checkpoint where it lies now."""
        started = super()._init_training_state(*args)
        self.state.compute_steps(self.args, self.state.max_steps)
        if (best := self.state.best_global_step) is not None:
            folder = Path(self.args.output_dir) / f"{PREFIX}{best}"
            if self.args.load_best_model_at_end and (damage := find_damage(folder)) is not None:
                rule = f"The best checkpoint so far is damaged ({damage}), and the run is to end with it."
                raise UserError(str(folder), None, rule, "Give --fresh to start over.")
            self.state.best_model_checkpoint = str(folder)
        return started

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        file = Path(output_dir) / f"counters_{self.args.process_index}.json"
        file.write_text(json.dumps(self._counters()), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._restore_counters(checkpoint)

    def _restore_counters(self, checkpoint: str | None) -> None:
        """What was summed up on this rank since it was last logged; without it, the next value logged is another."""
        if checkpoint is None:
            return
        file = Path(checkpoint) / f"counters_{self.args.process_index}.json"
        self._set_counters(json.loads(file.read_text(encoding="utf-8")))

    def _counters(self) -> dict[str, Any]:
        """This rank's sums since the last logged step, as JSON."""
        sums = self._meters[True].sums
        return {
            "meter": None if sums is None else sums.tolist(),
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "skipped": self._finite.num_skipped,
        }

    def _set_counters(self, counters: dict[str, Any]) -> None:
        """Sets what `_counters` gave."""
        self._tr_loss.fill_(counters["loss"])
        self._total_loss_scalar = counters["total_loss"]
        self._globalstep_last_logged = counters["last_logged"]
        self._finite.num_skipped = counters["skipped"]
        meter, device = counters["meter"], self.args.device
        sums = None if meter is None else torch.tensor(meter, dtype=wide_float(device), device=device)
        self._meters[True].sums = sums
