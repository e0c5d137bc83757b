"""Base against tuned, at the end of a run and again from its folder: the one place where the test split is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.data.audit import audit_splits
from lora_ft.data.prepare import build_splits
from lora_ft.data.splits import Splits
from lora_ft.errors import RunFailed, UserError, raise_faults
from lora_ft.evaluation.curves import read_log, trace_curves
from lora_ft.evaluation.metrics import check_metrics
from lora_ft.export.adapter import refuse_changed, unfinished_run
from lora_ft.libraries import load_libraries, quiet_libraries
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_tokenizer
from lora_ft.recipe import load_recipe
from lora_ft.sections import Recipe
from lora_ft.training.identity import find_changes
from lora_ft.training.run_folder import MANIFEST, read_manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
}


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Base against tuned for a run on disk: the same rows, settings and figures as at the end of its training.

    Raises:
        UserError: `folder` is no run, or its adapter, base or data are no longer what they were.
    """
    from lora_ft.evaluation.page import write_page
    from lora_ft.tasks import read_base

    quiet_libraries()
    recipe, manifest = load_recipe(folder / "recipe.yaml"), read_manifest(folder)
    if manifest is None:
        raise UserError(str(folder), None, f"It holds no {MANIFEST} of a run.", "Name the folder of a run.")
    if not (folder / "adapter").is_dir():
        raise unfinished_run(folder)
    refuse_changed(folder / "adapter")
    raise_faults(check_metrics(recipe.evaluation.metrics))
    base = find_base(recipe.model.base, manifest["base"]["revision"], recipe.model.trust_remote_code)
    load_libraries("datasets")
    tokenizer = load_tokenizer(base.folder, recipe.model, recipe.data.chat_template)
    splits = build_splits(recipe.data, tokenizer)
    raise_faults(find_changes(folder, manifest, base.fingerprint, splits.fingerprint))
    model = read_base(recipe, base, tokenizer, splits)
    task, seed = recipe.data.task, recipe.training["seed"]  # the head of the base alone is drawn from it
    model = attach_adapter(model, None, task=task, seed=seed, adapter=str(folder / "adapter"))
    figures = evaluate_model(model, tokenizer, splits, replace(recipe, output_dir=folder), manifest)
    write_page(folder)
    return figures


def evaluate_model(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, splits: Splits, recipe: Recipe, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Base against tuned on the test split, which is read here and nowhere else, and the verdict on the run.

    Manifests of older runs do not say which step was kept; it is taken for the one with the lowest validation loss.
    """
    from lora_ft.evaluation.report import write_report
    from lora_ft.evaluation.verdict import Evidence
    from lora_ft.tasks import TASKS

    started = time.perf_counter()
    compared = TASKS[recipe.data.task].compare(model, tokenizer, splits, recipe)
    if recipe.model.adapter is not None:
        note = "The base has no adapter on it: what model.adapter had learned before is part of the difference."
        compared = replace(compared, notes=(*compared.notes, note))
    curves = trace_curves(read_log(recipe.output_dir))
    audit = audit_splits(splits, recipe.data, tokenizer)
    lowest = curves.lowest if recipe.training.get("load_best_model_at_end") else None
    kept_step = manifest.get("kept_step", lowest.step if lowest else None)
    evidence = Evidence(curves, compared, audit, kept_step)
    return write_report(evidence, recipe.output_dir, time.perf_counter() - started)


def evaluate_in_new_process(folder: Path) -> dict[str, Any]:
    """`lora-ft evaluate` on the run, outside the launcher."""
    environment = {
        k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("ACCELERATE_")
    }
    command = [sys.executable, "-m", "lora_ft", "evaluate", str(folder), "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        rule = f"The evaluation in a process of its own ended with exit code {done.returncode}."
        raise RunFailed(str(folder), None, rule, f"The adapter is whole. Try: lora-ft evaluate {folder}")
    return json.loads(done.stdout)
