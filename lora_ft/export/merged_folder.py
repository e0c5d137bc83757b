"""What a merged model has of its own beside its weights: index and config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_ft.export.merge_plan import MergedTensor
from lora_ft.export.prepare_merge import Merge
from lora_ft.fingerprint import INDEX_NAME, WEIGHTS_NAME, read_json

IDENTITY_NAME = "identity.json"
"""In an unfinished merge: the hash of what it is a merge of."""


def open_draft(out: Path, identity: str) -> Path:
    """The folder a merge grows in, beside `out`: empty, or that of an earlier try at the very same merge."""
    draft = out.with_name(f".{out.name}.merging")
    marker = draft / IDENTITY_NAME
    if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != identity:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        partial = draft / f"{IDENTITY_NAME}.partial"
        partial.write_text(json.dumps(identity), encoding="utf-8")
        partial.rename(marker)
    return draft


def write_index(tensors: Sequence[MergedTensor], folder: Path) -> None:
    """model.safetensors.index.json, unless all is in one file."""
    weight_map = {tensor.name: tensor.file for tensor in tensors}
    if set(weight_map.values()) == {WEIGHTS_NAME}:
        return
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(merge: Merge, folder: Path) -> None:
    """The base's config.json, changed only where the merged model differs."""
    base, model = merge.base.folder, merge.model
    config = read_json(base / "config.json")
    text = config.get("text_config", config)
    if merge.plan.untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != type(model.config).from_pretrained(str(base)).get_text_config().vocab_size:
        text["vocab_size"] = rows
    if merge.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = merge.dtype
    config.pop("quantization_config", None)
    if merge.is_classifier:
        config["architectures"] = [type(model).__name__]
        config["id2label"] = {str(index): label for index, label in model.config.id2label.items()}
        config["label2id"] = model.config.label2id
        text["pad_token_id"] = model.config.get_text_config().pad_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
