"""What each command does: a short function of its options, which imports what it calls when it runs.

What it returns is the exit code, 0 if nothing; `options.emit` prints the one document that --json asks for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
import time
from pathlib import Path

from lora_ft.errors import Interrupted, UserError


def train_command(options: argparse.Namespace) -> None:
    from lora_ft.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # its faults cost no import of torch

    from lora_ft.run import run_recipe

    try:
        result = run_recipe(recipe, fresh=options.fresh, warm_start=options.warm_start, quiet=options.json)
    except Interrupted as stop:
        (fault,) = stop.faults
        raise Interrupted(fault.place, fault.value, fault.rule, f"Go on with:\n  {_command_again()}") from None
    if result is None:
        return
    if options.json:
        options.emit(result.manifest)
    else:
        from lora_ft.summary import print_summary

        print_summary(result)


def _command_again() -> str:
    """The command that this process is, as typed, without what would begin anew; under a launcher, the launcher's."""
    import shlex

    import psutil

    process = psutil.Process()
    launcher = process.parent() if "TORCHELASTIC_RUN_ID" in os.environ else None
    words = (launcher or process).cmdline()
    if len(words) > 1 and shutil.which(Path(words[1]).name) == words[1]:  # `lora-ft`, which Python was given as a file
        words = [Path(words[1]).name, *words[2:]]
    return shlex.join(word for word in words if word not in {"--fresh", "--warm-start"})


def check_command(options: argparse.Namespace) -> int:
    from lora_ft.recipe import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from lora_ft.data.audit_table import print_audit
    from lora_ft.model.machine import probe_machine
    from lora_ft.settle import check_arguments, check_recipe, settle_recipe
    from lora_ft.summary import print_plan
    from lora_ft.training.distributed import read_launch

    machine, launch = probe_machine(), read_launch()
    recipe = settle_recipe(recipe, machine, launch)
    planned = audit = None
    if options.no_data:
        check_arguments(recipe)
    else:
        planned, audit = check_recipe(recipe, machine, launch)
        recipe = planned.recipe
    is_refused = audit is not None and audit.is_strict and bool(audit.warnings)
    if options.json:
        choices = [vars(choice) for choice in recipe.choices]
        found = {"memory": planned and planned.to_json(), "audit": audit and audit.to_json()}
        options.emit({"ok": not is_refused, "choices": choices, **found})
    else:
        print(dump_recipe(recipe), end="")
        if planned is not None and audit is not None:
            print_plan(planned)
            print_audit(audit)
    return UserError.exit_code if is_refused else 0


def plan_command(options: argparse.Namespace) -> int:
    from lora_ft.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from lora_ft.model.machine import imagine_gpu, probe_machine
    from lora_ft.model.planning import parse_memory
    from lora_ft.settle import plan_recipe, settle_recipe
    from lora_ft.summary import print_plan
    from lora_ft.training.distributed import Launch
    from lora_ft.training.launch_file import read_launch_file

    machine = imagine_gpu(parse_memory(options.device)) if options.device else probe_machine()
    if options.config_file is not None:
        launch = read_launch_file(options.config_file, options.gpus)
    else:
        count = options.gpus or 1
        launch = Launch("ddp" if count > 1 else "single", world_size=count, local_world_size=count)
    planned = plan_recipe(settle_recipe(recipe, machine, launch), machine, launch)
    if options.json:
        options.emit(planned.to_json())
    else:
        print_plan(planned)
    return 0 if planned.plan.fits else 1


def preview_command(options: argparse.Namespace) -> None:
    from lora_ft.data.preview import preview_rows, print_preview, write_preview
    from lora_ft.recipe import load_recipe
    from lora_ft.settle import find_tokenizer

    recipe = load_recipe(options.recipe, options.overrides)
    rows = preview_rows(recipe.data, find_tokenizer(recipe), options.rows)
    if options.html is not None:
        write_preview(rows, options.html)
    if options.json:
        options.emit([dataclasses.asdict(row) for row in rows])
    elif options.html is None:
        print_preview(rows, show_ids=options.ids)
    else:
        print(f"written to {options.html}")


def prepare_command(options: argparse.Namespace) -> None:
    from lora_ft.data.prepare import build_splits
    from lora_ft.recipe import load_recipe
    from lora_ft.settle import find_tokenizer

    recipe = load_recipe(options.recipe, options.overrides)
    splits = build_splits(recipe.data, find_tokenizer(recipe))
    if options.json:
        options.emit({"folder": str(splits.folder), "fingerprint": splits.fingerprint, **splits.report.to_json()})
    else:
        counts = ", ".join(f"{len(getattr(splits, name))} {name}" for name in ("train", "validation", "test"))
        print(f"prepared {counts} rows in {splits.folder}")


def evaluate_command(options: argparse.Namespace) -> None:
    from lora_ft.evaluate import evaluate_run

    figures = evaluate_run(options.run)
    if options.json:
        options.emit(figures)
    else:
        from lora_ft.summary import print_scores

        print_scores(figures)


def compare_command(options: argparse.Namespace) -> None:
    from lora_ft.evaluation.side_by_side import compare_runs

    runs = compare_runs(options.runs)
    if options.json:
        options.emit([run.to_json() for run in runs])
    else:
        from lora_ft.summary import print_runs

        print_runs(runs)


def watch_command(options: argparse.Namespace) -> None:
    from lora_ft.watch import read_state, watch_run

    if options.json:
        options.emit(read_state(options.run, time.time()))
    else:
        watch_run(options.run)


def sweep_command(options: argparse.Namespace) -> None:
    from lora_ft.sweep.study import sweep

    result = sweep(options.recipe, options.space, options.trials, options.overrides, options.out)
    if options.json:
        options.emit(result.to_json())
    else:
        from lora_ft.summary import print_sweep

        print_sweep(result)


def merge_command(options: argparse.Namespace) -> None:
    from lora_ft.export.fresh import process_ahead
    from lora_ft.export.merge import merge_adapter

    with contextlib.nullcontext() if options.no_proof else process_ahead():
        report = merge_adapter(
            [_read_weight(word) for word in options.adapters],
            options.out,
            base=options.base,
            dtype=options.dtype,
            onto=options.onto,
            prove=not options.no_proof,
            trust_remote_code=options.trust_remote_code,
        )
    if options.json:
        options.emit(report.to_json())
        return
    print(f"merged {report.num_changed} of {report.num_tensors} tensors into {options.out} as {report.dtype}")
    if report.proof is not None:
        proof = report.proof
        print(
            f"proven: {proof.num_positions} positions, logits within {proof.max_logit_difference:.1e} of base + adapter"
        )


def _read_weight(word: str) -> tuple[Path, float]:
    """`FOLDER=0.5` as an adapter, or that of a run, and its weight; 1 without one, and where a folder has that name."""
    from lora_ft.export.adapter import find_adapter

    folder, equals, weight = word.rpartition("=")
    if not equals or Path(word).is_dir():
        return find_adapter(Path(word)), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number == 0:
        rule = "A weight is a number, and at 0 the adapter would do nothing."
        raise UserError("command line", word, rule, "Write ADAPTER=0.5, say.")
    return find_adapter(Path(folder)), number


def verify_command(options: argparse.Namespace) -> int:
    from lora_ft.export.fresh import process_ahead
    from lora_ft.export.verify import verify_folder

    with contextlib.nullcontext() if options.quick else process_ahead():
        trusted = options.trust_remote_code
        report = verify_folder(options.folder, quick=options.quick, base=options.base, trust_remote_code=trusted)
    if options.json:
        options.emit(report.to_json())
    else:
        for finding in report.findings:
            mark = "FAIL" if not finding.ok else "ok  " if finding.is_checked else "?   "
            print(f"{mark}  {finding.name}: {finding.detail}")
    return 0 if report.ok else 1


def push_command(options: argparse.Namespace) -> None:
    from lora_ft.export.hub import push_folder

    report = push_folder(
        options.folder,
        options.repository,
        merged=options.merged,
        public=options.public,
        base_id=options.base_id,
        license=options.license,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        options.emit(dataclasses.asdict(report))
    else:
        state = "was there already" if report.already_there else "published"
        print(f"{state}: {report.url} ({'private' if report.private else 'public'}, commit {report.commit[:12]})")


def cache_command(options: argparse.Namespace) -> None:
    from lora_ft.model.quant_cache import clear_cached, list_cached

    found = clear_cached() if options.clear else list_cached()
    if options.json:
        options.emit({"cleared": options.clear, "bases": [entry.to_json() for entry in found]})
        return
    for entry in found:
        print(f"{entry.num_bytes / 1e6:10.1f} MB  {entry.base}")
    print(f"{len(found)} quantised bases{' removed' if options.clear else ''}")


def chat_command(options: argparse.Namespace) -> None:
    from lora_ft.chat import chat

    said = chat(
        options.folder,
        with_base=options.base,
        max_new_tokens=options.max_new_tokens,
        trust_remote_code=options.trust_remote_code,
        quiet=options.json,
    )
    if options.json:
        options.emit({"turns": said})


def recipes_command(options: argparse.Namespace) -> None:
    from lora_ft.builtin import PREFIX, describe_recipe, list_recipes, locate_recipe

    if options.name is not None:
        source = locate_recipe(PREFIX + options.name.removeprefix(PREFIX))
        target = Path.cwd() / source.name
        if target.exists():
            raise UserError(str(target), None, "A file of that name is here already.", "Rename or remove it.")
        shutil.copyfile(source, target)
        options.emit({"copied": str(target)}) if options.json else print(f"copied to {target}")
        return
    recipes = {name: describe_recipe(name) for name in list_recipes()}
    if options.json:
        options.emit(recipes)
    else:
        for name, summary in recipes.items():
            print(f"{name:24} {summary}")
        print("\nRun one: lora-ft train builtin:NAME      Copy one here: lora-ft recipes NAME")
