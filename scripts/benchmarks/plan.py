"""The memory plan against what training really took: three steps of full rows, at several settings.

On a CPU the growth of resident memory counts (without the libraries, which are there before), on a GPU what PyTorch
allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.figure import Figure, Options, forget_peak, memory_bytes, run_worker
from benchmarks.tasks import LORA, NF4, TASKS
from benchmarks.train import compute_on


@dataclass(frozen=True)
class Setting:
    """What a step is given."""

    task: str
    """Base, by name."""
    batch_size: int
    """Rows."""
    length: int
    """Tokens a row."""
    bits: int
    """Of the base's weights."""
    checkpointing: bool
    """Whether activations are computed again."""

    def __str__(self) -> str:
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.task}, {self.batch_size} × {self.length} tokens, {self.bits} bit{again}"


SETTINGS = (
    Setting("58M", 4, 512, 4, False),
    Setting("58M", 8, 1024, 4, False),
    Setting("58M", 8, 1024, 4, True),
    Setting("58M", 4, 1024, 16, False),
    Setting("58M", 16, 256, 16, True),
    Setting("58M", 1, 128, 4, False),
    Setting("0.63B", 1, 256, 4, False),
    Setting("0.63B", 2, 512, 4, True),
    Setting("0.63B", 2, 256, 16, False),
)


def measure(options: Options) -> Iterator[Figure]:
    """Planned over measured at each setting, and the largest error."""
    errors, limit = [], 5 if compute_on()[0] == "cuda" else 10
    run = partial(run_worker, "plan", LORA_FT_CACHE=str(options.scratch / "plan-cache"))
    for task in TASKS:  # quantises once: a step is planned, and not what quantising takes before it
        run(next(n for n, s in enumerate(SETTINGS) if (s.task, s.bits) == (task, 4)), options.scratch / "plan")
    for number, setting in enumerate(SETTINGS):
        found = run(number, options.scratch / "plan")
        planned, measured = (found[name] / 1e6 for name in ("planned_bytes", "measured_bytes"))
        errors.append(100 * abs(planned / measured - 1))
        yield Figure("plan", f"{setting}: measured", measured, "MB")
        yield Figure("plan", f"{setting}: planned", planned, "MB")
    yield Figure("plan", "largest error", max(errors), "%", at_most=limit)


def work(number: str, folder: str) -> dict[str, float]:
    """Plans and measures one setting in this process."""
    from pathlib import Path

    import torch
    from transformers import AutoConfig

    from lora_ft.model.machine import prefers_fused_layers, probe_machine
    from lora_ft.model.memory import Hardware, Workload, plan_step
    from lora_ft.model.profile import profile_model

    setting, machine = SETTINGS[int(number)], probe_machine()
    kind, dtype = compute_on()
    task, name = TASKS[setting.task], str(dtype).removeprefix("torch.")
    config = AutoConfig.for_model(task.model_type, **task.shape, max_position_embeddings=4096)
    work = Workload(setting.batch_size, setting.length, NF4 if setting.bits == 4 else None, setting.checkpointing)
    profile = profile_model(config, name, LORA, is_fused=prefers_fused_layers(kind))
    plan = plan_step(profile, work, Hardware(kind, machine.memory_bytes))
    libraries = sum(cause.num_bytes for cause in plan.causes if cause.name == "libraries")
    train = prepare(setting, config, dtype, Path(folder) / setting.task)
    forget_peak()
    before = memory_bytes("VmRSS") if kind == "cpu" else 0
    train()
    peak = memory_bytes("VmHWM") - before if kind == "cpu" else torch.cuda.max_memory_allocated()
    return {"planned_bytes": plan.peak_bytes - libraries, "measured_bytes": peak}


def prepare(setting: Setting, config: Any, dtype: Any, folder: Any) -> Any:
    """A call that loads the base and trains three steps; everything it imports is imported here."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from benchmarks.tasks import train_tokenizer
    from lora_ft.model.adapter import attach_adapter
    from lora_ft.model.load import find_base, load_base
    from lora_ft.sections import ModelSection
    from lora_ft.training.trainer import build_arguments, build_trainer

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([("a question", "an answer")], 300)
    rows = [{"input_ids": list(range(5, 5 + setting.length))} for _ in range(3 * setting.batch_size)]
    data = datasets.Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    name = str(dtype).removeprefix("torch.")
    training = {
        "max_steps": 3,
        "per_device_train_batch_size": setting.batch_size,
        "gradient_checkpointing": setting.checkpointing,
        "optim": "adamw_torch_fused",
        "bf16": name == "bfloat16",
        "use_cpu": compute_on()[0] == "cpu",
        "save_strategy": "no",
        "report_to": "none",
    }
    arguments = build_arguments(training, folder / "run")
    (folder / "run").mkdir(exist_ok=True)
    base, section = find_base(str(folder)), ModelSection(str(folder), dtype=name, attn_implementation="sdpa")  # type: ignore[arg-type]
    quantization = {**NF4, "bnb_4bit_compute_dtype": name} if setting.bits == 4 else None

    def train() -> None:
        model = attach_adapter(load_base(base, section, quantization), LORA)
        build_trainer(model, tokenizer, data, None, arguments, quiet=True).train()

    return train
