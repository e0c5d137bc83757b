"""What lora_ft takes beside TRL, PEFT and transformers of the same environment, measured in turns on this machine.

    python scripts/benchmark.py                        every topic
    python scripts/benchmark.py train loss             some of them
    python scripts/benchmark.py --rounds 1 --markdown docs/benchmarks.md --png docs/benchmarks.png

Medians and their ratios count: absolute times belong to the machine. A GPU is used where there is one. Real rows come
from gsm8k_train.json in the folder $LORA_FT_DATA, or --data.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from benchmarks.figure import Figure, Options

TOPICS = ("start", "saving", "data", "loss", "attention", "plan", "merge", "train")
"""Rooms in `benchmarks/`, what takes least time first."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


def main() -> int:
    """The table; with --worker, one measured run in this process."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(importlib.import_module(f"benchmarks.{sys.argv[2]}").work(*sys.argv[3:])))
        return 0
    options = parse_arguments()
    figures: list[Figure] = []
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for topic in options.topics or TOPICS:
            folder = Path(scratch) / topic
            folder.mkdir()
            room = importlib.import_module(f"benchmarks.{topic}")
            for figure in room.measure(Options(folder, options.data, options.rounds)):
                print(f"{figure.topic}: {figure.name}: {figure.shown} {describe(figure)}", file=sys.stderr, flush=True)
                figures.append(figure)
    found = {"machine": describe_machine(), "rounds": options.rounds, "figures": [f.to_json() for f in figures]}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(write_markdown(figures, options.rounds))
    if options.png:
        draw(figures, options.png)
    print_table(figures)
    return 0 if all(figure.is_met is not False for figure in figures) else 1


def parse_arguments() -> argparse.Namespace:
    """The options, or the usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", choices=[*TOPICS, []], metavar="TOPIC", help=f"of: {', '.join(TOPICS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns each system takes; medians count")
    parser.add_argument("--data", type=Path, default=os.environ.get("LORA_FT_DATA"), help="folder of gsm8k_train.json")
    parser.add_argument("--scratch", type=Path, help="folder for some gigabytes of bases and rows")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--markdown", type=Path, help="file for the table, with machine and versions")
    parser.add_argument("--png", type=Path, help="file for a picture of the ratios")
    options = parser.parse_args()
    if options.data is None or not (options.data / "gsm8k_train.json").is_file():
        parser.error("gsm8k_train.json is not there: set LORA_FT_DATA or --data to its folder")
    return options


def describe(figure: Figure) -> str:
    """The goal and whether it is met."""
    words = {None: "", True: "met", False: "MISSED"}
    return f"({figure.goal}: {words[figure.is_met]})" if figure.goal else ""


def describe_machine() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    from lora_ft.model.machine import probe_machine

    machine = probe_machine()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "date": date.today().isoformat(),
        "device": machine.name,
        "memory": f"{machine.memory_bytes / 2**30:.0f} GiB",
        "bfloat16": machine.bf16_reason,
        "python": platform.python_version(),
        **versions,
    }


def print_table(figures: Sequence[Figure]) -> None:
    """All figures, for a person."""
    from rich.console import Console
    from rich.table import Table

    table = Table("topic", "what", "measured", "goal", "")
    for figure in figures:
        verdict = {None: "", True: "met", False: "[red]missed[/]"}[figure.is_met]
        table.add_row(figure.topic, figure.name, figure.shown, figure.goal, verdict)
    Console(width=140).print(table)


def write_markdown(figures: Sequence[Figure], rounds: int) -> str:
    """The figures as a document."""
    lines = ["# Benchmarks", "", f"`python scripts/benchmark.py --rounds {rounds}`, systems taking turns, medians.", ""]
    lines += [f"- {name}: {value}" for name, value in describe_machine().items()]
    topic = None
    for figure in figures:
        if figure.topic != topic:
            topic = figure.topic
            lines += ["", f"## {topic}", "", "| what | measured | goal | |", "|---|---:|---:|---|"]
        verdict = {None: "", True: "met", False: "**missed**"}[figure.is_met]
        lines.append(f"| {figure.name} | {figure.shown} | {figure.goal} | {verdict} |")
    return "\n".join(lines) + "\n"


def draw(figures: Sequence[Figure], path: Path) -> None:
    """The ratios as bars, with a mark where each should be."""
    from matplotlib.figure import Figure as Picture

    ratios = [figure for figure in figures if figure.unit == "×" and figure.goal][::-1]
    picture = Picture(figsize=(8, 0.45 * len(ratios) + 1), layout="constrained")
    axes = picture.subplots()
    colours = ["#2a78d6" if figure.is_met else "#d1495b" for figure in ratios]
    axes.barh([f"{f.topic}: {f.name}" for f in ratios], [f.value for f in ratios], color=colours, height=0.6)
    for place, figure in enumerate(ratios):
        bound = figure.at_least if figure.at_least is not None else figure.at_most or 1.0
        axes.plot([bound, bound], [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.annotate(f" {figure.value:.3g}×, goal {figure.goal}", (figure.value, place), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
