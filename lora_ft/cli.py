"""The command line: its words, what is made of a fault, and exit codes. What a command does stands in `commands`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lora_ft.commands import (
    cache_command,
    chat_command,
    check_command,
    compare_command,
    evaluate_command,
    merge_command,
    plan_command,
    prepare_command,
    preview_command,
    push_command,
    recipes_command,
    sweep_command,
    train_command,
    verify_command,
    watch_command,
)
from lora_ft.errors import Fault, Interrupted, UserError
from lora_ft.libraries import own_process

FIRST_RANK_SECONDS, LAST_WORD_SECONDS = 20.0, 2.0
"""What other ranks give the first one to say a fault that all of them have found, and what all were told together."""
ONTO = "onto the base's own weights, or onto what 4 bit made of them in training"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 the user must change something, 1 failed, 130 interrupted."""
    stdout = sys.stdout
    try:
        options = parse_arguments(arguments)
        own_process()
        options.emit = partial(_print_document, stream=stdout)
        code = _run_command(options)
        stdout.flush()
        return code
    except BrokenPipeError:  # as after `| head`; Python would say so once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        with contextlib.suppress(OSError):
            print("Nobody reads the output any more.", file=sys.stderr)
        return 1


def _print_document(value: object, stream: TextIO) -> None:
    """The one document that --json asks for."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), file=stream, flush=True)


def _describe_faults(faults: Iterable[Fault]) -> dict[str, Any]:
    """What a machine is told of a command that was refused."""
    return {"ok": False, "faults": [vars(fault) for fault in faults]}


def _run_command(options: argparse.Namespace) -> int:
    """The exit code of the command; what a user can mend is reported."""
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            return int(options.command(options) or 0)
    except UserError as error:
        return _report_error(error, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (error.filename is None and error.errno is None):
            raise
        fault = UserError(
            str(error.filename or "disk"), None, f"{error.strerror}.", "Mend this, then run the command again."
        )
        return _report_error(fault, options)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; overrides may stand before and after options, which argparse alone refuses.

    What is wrong with them argparse says in its way, and ends the process with 2; for machines it is a document too.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    try:
        options, rest = parser.parse_known_args(words)
        if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except Misuse as fault:
        if any(word.partition("=")[0] == "--json" for word in words):
            said = Fault("command line", None, fault.message, f"See {fault.parser.prog} --help")
            _print_document(_describe_faults([said]), sys.stdout)
        argparse.ArgumentParser.error(fault.parser, fault.message)
    if rest:
        options.overrides += rest
    return options


class Misuse(Exception):
    """A command line that is none."""

    def __init__(self, parser: argparse.ArgumentParser, message: str):
        self.parser, self.message = parser, message
        super().__init__(message)


class Parser(argparse.ArgumentParser):
    """argparse's own, but for what it does about an error; options are written out."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Leaves it to who reads the command line.

        Raises:
            Misuse: always.
        """
        raise Misuse(self, message)


class TellVersion(argparse.Action):
    """Looks the version up only when asked for it; argparse's own action wants it at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(parser.prog, version("lora-ft"))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="lora-ft", description="LoRA and QLoRA fine-tuning that proves what it did.")
    parser.add_argument("--version", action=TellVersion, nargs=0, help="tell the version and exit")
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
    anew = train.add_mutually_exclusive_group()
    anew.add_argument("--fresh", action="store_true", help="remove what an older run left in output_dir")
    anew.add_argument("--warm-start", action="store_true", help="start anew, from the weights of the run there")
    check = add("check", check_command, "check a recipe and audit its data, and say what would be run")
    add_recipe(check)
    check.add_argument("--no-data", action="store_true", help="the recipe alone: neither base nor data are looked for")
    plan = add("plan", plan_command, "say how much memory a training step takes, from the base's config alone")
    add_recipe(plan)
    plan.add_argument("--device", help="memory of a GPU to plan for ('24 GiB'); this machine's if left out")
    plan.add_argument("--gpus", type=_count, help="how many of them share a step")
    plan.add_argument("--config-file", type=Path, help="accelerate config to plan for, with its ZeRO or FSDP sharding")
    preview = add("preview", preview_command, "show rows as the model sees them, with what is learned in colour")
    add_recipe(preview)
    preview.add_argument("-n", "--rows", type=_count, default=3, help="how many rows")
    preview.add_argument("--ids", action="store_true", help="token ids beside the tokens")
    preview.add_argument("--html", type=Path, help="write a page to this file instead")
    add_recipe(add("prepare", prepare_command, "tokenise a recipe's data into the cache that train reads"))
    evaluate = add("evaluate", evaluate_command, "compare a run's adapter with its base on the test split")
    evaluate.add_argument("run", type=Path, help="folder of a run")
    compare = add("compare", compare_command, "put runs side by side: figures, and the settings in which they differ")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    watch = add("watch", watch_command, "follow a run that trains, from its folder; --json says how far it is, once")
    watch.add_argument("run", type=Path, help="folder of a run")
    sweep = add("sweep", sweep_command, "try a recipe's settings by validation loss, and write out the best recipe")
    add_recipe(sweep)
    sweep.add_argument("--space", type=Path, required=True, help="YAML file: key: [values] or {low:, high:, log:}")
    sweep.add_argument("--trials", type=_count, required=True, help="trials in all, those of earlier starts included")
    sweep.add_argument("--out", type=Path, help="folder of the sweep; the recipe's output_dir with -sweep if left out")
    merge = add("merge", merge_command, "merge an adapter into its base, and prove that nothing changed")
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="adapter folder, or several with weights"
    )
    merge.add_argument("--out", type=Path, required=True, help="folder of the merged model")
    merge.add_argument("--base", help="where the base lies, if not where the adapter says")
    merge.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="type of the merged weights")
    merge.add_argument("--onto", choices=["original", "quantized"], default="original", help=ONTO)
    merge.add_argument("--no-proof", action="store_true", help="do not compare logits and generations afterwards")
    verify = add("verify", verify_command, "check that a folder is what was trained")
    verify.add_argument("folder", type=Path, help="run, adapter or merged model")
    verify.add_argument("--base", help="where the base lies, if not where the adapter says")
    verify.add_argument("--quick", action="store_true", help="hashes and shapes only, no weights in memory")
    push = add("push", push_command, "publish an adapter or a merged model on the Hub")
    push.add_argument("folder", type=Path, help="run, adapter or merged model")
    push.add_argument("repository", help="ORG/NAME")
    push.add_argument("--merged", action="store_true", help="of a run, the merged model")
    push.add_argument("--public", action="store_true", help="let everyone see it")
    push.add_argument("--base-id", help="Hub id of the base, if it was trained from a folder")
    push.add_argument("--license", help="licence for the card, as the Hub names it")
    chat = add("chat", chat_command, "talk to a tuned model in the terminal")
    chat.add_argument("folder", type=Path, help="run, adapter or merged model")
    chat.add_argument("--base", action="store_true", help="let the base answer beside it")
    chat.add_argument("--max-new-tokens", type=_count, default=256, help="longest answer in tokens")
    for command in (merge, verify, push, chat):
        command.add_argument("--trust-remote-code", action="store_true", help="let Python code beside the model run")
    cache = add("cache", cache_command, "show quantised bases that are kept for the next start, or clear them")
    cache.add_argument("--clear", action="store_true", help="remove them")
    recipes = add("recipes", recipes_command, "list the embedded recipes, or copy one here")
    recipes.add_argument("name", nargs="?", help="recipe to copy into this folder")
    return parser


def _count(word: str) -> int:
    """A number of things, of which there is one at least."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: a whole number of 1 or more is wanted")
    return int(word)


def _report_error(error: UserError, options: argparse.Namespace) -> int:
    """One message: for people on stderr, for machines on stdout.

    A launcher ends every rank as soon as one has ended. So the first rank says what all have found, and another one
    waits to be ended meanwhile; what it alone has found, it says at last. That they stop, all have agreed on."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, Interrupted):
        time.sleep(LAST_WORD_SECONDS)
        return error.exit_code
    if rank != "0":
        time.sleep(FIRST_RANK_SECONDS)
    print(f"\n{error}" if rank == "0" else f"\nrank {rank}: {error}", file=sys.stderr)
    if options.json:
        options.emit(_describe_faults(error.faults))
    return error.exit_code
