"""Base and adapter made into one plain model, tensor by tensor, for bases far larger than memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_ft.errors import UserError
from lora_ft.export.card import CAUSAL, merged_facts, render_card
from lora_ft.export.companions import copy_companions
from lora_ft.export.merge_report import REPORT_NAME, MergeReport, Onto, read_report, write_report
from lora_ft.export.merged_folder import IDENTITY_NAME, open_draft, write_config, write_index
from lora_ft.export.ollama import write_modelfile
from lora_ft.export.prepare_merge import Merge, prepare_merge
from lora_ft.export.proof import prove_merge, refuse_unequal
from lora_ft.export.stream import JOURNAL_NAME, write_merged
from lora_ft.fingerprint import hash_file, publish_folder
from lora_ft.training.run_folder import MANIFEST as RUN_MANIFEST


def merge_adapter(
    adapter: Path | Sequence[tuple[Path, float]],
    out: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: Onto = "original",
    prompts: Sequence[Sequence[int]] = (),
    prove: bool = True,
    trust_remote_code: bool = False,
) -> MergeReport:
    """A plain transformers model in `out` that equals base and adapter together, and the proof that it does.

    `out` appears whole or not at all; a merge that was killed goes on where it stood when it is asked for again.

    Args:
        adapter: a folder, or several with a weight each, whose LoRA is summed.
        base: where the base lies, if not where the adapter says.
        dtype: `float32`, `float16` or `bfloat16` for all weights; as in the base if None.
        onto: `original` adds to the base's own weights, `quantized` to what the quantised model made of them.
        prompts: token ids the proof is made on; those recorded with the adapter if empty.
        prove: whether the merged model is compared with base + adapter before it takes its name.

    Raises:
        UserError: something of the adapter cannot be merged, or fits no tensor of the base.
        RunFailed: a merged value is not finite, or the merged model is not the one that was trained.
    """
    started, out = time.monotonic(), out.resolve()  # `.` has no name beside which a draft could grow
    merge = prepare_merge(adapter, base, dtype, onto, trust_remote_code)
    refuse_place(out, merge)
    with lock_merge(out):
        draft = open_draft(out, merge.identity())
        tensors = write_merged(merge.plan.tensors, draft)
        write_index(merge.plan.tensors, draft)
        write_config(merge, draft)
        copy_companions(merge.base.folder, merge.parts[0].adapter.folder, draft)
        handoff = write_modelfile(draft) if merge.task_type in (None, CAUSAL) else None
        report = describe_merge(merge, draft, tensors, time.monotonic() - started)
        if prove:
            report = prove_merge(merge, draft, report, prompts)
        write_report(report, draft)
        refuse_unequal(report, draft)
        facts = merged_facts(report, out.resolve().name, merge.task_type, handoff)
        (draft / "README.md").write_text(render_card(facts), encoding="utf-8")
        for name in (JOURNAL_NAME, IDENTITY_NAME):
            (draft / name).unlink()
        publish_folder(draft, out)
    return report


def refuse_place(out: Path, merge: Merge) -> None:
    """Nothing if the merged model can take the name `out`, and there is room for it.

    Raises:
        UserError: something else lies there, which would be lost, or it would lie inside of an adapter that it is made
            of, or the disk is too full.
    """
    adapters = [part.adapter.folder for part in merge.parts]
    for folder in adapters:
        if folder.resolve() in (out, *out.parents):
            raise UserError("--out", str(out), f"It would lie inside of {folder}.", "Name a folder beside it.")
    for folder in [merge.base.folder, *adapters]:
        if out in folder.resolve().parents:
            raise UserError("--out", str(out), f"{folder} lies inside of it, and would be lost.", "Name a new folder.")
    nearest = next(parent for parent in out.parents if parent.exists())
    if not nearest.is_dir():
        raise UserError("--out", str(out), f"{nearest} is a file.", "Name a folder.")
    if out.exists() and not _is_replaceable(out, merge):
        rule = "Something else than an earlier merge of this lies there, and would be replaced."
        raise UserError("--out", str(out), rule, "Name a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.num_bytes for tensor in merge.plan.tensors), shutil.disk_usage(out.parent).free
    if needed > free:
        rule = f"The merged model takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free there."
        raise UserError("--out", str(out), rule, "Make room, or name a folder on another disk.")


def _is_replaceable(out: Path, merge: Merge) -> bool:
    """Whether what lies in `out` is an empty folder, or a merged model of the same base and adapters, or of the run
    whose adapter alone is merged: it may have been trained on since.
    """
    if not (out / REPORT_NAME).is_file():
        return out.is_dir() and not any(out.iterdir())
    own = merge.parts[0].adapter.folder.resolve().with_name("merged")
    is_alone = [part.weight for part in merge.parts] == [1.0]
    if out == own and is_alone and (out.parent / RUN_MANIFEST).is_file():
        return True
    try:
        report = read_report(out)
    except UserError:
        return False
    made_of = merge.base.fingerprint, merge.weighted_hashes
    return report is not None and (report.base_fingerprint, report.adapters) == made_of


@contextmanager
def lock_merge(out: Path) -> Iterator[None]:
    """Held while a merge into `out` runs; the kernel lets go of it when the process dies.

    Raises:
        UserError: another process merges into `out` right now.
    """
    from filelock import FileLock, Timeout

    path = out.with_name(f".{out.name}.merging.lock")
    try:
        with FileLock(path, blocking=False):
            yield
            path.unlink()
    except Timeout as error:
        raise UserError(str(out), None, "Another process is merging into it.", "Wait for it.") from error


def describe_merge(merge: Merge, draft: Path, tensors: dict[str, str], seconds: float) -> MergeReport:
    """What was merged, before any proof."""
    plan = merge.plan
    others = {REPORT_NAME, "README.md", JOURNAL_NAME, IDENTITY_NAME} | {tensor.file for tensor in plan.tensors}
    paths = {path.relative_to(draft).as_posix(): path for path in sorted(draft.rglob("*")) if path.is_file()}
    return MergeReport(
        base=merge.base.name,
        revision=merge.base.revision,
        base_fingerprint=merge.base.fingerprint,
        adapters=merge.weighted_hashes,
        onto=merge.onto,
        dtype=merge.stored_dtype,
        num_tensors=len(plan.tensors),
        num_changed=sum(bool(tensor.updates) or tensor.is_replaced for tensor in plan.tensors),
        total_bytes=sum(tensor.num_bytes for tensor in plan.tensors),
        untied=plan.untied,
        left_out=plan.left_out,
        merge_seconds=seconds,
        proof=None,
        compared_in=None,
        faults=(),
        training_difference=None,
        samples=(),
        tensors=tensors,
        files={name: hash_file(path) for name, path in paths.items() if name not in others},
    )
