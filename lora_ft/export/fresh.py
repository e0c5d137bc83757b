"""Questions to models that a process of their own answers, so that nothing of this one's memory can help.

python -m lora_ft.export.fresh < REQUEST.json > ANSWER.json
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ft.errors import RunFailed, UserError
from lora_ft.export.adapter import open_adapter
from lora_ft.export.manifest import Arithmetic
from lora_ft.export.parity import compare_with_references, record_references
from lora_ft.export.reload import WeightedAdapter, load_combined, load_merged
from lora_ft.export.samples import record_samples
from lora_ft.fingerprint import BaseIdentity
from lora_ft.libraries import load_libraries, own_process, quiet_libraries

_ahead: list[subprocess.Popen[str]] = []
"""The process that waits for the next question, if one was started."""


@contextmanager
def process_ahead() -> Iterator[None]:
    """Within it a process for the first question loads its libraries while this one loads its own, and then waits.

    It takes a core for the seconds that this takes, and some 300 MB. It ends with what started it, however that ends:
    its input is closed then.
    """
    if _ahead or os.environ.get("RANK", "0") != "0":  # only the first rank asks
        yield
        return
    _ahead.append(_start_process())
    try:
        yield
    finally:
        while _ahead:
            _end_process(_ahead.pop())


def ask_fresh(task: str, **request: Any) -> Any:
    """What a new process answers to `request`, plain JSON both ways.

    Raises:
        RunFailed: it could not load what it was asked about.
    """
    process = _ahead.pop() if _ahead and _ahead[-1].poll() is None else _start_process()
    try:
        answer, said = process.communicate(json.dumps({"task": task, **request}))
    except BaseException:
        _end_process(process)
        raise
    if process.returncode:
        reason = said.strip().splitlines()[-1] if said.strip() else f"it was killed ({process.returncode})"
        rule = f"A fresh process could not load it: {reason}"
        raise RunFailed(
            str(request.get("folder", task)), None, rule, "Check that it fits in memory, and verify its files."
        )
    return json.loads(answer)


def _start_process() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_ft.export.fresh"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # no compiler is loaded for a few answers
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def answer_adapter(request: dict[str, Any]) -> Any:
    """An adapter's answers to `prompts`."""
    return [asdict(sample) for sample in record_samples(tuned_model(request), request["prompts"])]


def answer_merged(request: dict[str, Any]) -> Any:
    """A merged model's answers to `prompts`."""
    model = load_merged(Path(request["folder"]), Arithmetic(**request["arithmetic"]), request["trust_remote_code"])
    return [asdict(sample) for sample in record_samples(model, request["prompts"])]


def prove_merge(request: dict[str, Any]) -> Any:
    """How far a merged model is from base + adapter, and its own answers; one of the two is in memory at a time."""
    references = record_references(tuned_model(request), request["prompts"])
    gc.collect()
    merged = load_merged(
        Path(request["folder"]), Arithmetic(**request["merged_arithmetic"]), request["trust_remote_code"]
    )
    parity = compare_with_references(merged, references)
    samples = record_samples(merged, request["prompts"])
    return {"parity": asdict(parity), "samples": [asdict(sample) for sample in samples]}


def tuned_model(request: dict[str, Any]) -> Any:
    """The base with the requested adapters on it."""
    trust = request["trust_remote_code"]
    parts = [WeightedAdapter(open_adapter(Path(folder), trust), weight) for folder, weight in request["adapters"]]
    base = BaseIdentity(**{**request["base"], "folder": Path(request["base"]["folder"])})
    return load_combined(parts, base, Arithmetic(**request["arithmetic"]))


def identity_fields(base: BaseIdentity) -> dict[str, Any]:
    """A base that was found and proven to be the right one, as JSON takes it."""
    return {**asdict(base), "folder": str(base.folder.absolute())}


TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    function.__name__: function for function in (answer_adapter, answer_merged, prove_merge)
}
"""What can be asked."""


def main() -> None:
    """Loads the libraries, reads one request from stdin and writes the answer to stdout; without a request, nothing."""
    own_process()
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    quiet_libraries()
    load_libraries()
    text = sys.stdin.read()
    if not text:
        return
    request = json.loads(text)
    try:
        answer = TASKS[request["task"]](request)
    except UserError as error:
        raise SystemExit(" ".join(str(error).split())) from error
    json.dump(answer, stdout)
    stdout.close()


if __name__ == "__main__":
    main()
