"""Whether a folder is what it says: its bytes, its shapes, its base, and the answers it gave when it was saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lora_ft.errors import RunFailed, UserError
from lora_ft.export.adapter import CONFIG_NAME, KEY_PREFIX, TENSORS_NAME, Adapter, open_adapter, unfinished_run
from lora_ft.export.base import base_of_adapter
from lora_ft.export.finding import Finding, VerifyReport, check_answers, check_files, find_added
from lora_ft.export.fresh import ask_fresh, identity_fields
from lora_ft.export.merge_report import REPORT_NAME, read_report
from lora_ft.export.save import idle_modules, refuse_broken
from lora_ft.export.skeleton import build_skeleton, expected_shapes, key_faults
from lora_ft.export.verify_merged import verify_merged
from lora_ft.export.vllm import fit_vllm
from lora_ft.fingerprint import BaseIdentity, hash_tensors, read_json

RUN_NAME = "run.json"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")


def verify_folder(
    path: Path, *, quick: bool = False, base: str | None = None, trust_remote_code: bool = False
) -> VerifyReport:
    """What holds and what does not of an adapter, a run, or a merged folder.

    Args:
        quick: leave out all that reads the weights of a whole model.
        base: where the base lies, if not where the adapter says.

    Raises:
        UserError: `path` is none of the three.
    """
    if (path / CONFIG_NAME).is_file():
        return VerifyReport(str(path), tuple(verify_adapter(path, quick, base, trust_remote_code)))
    if (path / "adapter" / CONFIG_NAME).is_file():
        return VerifyReport(str(path), tuple(verify_run(path, quick, base, trust_remote_code)))
    if (path / "config.json").is_file():
        return VerifyReport(str(path), tuple(verify_merged(path, quick, trust_remote_code)))
    if (path / RUN_NAME).is_file() and (path / "adapter").is_dir():
        rule = f"{CONFIG_NAME} is missing in adapter/, so nothing can be read with it."
        raise UserError(str(path), None, rule, "Copy the run again.")
    if (path / RUN_NAME).is_file():
        raise unfinished_run(path)
    rule = "A folder to verify is an adapter, a run with adapter/, or a merged model."
    raise UserError(str(path), None, rule, "Give one of these.")


def verify_run(path: Path, quick: bool, base: str | None, trust_remote_code: bool) -> Iterator[Finding]:
    """Findings on a run: its files, its adapter, and its merged model if there is one."""
    yield check_run(path, quick)
    yield from verify_adapter(path / "adapter", quick, base, trust_remote_code)
    merged = path / "merged"
    if (merged / "config.json").is_file():
        yield check_merged_adapter(merged, path / "adapter", has_merged(path))
        for finding in verify_merged(merged, quick, trust_remote_code):
            yield Finding(f"merged {finding.name}", finding.ok, finding.detail, finding.is_checked)
    elif has_merged(path):
        is_there = merged.is_dir() and any(merged.iterdir())
        detail = "its config.json is missing" if is_there else "the run made a merged model, and it is gone"
        yield Finding("merged", not is_there, detail, False)


def has_merged(run: Path) -> bool:
    """Whether the run in this folder ended with a merged model; `check_run` says whether that can be known."""
    try:
        files = read_json(run / RUN_NAME).get("files") if (run / RUN_NAME).is_file() else None
    except UserError:
        return False
    return isinstance(files, dict) and any(name.startswith("merged/") for name in files)


def check_merged_adapter(merged: Path, adapter: Path, is_ours: bool) -> Finding:
    """Whether the merged model in a run was made of its adapter, and of that alone.

    Args:
        is_ours: whether it was lora_ft that made one here.
    """
    try:
        report = read_report(merged)
    except UserError as error:
        return Finding("merged adapter", False, str(error))
    if report is None:
        detail = f"{REPORT_NAME}, which says what was merged, is missing"
        return Finding("merged adapter", not is_ours, detail, is_ours)
    weights = adapter / TENSORS_NAME
    is_same = weights.is_file() and report.adapters == ((hash_tensors(weights), 1.0),)
    detail = "the run's own" if is_same else "it was made of another adapter, or of several"
    return Finding("merged adapter", is_same, detail)


def check_run(path: Path, quick: bool) -> Finding:
    """Whether the files of a run are those it ended with; one that has not ended says of none what they were.

    Checkpoints may have been removed since to save space, `merged/` and `report/` made again, and cards written on.

    Args:
        quick: leave out weights, which are large.
    """
    if not (path / RUN_NAME).is_file():
        return Finding("run", True, f"no {RUN_NAME}: this is no run of ours, or its start is not over", False)
    try:
        manifest = read_json(path / RUN_NAME)
    except UserError as error:
        return Finding("run", False, str(error))
    if "state" not in manifest:
        return Finding("run", False, f"{RUN_NAME} does not tell the run's state, and so is no run's")
    if manifest["state"] != "finished":
        return Finding("run", True, "it has not finished, so its files have no hashes to be held against", False)
    digests = manifest.get("files")
    if not isinstance(digests, dict) or not digests:
        return Finding("run", False, f"{RUN_NAME} has no hashes of its files, as that of a finished run has")
    kept = {
        name: digest
        for name, digest in digests.items()
        if not name.startswith(("merged/", "report/"))
        and not name.endswith("README.md")
        and not (quick and name.endswith(WEIGHT_SUFFIXES))
        and not (name.startswith("checkpoint-") and not (path / name).is_file())
    }
    found = check_files(path, kept, ())
    return Finding("run", found.ok, found.detail)


def verify_adapter(path: Path, quick: bool, base: str | None, trust_remote_code: bool) -> Iterator[Finding]:
    """Findings on an adapter folder; those that need an intact file or the right base end with the first fault."""
    try:
        adapter = open_adapter(path, trust_remote_code)
    except UserError as error:
        yield Finding("files", False, str(error))
        return
    yield check_hashes(adapter)
    yield check_values(adapter)
    try:
        identity = base_of_adapter(adapter, base)
    except UserError as error:
        yield Finding("base", False, str(error))
        return
    yield check_base(adapter, identity)
    keys = check_keys(adapter, identity)
    yield keys
    yield describe_vllm(adapter)
    if keys.ok and not quick:
        yield check_samples(adapter, identity)


def check_hashes(adapter: Adapter) -> Finding:
    """Whether the files are those that were saved."""
    manifest = adapter.manifest
    if manifest is None:
        return Finding("files", True, "another tool saved this adapter, so there are no hashes for it", False)
    changed = [TENSORS_NAME] * (hash_tensors(adapter.folder / TENSORS_NAME) != manifest.tensors)
    added = find_added(adapter.folder, {*manifest.files, TENSORS_NAME})
    return check_files(adapter.folder, manifest.files, changed, added)


def check_values(adapter: Adapter) -> Finding:
    """Whether the tensors are finite and change anything."""
    tensors = adapter.read()
    try:
        refuse_broken({KEY_PREFIX + key: tensor for key, tensor in tensors.items()}, adapter.folder)
    except RunFailed as error:
        return Finding("values", False, str(error))
    idle = idle_modules(tensors)
    detail = f"{len(tensors)} tensors, finite, with an effect"
    return Finding("values", True, detail + (f"; {len(idle)} modules are idle, such as {idle[0]}" if idle else ""))


def check_base(adapter: Adapter, base: BaseIdentity) -> Finding:
    """Which base was found, and whether it can be told to be the right one; a wrong one was refused before."""
    if adapter.manifest is None:
        return Finding("base", True, f"{base.name}; the adapter does not record which weights it was trained on", False)
    return Finding("base", True, f"{base.name}, fingerprint {base.fingerprint[:12]} as in training")


def check_keys(adapter: Adapter, base: BaseIdentity) -> Finding:
    """Whether the file holds exactly the tensors PEFT will look for, in the shapes the base has."""
    faults = key_faults(adapter.shapes, expected_shapes(build_skeleton(base.folder, adapter), adapter))
    return Finding("keys", not faults, "; ".join(faults) or f"{len(adapter.shapes)} keys and shapes fit the base")


def describe_vllm(adapter: Adapter) -> Finding:
    """Whether vLLM can serve it, for information: an adapter is none the worse if it cannot."""
    fit = fit_vllm(adapter)
    detail = "; ".join(fit.faults) or f"serves it with --enable-lora --max-lora-rank {fit.max_lora_rank}"
    return Finding("vllm", True, f"does not serve it as it is: {detail}" if fit.faults else detail)


def check_samples(adapter: Adapter, base: BaseIdentity) -> Finding:
    """Whether a fresh process gives the recorded answers."""
    manifest = adapter.manifest
    if manifest is None or not manifest.samples:
        return Finding("samples", True, "none recorded", False)
    return check_answers(
        manifest.samples,
        manifest.arithmetic.dtype,
        lambda: ask_fresh(
            "answer_adapter",
            adapters=[(str(adapter.folder), 1.0)],
            base=identity_fields(base),
            trust_remote_code=adapter.trust_remote_code,
            arithmetic=asdict(manifest.arithmetic),
            prompts=[sample.prompt for sample in manifest.samples],
        ),
    )
