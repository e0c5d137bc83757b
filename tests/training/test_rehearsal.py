"""What cannot train is refused before a base is read or a folder taken, all of it at once."""

import pytest

from lora_ft.errors import UserError
from lora_ft.training.rehearsal import refuse_unstartable
from lora_ft.training.trainer import build_arguments


def build(tmp_path, **training):
    return build_arguments({"report_to": "none", "use_cpu": True, **training}, tmp_path)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training.lr_scheduler_type"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "training.lr_scheduler_type"),
        ({"adam_beta1": 1.5}, "training.optim"),
        ({"optim_args": "foo=1"}, "training.optim_args"),
        ({"optim": "galore_adamw"}, "training.optim"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel"),
        ({"activation_offloading": True}, "training.activation_offloading"),
        ({"gradient_checkpointing_kwargs": {"foo": 1}}, "training.gradient_checkpointing_kwargs.foo"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 9}, "training.dataloader_drop_last"),
    ],
    ids=str,
)
def test_what_would_end_training_at_its_first_step_is_refused(tmp_path, settings, place):
    with pytest.raises(UserError, match=place):
        refuse_unstartable(build(tmp_path, **settings), 8)


def test_all_faults_are_said_at_once(tmp_path):
    arguments = build(tmp_path, adam_beta1=1.5, activation_offloading=True, lr_scheduler_kwargs={"foo": 1})
    with pytest.raises(UserError) as caught:
        refuse_unstartable(arguments, 8)
    assert all(part in str(caught.value) for part in ("optim", "lr_scheduler_type", "activation_offloading"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.1},
        {"optim": "adamw_8bit"},
        {"optim": "adafactor"},
        {"optim": "sgd", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 8},
    ],
    ids=str,
)
def test_what_can_train_is_let_through(tmp_path, settings):
    refuse_unstartable(build(tmp_path, **settings), 8)
