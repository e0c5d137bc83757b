"""Whether a merged model is whole, is the one that was merged, and still says what it said."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import UserError
from lora_ft.export.checkpoint import (
    FLOATS,
    Place,
    StoredTensor,
    extremes,
    place_tensors,
    read_checkpoint,
    torch_dtype,
)
from lora_ft.export.finding import Finding, check_answers, check_files, find_added
from lora_ft.export.fresh import ask_fresh
from lora_ft.export.merge_report import MergeReport, read_report
from lora_ft.export.skeleton import architecture_class, empty_model, read_config
from lora_ft.fingerprint import CHUNK_BYTES, start_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def verify_merged(path: Path, quick: bool, trust_remote_code: bool) -> Iterator[Finding]:
    """Findings on a merged folder; those that need intact files end with the first fault."""
    try:
        report = read_report(path)
        tensors = read_checkpoint(path)
    except UserError as error:
        yield Finding("files", False, str(error))
        return
    yield check_architecture(path, tensors, trust_remote_code)
    yield check_proof(report)
    changed, infinite = ([], []) if quick else read_all(tensors, report)
    if report is None:
        yield Finding("files", True, "another tool merged this model, so there are no hashes for it", False)
    else:
        weights = {tensor.path.name for tensor in tensors.values()}
        yield check_files(path, report.files, changed, find_added(path, {*report.files, *weights}))
    if not quick:
        detail = f"not finite: {', '.join(infinite)}" if infinite else f"{len(tensors)} tensors, finite"
        yield Finding("values", not infinite, detail)
        yield check_samples(path, report, trust_remote_code)


def check_architecture(path: Path, tensors: Mapping[str, StoredTensor], trust_remote_code: bool) -> Finding:
    """Whether the files hold every weight of the architecture that config.json names, in its shape."""
    import torch

    try:
        config = read_config(path, trust_remote_code)
        with torch.device("meta"):
            model = empty_model(architecture_class(config), config, trust_remote_code)
    except UserError as error:
        return Finding("keys", False, str(error))
    places = place_tensors(tensors, model)
    found = {place.parameter for place in places.values() if place}
    shared = model.all_tied_weights_keys
    needed = {name for name, _ in model.named_parameters()} - found
    missing = sorted(name for name in needed if shared.get(name) not in found and name not in shared.values())
    strange = sorted(name for name, place in places.items() if place is None)
    detail = f"{type(model).__name__}, {len(tensors)} tensors"
    if strange:
        detail += f"; {len(strange)} of them are not used by transformers, such as {strange[0]}"
    misshapen = find_misshapen(tensors, places, model)
    faults = [
        f"{reason}: {', '.join(names[:3])}"
        for reason, names in {"missing": missing, "of another shape": misshapen}.items()
        if names
    ]
    return Finding("keys", not faults, "; ".join(faults) or detail)


def find_misshapen(
    tensors: Mapping[str, StoredTensor], places: Mapping[str, Place | None], model: PreTrainedModel
) -> list[str]:
    """Names of the parameters whose tensors are not of their shape, where nothing is converted in between.

    experts.0.w1 [I, D]  experts.0.w3 [I, D]      rows of one expert, which together are gate_up_proj[0] [2·I, D]
    """
    state, parts = model.state_dict(), defaultdict(list)
    for name, place in places.items():
        if place is not None and place.conversion is None:
            parts[place.parameter, place.expert].append(tensors[name].shape)
    misshapen = set()
    for (parameter, expert), shapes in parts.items():
        wanted = tuple(state[parameter].shape)[expert is not None :]
        rows = [(sum(shape[0] for shape in shapes),)] if expert is not None else [shape[:1] for shape in shapes]
        if {(*first, *shape[1:]) for first in rows for shape in shapes} != {wanted}:
            misshapen.add(parameter)
    return sorted(misshapen)


def check_proof(report: MergeReport | None) -> Finding:
    """Whether it was shown, when it was merged, that the model is base + adapter."""
    if report is None or report.proof is None:
        return Finding("proof", True, "it was never compared with base + adapter", False)
    detail = (
        f"merged onto {report.base} ({report.base_fingerprint[:12]}); "
        f"logits within {report.proof.max_logit_difference:.1e} of base + adapter, "
        f"KL {report.proof.mean_kl_divergence:.1e}"
    )
    return Finding("proof", not report.faults, "; ".join(report.faults) or detail)


def read_all(tensors: Mapping[str, StoredTensor], report: MergeReport | None) -> tuple[list[str], list[str]]:
    """Names of tensors that are not as they were merged, and of those with values that are not finite."""
    import torch

    changed, infinite = [], []
    for name, tensor in tensors.items():
        digest, finite = start_digest(), True
        for chunk in tensor.read_chunks(CHUNK_BYTES):
            digest.update(chunk)
            if tensor.dtype in FLOATS:
                finite &= all(map(math.isfinite, extremes(torch.frombuffer(chunk, dtype=torch_dtype(tensor.dtype)))))
        if report and report.tensors.get(name) != digest.hexdigest():
            changed.append(name)
        if not finite:
            infinite.append(name)
    gone = [name for name in report.tensors if name not in tensors] if report else []
    return changed + gone, infinite


def check_samples(path: Path, report: MergeReport | None, trust_remote_code: bool) -> Finding:
    """Whether a fresh process gives the recorded answers."""
    if report is None or not report.samples or report.compared_in is None:
        return Finding("samples", True, "none recorded", False)
    request = {
        "folder": str(path),
        "arithmetic": asdict(report.compared_in),
        "prompts": [sample.prompt for sample in report.samples],
        "trust_remote_code": trust_remote_code,
    }
    return check_answers(report.samples, report.compared_in.dtype, lambda: ask_fresh("answer_merged", **request))
