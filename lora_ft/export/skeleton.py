"""The tuned model without its weights: which module, which parameter, which adapter key.

transformers and PEFT build it on the meta device, so their own rules decide what an adapter key means (target
patterns, ranks, scaling, tied layers, vocabularies); nothing is guessed from names.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import UserError
from lora_ft.export.adapter import KEY_PREFIX, TENSORS_NAME, Adapter
from lora_ft.model.adapter import TASK_TYPES
from lora_ft.model.load import AUTO_CLASSES

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

TASK_CLASSES = {
    **{TASK_TYPES[task]: name for task, name in AUTO_CLASSES.items()},
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""PEFT's task type → the transformers class that loads the base of such an adapter."""
CLASSIFIER_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose models answer with a label."""
HEAD_SUFFIXES = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""What architectures call the last layer of a classifier; its rows are the labels."""


def model_class(config: LoraConfig) -> type:
    """The transformers class that loads the base of an adapter.

    Raises:
        UserError: the adapter says neither its task nor its class.
    """
    import transformers

    if config.task_type in TASK_CLASSES:
        return getattr(transformers, TASK_CLASSES[config.task_type])
    if config.auto_mapping:
        return getattr(
            importlib.import_module(config.auto_mapping["parent_library"]), config.auto_mapping["base_model_class"]
        )
    rule = f"The adapter must say what kind of model it is for: {', '.join(TASK_CLASSES)}."
    raise UserError("adapter_config.json: task_type", config.task_type, rule, "Write its task type there.")


def architecture_class(config: PretrainedConfig) -> type:
    """The transformers class that loads what a config names as its architecture, or brings code for.

    Raises:
        UserError: it names none, or one that transformers does not have.
    """
    import transformers

    own = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModelFor")]
    name = own[0] if own else (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        rule = "A merged model's config names the transformers class it is of."
        raise UserError("config.json: architectures", name, rule, "Merge again.")
    return getattr(transformers, name)


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """config.json of a model, as transformers understands it.

    Raises:
        UserError: transformers does not, or it needs Python code beside it, and running that was not allowed.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, TypeError, OSError) as error:
        if "trust_remote_code" not in str(error):
            rule = f"transformers cannot read it: {str(error).strip().partition(chr(10))[0]}"
            raise UserError(str(folder / "config.json"), None, rule, "Copy it again.") from error
        rule = "This model brings its own Python code, which runs with your rights."
        raise UserError(str(folder), None, rule, "Read that code, then say --trust-remote-code.") from None


def tuned_config(base: Path, adapter: Adapter) -> PretrainedConfig:
    """The base's config with the labels, and the padding, that the adapter was trained with."""
    config = read_config(base, adapter.trust_remote_code)
    if adapter.manifest and adapter.manifest.labels:
        config.id2label = {int(index): label for index, label in adapter.manifest.labels.items()}
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.get_text_config().pad_token_id = adapter.manifest.pad_token_id
    elif (num_labels := count_labels(adapter)) is not None:
        config.num_labels = num_labels
    return config


def count_labels(adapter: Adapter) -> int | None:
    """Rows of the head that lies with a classifier's adapter; None for another model, or where there is none."""
    heads = [shape[0] for key, shape in adapter.shapes.items() if key.endswith(HEAD_SUFFIXES)]
    return heads[0] if heads and adapter.config.task_type in CLASSIFIER_TASKS else None


def build_plain(base: Path, adapter: Adapter) -> PreTrainedModel:
    """The tuned model on the meta device without its adapter, with the vocabulary and labels the adapter is for."""
    import torch
    from transformers.initialization import no_init_weights

    config = tuned_config(base, adapter)
    with torch.device("meta"), no_init_weights():
        model = empty_model(model_class(adapter.config), config, adapter.trust_remote_code)
        model.tie_weights()  # which belongs to what is left out
        resize_embeddings(model, adapter)
    return model


def build_skeleton(base: Path, adapter: Adapter) -> PeftModel:
    """The tuned model on the meta device; quantisation is left out, as it changes no key.

    Initialisations that read the base's weights are left out too: they have nothing to read here.
    """
    import torch
    from peft import get_peft_model
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(adapter.config)
    config.init_lora_weights = True
    model = build_plain(base, adapter)
    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def empty_model(cls: type, config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model of `cls` from its config alone; call it under the meta device."""
    return cls.from_config(config, trust_remote_code=trust_remote_code) if hasattr(cls, "from_config") else cls(config)


def resize_embeddings(model: PreTrainedModel, adapter: Adapter) -> None:
    """The model with as many embeddings as the tuned one had; nothing happens if the vocabulary was not enlarged."""
    rows = num_embeddings(model, adapter)
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def num_embeddings(model: PreTrainedModel, adapter: Adapter) -> int:
    """Rows of the tuned model's input embeddings: recorded, or read off the tensors the adapter replaces them with."""
    if adapter.manifest:
        return adapter.manifest.num_embeddings
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    for key in (f"{name}.weight", f"{name}.base_layer.weight", f"{name}.token_adapter.base_layer.weight"):
        if key in adapter.shapes:
            return adapter.shapes[key][0]
    return embeddings.weight.shape[0]


def expected_shapes(skeleton: PeftModel, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Key → shape of every tensor the adapter's file must hold, and no other.

    Whole embeddings belong there if the vocabulary was enlarged, and may lie there otherwise: PEFT stores them beside
    a LoRA on embeddings.
    """
    required = adapter_shapes(skeleton, False)
    if adapter.shapes.keys() <= required.keys():
        return required
    complete = adapter_shapes(skeleton, True)
    embeddings = complete.keys() - required.keys()
    return complete if embeddings & adapter.shapes.keys() else required


def adapter_shapes(skeleton: PeftModel, with_embeddings: bool) -> dict[str, tuple[int, ...]]:
    """Key → shape of what PEFT would save."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(skeleton, save_embedding_layers=with_embeddings)
    return {key.removeprefix(KEY_PREFIX): tuple(tensor.shape) for key, tensor in state.items()}


def key_faults(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What keeps `found` from being `expected`: missing, unexpected and misshapen tensors, the first three of each."""
    checks: dict[str, Callable[[str], bool]] = {
        "missing": lambda key: key not in found,
        "unexpected": lambda key: key not in expected,
        "of another shape": lambda key: key in found and key in expected and found[key] != expected[key],
    }
    faults = []
    for name, is_fault in checks.items():
        keys = sorted(key for key in found.keys() | expected.keys() if is_fault(key))
        if keys:
            faults.append(f"{len(keys)} {name}: {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}")
    return faults


def refuse_unmatched(adapter: Adapter, skeleton: PeftModel) -> None:
    """Nothing if the adapter's file holds exactly the tensors PEFT will look for; PEFT itself only warns.

    Raises:
        UserError: some are missing, unexpected, or of another shape.
    """
    faults = key_faults(adapter.shapes, expected_shapes(skeleton, adapter))
    if faults:
        rule = "An adapter holds exactly the tensors its config promises for this base."
        fix = "Give the base it was trained on with --base, or save the adapter again."
        raise UserError(str(adapter.folder / TENSORS_NAME), "; ".join(faults), rule, fix)
