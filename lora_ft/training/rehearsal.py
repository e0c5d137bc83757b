"""What would end a training at its first step, tried on a single number before the base is read."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from lora_ft.errors import Fault, raise_faults

if TYPE_CHECKING:
    from transformers import TrainingArguments

SEES_MODEL = ("galore", "apollo", "lomo", "adalomo")
"""How optimizers are named that are made for the layers of one model; only their package is looked for."""
REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, AssertionError)
"""What libraries raise at settings that they cannot do with."""


def refuse_unstartable(arguments: TrainingArguments, num_rows: int) -> None:
    """Nothing, if an optimizer and a schedule can be made of the arguments, and a batch of the rows.

    Raises:
        UserError: all that cannot.
    """
    raise_faults([*_refused(arguments), *_unavailable(arguments, num_rows)])


def _refused(arguments: TrainingArguments) -> Iterator[Fault]:
    """What the makers of optimizers and schedules refuse, in their own words."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    optimizer: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.zeros(1, requires_grad=True, device=arguments.device)], **options)
    except REFUSALS as fault:
        if isinstance(fault, ImportError) or not name.startswith(SEES_MODEL):
            fix = "Change it or its settings (learning_rate, adam_beta1 and so on), or install what it needs."
            yield Fault("training.optim", name, f"No optimizer can be made: {_said(fault)}", fix)
    else:
        plain = copy.copy(arguments)
        plain.optim_args = None
        if arguments.optim_args and Trainer.get_optimizer_cls_and_kwargs(plain) == (kind, options):
            yield Fault("training.optim_args", arguments.optim_args, f"{name} reads none of these.", "Leave it out.")
    schedule, steps = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)), 1000
    try:
        warmup, options = arguments.get_warmup_steps(steps), arguments.lr_scheduler_kwargs
        get_scheduler(schedule, optimizer, warmup, steps, options)
    except REFUSALS as fault:
        rule = f"No schedule can be made: {_said(fault)}"
        yield Fault("training.lr_scheduler_type", schedule, rule, "Change it, or training.lr_scheduler_kwargs.")


def _unavailable(arguments: TrainingArguments, num_rows: int) -> Iterator[Fault]:
    """What this machine, its packages, or these rows do not give."""
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        yield Fault("training.use_liger_kernel", True, "liger-kernel is not installed.", "Install it, or leave it out.")
    if getattr(arguments, "activation_offloading", False) and arguments.device.type == "cpu":
        rule = "Activations are offloaded from a GPU, and there is none."
        yield Fault("training.activation_offloading", True, rule, "Leave it out.")
    named = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys() - {"function", "args", "kwargs"}
    known = {*named, "preserve_rng_state"}  # which it takes out of its `kwargs`
    for key, value in (arguments.gradient_checkpointing_kwargs or {}).items():
        if key not in known:
            rule = f"torch.utils.checkpoint takes {', '.join(sorted(known))}."
            yield Fault(f"training.gradient_checkpointing_kwargs.{key}", value, rule, "Leave it out.")
    batch = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and num_rows < batch:
        rule = f"A batch takes {batch} rows, there are {num_rows}, and an incomplete one is dropped."
        yield Fault("training.dataloader_drop_last", True, rule, "Leave it out, or make the batch smaller.")


def _said(fault: BaseException) -> str:
    return " ".join(str(fault).split()).rstrip(".") + "."
