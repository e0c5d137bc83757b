"""What a finished run says to a person: what was done, the numbers, where everything lies, and what to try next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_ft.model.planning import RecipePlan
from lora_ft.run import RunResult

LIES_THERE = {
    "adapter": "the adapter, as PeftModel.from_pretrained reads it",
    "merged": "base and adapter in one, as transformers.pipeline reads it",
    "report": "every figure, and every answer beside its reference",
    "recipe.yaml": "the recipe as it was run, with what was chosen for this machine",
    "run.json": "versions, fingerprints, figures, and every file's hash",
}


def print_summary(result: RunResult) -> None:
    """The end of `lora-ft train`, on stdout."""
    console, manifest = Console(highlight=False), result.manifest
    training = manifest["training"]
    console.print(
        f"\n[bold]trained[/] {manifest['trainable_parameters']:,} parameters on {manifest['base']['name']}"
        f" in {training['train_runtime']:.0f} s, mean loss {training['train_loss']:.3f}"
    )
    console.print(f"[bold]verified[/] {_last_detail(manifest['verification'])}")
    if manifest["evaluation"]:
        print_scores(manifest["evaluation"], console)
    if merge := manifest["export"].get("merge"):
        proof = merge["proof"]
        console.print(
            f"[bold]merged[/] as {merge['dtype']}: logits within {proof['max_logit_difference']:.1e} of base + adapter,"
            f" {proof['greedy_agreement']:.0%} of greedy answers alike"
        )
    folder = Path(result.folder)
    console.print(f"\n[bold]{_shorten(folder)}/[/]")
    for name, meaning in LIES_THERE.items():
        if (folder / name).exists():
            console.print(f"  {name:12} {meaning}")
    console.print(f"\nnext: [bold]lora-ft chat {_shorten(folder)} --base[/]")


def print_scores(figures: dict[str, Any], console: Console | None = None) -> None:
    """Base against tuned as a table."""
    console = console or Console(highlight=False)
    base, tuned = figures["base"], figures["tuned"]
    table = Table(title=f"test split, {base['num_supervised_tokens']:,} supervised tokens", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    table.add_row("perplexity", f"{base['perplexity']:.2f}", f"{tuned['perplexity']:.2f}")
    table.add_row("token accuracy", f"{base['token_accuracy']:.1%}", f"{tuned['token_accuracy']:.1%}")
    for name, value in base["metrics"].items():
        table.add_row(f"{name}, {base['num_answers']} answers", f"{value:.1%}", f"{tuned['metrics'][name]:.1%}")
    console.print(table)


def print_plan(planned: RecipePlan) -> None:
    """The memory of a step by cause, and what would make it fit."""
    console, plan = Console(highlight=False), planned.plan
    recipe = planned.recipe.training
    rows = recipe.get("per_device_train_batch_size", 8)
    table = Table(
        title=f"memory of a step, {rows} rows of {planned.recipe.data.max_length} tokens", title_justify="left"
    )
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
        console.print(f"fits with: {change}", soft_wrap=True)


def _last_detail(verification: dict[str, Any]) -> str:
    """The finding that says most: the adapter's answers after a reload in a fresh process."""
    return str(verification["findings"][-1]["detail"])


def _shorten(folder: Path) -> str:
    """The folder relative to the working folder where that is shorter."""
    try:
        return folder.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(folder)
