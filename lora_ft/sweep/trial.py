"""One trial of a sweep: a short run that ends with its validation loss, and never looks at the test split."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from lora_ft.data.cache import fingerprint_data
from lora_ft.data.prepare import build_splits
from lora_ft.data.sources import find_source
from lora_ft.errors import UserError
from lora_ft.libraries import quiet_libraries
from lora_ft.model.load import find_base, load_tokenizer
from lora_ft.model.machine import probe_machine, release_memory
from lora_ft.recipe_rules import EARLY_STOPPING, library_part
from lora_ft.run import prepare_trainer
from lora_ft.sections import Recipe
from lora_ft.settle import fit_recipe, settle_recipe
from lora_ft.training.distributed import read_launch

Report = Callable[[int, float], bool]
"""(number of the evaluation, validation loss) → whether the trial is to end here."""
CheckInputs = Callable[[str, str], None]
"""(fingerprint of the base, fingerprint of the data) → nothing, or a UserError."""
FOR_TRIALS = {"save_strategy": "no", "report_to": "none", "load_best_model_at_end": False}
"""A trial leaves no weights: the best recipe is trained again."""


class PruningCallback(TrainerCallback):
    """Tells each validation loss, and ends the training when told to."""

    def __init__(self, report: Report):
        self._report, self.losses, self.is_pruned = report, list[float](), False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.losses.append(metrics["eval_loss"])
        if self._report(len(self.losses), self.losses[-1]):
            self.is_pruned = control.should_training_stop = True


def run_trial(recipe: Recipe, report: Report, check_inputs: CheckInputs) -> float | None:
    """The validation loss of the adapter that this recipe would leave; None where the trial was ended early.

    Under `load_best_model_at_end` that is the lowest, otherwise the last.

    Raises:
        UserError: the recipe has no validation rows, never evaluates, or is refused when its parts are built, or
            `check_inputs` refuses its base or its data, before anything is trained.
    """
    quiet_libraries()
    keeps_best = bool(recipe.training.get("load_best_model_at_end") or EARLY_STOPPING in recipe.training)
    launch, machine = read_launch(), probe_machine()
    recipe = settle_recipe(replace(recipe, training={**library_part(recipe.training), **FOR_TRIALS}), machine, launch)
    base = find_base(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    tokenizer = load_tokenizer(base.folder, recipe.model, recipe.data.chat_template)
    unpacked = replace(recipe.data, packing=False)  # the one key of the section that trials may differ in
    sources = [find_source(source) for source in unpacked.sources]
    check_inputs(base.fingerprint, fingerprint_data(sources, unpacked, tokenizer))
    splits = build_splits(recipe.data, tokenizer)
    splits = replace(splits, test=splits.test.select([]))
    recipe = fit_recipe(recipe, base.folder, tokenizer, splits, machine, launch).recipe
    if recipe.training["eval_strategy"] == "no":
        rule = "A sweep steers by validation rows, and there are none, or they are never evaluated."
        raise UserError("training.eval_strategy", "no", rule, "Give validation rows, and remove this key.")
    shutil.rmtree(recipe.output_dir, ignore_errors=True)
    recipe.output_dir.mkdir(parents=True)
    pruning = PruningCallback(report)
    trainer = prepare_trainer(recipe, base, tokenizer, splits, quiet=True)
    trainer.add_callback(pruning)
    try:
        trainer.train()
    finally:
        del trainer
        release_memory()
    if pruning.is_pruned:
        return None
    if not pruning.losses:
        rule = "No evaluation happened: training ended before the first one was due."
        raise UserError("training.eval_steps", recipe.training.get("eval_steps"), rule, "Lower training.eval_delay.")
    return min(pruning.losses) if keeps_best else pruning.losses[-1]
