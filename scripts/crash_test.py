"""Kills real training, saving and merging at random moments, and checks that nothing is lost.

    python scripts/crash_test.py --kills 200              # one process
    python scripts/crash_test.py --kills 20 --ranks 2     # one rank of two, over gloo
    python scripts/crash_test.py --kills 40 --merge       # writing a merged model
    python scripts/crash_test.py --damage                 # every file of a checkpoint deleted, cut, one byte turned

A run saves after every step; it is killed with SIGKILL, checked, and gone on with, again and again until it is
finished. Then its adapter must be that of a run nobody disturbed. Processes are forked from one that has imported
everything, so a kill costs a second and not ten; moments are drawn from --seed. Exit code 0 says that all held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120
"""How long a process may take that nobody kills."""
GRACE_SECONDS = 30
"""How long torch's launcher waits after SIGTERM for the other ranks of one that died, before it kills them."""


@dataclass
class Findings:
    """What was done, and what should not have happened."""

    counts: Counter[str] = field(default_factory=Counter)
    """Kills, finished runs, kills by where they fell."""
    faults: list[str] = field(default_factory=list)
    """Promises that were broken, each in a sentence."""


def main() -> int:
    options = parse_options()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    folder = Path(tempfile.mkdtemp(prefix="crash-test-", dir=options.folder))
    os.environ["LORA_FT_CACHE"] = str(folder / "cache")
    started = time.monotonic()
    try:
        import_everything()
        findings = Findings()
        test = kill_merges if options.merge else damage_files if options.damage else kill_runs
        test(folder, options, findings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {**findings.counts, "seconds": round(time.monotonic() - started), "faults": findings.faults}
    print(json.dumps(figures, indent=2))
    return 1 if findings.faults else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=30, help="an end in any case")
    parser.add_argument("--merge", action="store_true", help="kill merges instead of runs")
    parser.add_argument("--damage", action="store_true", help="damage files of a checkpoint instead")
    parser.add_argument("--folder", help="where to write; the system's temporary folder if left out")
    return parser.parse_args()


def import_everything() -> None:
    """What a process needs, imported once; no thread may be started here, or a fork would inherit its locks."""
    import torch

    import lora_ft.export.merge
    import lora_ft.export.save
    import lora_ft.run
    import lora_ft.training.trainer  # noqa: F401

    torch.set_num_threads(1)


def write_recipe(folder: Path, name: str, steps: int, **training: Any) -> Path:
    """A recipe over the included base that saves after every step."""
    import yaml

    data = folder / "rows.jsonl"
    if not data.exists():
        rows = [{"prompt": f"What is {n} and {n}?", "completion": f" It is {2 * n}."} for n in range(40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "output_dir": str(folder / name),
        "model": {"base": "builtin:wren", "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "data": {"sources": [{"path": str(data)}], "max_length": 64, "split": {"validation": 0.1, "test": 0.0}},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 3,
            **training,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_training(recipe: Path) -> None:
    """The recipe, in this process.

    A fresh one takes seconds to import what it needs, so the saved adapter is checked by its hashes, and what several
    ranks trained is evaluated here.
    """
    import lora_ft.run
    from lora_ft.evaluate import evaluate_run
    from lora_ft.export.verify import verify_folder
    from lora_ft.recipe import load_recipe

    def verify_quickly(adapter: Path, trust_remote_code: bool = False) -> dict[str, Any]:
        return verify_folder(adapter, quick=True, trust_remote_code=trust_remote_code).to_json()

    lora_ft.run.verify_saved = verify_quickly
    lora_ft.run.evaluate_in_new_process = evaluate_run
    lora_ft.run.run_recipe(load_recipe(recipe), quiet=True)


def fork(work: Callable[[], None], log: Path, **environment: str) -> int:
    """The id of a new process that does `work`; what it says goes to the end of `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start_run(recipe: Path, ranks: int) -> list[int]:
    """The processes of a run."""
    log = recipe.with_suffix(".log")
    if ranks == 1:
        return [fork(lambda: run_training(recipe), log)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        fork(lambda: run_training(recipe), log, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(ranks)
    ]


def wait_for(children: list[int], seconds: float) -> dict[int, int]:
    """The exit codes of those that end in time; negative for a signal."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < until:
        for child in children:
            if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.005)
    return codes


def end_all(children: list[int], codes: dict[int, int]) -> None:
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def kill_runs(folder: Path, options: argparse.Namespace, findings: Findings) -> None:
    """Runs that are killed until they are finished, against one that was not."""
    draw, until = random.Random(options.seed), time.monotonic() + options.minutes * 60
    expected, duration = undisturbed(folder, options)
    findings.counts["milliseconds of an undisturbed run"] = round(duration * 1000)
    number = 0
    while findings.counts["kills"] < options.kills and time.monotonic() < until and not findings.faults:
        number += 1
        recipe = write_recipe(folder, f"run-{number}", options.steps)
        run, newest = folder / f"run-{number}", 0
        while not is_finished(run) and not findings.faults:
            if findings.counts["kills"] < options.kills and time.monotonic() < until:
                kill_once(recipe, options.ranks, draw.uniform(0, duration), findings, draw)
            elif wrong := leave_alone(recipe, options.ranks):
                findings.faults.append(f"a run that nobody killed ended with {wrong}")
            newest = check_folder(run, newest, findings)
        found = adapter_hash(run) if is_finished(run) else "none"
        if found != expected:
            findings.faults.append(f"run {number} ended with another adapter: {found} and not {expected}")
        findings.counts["runs"] += 1
        if findings.faults:
            print(recipe.with_suffix(".log").read_text()[-4000:], file=sys.stderr)
        shutil.rmtree(run, ignore_errors=True)


def undisturbed(folder: Path, options: argparse.Namespace) -> tuple[str, float]:
    """The adapter of a run that is left alone, and how long it takes; the first one also prepares the data."""
    for name in ("warm", "reference"):
        recipe = write_recipe(folder, name, options.steps)
        started = time.monotonic()
        if leave_alone(recipe, options.ranks):
            raise SystemExit(recipe.with_suffix(".log").read_text()[-4000:])
        duration = time.monotonic() - started
    return adapter_hash(folder / "reference"), duration


def leave_alone(recipe: Path, ranks: int) -> list[str]:
    """What went wrong in a run that nobody kills: exit codes, and processes that did not end in time."""
    children = start_run(recipe, ranks)
    codes = wait_for(children, WAIT_SECONDS)
    end_all(children, codes)
    stuck = ["no end"] * (len(children) - len(codes))
    return stuck + [f"exit code {code}" for code in codes.values() if code]


def kill_once(recipe: Path, ranks: int, seconds: float, findings: Findings, draw: random.Random) -> None:
    """A run that is killed after that time, or that ends before; of several ranks one dies, and the others follow."""
    children = start_run(recipe, ranks)
    codes = wait_for(children, seconds)
    if len(codes) < len(children):
        victim = draw.choice([child for child in children if child not in codes])
        findings.counts["kills"] += 1
        findings.counts[f"kills while {where_it_is(recipe)}"] += 1
        os.kill(victim, signal.SIGKILL)
        others = [child for child in children if child not in codes and child != victim]
        for child in others:  # as the launcher does, which these runs have none of
            os.kill(child, signal.SIGTERM)
        codes |= wait_for([victim, *others], GRACE_SECONDS)
    elif any(codes.values()):
        findings.faults.append(f"a run that nobody killed ended with {sorted(codes.values())}")
    end_all(children, codes)


def where_it_is(recipe: Path) -> str:
    """What a run is doing, as far as its folder tells."""
    run = recipe.with_suffix("")
    if (run / ".saving").exists():
        return "saving"
    if list(run.glob(".adapter*")):
        return "exporting"
    return "training" if (run / "run.json").exists() else "starting"


def check_folder(run: Path, newest_before: int, findings: Findings) -> int:
    """The newest step that is saved. Every checkpoint that can be seen is whole, and none that was there is lost."""
    from lora_ft.training.checkpoint import find_damage, list_checkpoints

    for checkpoint in list_checkpoints(run):
        if (damage := find_damage(checkpoint)) is not None:
            findings.faults.append(f"{checkpoint.name} can be seen and is damaged: {damage}")
    steps = [int(path.name.rpartition("-")[2]) for path in list_checkpoints(run)]
    newest = max(steps, default=0)
    if newest < newest_before:
        findings.faults.append(f"checkpoint-{newest_before} was lost; the newest is {newest}")
    return newest


def is_finished(run: Path) -> bool:
    manifest = run / "run.json"
    return manifest.exists() and json.loads(manifest.read_text())["state"] == "finished"


def adapter_hash(run: Path) -> str:
    from lora_ft.fingerprint import hash_tensors

    return hash_tensors(run / "adapter" / "adapter_model.safetensors")


def kill_merges(folder: Path, options: argparse.Namespace, findings: Findings) -> None:
    """Merges that are killed: the folder of the result is absent or whole."""
    from lora_ft.export.merge import merge_adapter
    from lora_ft.export.verify import verify_folder

    undisturbed(folder, options)
    adapter, merged = folder / "reference" / "adapter", folder / "merged"
    draw, until = random.Random(options.seed), time.monotonic() + options.minutes * 60

    def merge() -> None:
        merge_adapter(adapter, merged, prove=False)

    started = time.monotonic()
    wait_for([fork(merge, folder / "merge.log")], WAIT_SECONDS)
    duration = time.monotonic() - started
    while findings.counts["kills"] < options.kills and time.monotonic() < until and not findings.faults:
        shutil.rmtree(merged, ignore_errors=True)
        child = fork(merge, folder / "merge.log")
        codes = wait_for([child], draw.uniform(0, duration))
        findings.counts["merges finished" if codes else "kills"] += 1
        end_all([child], codes)
        if merged.exists() and not verify_folder(merged, quick=True).ok:
            findings.faults.append("a merged model can be seen and is not whole")
    wait_for([fork(merge, folder / "merge.log")], WAIT_SECONDS)
    if not (merged.exists() and verify_folder(merged, quick=True).ok):
        findings.faults.append(f"after the kills a merge fails: {(folder / 'merge.log').read_text()[-2000:]}")


def damage_files(folder: Path, options: argparse.Namespace, findings: Findings) -> None:
    """Each file of a real checkpoint deleted, cut, and with one byte turned at its start, middle and end."""
    from lora_ft.training.checkpoint import find_damage, find_intact, list_checkpoints

    undisturbed(folder, options)
    run = folder / "reference"
    newest, before, *_ = list_checkpoints(run)
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole, name = path.read_bytes(), path.relative_to(newest).as_posix()
        damaged: dict[str, bytes | None] = {"deleted": None, "cut": whole[: len(whole) // 2], "cut by one": whole[:-1]}
        for place in {0, len(whole) // 2, len(whole) - 1}:
            damaged[f"byte {place} turned"] = whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        for kind, content in damaged.items():
            path.unlink() if content is None else path.write_bytes(content)
            findings.counts["damages"] += 1
            if find_damage(newest) is None or find_intact(run) != before:
                findings.faults.append(f"{name} {kind}: not seen")
            path.write_bytes(whole)
        findings.counts["files"] += 1
    if find_damage(newest) is not None:
        findings.faults.append("a checkpoint that was mended is called damaged")


if __name__ == "__main__":
    sys.exit(main())
