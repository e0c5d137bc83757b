"""What an evaluation leaves in `report/`: figures for machines, and every answer beside its reference."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ft.evaluation.compare import Comparison
from lora_ft.fingerprint import whole_folder


def write_report(compared: Comparison, run: Path, seconds: float) -> dict[str, Any]:
    """`report/report.json` and `report/predictions.jsonl` below the run's folder; returns what the former says."""
    figures = {**compared.to_json(), "seconds": round(seconds, 2)}
    with whole_folder(run / "report") as folder:
        (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        with open(folder / "predictions.jsonl", "w", encoding="utf-8") as stream:
            for prediction in compared.predictions:
                stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    return figures
