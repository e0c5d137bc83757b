"""What an evaluation leaves in `report/`: figures for machines, and every answer beside its reference."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ft.evaluation.verdict import Evidence, judge_run
from lora_ft.fingerprint import read_json, whole_folder

REPORT, PREDICTIONS = "report.json", "predictions.jsonl"


def write_report(evidence: Evidence, run: Path, seconds: float) -> dict[str, Any]:
    """`report/report.json` and `report/predictions.jsonl` below the run's folder; returns figures and verdict."""
    verdict = judge_run(evidence).to_json()
    figures = {**evidence.compared.to_json(), "verdict": verdict, "seconds": round(seconds, 2)}
    whole = {**figures, "curves": evidence.curves.to_json(), "audit": evidence.audit.to_json()}
    with whole_folder(run / "report") as folder:
        (folder / REPORT).write_text(
            json.dumps(_without_nan(whole), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        with open(folder / PREDICTIONS, "w", encoding="utf-8") as stream:
            for prediction in evidence.compared.predictions:
                stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    return figures


def _without_nan(value: Any) -> Any:
    """The value with null for each number that JSON does not know, such as the loss of a run that diverged."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(run: Path) -> dict[str, Any] | None:
    """What `report/report.json` says, or None before the run was evaluated."""
    try:
        return read_json(run / "report" / REPORT, f"Run: lora-ft evaluate {run}")
    except FileNotFoundError:
        return None
