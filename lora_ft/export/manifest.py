"""`lora_ft.json`: what an adapter was trained on, what its files hash to, and what it answered when it was saved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError

MANIFEST_NAME = "lora_ft.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Sample:
    """What a model says after one prompt, small enough to keep for ever."""

    prompt: tuple[int, ...]
    """Token ids."""
    top_ids: tuple[int, ...]
    """The likeliest next tokens (or labels, for a classifier), best first."""
    top_logits: tuple[float, ...]
    """Their logits, in fp32."""
    mean_log_probability: float | None
    """Mean log-probability of the prompt's own tokens, each given those before it; None for a classifier."""


@dataclass(frozen=True)
class Arithmetic:
    """How the base was held while an adapter was trained; the same again gives the same answers."""

    dtype: str
    """Type of weights that are not quantised, such as `bfloat16`."""
    quantization: dict[str, Any] | None
    """Fields of `transformers.BitsAndBytesConfig`; None for 16 or 32 bit."""
    attention: str | None
    """transformers' name of the attention implementation."""


@dataclass(frozen=True)
class AdapterManifest:
    """Everything needed to know an adapter again."""

    base: str
    """The base as the user named it."""
    revision: str | None
    """Commit of a Hub base."""
    base_fingerprint: str
    """`fingerprint_base` of the weights it was trained on."""
    architecture: str
    """Class of the base model, such as `LlamaForCausalLM`."""
    num_embeddings: int
    """Rows of the input embeddings of the tuned model."""
    base_embeddings: int
    """Rows the base has itself; fewer if the vocabulary was enlarged for training."""
    labels: dict[str, str] | None
    """Label id → name, for a classifier."""
    arithmetic: Arithmetic
    """How the base was held when `samples` were recorded."""
    tensors: str
    """`hash_tensors` of adapter_model.safetensors."""
    files: dict[str, str]
    """SHA-256 of every other file beside it."""
    idle_modules: tuple[str, ...]
    """Targets whose update is exactly zero, such as the vision tower of a model trained on text alone."""
    samples: tuple[Sample, ...]
    """What the live model answered, to be compared after a reload."""
    versions: dict[str, str]
    """Library → version that wrote the adapter."""
    task_type: str | None = None
    """PEFT's name of the task, such as `SEQ_CLS`."""
    pad_token_id: int | None = None
    """What a classifier's rows were padded with: it answers at the last token before it."""


def write_manifest(manifest: AdapterManifest, folder: Path) -> None:
    """`lora_ft.json` written into `folder`."""
    text = json.dumps({"format": MANIFEST_FORMAT, **asdict(manifest)}, indent=2) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> AdapterManifest | None:
    """The manifest in `folder`; None if it has none, as for an adapter that another tool saved.

    Raises:
        UserError: the manifest is damaged, or a newer lora_ft wrote it.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if (found := fields.pop("format")) != MANIFEST_FORMAT:
            rule = f"This lora_ft reads manifests of format {MANIFEST_FORMAT}."
            raise UserError(str(path), f"format {found}", rule, "Install the lora_ft that wrote it.")
        fields["arithmetic"] = Arithmetic(**fields["arithmetic"])
        fields["samples"] = tuple(read_sample(sample) for sample in fields["samples"])
        fields["idle_modules"] = tuple(fields["idle_modules"])
        return AdapterManifest(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"The manifest cannot be read ({error})."
        raise UserError(str(path), None, rule, "Copy the adapter again from where it was trained.") from error


def read_sample(fields: dict[str, Any]) -> Sample:
    """A sample from its JSON fields."""
    tuples = {key: tuple(fields[key]) for key in ("prompt", "top_ids", "top_logits")}
    return Sample(**tuples, mean_log_probability=fields["mean_log_probability"])
