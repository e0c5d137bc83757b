"""What recipes may say, beside what the fields of the libraries tell: whose a key is, its range, where it says nothing.

Tables for `recipe`, which checks against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from lora_ft.library_fields import LibraryField
from lora_ft.sections import DEFAULT_TARGET_LENGTH

LORAPLUS = "loraplus_lr_ratio"
"""The one key under `lora` that is no LoraConfig field: it goes to `peft.optimizers.create_loraplus_optimizer`."""
EARLY_STOPPING = "early_stopping_patience"
"""The one key under `training` that is no SFTConfig field: `LoraTrainer` goes by it, over a resume too."""

LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
OUR_FIELDS: dict[str, dict[str, LibraryField]] = {
    "lora": {LORAPLUS: LibraryField(float)},
    "training": {
        "per_device_train_batch_size": LibraryField(int | Literal["auto"]),
        EARLY_STOPPING: LibraryField(int),
        "optim": LibraryField(str, takes_null=False),
        "gradient_checkpointing_kwargs": LibraryField(dict[str, Any] | None),
        "activation_checkpointing_kwargs": LibraryField(dict[str, Any] | None),
        "log_level": LibraryField(LogLevel),
        "log_level_replica": LibraryField(LogLevel),
        "include_num_input_tokens_seen": LibraryField(bool | Literal["all", "non_padding", "no"]),
    },
}
"""Fields of the libraries' sections that are ours, that take more than the library does, or whose values it names only
in words."""
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Newest names of transformers, and those that TRL, PEFT and everything here know."""

TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "seq2seq": {"max_length": 512, "max_target_length": DEFAULT_TARGET_LENGTH, "truncation": "context"},
}
"""Values of the data section that a task has where a recipe says nothing: T5 was trained on 512 tokens, and a question
that loses its end is another question."""
OWNED_ELSEWHERE: dict[str, dict[str, str]] = {
    "quantization": {},
    "lora": {
        "task_type": "data.task",
        "peft_type": "the section's name",
        "base_model_name_or_path": "model.base",
        "revision": "model.revision",
        "inference_mode": "the command: train, or chat",
    },
    "training": {
        "output_dir": "output_dir",
        "max_length": "data.max_length",
        "packing": "data.packing",
        "packing_strategy": "data.packing",
        "eval_packing": "data.packing",
        "padding_free": "data.packing",
        "assistant_only_loss": "data.train_on",
        "completion_only_loss": "data.train_on",
        "truncation_mode": "data.truncation",
        "dataset_text_field": "data.sources.0.columns",
        "dataset_kwargs": "data",
        "dataset_num_proc": "data",
        "shuffle_dataset": "data.split.seed",
        "chat_template_path": "data.chat_template",
        "eos_token": "data.chat_template",
        "pad_token": "the tokenizer of model.base",
        "model_init_kwargs": "model",
        "trust_remote_code": "model.trust_remote_code",
        "resume_from_checkpoint": "output_dir: an unfinished run there is continued",
        "push_to_hub": "export.push_to",
        "hub_model_id": "export.push_to",
        "hub_token": "the environment variable HF_TOKEN",
        "hub_private_repo": "export",
        "hub_strategy": "export",
        "hub_always_push": "export",
        "hub_revision": "export",
        "do_train": "the command: lora-ft train",
        "do_eval": "evaluation",
        "do_predict": "evaluation.generate",
        "predict_with_generate": "evaluation.generate",
        "generation_max_length": "evaluation.max_new_tokens",
        "generation_num_beams": "the base's generation_config.json",
        "generation_config": "the base's generation_config.json",
        "remove_unused_columns": "data",
        "logging_nan_inf_filter": "nothing: a loss that is not finite ends the run",
        "deepspeed": "the file given to accelerate launch --config_file",
        "fsdp": "the file given to accelerate launch --config_file",
        "fsdp_config": "the file given to accelerate launch --config_file",
        "local_rank": "accelerate launch",
    },
}
"""Section → keys of the library that are not written there, and where the same thing is decided."""

FORMER = {
    "max_seq_length": "data.max_length",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "warmup_ratio": "training.warmup_steps, where a number below 1 is a share of the steps",
    "neftune_alpha": "training.neftune_noise_alpha",
    "no_cuda": "training.use_cpu",
}
"""Names of older releases and other tools → what is written now."""
UNMEASURED = {"classification": ("generate", "metrics", "max_new_tokens", "general"), "seq2seq": ("general",)}
"""`data.task` → keys of `evaluation` that say nothing there: a class is not written, and an answer is no text."""
EXTENT = ("num_train_epochs", "max_steps")
"""Training settings that say how long a run is; it may become longer. Of both, transformers goes by the second."""
IDLE = {
    "load_in_4bit": ("llm_int8_threshold", "llm_int8_has_fp16_weight"),
    "load_in_8bit": ("bnb_4bit_",),
}
"""How weights are read → how the keys of `quantization` begin that say nothing then."""
INERT = {
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
}
"""What a config that transformers wrote says of keys that say nothing there."""


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "data.max_length": (lambda v: v >= 8, "A row has room for at least 8 tokens.", "Write 1024, say."),
    "data.sources": (lambda v: len(v) > 0, "At least one source is needed.", "Write - {path: data.jsonl}"),
    "data.split.validation": (lambda v: 0 <= v < 1, "A share lies between 0 and 1.", "Write 0.1 for a tenth."),
    "data.split.test": (lambda v: 0 <= v < 1, "A share lies between 0 and 1.", "Write 0.1 for a tenth."),
    "data.split.seed": (lambda v: v >= 0, "A seed is not negative.", "Write 42, say."),
    "evaluation.generate": (lambda v: v == "all" or v >= 0, "A number of rows is not negative.", "Write 32, or all."),
    "evaluation.max_new_tokens": (lambda v: v > 0, "An answer has at least one token.", "Write 128, say."),
    "evaluation.batch_size": (lambda v: v > 0, "A batch has at least one row.", "Write 16, say."),
    "guards.skip_non_finite": (lambda v: v >= 0, "A number of steps is not negative.", "Write 0, or 3."),
    "guards.stall_minutes": (lambda v: v >= 0, "A time is not negative.", "Write 15, or 0 for never."),
    "quantization.bnb_4bit_compute_dtype": (
        lambda v: v in ("bfloat16", "float16", "float32"),
        "Expected one of bfloat16, float16, float32.",
        "Choose one, or leave it out for model.dtype.",
    ),
    "quantization.bnb_4bit_quant_type": (lambda v: v in ("nf4", "fp4"), "Expected one of nf4, fp4.", "Choose one."),
    "export.push_to": (_is_repository, "A repository on the Hub is named ORG/NAME.", "Give both parts."),
    "lora.r": (lambda v: v > 0, "A rank is at least 1.", "Write 16, say."),
    "lora.lora_dropout": (lambda v: 0 <= v < 1, "A probability lies between 0 and 1.", "Write 0.05, or leave it out."),
    "lora.lora_alpha": (lambda v: v > 0, "At 0 the adapter would do nothing.", "Write 32, say."),
    **dict.fromkeys(
        ("lora.kasa_config", "lora.velora_config", "lora.monteclora_config", "lora.arrow_config"),
        (
            lambda _: False,
            "This kind of LoRA wants a loss, other adapters, or values of weights that no plan of memory has.",
            "Leave it out, and train plain LoRA, or with use_dora or use_rslora.",
        ),
    ),
    "lora.loraplus_lr_ratio": (lambda v: v > 0, "A ratio of learning rates is above 0.", "Write 16, say."),
    "training.learning_rate": (lambda v: 0 < v < 10, "A learning rate lies above 0 and below 10.", "Write 2e-4, say."),
    "training.weight_decay": (lambda v: v >= 0, "Below 0 it would make weights grow.", "Write 0.01, say, or 0."),
    "training.num_train_epochs": (
        lambda v: 0 < v < math.inf,
        "At least part of an epoch is trained, and the last one ends.",
        "Write 3, say.",
    ),
    "training.max_steps": (lambda v: v == -1 or v > 0, "At least one step is trained.", "Write 100, say, or -1."),
    **dict.fromkeys(
        ("training.seed", "training.data_seed"),
        (lambda v: 0 <= v < 2**32, "A seed is not negative, and has at most 32 bits.", "Write 42, say."),
    ),
    **dict.fromkeys(
        ("training.logging_steps", "training.eval_steps", "training.save_steps"),
        (lambda v: 0 <= v < math.inf, "A number of steps is not negative, and ends.", "Write 10, say."),
    ),
    "training.pad_to_multiple_of": (
        lambda _: False,
        "Rows are joined, or padded to the longest of their batch and no further.",
        "Leave it out.",
    ),
    "training.parallelism_config": (
        lambda _: False,
        "It is an object of accelerate, which a recipe cannot write.",
        "Leave it out; devices share a training as accelerate launch --config_file says.",
    ),
    "training.save_total_limit": (lambda v: v > 0, "At least one checkpoint is kept.", "Write 2, or null for all."),
    "training.max_grad_norm": (lambda v: v >= 0, "A norm is not negative.", "Write 1.0, or 0 to clip nothing."),
    "training.neftune_noise_alpha": (
        lambda v: 0 <= v < math.inf,
        "Noise is not negative, and finite.",
        "Write 5, or leave it out.",
    ),
    "training.dataloader_num_workers": (lambda v: v >= 0, "A number of processes is not negative.", "Write 0, or 2."),
    "training.dataloader_prefetch_factor": (lambda v: v > 0, "A worker reads ahead a batch at least.", "Write 2, say."),
    "training.per_device_train_batch_size": (
        lambda v: v == "auto" or v > 0,
        "A batch has at least one row.",
        "Write 4, say, or auto for the largest that fits.",
    ),
    "training.per_device_eval_batch_size": (lambda v: v > 0, "A batch has at least one row.", "Write 4, say."),
    "training.early_stopping_patience": (lambda v: v > 0, "Validation is waited for at least once.", "Write 2, say."),
    "training.gradient_accumulation_steps": (lambda v: v > 0, "A step has at least one batch.", "Write 1, say."),
}
"""Key → whether a value is in range, the rule, and the fix."""


def ends_by_steps(training: dict[str, Any]) -> bool:
    """Whether `max_steps` says how long a run is: transformers takes -1 for nothing said."""
    return training.get("max_steps") not in (None, -1)


def library_part(values: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of a `lora` or `training` section that are the library's own."""
    return {key: value for key, value in (values or {}).items() if key not in (LORAPLUS, EARLY_STOPPING)}
