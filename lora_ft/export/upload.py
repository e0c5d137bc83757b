"""What goes to the Hub: files on a list, with the base's public name, and no secret in any of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from lora_ft.data.privacy import RECOGNISERS
from lora_ft.errors import Fault, UserError, raise_faults
from lora_ft.export.adapter import CONFIG_NAME, TENSORS_NAME, Adapter, open_adapter, read_adapter_fields
from lora_ft.export.card import CAUSAL, CardFacts, adapter_facts, add_run, merged_facts, render_card
from lora_ft.export.companions import GENERATION_NAME, TOKENIZER_FILES
from lora_ft.export.manifest import MANIFEST_NAME
from lora_ft.export.merge_report import REPORT_NAME, read_report
from lora_ft.export.ollama import MODELFILE_NAME
from lora_ft.export.skeleton import count_labels
from lora_ft.export.vllm import fit_vllm
from lora_ft.fingerprint import INDEX_NAME, WEIGHTS_NAME, list_weight_files, read_json

CARD_NAME = "README.md"
BESIDE_BOTH = (CARD_NAME, "LICENSE*", "NOTICE*", GENERATION_NAME, *TOKENIZER_FILES)
ADAPTER_FILES = (TENSORS_NAME, CONFIG_NAME, MANIFEST_NAME, *BESIDE_BOTH)
MERGED_FILES = (
    REPORT_NAME,
    MODELFILE_NAME,
    "preprocessor_config.json",
    "processor_config.json",
    *BESIDE_BOTH,
)
"""What may go beside what must; everything else in the folder stays where it is."""
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL")
"""Environment variables whose values must not be in any file."""
SHORTEST_SECRET = 12
"""Shorter values are too likely to be there by chance."""


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub."""

    files: Mapping[str, Path | bytes]
    """Name in the repository → the file here, or its content where it is not the file's."""
    left_out: tuple[str, ...]
    """Files of the folder that do not go."""


def collect_adapter(folder: Path, repository: str, base: str | None, license: str | None) -> Upload:
    """An adapter for the Hub: its config names a base that others can load.

    Raises:
        UserError: the base lies on this machine only, and no public id was given for it.
    """
    adapter = open_adapter(folder)
    manifest = adapter.manifest
    named = manifest.base if manifest else adapter.config.base_model_name_or_path
    from_hub = manifest.revision is not None if manifest else not Path(named or "").exists()
    public = public_base(named, from_hub, base, str(folder))
    config = {**read_adapter_fields(folder), "base_model_name_or_path": public}
    changed = {CONFIG_NAME: to_json(config)}
    facts = foreign_facts(adapter, repository)
    if manifest:
        fields = read_json(folder / MANIFEST_NAME)
        hashes = {**fields["files"], CONFIG_NAME: hash_bytes(changed[CONFIG_NAME])}
        changed[MANIFEST_NAME] = to_json({**fields, "base": public, "files": hashes, "samples": []})
        facts = adapter_facts(manifest, repository)
    facts = replace(facts, base=public, license=license, vllm=describe_vllm(adapter, public, repository))
    changed[CARD_NAME] = render_card(add_run(facts, folder.parent)).encode()
    return collect(folder, ADAPTER_FILES, changed, (TENSORS_NAME,))


def foreign_facts(adapter: Adapter, repository: str) -> CardFacts:
    """What the config and the tensors of an adapter tell, where no manifest does."""
    config = adapter.config
    return CardFacts(
        title=repository,
        base=config.base_model_name_or_path or "",
        revision=config.revision,
        is_adapter=True,
        task_type=config.task_type or CAUSAL,
        num_labels=count_labels(adapter),
    )


def describe_vllm(adapter: Adapter, base: str, repository: str) -> tuple[str, ...]:
    """How to serve the adapter with vLLM, or why not."""
    fit = fit_vllm(adapter)
    if fit.faults:
        return (*fit.faults, "merge it first: `lora-ft merge`")
    name = repository.rpartition("/")[2]
    flags = f"--enable-lora --max-lora-rank {fit.max_lora_rank} --lora-modules {name}={repository}"
    return (f"`vllm serve {base} {flags}`",)


def collect_merged(folder: Path, repository: str, base: str | None, license: str | None) -> Upload:
    """A merged model for the Hub.

    Raises:
        UserError: no report says what it was merged from, its base has no public id, or a file of weights is not there.
    """
    report = read_report(folder)
    if report is None:
        rule = f"There is no {REPORT_NAME}, so what this model is made of is not known."
        raise UserError(str(folder), None, rule, "Merge it with lora-ft merge.")
    public = public_base(report.base, report.revision is not None, base, str(folder))
    report = replace(report, base=public, samples=())
    config = read_json(folder / "config.json")
    handoff = "llama.cpp's converter, then the `Modelfile`" if (folder / MODELFILE_NAME).is_file() else None
    facts = replace(merged_facts(report, repository, read_task_type(config), handoff), license=license)
    changed = {
        REPORT_NAME: to_json(report.to_json()),
        CARD_NAME: render_card(add_run(facts, folder.parent)).encode(),
    }
    weights = [path.name for path in list_weight_files(folder)]
    needed = (*weights, "config.json") if weights == [WEIGHTS_NAME] else (*weights, "config.json", INDEX_NAME)
    return collect(folder, (*MERGED_FILES, *custom_code(config)), changed, needed)


def read_task_type(config: Mapping[str, Any]) -> str:
    """PEFT's name of what a merged model is for, read off its config."""
    if "SequenceClassification" in config["architectures"][0]:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if config.get("is_encoder_decoder") else CAUSAL


def custom_code(config: Mapping[str, Any]) -> list[str]:
    """The Python files a config needs, as its `auto_map` names them."""
    classes = [
        name for names in config.get("auto_map", {}).values() for name in ([names] if isinstance(names, str) else names)
    ]
    return sorted({f"{name.split('--')[-1].split('.')[0]}.py" for name in classes if name})


def collect(folder: Path, patterns: tuple[str, ...], changed: Mapping[str, bytes], needed: tuple[str, ...]) -> Upload:
    """The files of `folder` that match a pattern or are `needed`, those in `changed` with another content.

    Links are left out, as they could lead anywhere.

    Raises:
        UserError: a file that is needed is left out.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    links = {path for path in paths.values() if path.is_symlink()}
    files = {name: path for name, path in paths.items() if path.is_file() or path in links}
    matching = {path for pattern in (*patterns, *map(escape, needed)) for path in folder.glob(pattern)}
    chosen = {
        name: path for name, path in files.items() if path in matching and not links.intersection([path, *path.parents])
    }
    raise_faults(
        Fault(str(folder / name), None, "It is needed, and a link is not followed.", "Put the file itself there.")
        for name in needed
        if name not in chosen
    )
    return Upload({**chosen, **changed}, tuple(name for name in files if name not in chosen))


def public_base(named: str | None, from_hub: bool, declared: str | None, place: str) -> str:
    """The Hub id of a base.

    Args:
        from_hub: whether it was fetched from there, so that its name is known to be public.

    Raises:
        UserError: it lies on this machine only, and no public id was declared.
    """
    name = declared or (named if from_hub else None)
    if not name or not re.fullmatch(r"([\w.-]+/)?\w[\w.-]*", name):
        rule = "The base must be one that others can load; this one is known by a name on this machine only."
        raise UserError(place, named, rule, "Declare its Hub id with --base-id ORG/NAME.")
    return name


def refuse_secrets(upload: Upload) -> None:
    """Nothing if no file that goes has a secret in it.

    Raises:
        UserError: names every file with a key, token, password, or the value of such an environment variable; never
            the secret itself.
    """
    raise_faults(
        fault for name, content in upload.files.items() for fault in secrets_in(name, read_text(name, content))
    )


def secrets_in(name: str, text: str) -> Iterator[Fault]:
    """What is secret in one file; a stretch across quotation marks is two entries of a vocabulary that read as one."""
    kinds = {
        kind.name
        for kind in RECOGNISERS
        if kind.is_secret and any('"' not in found.group() for found in re.finditer(kind.pattern, text))
    }
    values = {
        variable
        for variable, value in os.environ.items()
        if SECRET_VARIABLE.search(variable.upper()) and len(value) >= SHORTEST_SECRET and value in text
    }
    for kind in sorted(kinds) + sorted(f"the value of ${variable}" for variable in values):
        rule = "Nothing secret is published, not even to a private repository."
        yield Fault(name, kind, rule, "Remove it from the file; if it was real, make a new one.")


def read_text(name: str, content: Path | bytes) -> str:
    """The text of a file; of a safetensors file its header, which may hold any metadata."""
    if isinstance(content, bytes):
        return content.decode("utf-8", "replace")
    if content.suffix == ".safetensors":
        with open(content, "rb") as stream:
            return stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8", "replace")
    return content.read_text(encoding="utf-8", errors="replace")


def to_json(value: object) -> bytes:
    """JSON as it is written to a file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def hash_bytes(content: bytes) -> str:
    """SHA-256 of `content`, in hex."""
    return hashlib.sha256(content).hexdigest()
