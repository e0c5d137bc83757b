"""What a model holds per parameter and per token, counted on the meta device: no weight is read, none is made.

What the backward pass needs is counted, not guessed: the model's own forward is run on tensors that have a shape and
no memory, and what autograd keeps of it is added up. A new architecture, a rank pattern or DoRA needs no change here.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from lora_ft.errors import raise_faults
from lora_ft.model.adapter import TASK_TYPES, call_peft
from lora_ft.model.adapter_faults import find_idle, find_impossible
from lora_ft.model.load import AUTO_CLASSES, CLASSIFIER_HEADS
from lora_ft.recipe import check_buildable
from lora_ft.recipe_rules import library_part
from lora_ft.sections import Task

PROBES = (64, 128)
"""Tokens of the two forward passes that are counted; between them lies what grows with tokens, and what does not."""
POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")
"""What architectures call the table of learned positions."""
ATTENTION_FLAGS = {"flash_attention_2": "_supports_flash_attn", "sdpa": "_supports_sdpa"}
"""Attention → the flag of a class in transformers that has it."""


@dataclass(frozen=True)
class ModelProfile:
    """A base with an adapter, per parameter and per token."""

    linear_parameters: int
    """Parameters of the matrices that bitsandbytes quantises."""
    largest_matrix: int
    """Parameters of the largest of them."""
    other_parameters: int
    """Embeddings, head, norms, biases: what is never quantised."""
    embedding_parameters: int
    """Those of them in a table of which a step reads only the rows of its tokens; none where the head is tied to it."""
    trained_parameters: int
    """Parameters of the adapter, and of modules trained whole."""
    rank_parameters: int
    """Those of them that are as many as the adapter's rank is high."""
    adapted_parameters: int
    """Parameters of the matrices that get LoRA."""
    layer_parameters: int
    """Parameters of the largest layer: what ZeRO-3 and FSDP gather at once."""
    layer_bytes: tuple[int, ...]
    """What autograd keeps of each layer, in bytes a token."""
    outer_bytes: int
    """What it keeps outside of layers, in bytes a token."""
    fixed_bytes: int
    """What it keeps however few tokens there are: weights that PEFT adds the product of A and B to, as with experts."""
    hidden_size: int
    """D."""
    widest: int
    """Largest number of inputs or outputs of a matrix in a layer."""
    vocab_size: int
    """V."""
    num_heads: int
    """Heads of attention."""
    dtype_bytes: int
    """Bytes of a number in the forward pass."""
    attentions: tuple[str, ...]
    """Attentions of transformers that the architecture has, the fastest first."""
    scores_all: bool
    """Whether every position of an answer is scored at once, as an encoder-decoder's are here."""
    positions: int | None
    """Tokens that a row can have where positions are learned, as GPT-2's are; None where they are computed."""


def profile_model(
    config: Any,
    dtype: str,
    lora: dict[str, Any],
    skip_modules: tuple[str, ...] = (),
    task: Task = "sft",
    trust_remote_code: bool = False,
    is_fused: bool = False,
) -> ModelProfile:
    """The profile of a model of this config for a task with an adapter, computing in `dtype`.

    `is_fused` is whether its layers go the short way of `model.fused_layers`, as where `prefers_fused_layers` says so.

    An encoder-decoder is given as many tokens on either side, which is the most that both can have.

    `skip_modules` are those that `llm_int8_skip_modules` keeps from quantisation.

    Raises:
        ValueError: the architecture has no model for the task.
    """
    import torch

    count = partial(_count, config, getattr(torch, dtype), lora, skip_modules, task, trust_remote_code, is_fused)
    try:
        return count("profile")
    except (KeyError, AttributeError, RuntimeError):
        return count("eager")  # some know attentions by name, and only those, or make masks of their own


def _count(
    config: Any,
    dtype: Any,
    lora: dict[str, Any],
    skip_modules: tuple[str, ...],
    task: Task,
    trust_remote_code: bool,
    is_fused: bool,
    attention: str,
) -> ModelProfile:
    import torch

    from lora_ft.model.fused_layers import fused_layers

    with torch.device("meta"):
        model = _build_on_meta(config, dtype, task, trust_remote_code, attention)
        matrices = _find_matrices(model, skip_modules)
        sizes = [weight.numel() for weight in matrices]
        total = sum(parameter.numel() for parameter in model.parameters())
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        table = 0 if head is not None and head.weight is embeddings else embeddings.numel()
        layers = _find_layers(model)
        layer_parameters = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        tuned = _attach_on_meta(model, lora, task)
        with fused_layers(tuned) if is_fused else nullcontext():
            few, many = (_count_kept(tuned, layers, count) for count in PROBES)
    slope = {key: (many[key] - few[key]) // (PROBES[1] - PROBES[0]) for key in many}
    text = config.get_text_config()
    return ModelProfile(
        linear_parameters=sum(sizes),
        largest_matrix=max(sizes),
        other_parameters=total - sum(sizes),
        embedding_parameters=table,
        trained_parameters=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        rank_parameters=sum(p.numel() for name, p in tuned.named_parameters() if ".lora_" in name),
        adapted_parameters=sum(layer.get_base_layer().weight.numel() for layer in _find_adapted(tuned)),
        layer_parameters=layer_parameters,
        layer_bytes=tuple(slope.get(index, 0) for index in range(len(layers))),
        outer_bytes=slope.get(None, 0),
        fixed_bytes=sum(few[key] - slope[key] * PROBES[0] for key in many),
        hidden_size=text.hidden_size,
        widest=max(max(weight.shape) for weight in matrices),
        vocab_size=text.vocab_size,
        num_heads=text.num_attention_heads,
        dtype_bytes=dtype.itemsize,
        attentions=(*(name for name, flag in ATTENTION_FLAGS.items() if getattr(model, flag)), "eager"),
        scores_all=task == "seq2seq",
        positions=count_positions(model),
    )


def count_positions(model: Any) -> int | None:
    """Tokens that a row can have where positions are learned, as GPT-2's are; None where they are computed.

    Some tables of positions start behind those of padding.
    """
    import torch

    places = []
    for name, module in model.named_modules():
        is_table = not set(POSITION_TABLES).isdisjoint(name.split("."))  # an adapter may wrap it
        if is_table and isinstance(module, torch.nn.Embedding):
            taken = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            places.append(module.num_embeddings - taken)
    return min(places, default=None)


def _build_on_meta(config: Any, dtype: Any, task: Task, trust_remote_code: bool, attention: str) -> Any:
    import transformers
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register("profile", _attend)
    ALL_EXPERTS_FUNCTIONS.register("profile", _run_experts)
    options = {"dtype": dtype, "attn_implementation": attention, "experts_implementation": "profile"}
    config = copy.deepcopy(config)  # which is given the names of these
    if task == "sft":
        config.get_text_config().pad_token_id = None  # or some would look for it among tokens that have no value
    build = getattr(transformers, AUTO_CLASSES[task]).from_config
    model = build(config, trust_remote_code=trust_remote_code, **options)
    return model.requires_grad_(False)


def _find_matrices(model: Any, skip_modules: tuple[str, ...]) -> list[Any]:
    """The weights that bitsandbytes quantises: those of linear layers, but for the head and what is tied to it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and name.partition(".")[0] not in CLASSIFIER_HEADS
        and not any(s in name for s in skip_modules)
    ]


def _attach_on_meta(model: Any, lora: dict[str, Any], task: Task) -> Any:
    """The model with the adapter, all in the type the model computes in, as autocast has it."""
    from peft import LoraConfig, get_peft_model

    asked = library_part(lora)
    known = {key: value for key, value in asked.items() if value != "loftq"}  # it wants a base that was quantised
    raise_faults(find_impossible(model, known))
    fields = {key: value for key, value in asked.items() if key != "init_lora_weights"}
    config = check_buildable("lora", LoraConfig, {**fields, "task_type": TASK_TYPES[task]}, "recipe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say, it says of the model that is trained
        tuned = call_peft(get_peft_model, model, config, autocast_adapter_dtype=False)
        raise_faults(find_idle(tuned, fields))
    for parameter in tuned.parameters():
        parameter.data = parameter.data.to(model.dtype)
    return tuned.train()


def _find_adapted(tuned: Any) -> list[Any]:
    """The linear layers that have LoRA beside them."""
    from peft.tuners.lora import Linear

    return [module for module in tuned.modules() if isinstance(module, Linear)]


def _find_layers(model: Any) -> list[Any]:
    """The layers that gradient checkpointing computes again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] or [model]


def _count_kept(tuned: Any, layers: list[Any], num_tokens: int) -> Counter[int | None]:
    """Bytes that autograd keeps of a forward pass over `num_tokens` tokens, by number of the layer; None outside."""
    import torch

    kept: Counter[int | None] = Counter()
    own = {tensor.untyped_storage()._cdata for tensor in (*tuned.parameters(), *tuned.buffers())}
    alive: list[torch.Tensor] = []
    inside: list[int | None] = [None]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # neither a weight nor something counted before
            own.add(storage._cdata)
            kept[inside[0]] += storage.nbytes()
        alive.append(tensor)
        return tensor

    counted = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _watched(layers, inside), _no_autocast(), counted:
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        sides = {"decoder_input_ids": ids} if tuned.config.is_encoder_decoder else {}
        if tuned.config._attn_implementation == "eager":
            sides["attention_mask"] = torch.ones_like(ids)  # without one, it is looked for documents in positions
        tuned.get_base_model().base_model(input_ids=ids, use_cache=False, **sides)
    return kept


@contextmanager
def _watched(layers: list[Any], inside: list[int | None]) -> Iterator[None]:
    """`inside[0]` is the number of the layer that is running."""
    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: inside.__setitem__(0, index)))
        hooks.append(layer.register_forward_hook(lambda *_: inside.__setitem__(0, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Autocast that does nothing: the meta device has none, and PEFT switches it off around the weights of experts."""
    import torch

    autocast = torch.autocast
    torch.autocast = lambda *_, **__: nullcontext()
    try:
        yield
    finally:
        torch.autocast = autocast


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
    """Attention that keeps what a fused kernel keeps: queries, keys, values and its output, no probabilities."""
    return _fused_attention().apply(query, key, value), None


def _run_experts(experts: Any, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """A mixture that keeps what transformers' grouped products keep; which expert a token goes to does not matter."""
    chosen = hidden.repeat_interleave(top_k_index.shape[-1], dim=0)
    first, last = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[0], experts.down_proj[0]
    wide = chosen @ (first if experts.is_transposed else first.t())
    wide = experts._apply_gate(wide) if experts.has_gate else experts.act_fn(wide)
    out = (wide @ (last if experts.is_transposed else last.t())) * top_k_weights.reshape(-1, 1).to(hidden.dtype)
    return out.view(len(hidden), -1, hidden.shape[-1]).sum(dim=1)


@cache
def _fused_attention() -> Any:
    import torch

    class FusedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out = torch.empty_like(query.transpose(1, 2)[..., : value.shape[-1]])
            ctx.save_for_backward(query, key, value, out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise AssertionError("a profile has no backward pass")

    return FusedAttention
