"""LoRA and its variants on a base: `attach_adapter` alone makes the PeftModel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.model.load import CLASSIFIER_HEADS
from lora_ft.recipe import check_buildable, library_part
from lora_ft.sections import Task

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

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
        UserError: PEFT refuses the settings, they cannot work on this base, or nothing would be trained.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    if task == "classification":
        _draw_head(model)
    if adapter is not None:
        model = _load_trainable(model, Path(adapter))
    else:
        fields = library_part(lora)
        raise_faults(_impossible(model, fields))
        loftq = fields.get("init_lora_weights") == "loftq" and _is_quantised(model)
        if loftq:  # PEFT's own LoftQ wants an unquantised base in memory; below, tensor by tensor from the files
            fields = {**fields, "init_lora_weights": True}
        config = check_buildable("lora", LoraConfig, {**fields, "task_type": TASK_TYPES[task]}, "recipe")
        model = call_peft(get_peft_model, model, config)
        if _rewrites_base(fields):
            _remember_start(model)
        if loftq:
            _start_from_loftq(model, base_folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    _widen_head_input(model)
    if count_trainable(model) == 0:
        raise UserError("lora", None, "No parameter would be trained.", "Check lora.target_modules.")
    return model


def count_trainable(model: Any) -> int:
    """Number of parameters that training changes; shards of ZeRO-3 count whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def load_weights(model: PeftModel, folder: Path) -> None:
    """Sets the adapter's weights to those that lie in `folder`.

    Raises:
        UserError: they are those of an adapter of another shape.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    fix = "Use the lora section they were trained with, or give --fresh."
    try:
        result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
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
        if ".lora_A." in key:
            joined[key] = torch.cat([tensors[key], first]).contiguous()
        elif ".lora_B." in key:
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


def _rewrites_base(lora: dict[str, Any]) -> bool:
    start = lora.get("init_lora_weights", True)
    return isinstance(start, str) and start.partition("_")[0] in {"pissa", "olora", "corda"}


def _draw_head(model: PreTrainedModel) -> None:
    """Draws a classifier's head anew, so that it follows from the seed and not from what was read before it."""
    for name in CLASSIFIER_HEADS:
        head = getattr(model, name, None)
        for parameter in head.parameters() if head is not None else ():
            if parameter.ndim > 1:
                parameter.data.normal_(std=HEAD_STD)
            else:
                parameter.data.zero_()


def _widen_head_input(model: PeftModel) -> None:
    """Gives a trained head, which is float32, what a base in 16 bit hands to it; PEFT does so for LoRA layers alone."""
    for name, module in model.named_modules():
        owner, _, kept = name.rpartition(".modules_to_save.")
        if kept and "." not in kept and owner.rpartition(".")[2] in CLASSIFIER_HEADS:
            module.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(next(head.parameters()).dtype),))


def _remember_start(model: PeftModel) -> None:
    """Keeps a copy of A0 and B0 on the model, for `on_original_base`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    setattr(model, START, {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()})


def _load_trainable(model: PreTrainedModel, folder: Path) -> PeftModel:
    """An adapter from disk, to be trained on; `is_trainable` is PEFT's switch, off by default (trl#3926)."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        rule = "The folder holds no adapter_model.safetensors; pickled adapters can run code and are not read."
        raise UserError("model.adapter", str(folder), rule, "Name the adapter/ folder of a run.")
    return call_peft(PeftModel.from_pretrained, model, folder, is_trainable=True)


def call_peft(function: Any, model: Any, *arguments: Any, **options: Any) -> Any:
    """What a function of PEFT makes of the model; what PEFT refuses is the user's to change."""
    try:
        with warnings.catch_warnings():
            if model.get_output_embeddings() is None:  # PEFT warns of a tie to an output layer that is not there
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            return function(model, *arguments, **options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as fault:
        rule = f"PEFT cannot attach this adapter: {str(fault).strip()}"
        raise UserError("lora", None, rule, "Change the setting it names.") from fault


def _is_quantised(model: Any) -> bool:
    return getattr(model, "quantization_method", None) is not None


def _impossible(model: Any, lora: dict[str, Any]) -> Iterator[Fault]:
    """Starts that read or rewrite the base's weights, where those are not there to be read."""
    start = lora.get("init_lora_weights", True)
    if _rewrites_base(lora) and _is_quantised(model):
        rule = "It decomposes the base's weights, and quantised ones cannot be decomposed."
        yield Fault("lora.init_lora_weights", start, rule, "Write loftq, or leave the section quantization out.")
    if start == "loftq" and not _is_quantised(model):
        rule = "LoftQ makes up for the error of quantisation, and the base is not quantised."
        yield Fault("lora.init_lora_weights", start, rule, "Add quantization: {load_in_4bit: true}, or write pissa.")
    if start == "eva":
        rule = "EVA needs a pass over the data before training, which is not done here."
        yield Fault("lora.init_lora_weights", start, rule, "Write true, pissa or olora.")


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
