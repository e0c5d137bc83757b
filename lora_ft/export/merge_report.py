"""`merge_report.json`: what was merged into what, and the proof that the two are the same model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora_ft.errors import UserError
from lora_ft.export.manifest import Arithmetic, Sample, read_sample
from lora_ft.export.parity import Parity

Onto = Literal["original", "quantized"]
REPORT_NAME = "merge_report.json"


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what, and how well; `merge_report.json` in the merged folder."""

    base: str
    """The base as the user named it."""
    revision: str | None
    """Commit of a Hub base."""
    base_fingerprint: str
    """Which weights those were."""
    adapters: tuple[tuple[str, float], ...]
    """`hash_tensors` of each adapter, and its weight."""
    onto: Onto
    """`original`, or `quantized`: the base as the quantised model saw it in training."""
    dtype: str
    """Type most of the merged weights are stored in."""
    num_tensors: int
    """Tensors in the merged files."""
    num_changed: int
    """Those of them that the adapters change."""
    total_bytes: int
    """How large all are."""
    untied: tuple[str, ...]
    """Weights that are one and the same in the base, and no longer here."""
    left_out: tuple[str, ...]
    """Tensors of the base that the merged model has no place for."""
    merge_seconds: float
    """Time it took, without the proof."""
    proof: Parity | None
    """How far the merged model is from base + adapter; None if that was not measured."""
    compared_in: Arithmetic | None
    """How the weights were held for the proof."""
    faults: tuple[str, ...]
    """What keeps the proof from holding."""
    training_difference: float | None
    """How far the answers are from those recorded when the adapter was saved: the largest difference of a logit, as a
    share of the largest logit. Where the base was quantised in training, this is what its rounding makes."""
    samples: tuple[Sample, ...]
    """What the merged model answered, to be compared after a copy or download."""
    tensors: dict[str, str]
    """Tensor → BLAKE3 of its bytes."""
    files: dict[str, str]
    """SHA-256 of every other file but this one and the card."""

    @property
    def verdict(self) -> str:
        """In a word or two, whether merged equals base + adapter."""
        return "not measured" if self.proof is None else "not equal" if self.faults else "equal"

    def to_json(self) -> dict[str, Any]:
        """The report for machines."""
        return {"verdict": self.verdict, **asdict(self)}


def write_report(report: MergeReport, folder: Path) -> None:
    """`merge_report.json` written into `folder`."""
    (folder / REPORT_NAME).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")


def read_report(folder: Path) -> MergeReport | None:
    """The report in `folder`; None if it has none, as for a model that another tool merged.

    Raises:
        UserError: the report is damaged.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields.pop("verdict")
        fields["proof"] = Parity(**fields["proof"]) if fields["proof"] else None
        fields["compared_in"] = Arithmetic(**fields["compared_in"]) if fields["compared_in"] else None
        fields["adapters"] = tuple(map(tuple, fields["adapters"]))
        fields["samples"] = tuple(read_sample(sample) for sample in fields["samples"])
        fields |= {name: tuple(fields[name]) for name in ("untied", "left_out", "faults")}
        return MergeReport(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), None, f"The report cannot be read ({error}).", "Copy the folder again.") from error
