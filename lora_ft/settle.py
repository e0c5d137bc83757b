"""A recipe as this machine, this launch, its base and its data allow it; no weight is read.

What cannot work is refused here, before a run writes anything.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.data.audit import AuditReport
from lora_ft.data.check import check_section
from lora_ft.data.prepare import check_data
from lora_ft.data.splits import Splits
from lora_ft.errors import raise_faults
from lora_ft.evaluation.general import prepare_general
from lora_ft.evaluation.metrics import check_metrics
from lora_ft.libraries import load_libraries, quiet_libraries
from lora_ft.model.load import find_config, load_tokenizer
from lora_ft.model.machine import Machine, check_machine, choose_settings, settle_validation
from lora_ft.model.planning import AUTO, RecipePlan, plan_memory, refuse_unfit
from lora_ft.model.stored import check_export, check_tokens, describe_reach
from lora_ft.sections import Recipe
from lora_ft.training.distributed import Launch, check_launch, describe_hardware, settle_launch
from lora_ft.training.steering import check_reach, check_steering
from lora_ft.training.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANY_ROWS = 10**9
"""So many that no setting is out of reach."""


def settle_recipe(recipe: Recipe, machine: Machine, launch: Launch) -> Recipe:
    """The recipe with all open settings chosen for this machine and launch; what cannot work is refused here."""
    if recipe.model.trust_remote_code:
        print(f"model.trust_remote_code: Python code beside {recipe.model.base} may run here", file=sys.stderr)
    if machine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, prints a warning
    raise_faults(
        [
            *check_section(recipe.data),
            *check_trackers(recipe.training),
            *check_metrics(recipe.evaluation.metrics),
            *check_machine(recipe, machine),
        ]
    )
    recipe = settle_launch(choose_settings(recipe, machine), launch)
    check_launch(launch, recipe)
    return recipe


def fit_recipe(
    recipe: Recipe,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    machine: Machine,
    launch: Launch,
) -> RecipePlan:
    """The settled recipe as its base, its data and the machine's memory allow it, with the plan of its largest step.

    Raises:
        UserError: it evaluates on rows that are not there, steers by what nothing measures, wants made of the adapter
            what cannot be, has tokens that the base does not know, or a step does not fit.
    """
    recipe = settle_validation(recipe, len(splits.validation))
    raise_faults([*check_steering(recipe), *check_export(recipe, base_folder)])
    planned = plan_memory(recipe, base_folder, describe_hardware(machine, launch), splits.longest_row)
    check_launch(launch, planned.recipe)  # once more: a batch size may have been chosen
    check_tokens(recipe, base_folder, tokenizer, splits)
    remark = None if recipe.data.packing else describe_reach(recipe, base_folder, splits.longest_row)
    if remark and launch.rank == 0:
        print(remark, file=sys.stderr)
    refuse_unfit(planned)
    return planned


def build_arguments(recipe: Recipe, num_rows: int) -> Any:
    """The trainer's arguments of a settled recipe, from which a training over so many rows can start.

    Raises:
        UserError: the library refuses them, or would at the first step.
    """
    from lora_ft.tasks import TASKS
    from lora_ft.training.rehearsal import refuse_unstartable

    arguments = TASKS[recipe.data.task].build_arguments(recipe.training, recipe.output_dir)
    refuse_unstartable(arguments, num_rows)
    raise_faults(check_reach(arguments, num_rows))
    return arguments


def check_arguments(recipe: Recipe) -> None:
    """Nothing, if a training with these settings can start, however many rows there will be.

    Raises:
        UserError: the library refuses them, or would at the first step.
    """
    sizes = {"per_device_train_batch_size": 1} if recipe.training.get("per_device_train_batch_size") == AUTO else {}
    build_arguments(replace(recipe, training={**recipe.training, **sizes}), MANY_ROWS)


def check_recipe(recipe: Recipe, machine: Machine, launch: Launch) -> tuple[RecipePlan, AuditReport]:
    """What a settled recipe would take of the machine, and what is to be known of its data before it is trained on.

    Raises:
        UserError: a step does not fit, or the data cannot be used.
    """
    quiet_libraries()
    folder = find_config(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    load_libraries("datasets")
    tokenizer = load_tokenizer(folder, recipe.model, recipe.data.chat_template)
    splits, audit = check_data(recipe.data, tokenizer)
    prepare_general(recipe.evaluation, recipe.data, tokenizer)
    planned = fit_recipe(recipe, folder, tokenizer, splits, machine, launch)
    build_arguments(planned.recipe, len(splits.train))
    return planned, audit


def plan_recipe(recipe: Recipe, machine: Machine, launch: Launch) -> RecipePlan:
    """The memory plan of a settled recipe; neither weights nor data are looked at, nor fetched."""
    quiet_libraries()
    folder = find_config(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    load_libraries()
    return plan_memory(recipe, folder, describe_hardware(machine, launch))


def find_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe's base, with its chat template or the recipe's; no weights are fetched."""
    quiet_libraries()
    folder = find_config(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    return load_tokenizer(folder, recipe.model, recipe.data.chat_template)
