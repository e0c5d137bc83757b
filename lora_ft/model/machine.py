"""What this machine is and does fastest, and the settings that follow: the one place for choices by device.

Nothing here overrides a recipe: only what it leaves open is chosen, and each choice carries its reason.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.recipe_rules import EARLY_STOPPING
from lora_ft.sections import Choice, Recipe, Task

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt, in glibc's malloc.h."""
LARGE_BYTES, SCARCE_BYTES = 2**24, 2**20
"""From which size on pieces of memory are mapped in float32: usually, and where memory is scarce."""
NUM_LOGITS, FEWEST_LOGITS_ROWS = 12 * 2**20, 128
"""Logits held at once, and the fewest tokens they are of, whatever the vocabulary: with less of either, the head's
weights are read more than they are used."""

ROUND_TO = 32
"""Products go by so many tokens: of a new shape one takes as long to prepare on a CPU as a small one to compute, the
head's up to four times as long, and few numbers of tokens are multiples of 32."""


@dataclass(frozen=True)
class Machine:
    """The device a run computes on."""

    device: str
    """`cpu`, `cuda:0`, `mps`; under a launcher, the device of this rank."""
    name: str
    """As the maker calls it."""
    memory_bytes: int
    """Memory of the device; of the machine, for a CPU. Of several GPUs that ranks share, that of the smallest."""
    native_bf16: bool
    """Whether bfloat16 arithmetic is at least as fast as float32."""
    bf16_reason: str
    """How that is known."""


@cache
def probe_machine() -> Machine:
    """The machine this process runs on; the CPU's bfloat16 speed is measured, once, in about 0.2 s."""
    import torch

    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(index)
        ranks = range(min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()))
        least = min([properties, *map(torch.cuda.get_device_properties, ranks)], key=lambda each: each.total_memory)
        native = properties.major >= 8
        reason = f"compute capability {properties.major}.{properties.minor}"
        return Machine(f"cuda:{index}", properties.name, least.total_memory, native, reason)
    if torch.backends.mps.is_available():
        return Machine("mps", platform.processor() or "Apple GPU", _main_memory_bytes(), False, "not measured on mps")
    ratio = _measure_bf16_speedup()
    return Machine(
        "cpu", _cpu_name(), _main_memory_bytes(), ratio >= 1.0, f"measured {ratio:.1f}× the speed of float32"
    )


def imagine_gpu(memory_bytes: int) -> Machine:
    """A GPU that is not here, to plan for: one of NVIDIA's since Ampere, with so much memory."""
    name = f"a GPU with {memory_bytes / 2**30:.0f} GiB"
    return Machine("cuda:0", name, memory_bytes, True, "as on every NVIDIA GPU since Ampere")


def choose_settings(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe with every open setting decided for `machine`; `recipe.choices` says what and why.

    Raises:
        UserError: the recipe asks for something this machine cannot do, such as fp16 on a CPU.
    """
    raise_faults(check_machine(recipe, machine))
    choices = list(recipe.choices)
    model, training = recipe.model, dict(recipe.training)
    quantization = dict(recipe.quantization) if recipe.quantization else None

    def choose(section: str, values: dict[str, Any], key: str, value: object, reason: str) -> None:
        if key not in values:
            values[key] = value
            choices.append(Choice(f"{section}.{key}", value, reason))

    if model.dtype == "auto":
        dtype, reason = _fastest_dtype(machine, recipe.data.task)
        model = replace(model, dtype=dtype)
        choices.append(Choice("model.dtype", dtype, reason))
    if model.attn_implementation is None:
        attention, reason = _fastest_attention(machine)
        model = replace(model, attn_implementation=attention)
        choices.append(Choice("model.attn_implementation", attention, reason))
    if quantization is not None and quantization.get("load_in_4bit"):
        choose("quantization", quantization, "bnb_4bit_compute_dtype", model.dtype, "as model.dtype")
    for key, value, reason in _training_settings(recipe, machine, model.dtype):
        choose("training", training, key, value, reason)
    return replace(recipe, model=model, quantization=quantization, training=training, choices=tuple(choices))


def _rhythm(training: dict[str, Any], has_validation: bool) -> Iterator[tuple[str, object, str]]:
    """How often is saved and evaluated: once an epoch, or in the steps of whichever the recipe names."""
    saves, evals = training.get("save_steps"), training.get("eval_steps")
    if saves is None and (EARLY_STOPPING in training or training.get("load_best_model_at_end")):
        saves = evals  # the best step must have been saved
    if saves is not None:
        yield "save_steps", saves, "as eval_steps"
        yield "save_strategy", "steps", "save_steps or eval_steps says how often"
    else:
        yield "save_strategy", "epoch", "an interrupted run loses at most one epoch"
    if not has_validation:
        yield "eval_strategy", "no", "no validation rows"
    elif evals is not None or saves is not None:
        yield "eval_steps", saves if evals is None else evals, "as save_steps"
        yield "eval_strategy", "steps", "save_steps or eval_steps says how often"
    else:
        yield "eval_strategy", "epoch", "as often as weights are saved"


def settle_validation(recipe: Recipe, num_validation_rows: int) -> Recipe:
    """The recipe, with no evaluation during training if it was only chosen here and no row turned up for it.

    Raises:
        UserError: the recipe itself asks for one, or for early stopping, and there are no rows.
    """
    if EARLY_STOPPING in recipe.training and not (num_validation_rows and recipe.training["eval_strategy"] != "no"):
        rule = "There is no validation to stop by: no rows, or eval_strategy is no."
        value = recipe.training[EARLY_STOPPING]
        raise UserError(f"training.{EARLY_STOPPING}", value, rule, "Raise data.split.validation, or remove this key.")
    if num_validation_rows or recipe.training["eval_strategy"] == "no":
        return recipe
    if "training.eval_strategy" not in {choice.key for choice in recipe.choices}:
        rule = "There are no validation rows to evaluate on."
        fix = "Raise data.split.validation, name a source with split: validation, or write no."
        raise UserError("training.eval_strategy", recipe.training["eval_strategy"], rule, fix)
    others = tuple(choice for choice in recipe.choices if choice.key != "training.eval_strategy")
    choice = Choice("training.eval_strategy", "no", "no validation rows")
    return replace(recipe, training={**recipe.training, "eval_strategy": "no"}, choices=(*others, choice))


def choose_arithmetic(device: str, dtype: str) -> Iterator[tuple[str, object, str]]:
    """How a model of this type on this device computes: fields of SFTConfig, each with a value and the reason."""
    yield "bf16", dtype == "bfloat16", "arithmetic follows model.dtype; trained weights stay float32"
    yield "fp16", dtype == "float16", "arithmetic follows model.dtype; trained weights stay float32"
    if device == "cpu":
        yield "use_cpu", True, "no GPU is visible"
        yield "dataloader_pin_memory", False, "memory is pinned for a GPU only"
    yield "optim", "adamw_torch_fused", "one pass over the weights instead of six"


def _training_settings(recipe: Recipe, machine: Machine, dtype: str) -> Iterator[tuple[str, object, str]]:
    on_cpu = machine.device == "cpu"
    splits = {source.split for source in recipe.data.sources}
    has_validation = "validation" in splits or (None in splits and recipe.data.split.validation > 0)
    yield "seed", 42, "fixed, so that a run can be repeated"
    yield from choose_arithmetic(machine.device, dtype)
    reason = "on a CPU time is scarcer than memory" if on_cpu else "GPU memory is scarcer than time"
    yield "gradient_checkpointing", not on_cpu, reason
    yield from _rhythm(recipe.training, has_validation)
    if EARLY_STOPPING in recipe.training:
        yield "load_best_model_at_end", True, "early stopping goes back to the best step"
    kept = (
        "the newest, and one before it"
        if recipe.data.task == "sft"
        else "those of lowest validation loss, and the newest"
    )
    yield "save_total_limit", 2, kept
    yield "ddp_find_unused_parameters", False, "every adapter is used in every step, so no rank need look"
    yield "logging_steps", 5, "often enough to draw a curve"
    yield "report_to", "none", "nothing leaves this machine unless asked"


def has_triton_loss(device_type: str) -> bool:
    """Whether TRL's Triton kernel can turn hidden states into losses; elsewhere, blocks that stay in cache are best."""
    return device_type in {"cuda", "xpu"} and importlib.util.find_spec("triton") is not None


def count_logits_rows(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits are held at once: about as many as `NUM_LOGITS` allow, in chunks of about one length."""
    most = max(FEWEST_LOGITS_ROWS, NUM_LOGITS // vocab_size)
    num_chunks = max(1, math.ceil(num_tokens / most))
    return fill_up(max(1, math.ceil(num_tokens / num_chunks)))


def fill_up(number: int) -> int:
    """The next multiple of `ROUND_TO`, or the number itself if it is one."""
    return -(-number // ROUND_TO) * ROUND_TO


def count_logits_bytes(kind: str, num_tokens: int, vocab_size: int, bytes_per_logit: int) -> int:
    """What logits take at once: a chunk of them, or what TRL's kernel has for a tile of 32,768 columns."""
    if kind == "cuda":
        return min(300 * 2**20, 4 * num_tokens * vocab_size)
    return count_logits_rows(num_tokens, vocab_size) * vocab_size * bytes_per_logit


def choose_head_columns(device_type: str, dtype: Any) -> int | None:
    """How many of a vocabulary's columns are multiplied at once; None for all.

    A float32 product on a CPU lays the weights out anew before it multiplies, and a thousand columns of them stay in
    the cache meanwhile: 268 tokens of 512 by 32,000 columns took 8% less time so, 128 tokens of 896 by 152,000 15%.
    """
    return 1024 if device_type == "cpu" and str(dtype) == "torch.float32" else None


def prefers_matmul_attention(device_type: str, dtype: Any) -> bool:
    """Whether matrix products attend faster than PyTorch's fused kernel: in bfloat16 on a CPU, by 2 to 4 times."""
    return device_type == "cpu" and str(dtype) == "torch.bfloat16"


def prefers_fused_layers(device_type: str) -> bool:
    """Whether norms, gated MLPs and LoRA layers as one step of autograd are better: on a CPU, where it was measured."""
    return device_type == "cpu"


def choose_mapped_bytes(device_type: str, dtype: Any, checkpointing: bool) -> int | None:
    """From which size on pieces of memory are mapped, and so given back when they are free; None: as glibc has it.

    glibc's heap keeps gaps, and takes in pieces of up to 32 MiB once one of them was freed. For float32 on a CPU, at
    the settings of scripts/benchmarks/plan.py: from 16 MiB on, 0.63B in 4 bit took 1.8 GB where it took 2.6, in the
    same time, and 58M up to a seventh less, in up to a quarter more; from 8 MiB on, 58M took another seventh less, in a
    tenth more. With checkpointing, which shows that memory is scarce, all from 1 MiB on are mapped: less than half of
    the memory, in up to two fifths more time. In bfloat16 it was no less memory without checkpointing.
    """
    if device_type != "cpu" or str(dtype) != "torch.float32":
        return None
    return SCARCE_BYTES if checkpointing else LARGE_BYTES


def can_keep_unpacked(num_bytes: int, checkpointing: bool, memory_bytes: int | None = None) -> bool:
    """Whether 4-bit weights may also lie unpacked in memory: if they take a fortieth of it at most, and no gradient
    `checkpointing` shows that memory is scarce.

    A step of few tokens gains most: of 0.63B, one of a row 6 to 14% in 0.7 GB more, one of four rows nothing.

    `memory_bytes` is this process's share; where it is left out, that of all that were launched on this machine.
    """
    share = _main_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return not checkpointing and num_bytes <= (share if memory_bytes is None else memory_bytes) // 40


def place_untrained() -> Any:
    """Where transformers puts a model that only answers: on this device; of several GPUs, on the next ones too where
    one has no room for all of it, as for a base that was sharded while it was trained.
    """
    import torch

    machine = probe_machine()
    is_one_of_many = machine.device.startswith("cuda") and torch.cuda.device_count() > 1
    return "sequential" if is_one_of_many else {"": machine.device}


@dataclass(frozen=True)
class MemoryTraits:
    """What a kind of device adds to what tensors take, and how much of it may be used."""

    library_bytes: int
    """What the imported libraries take of it."""
    runtime_bytes: int
    """What the first step adds: kernels, workspaces, code."""
    slack_share: float
    """Gaps the allocator leaves, as a share of what autograd keeps."""
    wide_tensors: float
    """Tensors of the width of a layer that are alive at once in its backward pass, beside what autograd keeps."""
    logits_copies: float
    """How often a chunk of logits is held, or what the head's products take beside it."""
    embedding_share: float
    """Share of the embeddings' table that is there: on a CPU it is mapped from its file, and rows come as tokens do."""
    usable_share: float
    """Share of its memory that a step may take."""


def memory_traits(kind: str, mapped_bytes: int | None = None) -> MemoryTraits:
    """What is known of `cpu` or `cuda`; `mapped_bytes` is of `choose_mapped_bytes`.

    CPU: fitted to tests/model/memory_measurements.json; glibc's heap leaves gaps. CUDA: a context is 0.5 GiB, tensors
    are counted from the code, as in Llama's MLP (gradients of gate, up and their product), and not yet measured.
    """
    if kind == "cpu":
        fitted = {None: (0.02, 13, 1.5), LARGE_BYTES: (0.3, 4, 2.5), SCARCE_BYTES: (0.0, 0, 1)}
        return MemoryTraits(512_000_000, 56_000_000, *fitted[mapped_bytes], 0.1, 0.9)
    return MemoryTraits(0, 600 * 2**20, 0.02, 3, 1, 1.0, 0.95)


def check_machine(recipe: Recipe, machine: Machine) -> Iterator[Fault]:
    """What this machine cannot do, though the recipe asks for it."""
    yield from _overflowing(recipe)
    if machine.device == "cpu":
        remedy = "Write bfloat16 or float32, or leave it out."
        if recipe.model.dtype == "float16":
            yield Fault("model.dtype", "float16", "Half precision has no training kernels on a CPU.", remedy)
        if recipe.training.get("fp16"):
            yield Fault("training.fp16", True, "Half precision has no training kernels on a CPU.", remedy)
        if recipe.training.get("tf32"):
            yield Fault("training.tf32", True, "TF32 is a format of NVIDIA GPUs.", "Remove it.")
    elif recipe.training.get("use_cpu"):
        rule = f"The base would lie on {machine.device}, and the batches elsewhere."
        yield Fault(
            "training.use_cpu", True, rule, "Remove it; to train on the CPU, hide the GPU (CUDA_VISIBLE_DEVICES=)."
        )
    if recipe.training.get("bf16") and recipe.training.get("fp16"):
        yield Fault("training.fp16", True, "bf16 and fp16 exclude each other.", "Remove one.")
    if recipe.model.dtype == "float16" and recipe.training.get("bf16"):
        yield Fault("training.bf16", True, "model.dtype is float16, and both would be mixed.", "Use one of them.")
    if recipe.training.get("fp16") and recipe.model.dtype == "bfloat16":
        yield Fault("training.fp16", True, "model.dtype is bfloat16, and both would be mixed.", "Use one of them.")


def _overflowing(recipe: Recipe) -> Iterator[Fault]:
    """Half precision for T5, whose activations pass 65,504 and become NaN. Source: transformers#9295, #4586."""
    if recipe.data.task != "seq2seq":
        return
    rule, fix = "T5 was trained in bfloat16; in float16 it overflows to NaN.", "Write bfloat16 or float32."
    half = {
        "model.dtype": recipe.model.dtype == "float16",
        "training.fp16": bool(recipe.training.get("fp16")),
        "quantization.bnb_4bit_compute_dtype": (recipe.quantization or {}).get("bnb_4bit_compute_dtype") == "float16",
        "export.dtype": recipe.export.dtype == "float16",
    }
    for key, is_half in half.items():
        if is_half:
            yield Fault(key, True if key == "training.fp16" else "float16", rule, fix)


def _fastest_dtype(machine: Machine, task: Task) -> tuple[Any, str]:
    if machine.native_bf16:
        return "bfloat16", f"native here: {machine.bf16_reason}"
    if machine.device.startswith("cuda") and task == "seq2seq":
        return "float32", "bfloat16 is not native, and T5 overflows in float16"
    if machine.device.startswith("cuda"):
        return "float16", f"bfloat16 is not native: {machine.bf16_reason}"
    return "float32", f"bfloat16 is not native: {machine.bf16_reason}"


def _fastest_attention(machine: Machine) -> tuple[str, str]:
    if machine.device.startswith("cuda") and machine.native_bf16 and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2", "the package flash_attn is installed"
    return "sdpa", "PyTorch's fused attention, exact for packed rows too"


def peak_memory_bytes(machine: Machine) -> int:
    """The most memory this process has held so far: of a GPU by PyTorch's count, of the machine by its kernel's."""
    import torch

    if machine.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(machine.device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def map_large_pieces(num_bytes: int) -> None:
    """From now on pieces of this size go back to the machine when they are free, if glibc has the memory.

    Smaller ones stay: glibc, told the one, would give back the end of its heap at every chance, and fetch it again.
    """
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(M_MMAP_THRESHOLD, num_bytes)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**30)


def release_memory() -> None:
    """Gives memory that nobody uses any more back to the machine; glibc keeps what many small pieces lie in."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _measure_bf16_speedup() -> float:
    """Speed of a bfloat16 matrix product relative to float32, on shapes of a small layer: the best of six, in turns.

    One after the other, a stall of the machine could fall on all products of one type, and decide what is trained in.
    """
    import torch

    pairs = {d: (torch.ones(512, 768, dtype=d), torch.ones(768, 768, dtype=d)) for d in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(pairs, float("inf"))
    for left, right in pairs.values():
        left @ right
    for _ in range(6):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            for _ in range(2):
                left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _main_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
