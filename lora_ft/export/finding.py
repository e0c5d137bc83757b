"""What a verification reports, and the two checks that adapters and merged models share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import RunFailed
from lora_ft.export.manifest import Sample, read_sample
from lora_ft.export.samples import RELATIVE_TOLERANCE, compare_samples
from lora_ft.fingerprint import hash_file

READ_UNASKED = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("*.tiktoken", "*.jinja", "chat_template.json", "additional_chat_templates/*", "config.json"),
    *("generation_config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json"),
)
"""Files whose mere presence changes what the libraries load from a folder."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What was checked, in a word or two."""
    ok: bool
    """Whether it holds."""
    detail: str
    """What was found."""
    is_checked: bool = True
    """Whether there was anything to hold it against; if not, `ok` says only that no fault is known."""


@dataclass(frozen=True)
class VerifyReport:
    """What was found in a folder."""

    folder: str
    """The folder."""
    findings: tuple[Finding, ...]
    """Everything that was checked, in order."""

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(finding.ok for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report for machines."""
        return {"folder": self.folder, "ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def find_added(folder: Path, known: Collection[str]) -> list[str]:
    """Files of `folder` that nobody saved there, and that transformers or PEFT would read beside those that were."""
    found = {path.relative_to(folder).as_posix() for pattern in READ_UNASKED for path in folder.glob(pattern)}
    return sorted(found.difference(known))


def check_files(folder: Path, digests: Mapping[str, str], changed: Sequence[str], added: Sequence[str] = ()) -> Finding:
    """Whether the files of `folder` have these hashes; `changed` are those already known not to, `added` strangers."""
    missing = [name for name in digests if not (folder / name).is_file()]
    others = [name for name in digests if name not in missing and hash_file(folder / name) != digests[name]]
    if missing or others or changed or added:
        faults = [f"{name} is missing" for name in missing] + [f"{name} has changed" for name in (*changed, *others)]
        faults += [f"{name} was added" for name in added]
        return Finding("files", False, "since it was saved, " + ", ".join(faults))
    return Finding("files", True, "as they were saved")


def check_answers(recorded: Sequence[Sample], dtype: str, ask: Callable[[], list[dict[str, Any]]]) -> Finding:
    """Whether the answers that `ask` brings from a fresh process are the recorded ones."""
    try:
        found = [read_sample(sample) for sample in ask()]
    except RunFailed as error:
        return Finding("samples", False, str(error))
    worst, allowed = compare_samples(recorded, found), RELATIVE_TOLERANCE[dtype]
    detail = f"{len(found)} prompts, logits within {worst:.1e} of those recorded ({allowed:.0e} allowed)"
    return Finding("samples", worst <= allowed, detail)
