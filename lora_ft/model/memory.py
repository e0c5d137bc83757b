"""What a training step holds, by cause, before any weight is read: whether it fits, and what would make it fit.

    weights ── adapter ── optimizer ──────────────────────────  all the time
                                       activations ╱‾‾╲          grow forwards, shrink backwards
                                              loss   ▏           at the turn, with what a layer's gradients pass through
                                                     gradients   grow backwards; kept where batches accumulate

Bytes are counted, in powers of ten only where a person reads them. Shapes: T tokens of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lora_ft.model.machine import (
    MemoryTraits,
    can_keep_unpacked,
    choose_mapped_bytes,
    count_logits_bytes,
    memory_traits,
    prefers_matmul_attention,
)
from lora_ft.model.profile import ModelProfile

BLOCK_SIZE = 64
"""Weights that share a scale in bitsandbytes' 4-bit types."""
ADAPTER_BYTES = FLOAT_BYTES = 4
"""Trained weights are float32."""
OPTIMIZER_BYTES = {"8bit": 2, "sgd": 0, "adafactor": 0, "lion": 4, "rmsprop": 4, "adagrad": 4, "adam": 8}
"""State a trained parameter, by the first of these words that stands in the optimizer's name."""
OFFLOADABLE = ("adamw_torch", "adamw_torch_fused")
"""Optimizers that DeepSpeed's CPU Adam computes; accelerate puts it in the place of any other one too."""
STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
"""`Hardware.sharding` → how much of a step is shared out, by the stages of ZeRO."""


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a training step."""

    batch_size: int
    """Rows a device computes at once."""
    length: int
    """Tokens of the longest row."""
    quantization: dict[str, Any] | None
    """Fields of BitsAndBytesConfig; of a base that is stored quantised, its own `quantization_config`."""
    checkpointing: bool
    """Whether activations of layers are computed again instead of kept."""
    accumulation: int = 1
    """Batches a step."""
    optimizer: str = "adamw_torch_fused"
    """As `training.optim`."""
    attention: str = "sdpa"
    """As `model.attn_implementation`."""

    @property
    def num_tokens(self) -> int:
        """T, where every row is full."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Hardware:
    """Where it is to run."""

    kind: str
    """`cpu` or `cuda`."""
    memory_bytes: int
    """Of each device."""
    num_devices: int = 1
    """Devices that share a step, a process each."""
    sharding: str = "none"
    """`none` (or DDP), `zero1`, `zero2`, `zero3` or `fsdp`."""
    offload: tuple[str, ...] = ()
    """What lies in the machine's memory instead: `optimizer`, `parameters`."""


@dataclass(frozen=True)
class Cause:
    """One thing that takes memory."""

    name: str
    """What it is."""
    num_bytes: int
    """At the peak, on one device."""
    note: str
    """How much of what, for a person."""


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of a training step on one device."""

    causes: tuple[Cause, ...]
    """What it is made of, in the order of the drawing above."""
    limit_bytes: int
    """What the device has for it."""

    @property
    def peak_bytes(self) -> int:
        """All causes together."""
        return sum(cause.num_bytes for cause in self.causes)

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.peak_bytes <= self.limit_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        causes = [asdict(cause) for cause in self.causes]
        totals = {"peak_bytes": self.peak_bytes, "limit_bytes": self.limit_bytes, "fits": self.fits}
        return {**totals, "causes": causes}


def plan_step(profile: ModelProfile, work: Workload, hardware: Hardware) -> MemoryPlan:
    """The memory of one training step of a model with this profile, or of reading its base, where that takes more."""
    traits = memory_traits(hardware.kind, choose_mapped_bytes(hardware.kind, _dtype_of(profile), work.checkpointing))
    causes = (
        *_standing(profile, work, hardware),
        *_passing(profile, work, hardware, traits),
        Cause("libraries", traits.library_bytes, "what importing torch, transformers and the rest takes"),
        Cause("runtime", traits.runtime_bytes, "kernels, workspaces and code that the first step brings in"),
    )
    limit = int(hardware.memory_bytes * traits.usable_share)
    plans = [MemoryPlan(tuple(cause for cause in causes if cause.num_bytes > 0), limit)]
    if hardware.sharding == "zero3" and _bits_per_weight(work.quantization, profile.dtype_bytes) < 16:
        plans.append(MemoryPlan(tuple(_reading(profile, work, causes[-2:])), limit))
    return max(plans, key=lambda plan: plan.peak_bytes)


def _reading(profile: ModelProfile, work: Workload, always: tuple[Cause, ...]) -> Iterator[Cause]:
    """A quantised base while it is read under ZeRO-3: transformers shards it only afterwards."""
    bits = _bits_per_weight(work.quantization, profile.dtype_bytes)
    note = f"{count(profile.linear_parameters)} × {bits:.2f} bit, whole on each device until all is read"
    yield Cause("base, linear layers", int(profile.linear_parameters * bits / 8), note)
    note = f"{count(profile.other_parameters)} × {8 * profile.dtype_bytes} bit, whole"
    yield Cause("base, embeddings and head", profile.other_parameters * profile.dtype_bytes, note)
    yield from always


def count(parameters: int) -> str:
    """A number of parameters in words."""
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _standing(profile: ModelProfile, work: Workload, hardware: Hardware) -> Iterator[Cause]:
    """What is there all the time: weights, adapter, optimizer, and gradients where batches accumulate."""
    bits = _bits_per_weight(work.quantization, profile.dtype_bytes)
    whole = 1 / _ranks(hardware, from_stage=3)
    shares = f", 1/{hardware.num_devices} of it" if whole < 1 else ""
    where = 0 if "parameters" in hardware.offload else 1
    linear = int(profile.linear_parameters * bits / 8 * whole) * where
    note = f"{count(profile.linear_parameters)} × {bits:.2f} bit{shares}{_say_unknown(work.quantization)}"
    yield Cause("base, linear layers", linear, note)
    mapped_share = 1 - memory_traits(hardware.kind).embedding_share
    is_mapped = bits < 8 or profile.dtype_bytes == 2  # files hold 16 bit, the quantised cache what is computed in
    unread = int(profile.embedding_parameters * mapped_share * is_mapped)
    other = int((profile.other_parameters - unread) * profile.dtype_bytes * whole) * where
    note = f"{count(profile.other_parameters - unread)} × {8 * profile.dtype_bytes} bit{shares}"
    yield Cause("base, embeddings and head", other, note)
    unpacked = profile.dtype_bytes * profile.adapted_parameters
    has_room = can_keep_unpacked(unpacked, work.checkpointing, hardware.memory_bytes)
    if bits < 8 and hardware.kind == "cpu" and whole == 1 and has_room:
        note = f"4-bit weights once more in {8 * profile.dtype_bytes} bit, as memory allows it"
        yield Cause("base, unpacked", unpacked, note)
    trained = profile.trained_parameters
    yield Cause("adapter", int(trained * ADAPTER_BYTES * whole), f"{count(trained)} × 32 bit")
    if "optimizer" not in hardware.offload:
        size = next((size for word, size in OPTIMIZER_BYTES.items() if word in work.optimizer), 8)
        state = int(trained * size / _ranks(hardware, from_stage=1))
        yield Cause("optimizer", state, f"{work.optimizer}: {size} bytes a trained parameter")
    gradients = int(trained * ADAPTER_BYTES / _ranks(hardware, from_stage=2))
    is_replicated = hardware.num_devices > 1 and hardware.sharding == "none"
    yield Cause("gradients", gradients * (1 + is_replicated), "32 bit" + (", and DDP's buckets" * is_replicated))


def _passing(profile: ModelProfile, work: Workload, hardware: Hardware, traits: MemoryTraits) -> Iterator[Cause]:
    """What comes and goes within a step, as it stands where the backward pass begins."""
    tokens, number = work.num_tokens, profile.dtype_bytes
    attention = _attention_bytes(profile, work, hardware)
    layers = [size * tokens + attention for size in profile.layer_bytes]
    outer = profile.outer_bytes * tokens + profile.fixed_bytes
    if work.checkpointing:
        inputs = len(layers) * profile.hidden_size * number * tokens
        yield Cause("activations", outer + inputs, f"inputs of {len(layers)} layers for {tokens:,} tokens")
        yield Cause("one layer, computed again", max(layers), "gradient checkpointing")
        kept = outer + inputs + max(layers)
    else:
        yield Cause("activations", outer + sum(layers), f"{len(layers)} layers for {tokens:,} tokens")
        kept = outer + sum(layers)
    wide = int(traits.wide_tensors * number * (profile.hidden_size + profile.widest) * tokens)
    yield Cause("gradients on their way", wide, "tensors as wide as a layer that its backward pass makes and drops")
    states = 2 * tokens * profile.hidden_size * number
    if profile.scores_all:
        logits, scored = 3 * FLOAT_BYTES * tokens * profile.vocab_size, "logits of all positions, thrice"
    else:
        logits = int(traits.logits_copies * count_logits_bytes(hardware.kind, tokens, profile.vocab_size, number))
        scored = "a chunk of logits"
    yield Cause("loss", logits + states, f"{scored}, states and their gradients")
    if _bits_per_weight(work.quantization, number) < 8:
        yield Cause("one matrix, unpacked", profile.largest_matrix * number, "from 4 bit, for one product")
    if _ranks(hardware, from_stage=3) > 1:
        yield Cause("layers, gathered", 2 * profile.layer_parameters * number, "this one and the next, whole")
    yield Cause("allocator", int(kept * traits.slack_share), "gaps between pieces that were given back")


def _attention_bytes(profile: ModelProfile, work: Workload, hardware: Hardware) -> int:
    """What a layer keeps of attention probabilities, where they are made: in matrix products on a CPU, or by `eager`.

    `eager` keeps those of every pair of tokens, in 32 bit as softmax makes them and twice as they are multiplied.
    """
    if work.attention == "eager":
        return work.num_tokens * profile.num_heads * work.length * (4 + 2 * profile.dtype_bytes)
    if work.length > 1024 or not prefers_matmul_attention(hardware.kind, _dtype_of(profile)):
        return 0
    return int(work.num_tokens * profile.num_heads * (work.length / 2 + 64) * profile.dtype_bytes)


def _dtype_of(profile: ModelProfile) -> str:
    return {2: "torch.bfloat16", 4: "torch.float32"}[profile.dtype_bytes]


def _bits_per_weight(quantization: dict[str, Any] | None, dtype_bytes: int) -> float:
    """Bits of a quantised weight with its share of the scales.

    A scale of 32 bit a block of 64 weights; double quantisation makes it 8 bit, and adds 32 bit for 256 of them.
    Source: Dettmers et al. 2023, "QLoRA", section 3: 0.5 bit a weight becomes 0.127.
    """
    if not quantization:
        return 8.0 * dtype_bytes
    if quantization.get("load_in_8bit") or quantization.get("quant_method") == "fp8":
        return 8.0
    if "bits" in quantization:  # GPTQ, AWQ and their kind: a scale of 16 bit for each group, or for a whole row (-1)
        group_size = quantization.get("group_size") or -1
        return quantization["bits"] + (16 / group_size if group_size > 0 else 0)
    if not quantization.get("load_in_4bit"):
        return 8.0 * dtype_bytes
    if quantization.get("bnb_4bit_use_double_quant"):
        return 4 + 8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * 256)
    return 4 + 32 / BLOCK_SIZE


def _say_unknown(quantization: dict[str, Any] | None) -> str:
    """A warning where weights are stored in a way whose size is not known; they are counted as if they were plain."""
    fields = quantization or {}
    is_counted = "bits" in fields or fields.get("quant_method", "bitsandbytes") in ("bitsandbytes", "fp8")
    return "" if is_counted else f", at most: the plan does not know the size of {fields['quant_method']} weights"


def _ranks(hardware: Hardware, from_stage: int) -> int:
    """Ranks that share what ZeRO shards from this stage on."""
    return hardware.num_devices if STAGES[hardware.sharding] >= from_stage else 1
