"""Cards tell what was trained on what and how well; counts of data, never data, and no way on the trainer's machine."""

import json
from dataclasses import replace

import pytest
import yaml

from lora_ft.errors import UserError
from lora_ft.export.card import CardFacts, adapter_facts, add_run, merged_facts, public_recipe, render_card
from lora_ft.export.manifest import read_manifest
from lora_ft.export.merge import merge_adapter

RUN = {
    "data": {
        "splits": {"train": {"num_documents": 40, "num_tokens": 900, "num_supervised_tokens": 300}},
        "faults": ["data.jsonl:3: my private row"],
    },
    "evaluation": {
        "figures": {
            "exact_match": {
                "base": {"value": 0.0, "low": 0.0, "high": 0.0},
                "tuned": {"value": 0.625, "low": 0.5, "high": 0.75},
                "difference": {"value": 0.625, "low": 0.5, "high": 0.75},
            }
        }
    },
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}
RECIPE = {
    "output_dir": "/home/anna/runs/secret-project",
    "model": {"base": "/home/anna/base", "dtype": "bfloat16"},
    "lora": {"r": 16},
    "data": {"sources": [{"path": "/home/anna/data/tickets.jsonl"}], "max_length": 512},
    "evaluation": {"metrics": ["f1", "/home/anna/score.py:score"], "general": "/home/anna/old.txt"},
    "export": {"merge": True},
}


@pytest.fixture
def run(tmp_path):
    """A run's folder with what a card reads of it."""
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def front_matter(card: str) -> dict:
    """The metadata on top of a card."""
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_the_metadata_is_what_the_hub_reads(plain):
    facts = replace(adapter_facts(read_manifest(plain.adapter), "org/tuned"), base="org/base", license="mit")
    assert front_matter(render_card(facts)) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-ft"],
    }


def test_a_run_gives_counts_figures_recipe_and_versions(plain, run):
    facts = replace(adapter_facts(read_manifest(plain.adapter), "org/tuned"), base="org/base")
    card = render_card(add_run(facts, run))
    for line in (
        "| train | 40 | 900 | 300 |",
        "| exact_match | 0 [0, 0] | 0.625 [0.5, 0.75] | 0.625 [0.5, 0.75] |",
        "  - path: tickets.jsonl",
        "  - score.py:score",
        "  general: old.txt",
        "torch 2.13.0, peft 0.21.2",
    ):
        assert line in card
    for private in ("anna", "secret-project", "my private row"):
        assert private not in card


def test_a_folder_that_is_no_run_adds_nothing(plain, tmp_path):
    facts = adapter_facts(read_manifest(plain.adapter), "org/tuned")
    assert add_run(facts, tmp_path) == facts


def test_a_pinned_base_and_a_larger_vocabulary_are_in_the_lines_to_copy(plain):
    manifest = replace(read_manifest(plain.adapter), base="org/base", revision="0123abc", num_embeddings=330)
    card = render_card(adapter_facts(manifest, "org/tuned"))
    assert 'AutoModelForCausalLM.from_pretrained("org/base", revision="0123abc")' in card
    assert "model.resize_token_embeddings(330)" in card


def test_a_classifier_is_loaded_as_one(plain):
    manifest = replace(read_manifest(plain.adapter), task_type="SEQ_CLS", labels={"0": "bad", "1": "good"})
    card = render_card(adapter_facts(manifest, "org/tuned"))
    assert front_matter(card)["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "num_labels=2)" in card


def test_a_merged_model_needs_no_base_to_load(plain, tmp_path):
    report = merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    card = render_card(merged_facts(report, "org/tuned", "CAUSAL_LM", "convert it"))
    assert 'AutoModelForCausalLM.from_pretrained("org/tuned", dtype="auto")' in card
    assert "vllm serve org/tuned" in card
    assert "Ollama: convert it" in card
    assert front_matter(card)["base_model_relation"] == "merge"


def test_a_card_of_nothing_but_a_name_is_still_a_card():
    card = render_card(CardFacts(title="t", base="org/base", revision=None, is_adapter=True))
    assert front_matter(card)["base_model"] == "org/base"


def test_no_way_on_the_trainers_machine_is_in_the_recipe():
    model = {"base": "/home/anna/base", "adapter": "/home/anna/first/adapter"}
    data = {
        "sources": [{"path": "C:\\Users\\anna\\tickets.jsonl"}, {"path": "org/set"}],
        "chat_template": "/home/anna/t.jinja",
        "cache_dir": "/home/anna/cache",
        "template_kwargs": {"mode": "/no_think"},
    }
    training = {"deepspeed": "~anna/zero.json", "learning_rate": 1e-4, "report_to": ["none"]}
    recipe = public_recipe({**RECIPE, "model": model, "data": data, "training": training}, "org/base")
    assert "anna" not in json.dumps(recipe)
    assert recipe["data"]["chat_template"] == "t.jinja" and recipe["model"] == {
        "base": "org/base",
        "adapter": "adapter",
    }
    assert recipe["training"] == {"deepspeed": "zero.json", "learning_rate": 1e-4, "report_to": ["none"]}
    assert recipe["data"]["template_kwargs"] == {"mode": "/no_think"}


@pytest.mark.parametrize(("name", "text"), [("run.json", "[]"), ("recipe.yaml", "a: [")])
def test_a_damaged_run_is_named(plain, run, name, text):
    (run / name).write_text(text)
    with pytest.raises(UserError, match=name):
        add_run(adapter_facts(read_manifest(plain.adapter), "org/tuned"), run)


def test_the_lines_to_copy_stop_where_training_did(plain):
    card = render_card(adapter_facts(read_manifest(plain.adapter), "org/tuned"))
    assert 'model.generation_config = GenerationConfig.from_pretrained("org/tuned")' in card
