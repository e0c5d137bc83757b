"""The command line: one short function a command; what they call is imported when they run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ft.errors import UserError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 the user must change something, 1 failed, 130 interrupted."""
    options = parse_arguments(arguments)
    _quiet_libraries()
    stdout = sys.stdout
    options.emit = lambda value: print(json.dumps(value, indent=2, ensure_ascii=False, default=str), file=stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            return int(options.command(options) or 0)
    except UserError as error:
        return _report_error(error, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        fault = UserError(
            str(error.filename or "disk"), None, f"{error.strerror}.", "Mend this, then run the command again."
        )
        return _report_error(fault, options)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; overrides may stand before and after options, which argparse alone refuses."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="lora-ft", description="LoRA and QLoRA fine-tuning that proves what it did.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
        command.set_defaults(command=function)
        return command

    def add_recipe(command: argparse.ArgumentParser) -> None:
        command.add_argument("recipe", help="YAML file, or builtin:NAME (see lora-ft recipes)")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to replace")

    train = add("train", train_command, "train an adapter, verify it, compare it with its base, export it")
    add_recipe(train)
    train.add_argument("--fresh", action="store_true", help="remove what an older run left in output_dir")
    add_recipe(add("check", check_command, "check a recipe and say what would be run"))
    evaluate = add("evaluate", evaluate_command, "compare a run's adapter with its base on the test split")
    evaluate.add_argument("run", type=Path, help="folder of a run")
    merge = add("merge", merge_command, "merge an adapter into its base")
    merge.add_argument("adapter", type=Path, help="adapter folder")
    merge.add_argument("--out", type=Path, required=True, help="folder of the merged model")
    merge.add_argument("--base", help="where the base lies, if not where the adapter says")
    merge.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="type of the merged weights")
    verify = add("verify", verify_command, "check that a folder is what was trained")
    verify.add_argument("folder", type=Path, help="run, adapter or merged model")
    verify.add_argument("--base", help="where the base lies, if not where the adapter says")
    verify.add_argument("--quick", action="store_true", help="hashes and shapes only, no weights in memory")
    chat = add("chat", chat_command, "talk to a tuned model in the terminal")
    chat.add_argument("folder", type=Path, help="run, adapter or merged model")
    chat.add_argument("--base", action="store_true", help="let the base answer beside it")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    recipes = add("recipes", recipes_command, "list the embedded recipes, or copy one here")
    recipes.add_argument("name", nargs="?", help="recipe to copy into this folder")
    return parser


def train_command(options: argparse.Namespace) -> None:
    from lora_ft.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # its faults cost no import of torch

    from lora_ft.run import run_recipe

    result = run_recipe(recipe, fresh=options.fresh, quiet=options.json)
    if result is None:
        return
    if options.json:
        options.emit(result.manifest)
    else:
        from lora_ft.summary import print_summary

        print_summary(result)


def check_command(options: argparse.Namespace) -> None:
    from lora_ft.model.machine import choose_settings, probe_machine
    from lora_ft.recipe import dump_recipe, load_recipe

    recipe = choose_settings(load_recipe(options.recipe, options.overrides), probe_machine())
    if options.json:
        options.emit({"ok": True, "choices": [vars(choice) for choice in recipe.choices]})
    else:
        print(dump_recipe(recipe), end="")


def evaluate_command(options: argparse.Namespace) -> None:
    from lora_ft.run import evaluate_run

    figures = evaluate_run(options.run)
    if options.json:
        options.emit(figures)
    else:
        from lora_ft.summary import print_scores

        print_scores(figures)


def merge_command(options: argparse.Namespace) -> None:
    from lora_ft.export.merge import merge_adapter

    report = merge_adapter(options.adapter, options.out, base=options.base, dtype=options.dtype)
    options.emit(report.to_json()) if options.json else print(f"merged into {options.out}")


def verify_command(options: argparse.Namespace) -> int:
    from lora_ft.export.verify import verify_folder

    report = verify_folder(options.folder, quick=options.quick, base=options.base)
    if options.json:
        options.emit(report.to_json())
    else:
        for finding in report.findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
    return 0 if report.ok else 1


def chat_command(options: argparse.Namespace) -> None:
    from lora_ft.chat import chat

    said = chat(options.folder, with_base=options.base, max_new_tokens=options.max_new_tokens, quiet=options.json)
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


def _report_error(error: UserError, options: argparse.Namespace) -> int:
    """One message: for people on stderr, for machines on stdout; under a launcher, from the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{error}", file=sys.stderr)
        if options.json:
            options.emit({"ok": False, "faults": [vars(fault) for fault in error.faults]})
    return error.exit_code


def _quiet_libraries() -> None:
    """Libraries say only what a user must know; their progress bars would run through ours."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "0")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
