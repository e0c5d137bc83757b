"""The model card: what was trained on what, how well, and how to load it. Counts of data, never data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lora_ft.errors import UserError
from lora_ft.export.manifest import AdapterManifest, read_manifest
from lora_ft.export.merge_report import MergeReport, read_report
from lora_ft.export.skeleton import TASK_CLASSES
from lora_ft.fingerprint import read_json

CAUSAL = "CAUSAL_LM"
PIPELINE_TAGS = {
    CAUSAL: "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
}
"""PEFT's task type → what the Hub calls a model for it."""
HIDDEN_RECIPE_KEYS = ("output_dir", "export")
"""Sections of a recipe that say where things lie on the trainer's machine, and nothing of the model."""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells."""

    title: str
    """Name of the model."""
    base: str
    """Hub id of the base; the folder's name where it has none."""
    revision: str | None
    """Commit of the base."""
    is_adapter: bool
    """Whether it needs its base; a merged model does not."""
    task_type: str = CAUSAL
    """PEFT's name of what it is for."""
    num_labels: int | None = None
    """Classes that a classifier tells apart."""
    license: str | None = None
    """Licence as the Hub names it."""
    tensors: str | None = None
    """Hash of an adapter's tensors."""
    num_embeddings: int | None = None
    """Rows of embeddings the base must have before the adapter is loaded, where that is more than it has."""
    versions: Mapping[str, str] | None = None
    """Library → version."""
    merge: MergeReport | None = None
    """What was merged, and the proof."""
    vllm: tuple[str, ...] = ()
    """How vLLM takes the adapter: flags, or why it does not."""
    handoff: str | None = None
    """How to go on to Ollama."""
    run: Mapping[str, Any] | None = None
    """run.json of the run."""
    recipe: Mapping[str, Any] | None = None
    """The run's recipe, made fit for others."""


def render_card(facts: CardFacts) -> str:
    """README.md, with the metadata the Hub reads on top."""
    sections = (
        front_matter(facts),
        [f"# {facts.title}", "", introduction(facts)],
        data_section(facts.run),
        figures_section(facts.run),
        proof_section(facts),
        loading_section(facts),
        recipe_section(facts.recipe),
        versions_section(facts),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def front_matter(facts: CardFacts) -> list[str]:
    """The card's metadata. Source: Hub documentation, "Model Cards", section "Model card metadata"."""
    fields: dict[str, Any] = {
        "base_model": facts.base,
        "base_model_relation": "adapter" if facts.is_adapter else "merge",
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": PIPELINE_TAGS[facts.task_type],
        "tags": ["lora", "lora-ft"],
    }
    if facts.license:
        fields["license"] = facts.license
    return ["---", yaml.safe_dump(fields, sort_keys=True).strip(), "---"]


def introduction(facts: CardFacts) -> str:
    """What it is, in a sentence."""
    pinned = f", commit `{facts.revision}`" if facts.revision else ""
    kind = "A LoRA adapter for" if facts.is_adapter else "A LoRA adapter merged into"
    return f"{kind} `{facts.base}`{pinned}."


def data_section(run: Mapping[str, Any] | None) -> list[str]:
    """How many rows and tokens it learnt from."""
    splits = (run or {}).get("data", {}).get("splits", {})
    if not splits:
        return []
    rows = [
        (name, counts.get("num_documents"), counts.get("num_tokens"), counts.get("num_supervised_tokens"))
        for name, counts in splits.items()
    ]
    return ["## Data", "", *table(("split", "documents", "tokens", "supervised tokens"), rows)]


def figures_section(run: Mapping[str, Any] | None) -> list[str]:
    """Base against tuned model on the test split."""
    evaluation = (run or {}).get("evaluation") or {}
    figures = evaluation.get("figures") or {}
    if not figures:
        return []
    columns = ("base", "tuned", "difference")
    rows = [(name, *(interval(found[column]) for column in columns)) for name, found in figures.items()]
    return ["## On the test split", "", *table(("", *columns), rows)]


def proof_section(facts: CardFacts) -> list[str]:
    """What is known to hold."""
    lines = []
    if facts.tensors:
        lines.append(f"- SHA-256 of the adapter's tensors: `{facts.tensors}`")
    if facts.merge:
        lines.append(f"- Merged onto the {facts.merge.onto} base, stored as {facts.merge.dtype}.")
    if facts.merge and facts.merge.proof:
        proof = facts.merge.proof
        lines += [
            f"- Verdict: {facts.merge.verdict} to base + adapter on {proof.num_prompts} prompts.",
            f"- Largest difference of a logit {proof.max_logit_difference:.1e}, mean {proof.mean_logit_difference:.1e};"
            f" the adapter itself moves a logit by {proof.mean_adapter_effect:.1e} on average.",
            f"- Mean KL divergence {proof.mean_kl_divergence:.1e} nats a token;"
            f" likeliest token the same at {proof.top_token_agreement:.1%} of positions.",
        ]
        if proof.greedy_agreement is not None:
            lines.append(f"- Greedy answers the same for {proof.greedy_agreement:.0%} of prompts.")
    return ["## Proof", "", *lines] if lines else []


def loading_section(facts: CardFacts) -> list[str]:
    """How to use it, for each program."""
    cls = TASK_CLASSES[facts.task_type]
    stops = facts.is_adapter and facts.task_type == CAUSAL and facts.tensors is not None
    lines = ["## How to load it", "", "```python"]
    if facts.is_adapter:
        pinned = f', revision="{facts.revision}"' if facts.revision else ""
        classes = f"{cls}, AutoTokenizer" + (", GenerationConfig" if stops else "")
        lines += ["from peft import PeftModel", f"from transformers import {classes}", ""]
        labels = f", num_labels={facts.num_labels}" if facts.num_labels else ""
        lines.append(f'model = {cls}.from_pretrained("{facts.base}"{pinned}{labels})')
        if facts.num_embeddings:
            lines.append(f"model.resize_token_embeddings({facts.num_embeddings})")
        lines.append(f'model = PeftModel.from_pretrained(model, "{facts.title}")')
        if stops:  # on what ended answers in training, which the base need not know
            lines.append(f'model.generation_config = GenerationConfig.from_pretrained("{facts.title}")')
    else:
        lines += [f"from transformers import {cls}, AutoTokenizer", ""]
        lines.append(f'model = {cls}.from_pretrained("{facts.title}", dtype="auto")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{facts.title}")')
    if facts.is_adapter and facts.num_labels:
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    lines.append("```")
    if facts.vllm:
        lines += ["", "vLLM: " + "; ".join(facts.vllm)]
    elif not facts.is_adapter and facts.task_type == CAUSAL:
        lines += ["", f"vLLM: `vllm serve {facts.title}`"]
    if facts.handoff:
        lines += ["", f"Ollama: {facts.handoff}"]
    return lines


def recipe_section(recipe: Mapping[str, Any] | None) -> list[str]:
    """The recipe it can be trained again with."""
    if not recipe:
        return []
    return ["## Recipe", "", "```yaml", yaml.safe_dump(dict(recipe), sort_keys=False).strip(), "```"]


def versions_section(facts: CardFacts) -> list[str]:
    """The libraries it was made with."""
    versions = (facts.run or {}).get("versions") or facts.versions or {}
    return (
        ["## Made with", "", ", ".join(f"{name} {version}" for name, version in versions.items())] if versions else []
    )


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def interval(estimate: Mapping[str, float]) -> str:
    """A figure to four digits, and the interval that holds it in 95% of resamples of the rows."""
    value, low, high = (f"{estimate[part]:.4g}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def adapter_facts(manifest: AdapterManifest, title: str) -> CardFacts:
    """What the manifest of an adapter tells."""
    enlarged = manifest.num_embeddings != manifest.base_embeddings
    return CardFacts(
        title=title,
        base=readable_base(manifest.base),
        revision=manifest.revision,
        is_adapter=True,
        task_type=manifest.task_type or CAUSAL,
        num_labels=len(manifest.labels) if manifest.labels else None,
        tensors=manifest.tensors,
        num_embeddings=manifest.num_embeddings if enlarged else None,
        versions=manifest.versions,
    )


def merged_facts(report: MergeReport, title: str, task_type: str | None, handoff: str | None) -> CardFacts:
    """What the report of a merge tells."""
    return CardFacts(
        title=title,
        base=readable_base(report.base),
        revision=report.revision,
        is_adapter=False,
        task_type=task_type or CAUSAL,
        merge=report,
        handoff=handoff,
    )


def readable_base(name: str) -> str:
    """The base's name without the way to it on the trainer's machine."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def add_run(facts: CardFacts, run: Path) -> CardFacts:
    """The facts with those of the run the model comes from, if `run` is one.

    Raises:
        UserError: its manifest or recipe is damaged.
    """
    if not (run / "run.json").is_file() or not (run / "recipe.yaml").is_file():
        return facts
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        rule = f"This is not YAML ({error})."
        raise UserError(str(run / "recipe.yaml"), None, rule, "Copy it again from where it was made.") from None
    return replace(facts, run=read_json(run / "run.json"), recipe=public_recipe(recipe, facts.base))


def write_run_cards(run: Path) -> None:
    """The cards of a finished run's adapter and merged model, with its data, figures and recipe."""
    adapter, merged = read_manifest(run / "adapter"), read_report(run / "merged")
    if adapter is not None:
        facts = add_run(adapter_facts(adapter, run.resolve().name), run)
        (run / "adapter" / "README.md").write_text(render_card(facts), encoding="utf-8")
    if merged is not None:
        task_type = adapter.task_type if adapter else None
        facts = add_run(merged_facts(merged, run.resolve().name, task_type, None), run)
        (run / "merged" / "README.md").write_text(render_card(facts), encoding="utf-8")


def public_recipe(recipe: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The recipe without ways on the trainer's machine: of a file or folder only the name is left."""
    shown = {key: value for key, value in recipe.items() if key not in HIDDEN_RECIPE_KEYS}
    data = {key: value for key, value in (shown.get("data") or {}).items() if key != "cache_dir"}
    data["sources"] = [{**source, "path": Path(source["path"]).name} for source in data.get("sources", [])]
    return without_ways({**shown, "model": {**shown.get("model", {}), "base": base}, "data": data})


def without_ways(value: Any) -> Any:
    """`value` with the last part alone of every absolute path in it."""
    if isinstance(value, Mapping):
        return {key: without_ways(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_ways(item) for item in value]
    return value.rstrip("/\\").replace("\\", "/").rpartition("/")[2] if is_way(value) else value


def is_way(value: object) -> bool:
    """Whether `value` is an absolute path of several parts, of any system; `/no_think`, say, is a word."""
    return isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:|\\\\).*[/\\]", value) is not None
