"""The base: found, identified, and read in 4, 8, 16 or 32 bit onto the device of this rank.

The identity (`BaseIdentity`) is known before any weight is read, and goes with the adapter wherever it goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.builtin import is_builtin, locate_model
from lora_ft.errors import UserError
from lora_ft.fingerprint import BaseIdentity, identify_base, read_json
from lora_ft.recipe import check_buildable
from lora_ft.sections import ModelSection, Task

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES: dict[Task, str] = {
    "sft": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""`data.task` → the transformers class that reads the base for it."""
CLASSIFIER_HEADS = ("score", "classifier")
"""What architectures call the layer that says the class; a base that was trained on text alone has none."""
FLOATING_HEADS = ("lm_head", *CLASSIFIER_HEADS)
"""Layers that are never quantised (peft#1720)."""
SEQ2SEQ_GENERATION = {"num_beams": 4, "no_repeat_ngram_size": 2, "early_stopping": True}
"""How an encoder-decoder base answers where it does not say so itself."""

BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What is fetched of a Hub base: weights, configs, tokenizer, licence; no pickles, and code only where it may run."""


def find_base(name: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseIdentity:
    """The identity of the base `name` (Hub id, folder, `builtin:NAME`); a Hub base is fetched unless it is cached.

    Raises:
        UserError: no such folder or repository, no network, no config, or no safetensors.
    """
    folder, commit = _locate(name, revision, [*BASE_FILES, *(["*.py"] if trust_remote_code else [])])
    _check_config(name, folder, trust_remote_code)
    if not list(folder.glob("*.safetensors")):
        rule = "It has no safetensors weights; pickled .bin files can run code and are not read."
        raise UserError("model.base", name, rule, "Convert it with transformers' save_pretrained.")
    return identify_base(name, folder, commit)


def find_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of the base's config and tokenizer; of a Hub base, no weights are fetched.

    Raises:
        UserError: no such folder or repository, no network, or no config.
    """
    light = [pattern for pattern in BASE_FILES if not pattern.endswith(".safetensors")]
    folder, _ = _locate(name, revision, [*light, *(["*.py"] if trust_remote_code else [])])
    _check_config(name, folder, trust_remote_code)
    return folder


def read_config(folder: Path, section: ModelSection, task: Task) -> PretrainedConfig:
    """The config of the base in `folder`.

    Raises:
        UserError: transformers does not know its architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, ImportError) as fault:
        raise unreadable(section, task, fault) from fault


def is_local(name: str) -> bool:
    """Whether a base lies on this machine alone, so that its name tells nobody else where it is."""
    return is_builtin(name) or Path(name).expanduser().is_dir()


def load_tokenizer(folder: Path, section: ModelSection, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base in `folder`, with a padding token; it is masked by position, never by its id.

    Raises:
        UserError: the folder holds no tokenizer that can be read, or the chat template file cannot.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError) as fault:
        rule = f"Its tokenizer cannot be read: {_first_line(fault)}"
        raise UserError("model.base", section.base, rule, "Add tokenizer.json to the folder.") from fault
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as fault:
            raise UserError("data.chat_template", chat_template, f"{fault.strerror}.", "Check the path.") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels are masked by position, so sharing it hides nothing
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(
    identity: BaseIdentity,
    section: ModelSection,
    quantization: dict[str, Any] | None = None,
    device: str | None = None,
    *,
    task: Task = "sft",
    labels: Sequence[str] = (),
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The base as the model of a task, frozen, on `device` (this rank's, if None).

    Weights that bitsandbytes does not quantise have `section.dtype`; heads are never quantised. Under DeepSpeed ZeRO-3
    transformers itself shards the weights while reading, so no device is given then.

    Args:
        labels: names of the classes for `classification`, which go into the model's config; its head is random.
        pad_token_id: what rows are padded with; a classifier looks for the last token before it.

    Raises:
        UserError: the weights cannot be read, do not fill the architecture, or are stored quantised in another way.
    """
    import torch
    import transformers
    from transformers.integrations import is_deepspeed_zero3_enabled

    from lora_ft.model.machine import probe_machine
    from lora_ft.model.quant_cache import load_quantised
    from lora_ft.model.stored import read_stored, refuse_requantising

    if quantization and (stored := read_stored(identity.folder)):
        refuse_requantising(quantization, stored)
        quantization = None  # the base's own says the same; given both, transformers warns
    options: dict[str, Any] = {
        "dtype": getattr(torch, section.dtype) if section.dtype != "auto" else "auto",
        "attn_implementation": section.attn_implementation,
        "trust_remote_code": section.trust_remote_code,
        "use_safetensors": True,
        "local_files_only": True,
    }
    if task == "classification":
        names = dict(enumerate(labels))
        options |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        options |= {"pad_token_id": pad_token_id}
    if not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": device or probe_machine().device}
    auto_class, config = getattr(transformers, AUTO_CLASSES[task]), build_quantization(quantization)
    try:
        with _without_load_report():
            if config is not None:
                model, info = load_quantised(auto_class, identity, config, options)
            else:
                model, info = auto_class.from_pretrained(identity.folder, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as fault:
        raise unreadable(section, task, fault) from fault
    _refuse_missing(section, info, CLASSIFIER_HEADS if task == "classification" else ())
    if quantization:
        _refuse_unquantised(model, quantization)
    use_safe_4bit_kernels(model)
    if task == "seq2seq" and not _says_how_to_answer(identity.folder):
        model.generation_config.update(**SEQ2SEQ_GENERATION)
    return model.requires_grad_(False)


def _says_how_to_answer(folder: Path) -> bool:
    """Whether the base's own generation config has a word on what `SEQ2SEQ_GENERATION` settles."""
    file = folder / "generation_config.json"
    return file.is_file() and not SEQ2SEQ_GENERATION.keys().isdisjoint(read_json(file, "Fetch the base again."))


def _refuse_unquantised(model: Any, quantization: dict[str, Any]) -> None:
    """Nothing, if layers were quantised, and all that are named to be left alone are there.

    Raises:
        UserError: with the keys that say otherwise.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [name for name, _ in model.named_modules()]
    skipped = set(quantization.get("llm_int8_skip_modules") or ()).difference(FLOATING_HEADS)
    idle = sorted(entry for entry in skipped if all(should_convert_module(name, [entry]) for name in names))
    if idle:
        rule = "This base has no such module."
        key = "quantization.llm_int8_skip_modules"
        raise UserError(key, ", ".join(idle), rule, "Correct the name, or remove it.")
    if not any(isinstance(module, (Linear4bit, Linear8bitLt)) for module in model.modules()):
        fix = "Remove the section, or llm_int8_enable_fp32_cpu_offload and llm_int8_skip_modules."
        raise UserError("quantization", None, "No layer of this base would be quantised.", fix)


def build_quantization(fields: dict[str, Any] | None) -> BitsAndBytesConfig | None:
    """The config of a recipe's section `quantization`, None without one.

    transformers leaves heads alone unless `llm_int8_skip_modules` names other layers; then they are named beside them.
    """
    from transformers import BitsAndBytesConfig

    if not fields:
        return None
    if skipped := fields.get("llm_int8_skip_modules"):
        fields = {**fields, "llm_int8_skip_modules": [*skipped, *FLOATING_HEADS]}
    return check_buildable("quantization", BitsAndBytesConfig, fields, "recipe")


def use_safe_4bit_kernels(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    bitsandbytes 0.50.2 does that in the first forward pass without gradients; later gradients are then computed from
    weights in another order (cosine 0.30 to the right ones), a merge is garbage, and layers whose `out_features` is not
    a multiple of 32 crash. Can go when `Linear4bit` keeps the packed copy apart from `weight`.
    """
    for _, layer in _list_4bit(model):
        layer.support_avx512bf16_for_cpu = False


def refuse_repacked(model: Any) -> None:
    """Nothing, if bitsandbytes has not repacked the 4-bit weights of a model that somebody else loaded, and cannot now.

    Raises:
        UserError: it has; the scales of the blocks were rounded to bfloat16 then, so there is no way back.
    """
    use_safe_4bit_kernels(model)
    for name, layer in _list_4bit(model):
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            rule = "It answered before, and bitsandbytes rounded and reordered its 4-bit weights in place for that."
            fix = "Load it again and attach the adapter before it answers, or load it with lora_ft.load_base."
            raise UserError("model", name, rule, fix)


def _list_4bit(model: Any) -> Iterator[tuple[str, Any]]:
    """The 4-bit layers of a model, with their names."""
    import bitsandbytes

    return ((name, each) for name, each in model.named_modules() if isinstance(each, bitsandbytes.nn.Linear4bit))


def _locate(name: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    """The folder of a base, and the commit it stands at if it comes from the Hub; files of `patterns` are fetched."""
    if is_builtin(name):
        return locate_model(name), None
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser(), None
    folder = _fetch(name, revision, patterns)
    return folder, folder.name  # the Hub cache keeps each snapshot in a folder named by its commit


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    place = f"{name}@{revision}" if revision else name
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise UserError("model.base", place, "Neither a folder nor a Hub id.", "Check the path.") from None
    except LocalEntryNotFoundError:
        rule = "It is no folder here, and the Hub cannot be reached to fetch it."
        raise UserError("model.base", place, rule, "Check the path, the network, and HF_HUB_OFFLINE.") from None
    except HfHubHTTPError as fault:
        rule = f"The Hub refuses it: {_first_line(fault)}"
        fix = "Check the name, the revision, and that HF_TOKEN has access."
        raise UserError("model.base", place, rule, fix) from None


def _check_config(name: str, folder: Path, trust_remote_code: bool) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError("model.base", name, f"{folder} has no config.json.", "Name the folder of a model.")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise UserError("model.base", name, f"{config} is not JSON: {fault}.", "Fetch the base again.") from None
    if "auto_map" in settings and not trust_remote_code and not _is_known(settings.get("model_type")):
        rule = "This base brings its own Python code."
        raise UserError("model.base", name, rule, "Read that code, then set model.trust_remote_code: true.")


def _is_known(model_type: str | None) -> bool:
    """Whether transformers has this architecture itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from telling at length what weights are missing; `_refuse_missing` decides about that."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_missing(section: ModelSection, info: dict[str, Any], drawn: Sequence[str]) -> None:
    """`drawn` are modules that no file need hold, as training starts them at random."""
    missing = sorted(name for name in info["missing_keys"] if name.partition(".")[0] not in drawn)
    if missing:
        rule = f"{len(missing)} weights of the architecture are not in its files, {missing[0]} first."
        raise UserError("model.base", section.base, rule, "Fetch the base again, or name one that fits data.task.")


def unreadable(section: ModelSection, task: Task, fault: Exception) -> UserError:
    """The error for what transformers says of a base that it cannot make a model of."""
    if "does not support an attention implementation" in str(fault):
        fix = "Write model.attn_implementation: eager, or leave it out."
        return UserError("model.attn_implementation", section.attn_implementation, "This architecture has none.", fix)
    rule, fix = f"It cannot be read: {_first_line(fault)}", "Check the folder."
    if "Unrecognized configuration class" in str(fault):
        rule = f"Its architecture has no {AUTO_CLASSES[task]}, which data.task: {task} is trained with."
        fix = "Name a base of another kind (seq2seq: T5 and its family; sft: causal ones), or another data.task."
    return UserError("model.base", section.base, rule, fix)


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
