"""The way from a recipe to a verified adapter; `run_recipe` reads like a table of contents."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ft.data.prepare import build_splits
from lora_ft.data.render import IGNORE_INDEX
from lora_ft.data.splits import Splits
from lora_ft.errors import RunFailed
from lora_ft.evaluate import evaluate_in_new_process, evaluate_model
from lora_ft.evaluation.general import prepare_general
from lora_ft.export.base import refuse_other_base
from lora_ft.export.fresh import process_ahead
from lora_ft.fingerprint import BaseIdentity, hash_tensors
from lora_ft.libraries import load_libraries, quiet_libraries
from lora_ft.model.adapter import TASK_TYPES, TENSORS_NAME, attach_adapter, count_trainable, load_weights
from lora_ft.model.load import find_base, load_tokenizer
from lora_ft.model.machine import peak_memory_bytes, probe_machine
from lora_ft.recipe_rules import EARLY_STOPPING, LORAPLUS
from lora_ft.sections import Recipe
from lora_ft.settle import build_arguments, fit_recipe, settle_recipe
from lora_ft.training.distributed import Launch, end_sharding, read_launch
from lora_ft.training.identity import refuse_disunity
from lora_ft.training.run_folder import (
    RunFolder,
    check_run_folder,
    check_space,
    claim_run_folder,
    refuse_unwritable,
    write_manifest,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lora_ft.training.trainer import LoraTrainer

NUM_SAMPLES, SAMPLE_TOKENS = 4, 64
"""Prompts whose logits are recorded with the adapter, and the length of those that go on, for a later reload to be held
against."""

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
    trainer = prepare_trainer(recipe, base, tokenizer, splits, run, quiet=quiet)
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


def prepare_trainer(
    recipe: Recipe,
    base: BaseIdentity,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    run: RunFolder | None = None,
    *,
    quiet: bool = False,
) -> LoraTrainer:
    """Base, adapter and trainer. The arguments come first: ranks meet then, and under ZeRO-3 they say how the base is
    read.

    Raises:
        UserError: the base or the adapter cannot be read, the arguments are refused, or ranks differ in the run they
            are about to train.
    """
    from lora_ft.tasks import TASKS, read_base

    steps, arguments = TASKS[recipe.data.task], build_arguments(recipe, len(splits.train))
    if run is not None:
        refuse_disunity(run.identity, run.resume_from)
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
    if run is not None and run.warm_start is not None:
        load_weights(model, run.warm_start)
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
