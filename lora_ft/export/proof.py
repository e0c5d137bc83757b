"""The proof that a merged model is base + adapter, asked of a fresh process before the model gets its name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import RunFailed
from lora_ft.export.fresh import ask_fresh, identity_fields
from lora_ft.export.manifest import AdapterManifest, Arithmetic, Sample, read_sample
from lora_ft.export.merge_report import REPORT_NAME, MergeReport
from lora_ft.export.parity import TOLERANCE, Parity
from lora_ft.export.prepare_merge import Merge
from lora_ft.export.requantize import recorded_arithmetic
from lora_ft.export.samples import compare_samples
from lora_ft.model.machine import probe_machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_PROMPTS, PROMPT_TOKENS = 4, 16
"""Prompts made up for the proof, where an adapter has none recorded."""
ROOM_FOR_FP32 = 0.6
"""Share of the free memory a model in fp32 may take for its proof; beyond that it is compared as it is stored."""


def prove_merge(merge: Merge, draft: Path, report: MergeReport, prompts: Sequence[Sequence[int]]) -> MergeReport:
    """The report with the proof: a fresh process loads base + adapter, and then the merged model."""
    first = merge.parts[0].adapter
    if not prompts:
        prompts = [sample.prompt for sample in first.manifest.samples] if first.manifest else []
    prompts = [list(prompt) for prompt in prompts] or make_up_prompts(merge.model)
    reference = recorded_arithmetic(first) if merge.onto == "quantized" else proof_arithmetic(merge, report)
    arithmetic = replace(reference, quantization=None)
    answer = ask_fresh(
        "prove_merge",
        folder=str(draft),
        adapters=[(str(part.adapter.folder), part.weight) for part in merge.parts],
        base=identity_fields(merge.base),
        trust_remote_code=first.trust_remote_code,
        arithmetic=asdict(reference),
        merged_arithmetic=asdict(arithmetic),
        prompts=prompts,
    )
    proof = Parity(**answer["parity"])
    samples = tuple(read_sample(sample) for sample in answer["samples"])
    faults = tuple(proof.faults(coarsest(report.dtype, reference)))
    return replace(
        report,
        proof=proof,
        compared_in=arithmetic,
        faults=faults,
        training_difference=distance_from_training(first.manifest, samples),
        samples=samples,
    )


def distance_from_training(manifest: AdapterManifest | None, samples: Sequence[Sample]) -> float | None:
    """How far a merged model's answers are from those the adapter was saved with; None if the prompts are others."""
    recorded = manifest.samples if manifest else ()
    if not recorded or [sample.prompt for sample in recorded] != [sample.prompt for sample in samples]:
        return None
    return compare_samples(recorded, samples)


def make_up_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Prompts of arbitrary tokens, always the same ones, for adapters with none recorded."""
    rows = model.get_input_embeddings().weight.shape[0]
    draw = random.Random(0)
    return [[draw.randrange(rows) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]


def proof_arithmetic(merge: Merge, report: MergeReport) -> Arithmetic:
    """fp32 where there is room for it, as it shows the smallest faults; the stored type otherwise."""
    wanted = 4 * sum(parameter.numel() for parameter in merge.model.parameters())
    return Arithmetic("float32" if wanted <= ROOM_FOR_FP32 * free_bytes() else report.dtype, None, None)


def free_bytes() -> int:
    """Free memory of the device that models are loaded on."""
    import psutil
    import torch

    device = probe_machine().device
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available


def coarsest(stored: str, reference: Arithmetic) -> str:
    """The type that rounds most of those at work, whose tolerance holds; LLM.int8 rounds activations too."""
    dtypes = [stored, reference.dtype]
    if reference.quantization and not reference.quantization.get("load_in_4bit"):
        dtypes.append("bfloat16")
    return max(dtypes, key=list(TOLERANCE).index)


def refuse_unequal(report: MergeReport, draft: Path) -> None:
    """Nothing if no fault was found.

    Raises:
        RunFailed: the merged model does not say what base and adapter say.
    """
    if report.faults:
        rule = "The merged model is not base + adapter, so it was not given its name."
        fix = f"{draft / REPORT_NAME} has the figures. If rounding is the reason, merge with --dtype float32."
        raise RunFailed(str(draft), "; ".join(report.faults), rule, fix)
