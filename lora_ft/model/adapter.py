"""LoRA and its variants on a base: `attach_adapter` alone makes the PeftModel."""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import UserError, raise_faults
from lora_ft.fingerprint import read_json
from lora_ft.model.adapter_faults import find_idle, find_impossible, is_quantised, rewrites_base
from lora_ft.model.load import CLASSIFIER_HEADS, FLOATING_HEADS, refuse_repacked
from lora_ft.recipe import check_buildable
from lora_ft.recipe_rules import library_part
from lora_ft.sections import Task

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT calls the files of an adapter."""
START = "weights_taken_from_base"
"""Attribute of a PeftModel that holds the A0 and B0 its start took out of the base's weights."""

HEAD_STD = 0.02
"""Standard deviation of a new classifier head, as in most architectures."""
TASK_TYPES: dict[Task, str] = {"sft": "CAUSAL_LM", "classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
"""`data.task` → PEFT's task type. Without SEQ_CLS PEFT saves no classifier head."""


def attach_adapter(
    model: PreTrainedModel,
    lora: dict[str, Any] | None,
    *,
    task: Task = "sft",
    seed: int = 42,
    adapter: str | None = None,
    base_folder: Path | None = None,
) -> PeftModel:
    """The base with an adapter whose parameters train in float32: a new one, or `adapter` from disk going on.

    The seed is set right before the adapter is drawn, so the same seed gives the same adapter whatever ran before.
    Float32 because an update of 1e-5 to a bfloat16 weight of 0.1 is rounded away (trl#7268).

    Raises:
        UserError: PEFT refuses the settings, they cannot work on this base, nothing would be trained, or bitsandbytes
            has repacked the base's 4-bit weights.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    refuse_repacked(model)
    set_seed(seed)
    if task == "classification":
        _draw_head(model)
    if adapter is not None:
        model = _load_trainable(model, Path(adapter))
    else:
        fields = library_part(lora)
        raise_faults(find_impossible(model, fields))
        loftq = fields.get("init_lora_weights") == "loftq" and is_quantised(model)
        if loftq:  # PEFT's own LoftQ wants an unquantised base in memory; below, tensor by tensor from the files
            fields = {**fields, "init_lora_weights": True}
        config = check_buildable("lora", LoraConfig, {**fields, "task_type": TASK_TYPES[task]}, "recipe")
        model = call_peft(get_peft_model, model, config)
        raise_faults(find_idle(model, fields))
        if rewrites_base(fields):
            _remember_start(model)
        if loftq:
            _start_from_loftq(model, base_folder)
    _widen_trained(model)
    if count_trainable(model) == 0:
        raise UserError("lora", None, "No parameter would be trained.", "Check lora.target_modules.")
    return model


def count_trainable(model: Any) -> int:
    """Number of parameters that training changes; shards of ZeRO-3 count whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def read_lora(folder: Path) -> LoraConfig:
    """The config of the adapter in `folder`.

    Raises:
        UserError: PEFT cannot read it.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, AttributeError) as fault:
        rule = f"PEFT cannot read it ({fault})."
        raise UserError(str(folder / CONFIG_NAME), None, rule, "Copy the adapter again.") from fault


def load_weights(model: PeftModel, folder: Path) -> None:
    """Sets the adapter's weights to those that lie in `folder`.

    Raises:
        UserError: they are those of an adapter of another shape, or of one on a base that its start had rewritten.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    fix = "Use the lora section they were trained with, or give --fresh."
    wanted = model.active_peft_config.init_lora_weights
    start = read_json(folder / CONFIG_NAME, fix).get("init_lora_weights", True)
    if start != wanted and any(rewrites_base({"init_lora_weights": each}) for each in (start, wanted)):
        rule = f"They fit the weights that init_lora_weights: {start} leaves in the base, and not those of {wanted}."
        other = "Name them as model.adapter, without the section lora," if start is True else f"Write {start},"
        raise UserError("lora.init_lora_weights", str(folder), rule, f"{other} or give --fresh.")
    try:
        result = set_peft_model_state_dict(model, load_file(folder / TENSORS_NAME))
    except RuntimeError as fault:  # torch's word for tensors of another shape
        rule = f"These weights do not fit this adapter: {str(fault).strip().splitlines()[-1].strip()}."
        raise UserError("lora", str(folder), rule, fix) from None
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        rule = f"These weights do not fit this adapter: {(missing or result.unexpected_keys)[0]} has no counterpart."
        raise UserError("lora", str(folder), rule, fix)


def on_original_base(
    model: PeftModel, tensors: dict[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and config of an adapter as they are on the base's own weights, whatever its start did to them.

    PiSSA and OLoRA take their first A0 and B0 out of the base: W becomes W - s·B0·A0. On the W that everybody else has,
    the trained adapter is s·(B·A - B0·A0), a plain LoRA of twice the rank. Saving A and B alone, as PEFT does unless
    told otherwise, gives an adapter that no stock base fits.

        A'  A       B'  B | -B0       r' = 2r
            A0

    Source: Meng et al. 2024, "PiSSA", section 4 and appendix C.
    """
    import torch

    start: dict[str, Tensor] | None = getattr(model, START, None)
    if start is None:
        return tensors, config
    joined = dict(tensors)
    for key, first in start.items():
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            joined[key] = torch.cat([tensors[key], first]).contiguous()
        elif ".lora_B." in key or key.endswith(".lora_embedding_B"):
            joined[key] = torch.cat([tensors[key], -first], dim=1).contiguous()
    growth = 2**0.5 if config.use_rslora else 2  # keeps alpha / r, or alpha / √r, as it was
    config = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: growth * alpha for name, alpha in config.alpha_pattern.items()},
    )
    return joined, config


def _draw_head(model: PreTrainedModel) -> None:
    """Draws a classifier's head anew, so that it follows from the seed and not from what was read before it."""
    for name in CLASSIFIER_HEADS:
        head = getattr(model, name, None)
        parameters = list(head.parameters()) if head is not None else []
        with _whole(parameters):
            for parameter in parameters:
                if parameter.ndim > 1:
                    parameter.data.normal_(std=HEAD_STD)
                else:
                    parameter.data.zero_()


def _whole(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Within it, parameters are whole on every rank; ZeRO-3 shares out afterwards what the first rank made of them."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _widen_trained(model: PeftModel) -> None:
    """Makes all that is trained float32 where the base computes in 16 bit; PEFT does so for LoRA layers alone.

    A module that is trained whole computes in float32, between a cast of what it gets and one of what it gives. A
    bias is cast whenever its layer, whose weight stays as it is, is called.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    copies = {part for wrapper in wrappers.values() for part in wrapper.modules_to_save.modules()}
    for name, wrapper in wrappers.items():
        _bridge_types(wrapper, keeps_output=name.rpartition(".")[2] in FLOATING_HEADS)
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        dtypes = {name: p.dtype for name, p in own if p.requires_grad and p.dtype != torch.float32}
        if dtypes and module not in copies:
            module.forward = _CastAtUse(module, dtypes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
            if hasattr(parameter, "ds_id"):  # ZeRO-3 keeps this rank's part of a weight of the base elsewhere
                parameter.ds_tensor.data = parameter.ds_tensor.data.to(torch.float32)


def _bridge_types(wrapper: Any, keeps_output: bool) -> None:
    """Casts what trained copies of a module get to their type, and what they give to that of the module itself.

    Logits of a head may stay float32: nothing of the base comes after them.
    """
    from accelerate.utils.operations import recursively_apply

    def cast(values: Any, dtype: torch.dtype) -> Any:
        return recursively_apply(lambda tensor: tensor.to(dtype), values, test_type=_is_floating)

    narrow = next((p.dtype for p in wrapper.original_module.parameters() if _is_floating(p)), None)
    for trained in wrapper.modules_to_save.values():
        trained.register_forward_pre_hook(
            lambda module, args, kwargs: cast((args, kwargs), next(module.parameters()).dtype), with_kwargs=True
        )
        if narrow is not None and not keeps_output:
            trained.register_forward_hook(lambda module, args, output: cast(output, narrow))


def _is_floating(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


class _CastAtUse:
    """The forward of a layer some of whose parameters are held in float32, and seen by it in the type of the others.

    The gradient reaches the float32 ones. bitsandbytes would otherwise narrow a bias for good when it is called.
    """

    def __init__(self, layer: nn.Module, dtypes: dict[str, torch.dtype]):
        self._layer, self._dtypes, self._forward = layer, dtypes, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held: dict[str, Any] = self._layer._parameters
        wide = {name: held[name] for name in self._dtypes}
        try:
            held.update({name: parameter.to(self._dtypes[name]) for name, parameter in wide.items()})
            return self._forward(*args, **kwargs)
        finally:
            held.update(wide)


def _remember_start(model: PeftModel) -> None:
    """Keeps a copy of A0 and B0 on the model, for `on_original_base`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    setattr(model, START, {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()})


def _load_trainable(model: PreTrainedModel, folder: Path) -> PeftModel:
    """An adapter from disk, to be trained on; `is_trainable` is PEFT's switch, off by default (trl#3926)."""
    from peft import PeftModel

    if not (folder / TENSORS_NAME).is_file():
        rule = f"The folder holds no {TENSORS_NAME}; pickled adapters can run code and are not read."
        raise UserError("model.adapter", str(folder), rule, "Name the adapter/ folder of a run.")
    return call_peft(PeftModel.from_pretrained, model, folder, is_trainable=True)


def call_peft(function: Any, model: Any, *arguments: Any, **options: Any) -> Any:
    """What a function of PEFT makes of the model; what PEFT refuses is the user's to change."""
    arguments = copy.deepcopy(arguments)  # PEFT writes into the lists of a config, which are those of the recipe
    try:
        with warnings.catch_warnings():
            if model.get_output_embeddings() is None:  # PEFT warns of a tie to an output layer that is not there
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            return function(model, *arguments, **options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, re.error) as fault:
        rule = f"PEFT cannot attach this adapter: {str(fault).strip()}"
        raise UserError("lora", None, rule, "Change the setting it names.") from fault


def _start_from_loftq(model: PeftModel, base_folder: Path | None) -> None:
    """A and B set to the best rank-r fit of what quantisation lost, W - dequantise(quantise(W)), layer by layer.

    The quantised weights stay as they are, so the adapter fits any 4-bit load of the base: one step of LoftQ, as PEFT's
    `replace_lora_weights_loftq` does it, which wants a GPU and a base in one file.

    Raises:
        UserError: a weight that was quantised is not in the base's files under its own name.
    Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization", section 3.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    assert base_folder is not None, "LoftQ reads the base's files"
    where: dict[str, Path] = {}
    for file in sorted(base_folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            where |= dict.fromkeys(weights.keys(), file)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), Linear4bit):
            continue
        if (key := f"{name}.weight") not in where:
            rule = f"LoftQ compares with the original weights, and {key} is not in the base's files."
            raise UserError("lora.init_lora_weights", "loftq", rule, "Write true.")
        with safe_open(where[key], "pt") as weights:
            original = weights.get_tensor(key)
        quantised = layer.get_base_layer().weight
        lost = original.to(quantised.device).float() - dequantize_4bit(quantised.data, quantised.quant_state).float()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        rank, scaling = layer.r["default"], layer.scaling["default"]
        root = (s[:rank] / scaling).sqrt()
        layer.lora_A["default"].weight.data = (root[:, None] * vh[:rank]).contiguous()
        layer.lora_B["default"].weight.data = (u[:, :rank] * root).contiguous()
