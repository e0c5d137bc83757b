"""The one place that writes adapters."""

from __future__ import annotations

import copy
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.errors import RunFailed
from lora_ft.export.adapter import TENSORS_NAME
from lora_ft.export.card import adapter_facts, render_card
from lora_ft.export.companions import save_companions
from lora_ft.export.manifest import AdapterManifest, Arithmetic, Sample, write_manifest
from lora_ft.export.samples import record_samples
from lora_ft.export.skeleton import CLASSIFIER_TASKS
from lora_ft.fingerprint import BaseIdentity, hash_folder, hash_tensors, whole_folder
from lora_ft.model.adapter import on_original_base
from lora_ft.model.load import use_safe_4bit_kernels

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORDED_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "lora_ft")


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    base: BaseIdentity,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    samples: Sequence[Sequence[int]] = (),
    recorded: Sequence[Sample] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> AdapterManifest:
    """The adapter of `model` in `folder`, whole or not at all, with what is needed to know it again.

    Written are the tensors and config as stock PEFT reads them, the tokenizer with its chat template, a generation
    config that stops where answers ended in training, a card, and `lora_ft.json` with hashes and the model's answers
    to `samples` (prompts of token ids).

    Args:
        state_dict: the gathered weights, where `model` holds only shards of them (ZeRO-3, FSDP).
        recorded: the answers, where all ranks had to take part in giving them; `samples` is not asked then.
        template_kwargs: variables of the chat template in training, which the saved template sets by itself.

    Raises:
        RunFailed: a tensor is empty or not finite, or the whole adapter has no effect; nothing is written then.
    """
    from safetensors.torch import save_file

    use_safe_4bit_kernels(model)
    name = model.active_adapter
    tensors = adapter_tensors(model, name, base, state_dict)
    tensors, config = on_original_base(model, tensors, model.peft_config[name])
    refuse_broken(tensors, folder)
    with whole_folder(folder) as draft:
        save_file(tensors, draft / TENSORS_NAME, metadata={"format": "pt"})
        save_config(model, config, base, draft)
        save_companions(model, tokenizer, draft, template_kwargs or {})
        answers = record_samples(model, samples) if recorded is None else tuple(recorded)
        manifest = describe_adapter(model, base, draft, idle_modules(tensors), answers)
        card = render_card(adapter_facts(manifest, folder.resolve().name))
        (draft / "README.md").write_text(card, encoding="utf-8")
        write_manifest(manifest, draft)
    return manifest


def adapter_tensors(
    model: PeftModel, name: str, base: BaseIdentity, state_dict: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's keys, each with memory of its own, on the CPU.

    Whole embeddings come along only if the vocabulary was enlarged. PEFT's own rule asks the Hub for the base's
    config, and stores a full unchanged embedding matrix beside every LoRA on embeddings.
    """
    from peft import get_peft_model_state_dict

    enlarged = num_embeddings(model) != base_embeddings(model, base)
    state = get_peft_model_state_dict(
        model,
        state_dict=None if state_dict is None else dict(state_dict),
        adapter_name=name,
        save_embedding_layers=enlarged,
    )
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}


def base_embeddings(model: PeftModel, base: BaseIdentity) -> int:
    """Rows of the base's own embeddings, as its config on disk says."""
    config = type(model.get_base_model().config).from_pretrained(str(base.folder))
    return int(config.get_text_config().vocab_size)


def num_embeddings(model: PeftModel) -> int:
    """Rows of the input embeddings, counted on the base below the adapter, also where ZeRO-3 holds only a shard."""
    weight = model.get_base_model().get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def refuse_broken(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Nothing if the tensors can be an adapter.

    Raises:
        RunFailed: there are none, some are empty or not finite, or all updates are zero.
    """
    place = str(folder / TENSORS_NAME)
    empty = [key for key, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        rule = "The weights were not gathered from the ranks that hold them, so the adapter would be empty (peft#1443)."
        raise RunFailed(
            place,
            listing(empty),
            rule,
            "Pass the gathered state dict, or train without ZeRO-3 sharding of the adapter.",
        )
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        rule = "Weights must be finite; training has diverged."
        raise RunFailed(
            place, listing(broken), rule, "Resume from the last good checkpoint with a lower learning rate."
        )
    updates = [key for key in tensors if is_update(key)]
    if len(idle_modules(tensors)) == len(updates) and all(".lora_" in key for key in tensors):
        rule = "Every lora_B is zero: the adapter changes nothing, as no gradient reached it."
        raise RunFailed(
            place,
            f"{len(updates)} modules",
            rule,
            "Check that the adapter is trainable and the learning rate is not zero.",
        )


def is_update(key: str) -> bool:
    """Whether `key` is the factor of an update that training starts at zero."""
    return key.endswith(("lora_B.weight", "lora_embedding_A"))


def idle_modules(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Modules whose LoRA update is exactly zero, because that factor of it is."""
    return tuple(key.rsplit(".lora_", 1)[0] for key, tensor in tensors.items() if is_update(key) and not tensor.any())


def listing(keys: Sequence[str]) -> str | None:
    """The first keys, and how many more there are."""
    return None if not keys else keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def save_config(model: PeftModel, config: LoraConfig, base: BaseIdentity, folder: Path) -> None:
    """adapter_config.json, with the base pinned, as stock PEFT reads it."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base.loadable_name
    config.revision = base.revision
    config.inference_mode = True
    mapping = None
    if config.task_type is None:
        base_class = type(model.get_base_model())
        mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)


def describe_adapter(
    model: PeftModel,
    base: BaseIdentity,
    folder: Path,
    idle: tuple[str, ...],
    answers: tuple[Sample, ...],
) -> AdapterManifest:
    """The manifest of an adapter whose files lie in `folder`."""
    base_model = model.get_base_model()
    files = hash_folder(folder)
    del files[TENSORS_NAME]
    return AdapterManifest(
        base=base.name,
        revision=base.revision,
        base_fingerprint=base.fingerprint,
        architecture=type(base_model).__name__,
        num_embeddings=num_embeddings(model),
        base_embeddings=base_embeddings(model, base),
        labels=model_labels(model),
        task_type=model.peft_config[model.active_adapter].task_type,
        pad_token_id=base_model.config.get_text_config().pad_token_id,
        arithmetic=model_arithmetic(base_model),
        tensors=hash_tensors(folder / TENSORS_NAME),
        files=files,
        idle_modules=idle,
        samples=answers,
        versions={
            package: importlib.metadata.version(package) for package in RECORDED_VERSIONS if is_installed(package)
        },
    )


def is_sharded(model: PeftModel) -> bool:
    """Whether this process holds only shards of the weights (ZeRO-3, FSDP), so that it cannot answer alone."""
    return any(hasattr(p, "ds_shape") or type(p.data).__name__ == "DTensor" for p in model.parameters())


def model_labels(model: PeftModel) -> dict[str, str] | None:
    """Label id → name of a classifier; None for a language model."""
    if model.peft_config[model.active_adapter].task_type not in CLASSIFIER_TASKS:
        return None
    return {str(index): label for index, label in model.config.id2label.items()}


def model_arithmetic(model: PreTrainedModel) -> Arithmetic:
    """How the weights of `model` are held."""
    quantization: dict[str, Any] | None = None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        fields = quantizer.quantization_config.to_diff_dict()
        quantization = {key: value for key, value in fields.items() if not key.startswith("_")}
    counts: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            counts[parameter.dtype] += parameter.numel()
    dtype = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    return Arithmetic(dtype, quantization, model.config._attn_implementation)


def is_installed(package: str) -> bool:
    """Whether the distribution `package` is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
