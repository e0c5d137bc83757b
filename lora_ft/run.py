"""The way from a recipe to a verified adapter; `run_recipe` reads like a table of contents."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.data.audit import AuditReport, audit_splits
from lora_ft.data.check import check_section
from lora_ft.data.prepare import build_splits, check_data
from lora_ft.data.render import IGNORE_INDEX
from lora_ft.data.splits import Splits
from lora_ft.errors import RunFailed, UserError, raise_faults
from lora_ft.evaluation.curves import read_log, trace_curves
from lora_ft.evaluation.general import prepare_general
from lora_ft.evaluation.metrics import check_metrics
from lora_ft.export.adapter import unfinished_run
from lora_ft.export.base import refuse_other_base
from lora_ft.export.fresh import process_ahead
from lora_ft.fingerprint import BaseIdentity, hash_tensors
from lora_ft.libraries import load_libraries, quiet_libraries
from lora_ft.model.adapter import TASK_TYPES, TENSORS_NAME, attach_adapter, count_trainable, load_weights
from lora_ft.model.load import find_base, find_config, load_base, load_tokenizer
from lora_ft.model.machine import Machine, choose_settings, peak_memory_bytes, probe_machine, settle_validation
from lora_ft.model.planning import RecipePlan, plan_memory, refuse_unfit
from lora_ft.model.stored import check_export, check_tokens
from lora_ft.recipe import load_recipe
from lora_ft.recipe_rules import EARLY_STOPPING, LORAPLUS
from lora_ft.sections import Recipe
from lora_ft.training.distributed import (
    Launch,
    check_launch,
    describe_hardware,
    end_sharding,
    read_launch,
    settle_launch,
)
from lora_ft.training.identity import find_changes
from lora_ft.training.run_folder import (
    MANIFEST,
    RunFolder,
    check_run_folder,
    check_space,
    claim_run_folder,
    read_manifest,
    refuse_unwritable,
    write_manifest,
)
from lora_ft.training.steering import check_reach, check_steering
from lora_ft.training.trackers import check_trackers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_ft.training.trainer import LoraTrainer

NUM_SAMPLES, SAMPLE_TOKENS = 4, 64
"""Prompts whose logits are recorded with the adapter, and the length of those that go on, for a later reload to be held
against."""

LAUNCHER_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
}

LIBRARIES = ("lora-ft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    """The run's folder."""
    manifest: dict[str, Any]
    """The content of its `run.json`."""


@process_ahead()
def run_recipe(
    recipe: Recipe, *, fresh: bool = False, warm_start: bool = False, quiet: bool = False
) -> RunResult | None:
    """The recipe, run to its end; None on every rank but the first. An unfinished run in its folder is gone on with.

    `fresh` removes what an older run left; `warm_start` does too, but for its weights, which the new run starts from.

    Raises:
        UserError: something the user must change; raised before training, and before anything is written.
        Interrupted: a signal ended it after a checkpoint was saved.
        RunFailed: the run broke a promise, for instance the saved adapter does not reproduce the trained one.
    """
    quiet_libraries()
    launch, machine = read_launch(), probe_machine()
    recipe = settle_recipe(recipe, machine, launch)
    refuse_unwritable(recipe.output_dir)
    base = find_base(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    load_libraries("datasets", "trl.trainer.sft_trainer")
    tokenizer = load_tokenizer(base.folder, recipe.model, recipe.data.chat_template)
    splits = build_splits(recipe.data, tokenizer)
    prepare_general(recipe.evaluation, recipe.data, tokenizer)
    planned = fit_recipe(recipe, base.folder, tokenizer, splits, machine, launch)
    recipe = planned.recipe
    run = check_run_folder(
        recipe,
        base.fingerprint,
        splits.fingerprint,
        processes=launch.world_size,
        strategy=launch.strategy,
        fresh=fresh,
        warm=warm_start,
    )
    trainer = prepare_trainer(recipe, base, tokenizer, splits, warm_start=run.warm_start, quiet=quiet)
    check_space(run, recipe, count_trainable(trainer.model), base.num_bytes)
    manifest = describe_run(recipe, base, splits, launch) | {
        "trainable_parameters": count_trainable(trainer.model),
        "memory": planned.to_json(),
    }
    with claim_run_folder(run, recipe, manifest) if launch.rank == 0 else contextlib.nullcontext():
        trainer.accelerator.wait_for_everyone()
        return finish_run(trainer, tokenizer, splits, base, recipe, run, launch, manifest)


def finish_run(
    trainer: LoraTrainer,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    base: BaseIdentity,
    recipe: Recipe,
    run: RunFolder,
    launch: Launch,
    manifest: dict[str, Any],
) -> RunResult | None:
    """Training, and what is made of it, in a folder that is ours; None on every rank but the first."""
    from lora_ft.evaluation.live import LivePage
    from lora_ft.evaluation.page import write_page

    if launch.rank == 0:
        tell_resume(run)
        trainer.add_callback(LivePage(run.path))
    outcome = trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    adapter = save_trained(trainer, tokenizer, splits, base, recipe)
    if launch.rank != 0:
        return None
    manifest["training"] = outcome.metrics
    manifest["memory"]["measured_peak_bytes"] = peak_memory_bytes(probe_machine())
    manifest["adapter_sha256"] = hash_tensors(adapter / TENSORS_NAME)
    manifest["verification"] = verify_saved(adapter, recipe.model.trust_remote_code)
    manifest["kept_step"] = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    write_manifest(run, "training", manifest)  # a process of its own may evaluate, and reads it
    manifest["evaluation"] = evaluate_trained(trainer, tokenizer, splits, recipe, launch, manifest)
    write_page(run.path)  # there already, should the export fail
    manifest["export"] = export_run(adapter, recipe, run, manifest)
    write_page(run.path)
    return RunResult(run.path, write_manifest(run, "finished", manifest))


def tell_resume(run: RunFolder) -> None:
    """Says on stderr where a run goes on or starts from, and which settings have changed meanwhile."""
    if run.resume_from is not None:
        print(f"going on from {run.resume_from}", file=sys.stderr)
    elif run.warm_start is not None:
        print(f"starting from the weights in {run.warm_start}", file=sys.stderr)
    for note in run.notes:
        print(f"  {note}", file=sys.stderr)


def settle_recipe(recipe: Recipe, machine: Machine, launch: Launch) -> Recipe:
    """The recipe with all open settings chosen for this machine and launch; what cannot work is refused here."""
    if recipe.model.trust_remote_code:
        print(f"model.trust_remote_code: Python code beside {recipe.model.base} may run here", file=sys.stderr)
    if machine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, prints a warning
    check_metrics(recipe.evaluation.metrics)
    check_section(recipe.data)
    recipe = settle_launch(choose_settings(recipe, machine), launch)
    raise_faults(check_trackers(recipe.training))
    check_launch(launch, recipe)
    return recipe


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
    check_tokens(recipe, base_folder, tokenizer, splits)
    refuse_unfit(planned)
    return planned


def prepare_trainer(
    recipe: Recipe,
    base: BaseIdentity,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    *,
    warm_start: Path | None = None,
    quiet: bool = False,
) -> LoraTrainer:
    """Base, adapter and trainer. The arguments come first: under ZeRO-3 they say how the base is read."""
    from lora_ft.tasks import TASKS

    steps, arguments = TASKS[recipe.data.task], build_arguments(recipe, len(splits.train))
    if recipe.model.adapter is not None:
        refuse_other_base(Path(recipe.model.adapter), base, TASK_TYPES[recipe.data.task])
    model = read_base(recipe, base, tokenizer, splits)
    model = attach_adapter(
        model,
        recipe.lora,
        task=recipe.data.task,
        seed=recipe.training["seed"],
        adapter=recipe.model.adapter,
        base_folder=base.folder,
    )
    if warm_start is not None:
        load_weights(model, warm_start)
    return steps.build_trainer(
        model,
        tokenizer,
        splits.train,
        splits.validation,
        arguments,
        loraplus_ratio=(recipe.lora or {}).get(LORAPLUS),
        patience=recipe.training.get(EARLY_STOPPING),
        guards=recipe.guards,
        name_row=lambda number: splits.examples("train")[number].place,
        quiet=quiet or bool(recipe.training.get("disable_tqdm")),
    )


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


def read_base(
    recipe: Recipe, base: BaseIdentity, tokenizer: PreTrainedTokenizerBase, splits: Splits
) -> PreTrainedModel:
    """The base as the model of the recipe's task, with a head for the classes of the data where it is to tell them."""
    task, labels = recipe.data.task, splits.report.labels
    return load_base(
        base, recipe.model, recipe.quantization, task=task, labels=labels, pad_token_id=tokenizer.pad_token_id
    )


def describe_run(recipe: Recipe, base: BaseIdentity, splits: Splits, launch: Launch) -> dict[str, Any]:
    """What `run.json` says of a run before its first step."""
    machine = probe_machine()
    return {
        "task": recipe.data.task,
        "base": {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
        "data": splits.report.to_json(),
        "choices": [{"key": c.key, "value": c.value, "reason": c.reason} for c in recipe.choices],
        "machine": {"device": machine.device, "name": machine.name, "processes": launch.world_size},
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in LIBRARIES}},
    }


def save_trained(
    trainer: LoraTrainer, tokenizer: PreTrainedTokenizerBase, splits: Splits, base: BaseIdentity, recipe: Recipe
) -> Path:
    """The folder of the adapter, written by the first rank.

    Every rank takes part in gathering the weights and in answering the prompts whose logits go with them.
    """
    from lora_ft.export.samples import record_samples
    from lora_ft.export.save import save_adapter
    from lora_ft.training.gather import gather_adapter

    folder = recipe.output_dir / "adapter"
    model = bare_model(trainer)
    held_out = next(rows for rows in (splits.test, splits.validation, splits.train) if len(rows))
    prompts = [question_of(row) for row in held_out.select(range(min(NUM_SAMPLES, len(held_out))))]
    recorded = record_samples(model, prompts)
    state_dict = gather_adapter(trainer)
    if trainer.is_world_process_zero():
        save_adapter(
            model,
            tokenizer,
            folder,
            base=base,
            state_dict=state_dict,
            recorded=recorded,
            template_kwargs=recipe.data.template_kwargs,
        )
    end_sharding()
    return folder


def question_of(row: dict[str, Any]) -> list[int]:
    """What a row asks: its tokens up to where supervision starts, or the first few; all where labels lie elsewhere."""
    if not isinstance(row["labels"], list) or len(row["labels"]) != len(row["input_ids"]):
        return row["input_ids"]
    start = next((place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX), 0)
    return row["input_ids"][:start][-SAMPLE_TOKENS:] if start > 1 else row["input_ids"][:SAMPLE_TOKENS]


def bare_model(trainer: LoraTrainer) -> PeftModel:
    """The trained model without what the trainer wrapped around it, mixed precision included.

    Autocast would round the adapter's products to 16 bit; a reload, which has none, would differ in the third digit.
    """
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def verify_saved(adapter: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a fresh process found when it reopened the adapter.

    Raises:
        RunFailed: it is not the adapter that was trained.
    """
    from lora_ft.export.verify import verify_folder

    report = verify_folder(adapter, trust_remote_code=trust_remote_code)
    faults = [f"{finding.name}: {finding.detail}" for finding in report.findings if not finding.ok]
    if faults:
        rule = "The saved adapter is not the one that was trained."
        raise RunFailed(
            str(adapter), "; ".join(faults), rule, "Nothing was published. Check the disk, then train again."
        )
    return report.to_json()


def evaluate_trained(
    trainer: LoraTrainer,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    recipe: Recipe,
    launch: Launch,
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Base against tuned on the test split, and the verdict, written to `report/`.

    Several ranks have gone their ways by now, so the first one starts a process of its own for it, which reads the
    adapter from disk.
    """
    if launch.world_size > 1:
        return evaluate_in_new_process(recipe.output_dir)
    return evaluate_model(bare_model(trainer), tokenizer, splits, recipe, manifest)


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Base against tuned for a run on disk: the same rows, settings and figures as at the end of its training.

    Raises:
        UserError: `folder` is no run, or its base or data are no longer what they were.
    """
    from lora_ft.evaluation.page import write_page

    quiet_libraries()
    recipe, manifest = load_recipe(folder / "recipe.yaml"), read_manifest(folder)
    if manifest is None:
        raise UserError(str(folder), None, f"It holds no {MANIFEST} of a run.", "Name the folder of a run.")
    if not (folder / "adapter").is_dir():
        raise unfinished_run(folder)
    check_metrics(recipe.evaluation.metrics)
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


def export_run(adapter: Path, recipe: Recipe, run: RunFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the recipe's `export` section asks for, made of the verified adapter; the cards tell of the whole run."""
    from lora_ft.export.card import write_run_cards
    from lora_ft.export.hub import push_folder
    from lora_ft.export.merge import merge_adapter

    done: dict[str, Any] = {}
    trusted = recipe.model.trust_remote_code
    if recipe.export.merge:
        merged = run.path / "merged"
        report = merge_adapter(adapter, merged, dtype=recipe.export.dtype, trust_remote_code=trusted)
        done["merge"] = {"dtype": report.dtype, "proof": report.to_json()["proof"], "seconds": report.merge_seconds}
    write_manifest(run, "training", manifest)
    write_run_cards(run.path)
    if recipe.export.push_to is not None:
        done["push"] = asdict(push_folder(adapter, recipe.export.push_to, trust_remote_code=trusted))
    return done
