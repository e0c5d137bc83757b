"""The report as one page: `report/report.html`, which needs nothing beside it, and the curves as a picture.

During training the page shows the curves so far and loads itself anew; afterwards it shows everything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_ft.evaluation import charts
from lora_ft.evaluation.curves import Curves, read_log, trace_curves
from lora_ft.evaluation.report import REPORT, read_report
from lora_ft.evaluation.samples import choose_samples
from lora_ft.evaluation.state import describe_state
from lora_ft.fingerprint import write_whole
from lora_ft.model.load import AUTO_CLASSES

PAGE, PICTURE = "report.html", "loss.png"
REFRESH_SECONDS = 5
GOOD, BAD = ("good fit",), ("leaking split", "overfit", "no better than base", "no better than a constant answer")
"""Verdicts shown in green and red; the others in amber."""


def write_page(run: Path) -> Path:
    """The page of a run, written in one step beside `report.json`; that of a training run while there is none."""
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    write_whole(folder / PAGE, render_page(run))
    if (folder / REPORT).is_file():
        draw_picture(trace_curves(read_log(run)), folder / PICTURE)
    return folder / PAGE


def render_page(run: Path) -> str:
    """The page as HTML, by what lies in the run's folder. Text of rows, names and paths is escaped, all of it."""
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines, report = read_log(run), read_report(run)
    curves = trace_curves(lines)
    environment = Environment(
        loader=PackageLoader("lora_ft", "evaluation/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": show_count, "bytes": show_bytes, "bars": charts.draw_bars}
    return environment.get_template("report.html.jinja").render(
        run=run,
        manifest=manifest,
        is_merged=(run / "merged").is_dir(),
        report=report,
        progress=describe_state(lines, time.time()),
        verdict=describe_verdict(report),
        figures=describe_figures(report),
        curves=curves,
        chart=charts.draw_losses(curves),
        canvas=charts,
        samples=choose_samples(run) if report else [],
        auto_class=AUTO_CLASSES[manifest["task"]],
        refresh_seconds=REFRESH_SECONDS,
    )


def describe_verdict(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The verdict, and how its colour is called."""
    if report is None:
        return None
    name = report["verdict"]["name"]
    return {**report["verdict"], "tone": "good" if name in GOOD else "bad" if name in BAD else "fair"}


def describe_figures(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row of the table for each figure, with the places of its bars in percent of their track."""
    if report is None:
        return []
    general = {"general text loss": report["general"]} if report["general"] else {}
    rows = []
    for name, figure in {**report["figures"], **general}.items():
        difference = figure["difference"]
        is_clear = difference["low"] > 0 or difference["high"] < 0
        is_better = (difference["value"] > 0) == (figure["better"] == "higher")
        tone = ("good" if is_better else "bad") if is_clear else "unclear"
        columns = {
            c: show_figure(figure[c], figure["unit"], c == "difference") for c in ("base", "tuned", "difference")
        }
        row = {"name": name.replace("_", " "), "num_rows": figure["num_rows"], "better": figure["better"], "tone": tone}
        rows.append({**row, **columns, "bars": place_bars(figure)})
    return rows


def show_figure(estimate: Mapping[str, float], unit: str, signed: bool) -> dict[str, str]:
    """A figure and its interval as text."""
    scale, digits, mark = (100, 1, " %") if unit == "share" else (1, 3 if unit == "nats" else 2, "")
    sign = "+" if signed else ""
    parts = (f"{estimate[part] * scale:{sign}.{digits}f}" for part in ("value", "low", "high"))
    value, low, high = (part.replace("-", "−") for part in parts)
    return {"value": value + mark, "interval": f"{low} to {high}"}


def place_bars(figure: Mapping[str, Any]) -> list[dict[str, float | str]]:
    """Base and tuned on one track: where the interval begins, how wide it is, and where the figure stands."""
    models = {name: figure[name] for name in ("base", "tuned")}
    low, high = min(m["low"] for m in models.values()), max(m["high"] for m in models.values())
    if figure["unit"] == "share":
        low, high = 0.0, 1.0
    width = (high - low) or 1.0
    return [
        {
            "model": name,
            "start": 100 * (model["low"] - low) / width,
            "width": max(0.8, 100 * (model["high"] - model["low"]) / width),
            "at": 100 * (model["value"] - low) / width,
        }
        for name, model in models.items()
    ]


def show_count(number: int | None) -> str:
    """12,345, or a dash."""
    return "–" if number is None else f"{number:,}"


def show_bytes(number: float | None) -> str:
    """1.2 GB or 340 MB."""
    if number is None:
        return "–"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def draw_picture(curves: Curves, path: Path) -> None:
    """The curves as a PNG, for slides and papers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=144, layout="constrained")
    axes = figure.subplots()
    for points, name, colour, marker in (
        (curves.train, "training", "#4c78b5", ""),
        (curves.validation, "validation", "#d9730d", "o"),
    ):
        if points:
            steps, losses = [point.step for point in points], [point.loss for point in points]
            axes.plot(steps, losses, label=name, color=colour, marker=marker)
    if curves.turning:
        axes.axvline(curves.turning.step, color="#b3261e", linestyle="--", linewidth=1)
        axes.annotate(f" turned at step {curves.turning.step}", (curves.turning.step, axes.get_ylim()[1]), va="top")
    chart = charts.draw_losses(curves)
    if chart and chart.is_logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    if curves.train or curves.validation:
        axes.legend(frameon=False)
    figure.savefig(path)
