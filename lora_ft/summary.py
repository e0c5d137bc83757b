"""What a finished run says to a person: what was done, the numbers, where everything lies, and what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_ft.recipe import load_recipe

if TYPE_CHECKING:
    from lora_ft.evaluation.side_by_side import ComparedRun
    from lora_ft.model.planning import RecipePlan
    from lora_ft.run import RunResult
    from lora_ft.sweep.study import SweepResult

LIES_THERE = {
    "adapter": "the adapter, as PeftModel.from_pretrained reads it",
    "merged": "base and adapter in one, as transformers.pipeline reads it",
    "report": "report.html for a browser, every figure, and every answer beside its reference",
    "recipe.yaml": "the recipe as it was run, with what was chosen for this machine",
    "run.json": "versions, fingerprints, figures, and every file's hash",
}

MOST_CLASSES = 10
"""Classes of which a terminal shows each against each."""


def print_summary(result: RunResult) -> None:
    """The end of `lora-ft train`, on stdout."""
    console, manifest = Console(highlight=False), result.manifest
    training = manifest["training"]
    console.print(
        f"\n[bold]trained[/] {manifest['trainable_parameters']:,} parameters on {escape(manifest['base']['name'])}"
        f" in {training['train_runtime']:.0f} s, mean loss {training['train_loss']:.3f}"
    )
    console.print(f"[bold]verified[/] {escape(_last_detail(manifest['verification']))}")
    print_scores(manifest["evaluation"], console)
    if merge := manifest["export"].get("merge"):
        proof, alike = merge["proof"], merge["proof"]["greedy_agreement"]
        answers = "" if alike is None else f", {alike:.0%} of greedy answers alike"
        within = f"logits within {proof['max_logit_difference']:.1e} of base + adapter"
        console.print(f"[bold]merged[/] as {merge['dtype']}: {within}{answers}")
    folder = Path(result.folder)
    console.print(f"\n[bold]{escape(_shorten(folder))}/[/]")
    for name, meaning in LIES_THERE.items():
        if (folder / name).exists():
            console.print(f"  {name:12} {meaning}")
    console.print(f"\nnext: [bold]{escape(_next_command(result))}[/]")


def print_scores(evaluation: dict[str, Any], console: Console | None = None) -> None:
    """The verdict, and base against tuned as a table, with the interval that resampled rows leave the difference in."""
    console = console or Console(highlight=False)
    verdict = evaluation["verdict"]
    for number, finding in enumerate(verdict["findings"]):
        console.print(f"[bold]{'also' if number else 'verdict'}[/] {finding['name']}: {escape(finding['because'])}")
        console.print(f"  next: {escape(finding['advice'])}", style="dim")
    if evaluation["figures"]:
        console.print(_tabulate_figures(evaluation))
    for note in evaluation.get("notes", ()):
        console.print(f"[bold]note[/] {escape(note)}")
    if evaluation.get("splits"):
        print_classes(evaluation, console)


def _tabulate_figures(evaluation: dict[str, Any]) -> Table:
    unit = "rows" if "confusion" in evaluation else "supervised tokens"
    title = f"test split, {evaluation['num_supervised_tokens']:,} {unit}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "rows", "base", "tuned", "difference", "95% interval"):
        table.add_column(column, justify="right" if column else "left")
    figures = evaluation["figures"] | ({"general text loss": g} if (g := evaluation["general"]) else {})
    for name, figure in figures.items():
        unit, difference = figure["unit"], figure["difference"]
        values = (show_value(figure[column]["value"], unit) for column in ("base", "tuned"))
        low, high = (show_value(difference[part], unit, "+") for part in ("low", "high"))
        change = show_value(difference["value"], unit, "+")
        table.add_row(escape(name.replace("_", " ")), f"{figure['num_rows']:,}", *values, change, f"{low} to {high}")
    return table


def print_classes(evaluation: dict[str, Any], console: Console) -> None:
    """How often a classifier is right on every split, and on the test split what it took for what, if there is one."""
    shares = [
        f"{name} {scores['accuracy']:.1%} of {scores['num_rows']}" for name, scores in evaluation["splits"].items()
    ]
    console.print(f"[bold]right[/] {', '.join(shares)}")
    if constant := evaluation.get("constant"):
        share = constant["accuracy"]["base"]["value"]
        console.print(f"always “{escape(constant['label'])}” would be right on {share:.1%} of the test rows")
    labels, confusion = [escape(label) for label in evaluation["labels"]], evaluation["confusion"]
    if confusion:
        print_table = print_confusion if len(labels) <= MOST_CLASSES else print_confusions
        print_table(labels, confusion, console)


def print_confusion(labels: Sequence[str], confusion: Sequence[Sequence[int]], console: Console) -> None:
    """Each class against each."""
    table = Table(title="test split: rows of a class (down) by the class chosen (across)", title_justify="left")
    for name in ("", *labels):
        table.add_column(name, justify="right" if name else "left")
    for label, counts in zip(labels, confusion, strict=True):
        table.add_row(label, *map(str, counts))
    console.print(table)


def print_confusions(labels: Sequence[str], confusion: Sequence[Sequence[int]], console: Console) -> None:
    """Which of many classes were taken for which most often; the whole table is on the page."""
    pairs = [
        (count, labels[wanted], labels[chosen])
        for wanted, counts in enumerate(confusion)
        for chosen, count in enumerate(counts)
        if count and wanted != chosen
    ]
    table = Table(title=f"test split: taken for another of {len(labels)} classes most often", title_justify="left")
    for name in ("rows", "of class", "taken for"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for count, wanted, chosen in sorted(pairs, key=lambda pair: -pair[0])[:MOST_CLASSES]:
        table.add_row(str(count), wanted, chosen)
    if pairs:
        console.print(table)


def print_plan(planned: RecipePlan) -> None:
    """The memory of a step by cause, and what would make it fit."""
    console, plan, work = Console(highlight=False), planned.plan, planned.work
    title = f"memory of a step, {work.batch_size} rows of up to {work.length} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("cause")
    table.add_column("MiB", justify="right")
    table.add_column("")
    for cause in plan.causes:
        table.add_row(cause.name, f"{cause.num_bytes / 2**20:,.0f}", cause.note)
    verdict = "fits in" if plan.fits else "does not fit in"
    table.add_section()
    table.add_row("peak", f"{plan.peak_bytes / 2**20:,.0f}", f"{verdict} {plan.limit_bytes / 2**20:,.0f} MiB")
    console.print(table)
    for change in planned.changes:
        console.print(f"fits with: {escape(str(change))}", soft_wrap=True)


def print_runs(runs: Sequence[ComparedRun]) -> None:
    """Runs side by side as a table; differing settings above, figures of the tuned models below."""
    console = Console(highlight=False)
    table = Table(title="tuned, on the test split", title_justify="left")
    for column in ("", *(escape(run.name) for run in runs)):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for key in runs[0].settings:
        table.add_row(key, *(escape(str(run.settings[key])) for run in runs), style="dim")
    table.add_row("verdict", *(run.verdict for run in runs))
    table.add_row("trained parameters", *(f"{run.num_parameters:,}" for run in runs))
    table.add_row("seconds", *("–" if run.train_seconds is None else f"{run.train_seconds:.0f}" for run in runs))
    for name in dict.fromkeys(name for run in runs for name in run.figures):
        found = [run.figures.get(name) for run in runs]
        table.add_row(
            escape(name.replace("_", " ")), *(show_estimate(f["tuned"], f["unit"]) if f else "–" for f in found)
        )
    if any(run.general for run in runs):
        found = [run.general for run in runs]
        cells = (show_estimate(f["difference"], f["unit"], "+") if f else "–" for f in found)
        table.add_row("general text, change", *cells)
    console.print(table)
    if len({run.data for run in runs}) > 1:
        console.print("These runs had different data, so their figures are of different test rows.")


def print_sweep(result: SweepResult) -> None:
    """Trials, the best first, and where the best recipe lies."""
    console = Console(highlight=False)
    table = Table(title="trials by validation loss", title_justify="left")
    keys = dict.fromkeys(key for trial in result.trials for key in trial.settings)
    for column in ("trial", "loss", *keys, ""):
        table.add_column(column, justify="right")
    for trial in sorted(result.trials, key=lambda trial: (trial.state != "complete", trial.loss or 0.0)):
        loss = f"{trial.loss:.4f}" if trial.loss is not None else "–"
        state = {"complete": "", "pruned": "ended early"}.get(trial.state, trial.state)
        table.add_row(str(trial.number), loss, *(escape(_show_setting(trial.settings.get(key))) for key in keys), state)
    console.print(table)
    if result.best is not None:
        console.print(f"next: [bold]lora-ft train {escape(shlex.quote(_shorten(result.folder / 'best.yaml')))}[/]")


def _show_setting(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_estimate(estimate: dict[str, float], unit: str, sign: str = "") -> str:
    """`12.3% [10.1%, 14.0%]`."""
    value, low, high = (show_value(estimate[part], unit, sign) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def show_value(value: float, unit: str, sign: str = "") -> str:
    """`12.3%` of a share, `0.123` nats, or a number to four digits."""
    if unit == "share":
        return f"{value * 100:{sign}.1f}%"
    return f"{value:{sign}.3f}" if unit == "nats" else f"{value:{sign}.4g}"


def _last_detail(verification: dict[str, Any]) -> str:
    """The finding that says most: the adapter's answers after a reload in a fresh process."""
    return str(verification["findings"][-1]["detail"])


def _next_command(result: RunResult) -> str:
    """What one would try first: to talk to a model that talks, or to look again at what was checked."""
    can_chat = load_recipe(result.folder / "recipe.yaml").data.task == "sft"
    folder = _shorten(result.folder)
    return shlex.join(["lora-ft", "chat", folder, "--base"] if can_chat else ["lora-ft", "verify", folder])


def _shorten(folder: Path) -> str:
    """The folder relative to the working folder where that is shorter."""
    try:
        return folder.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(folder)
