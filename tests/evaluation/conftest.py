"""Evidence and run folders made by hand."""

import json
from pathlib import Path

import pytest

from lora_ft.data.audit import LEAKS, AuditReport, Check, Lengths
from lora_ft.data.report import DataReport, SplitReport
from lora_ft.evaluation.bootstrap import Estimate
from lora_ft.evaluation.compare import Comparison, Figure, Prediction
from lora_ft.evaluation.curves import Curves, Point
from lora_ft.evaluation.report import write_report
from lora_ft.evaluation.verdict import Evidence

STEPS_AN_EPOCH = 50


def make_curve(losses, every):
    """Points `every` steps."""
    steps = [every * (index + 1) for index in range(len(losses))]
    return tuple(Point(step, step / STEPS_AN_EPOCH, loss) for step, loss in zip(steps, losses, strict=True))


def make_figure(base, tuned, half_width=0.1, unit="nats", better="lower", num_rows=100):
    """A figure whose intervals reach `half_width` to either side."""
    values = (base, tuned, tuned - base)
    estimates = (Estimate(value, value - half_width, value + half_width) for value in values)
    return Figure(*estimates, unit=unit, better=better, num_rows=num_rows)


def make_audit(leaked=0, num_train=400):
    """An audit of 100 validation and 100 test rows, of which some stand in training too."""
    rows = {"train": num_train, "validation": 100, "test": 100}
    splits = {name: SplitReport(num_rows=count, num_documents=count, num_tokens=9) for name, count in rows.items()}
    check = Check(LEAKS[0], leaked, "warning" if leaked else "ok", "Measured on them, memory looks like skill.")
    lengths = {"train": Lengths(3, 7, 9, (0, 1, 4, 2) * 3, 0.1, 0.9)}
    return AuditReport(DataReport(num_train + 200, num_train + 200, 0, 0, 0, splits), lengths, {}, {}, (check,))


@pytest.fixture
def make_evidence():
    """A function that makes the evidence of a run that went well, with parts replaced."""

    def make(train=None, validation=(2.0, 1.2, 1.0, 0.95), general=None, loss=None, kept_step=None, **audit):
        train = train or [3 * 0.8**index + 0.5 for index in range(40)]
        curves = Curves(make_curve(train, 5), make_curve(validation, STEPS_AN_EPOCH))
        figures = {"loss": loss or make_figure(3.0, 0.9)}
        prediction = Prediction("<|user|>What?", "the red light", "a light <script>alert(1)</script>", "the red light")
        return Evidence(curves, Comparison(figures, 900, (prediction,) * 3, general), make_audit(**audit), kept_step)

    return make


@pytest.fixture
def make_run(tmp_path, make_evidence):
    """A function that writes the folder of a finished run, without a model."""

    def make(name="run", **evidence) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        made = make_evidence(**evidence)
        lines = [{"step": 0, "epoch": 0, "time": 100.0, "max_steps": 200}]
        for point in made.curves.train:
            known = {"step": point.step, "epoch": point.epoch, "time": 100.0 + point.step}
            lines.append({**known, "loss": point.loss, "learning_rate": 1e-3})
        lines += [
            {"step": p.step, "epoch": p.epoch, "time": 300.0, "eval_loss": p.loss} for p in made.curves.validation
        ]
        lines.append({"step": 200, "epoch": 4.0, "time": 301.0, "train_runtime": 201.0})
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figures = write_report(made, folder, 1.5)
        manifest = {
            "state": "finished",
            "fingerprint": "f" * 64,
            "base": {"name": "org/<b>base</b>", "revision": None, "fingerprint": "b" * 64},
            "data": made.audit.data.to_json(),
            "choices": [{"key": "training.seed", "value": 42, "reason": "fixed"}],
            "task": "sft",
            "machine": {"device": "cpu", "name": "A CPU", "processes": 1},
            "versions": {"python": "3.11", "torch": "2.13"},
            "trainable_parameters": 1234,
            "training": {"train_runtime": 201.0, "train_loss": 0.9},
            "memory": {
                "peak_bytes": 800_000_000,
                "limit_bytes": 2_000_000_000,
                "measured_peak_bytes": 900_000_000,
                "causes": [{"name": "weights", "num_bytes": 700_000_000, "note": "of the base"}],
            },
            "evaluation": figures,
            "export": {},
        }
        (folder / "run.json").write_text(json.dumps(manifest))
        return folder

    return make
