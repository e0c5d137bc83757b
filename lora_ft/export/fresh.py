"""Questions to models that a process of their own answers, so that nothing of this one's memory can help.

python -m lora_ft.export.fresh TASK REQUEST.json ANSWER.json
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
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


def ask_fresh(task: str, **request: Any) -> Any:
    """What a new process answers to `request`, plain JSON both ways.

    Raises:
        RunFailed: it could not load what it was asked about.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / "request.json", Path(scratch) / "answer.json"]
        paths[0].write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "lora_ft.export.fresh", task, *map(str, paths)]
        environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # no compiler is loaded for a few answers
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if process.returncode:
            reason = (
                process.stderr.strip().splitlines()[-1]
                if process.stderr.strip()
                else f"it was killed ({process.returncode})"
            )
            rule = f"A fresh process could not load it: {reason}"
            raise RunFailed(
                str(request.get("folder", task)), None, rule, "Check that it fits in memory, and verify its files."
            )
        return json.loads(paths[1].read_text(encoding="utf-8"))


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


def main(task: str, request: str, answer: str) -> None:
    """The answer to one request, written to a file."""
    try:
        found = TASKS[task](json.loads(Path(request).read_text(encoding="utf-8")))
    except UserError as error:
        raise SystemExit(" ".join(str(error).split())) from error
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
