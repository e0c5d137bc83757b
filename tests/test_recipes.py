"""Every recipe that is shipped loads, builds its library objects, and trains on a tiny base of its architecture."""

import importlib
import json
from pathlib import Path

import pytest

from lora_ft.builtin import describe_recipe, list_recipes
from lora_ft.library_fields import LIBRARY_CLASSES, find_class
from lora_ft.recipe import load_recipe
from lora_ft.recipe_rules import LORAPLUS

RECIPES = Path(__file__).parents[1] / "recipes"
ARCHITECTURES = {
    "qwen3_8b_qlora": "Qwen3",
    "llama31_8b_qlora": "Llama",
    "mistral_7b_qlora": "Mistral",
    "gemma3_1b_qlora": "Gemma3Text",
    "smollm3_3b_qlora": "SmolLM3",
}
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def make_tiny(architecture: str, folder: Path) -> Path:
    """A random base of two layers of the architecture, with the tests' tokenizer."""
    import torch
    import transformers

    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**TINY)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_every_recipe_is_described():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(list_recipes())
    assert {"quickstart", *ARCHITECTURES} <= set(list_recipes())
    for name in list_recipes():
        assert len(describe_recipe(name)) > 20


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_builds_its_library_objects(path, tmp_path):
    recipe = load_recipe(path)
    for section in ("quantization", "lora", "training"):
        library = LIBRARY_CLASSES[find_class(section, recipe.data.task)]
        values = dict(getattr(recipe, section) or {})
        values.pop(LORAPLUS, None)
        if section == "training":
            values |= {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
        getattr(importlib.import_module(library.package), library.name)(**values)


@pytest.mark.parametrize(("name", "architecture"), ARCHITECTURES.items(), ids=list(ARCHITECTURES))
def test_recipe_trains_on_its_architecture(name, architecture, tmp_path, chat_rows):
    from lora_ft.run import run_recipe

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    overrides = [
        f"model.base={make_tiny(architecture, tmp_path / 'base')}",
        f"data.sources.0.path={data}",
        f"output_dir={tmp_path / 'run'}",
        "data.max_length=128",
        "training.max_steps=2",
        "training.gradient_accumulation_steps=1",
        "evaluation.generate=0",
    ]
    result = run_recipe(load_recipe(RECIPES / f"{name}.yaml", overrides), quiet=True)
    assert result.manifest["verification"]["ok"]
    assert result.manifest["training"]["train_loss"] > 0
    assert result.manifest["evaluation"]["num_supervised_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spam_classification", "qa_seq2seq", "domain_chat"])
def test_recipe_takes_two_steps_on_its_own_base(name, tmp_path):
    """The embedded base and data as they are; for spam, which is not embedded, rows of its form."""
    from lora_ft.run import run_recipe

    spam = tmp_path / "spam.tsv"
    spam.write_text("".join(f"{('ham', 'spam')[n % 2]}\tmessage number {n} for you\n" for n in range(40)))
    source = [f"data.sources.0.path={spam}"] if name == "spam_classification" else []
    written = [] if name == "spam_classification" else ["evaluation.generate=2", "evaluation.max_new_tokens=4"]
    overrides = [f"output_dir={tmp_path / 'run'}", "training.max_steps=2", "training.eval_strategy=no"]
    steps = ["training.save_strategy=no", "training.load_best_model_at_end=false"]
    result = run_recipe(load_recipe(RECIPES / f"{name}.yaml", [*overrides, *steps, *source, *written]), quiet=True)
    assert result.manifest["verification"]["ok"]
    assert result.manifest["export"]["merge"]["proof"]["top_token_agreement"] > 0.9
    assert (tmp_path / "run" / "report" / "predictions.jsonl").stat().st_size > 0


def test_alpaca_recipe_learns_gsm8k_answers(tmp_path, shared_data):
    """Real input: GSM8K in Alpaca form, answers only, loss going down, adapter verified."""
    from lora_ft.run import run_recipe

    rows = json.loads((shared_data / "gsm8k_train.json").read_text())[:300]
    data = tmp_path / "train.json"
    data.write_text(json.dumps(rows))
    overrides = [
        f"data.sources.0.path={data}",
        f"output_dir={tmp_path / 'run'}",
        "training.max_steps=20",
        "evaluation.generate=2",
        "evaluation.max_new_tokens=8",
    ]
    result = run_recipe(load_recipe(RECIPES / "gsm8k_alpaca.yaml", overrides), quiet=True)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert result.manifest["verification"]["ok"]
    perplexity = result.manifest["evaluation"]["figures"]["perplexity"]
    assert perplexity["tuned"]["value"] < perplexity["base"]["value"]
