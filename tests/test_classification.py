"""A base that learns classes: its head is drawn, trained, saved, read back and merged, and never quantised."""

import json
import math

import numpy as np
import pytest

from tests.test_run import NF4, stock

SPAM = ["win a free prize now", "free entry call now", "you have won a free phone", "claim your free prize"]
HAM = ["see you at the station", "are you home yet", "dinner is at seven", "call me when you are there"]
CLASSES = {"junk": SPAM, "fine": HAM, "odd": ["7 7 7 7", "9 9", "1 2 3", "4 4 4"]}
PIPELINE = """
import json, sys
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1])
print(json.dumps([found["label"] for found in classify(json.loads(sys.argv[2]), batch_size=4)]))
"""
HEAD_LOGITS = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, adapter, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
model.config.pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    print(json.dumps([model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]))
"""


def make_rows() -> list[dict]:
    """Sixty short texts of three classes."""
    return [
        {"text": f"{text} {extra}".strip(), "label": label}
        for extra in ("", "please", "today", "again", "ok")
        for label, texts in CLASSES.items()
        for text in texts
    ]


@pytest.fixture
def class_recipe(recipe_file, tmp_path):
    """A function that writes a recipe for three classes."""
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))

    def write(**sections):
        section = {
            "task": "classification",
            "sources": [{"path": str(data)}],
            "split": {"validation": 0.2, "test": 0.2},
        }
        return recipe_file(**{**sections, "data": section, "evaluation": None})

    return write


def make_gpt2(folder):
    """A random GPT-2 of two layers without a padding token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(path, *overrides):
    from lora_ft.recipe import load_recipe
    from lora_ft.run import run_recipe

    return run_recipe(load_recipe(path, overrides), quiet=True)


def test_the_whole_way_in_4_bit(class_recipe, tmp_path, lora_ft):
    """Failure mode 30, and the classes' names: adapter, merged model, figures, and the command's words."""
    learn = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    path = class_recipe(quantization=NF4, training=learn, export={"merge": True})
    done = lora_ft("train", path)
    assert done.returncode == 0, done.stderr
    assert "right train 1" in done.stdout and "accuracy" in done.stdout and "lora-ft verify" in done.stdout
    folder = tmp_path / "run"
    report = json.loads((folder / "report" / "report.json").read_text())
    accuracy = report["figures"]["accuracy"]
    assert set(report["splits"]) == {"train", "validation", "test"} and report["labels"] == ["fine", "junk", "odd"]
    assert report["splits"]["train"]["accuracy"] > 0.9 > accuracy["base"]["value"]
    assert sum(map(sum, report["confusion"])) == accuracy["num_rows"] == report["splits"]["test"]["num_rows"] == 12
    assert sum(report["confusion"][n][n] for n in range(3)) / 12 == pytest.approx(accuracy["tuned"]["value"])
    rows = [json.loads(line) for line in (folder / "report" / "predictions.jsonl").read_text().splitlines()]
    right = sum(row["tuned"] == row["reference"] for row in rows) / len(rows)
    assert right == pytest.approx(accuracy["tuned"]["value"])
    said = stock(PIPELINE, folder / "merged", json.dumps([row["prompt"] for row in rows]))
    alike = sum(label == row["tuned"] for label, row in zip(said, rows, strict=True))
    assert alike >= 10  # merged onto weights that were never quantised, so that rows near a border may change sides
    assert json.loads((folder / "merged" / "config.json").read_text())["id2label"]["1"] == "junk"
    again = lora_ft("evaluate", folder, "--json")
    assert json.loads(again.stdout)["figures"] == report["figures"], again.stderr
    assert lora_ft("verify", folder).returncode == 0
    refused = lora_ft("chat", folder)
    assert refused.returncode == 2 and "SEQ_CLS" in refused.stderr


def test_the_best_epoch_by_accuracy_is_the_one_that_is_kept(class_recipe, tmp_path):
    """What steers is measured under the name that steers."""
    learn = {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    run(class_recipe(training={**learn, "metric_for_best_model": "accuracy", "load_best_model_at_end": True}))
    state = json.loads(max((tmp_path / "run").glob("checkpoint-*/trainer_state.json")).read_text())
    values = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert state["best_metric"] == max(values)


def test_the_verdict_names_the_step_that_was_kept(class_recipe, tmp_path):
    """By accuracy, which is not always the one of the lowest loss; also when the run is evaluated again."""
    from lora_ft.evaluate import evaluate_run

    learn = {"num_train_epochs": 3, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    steering = {"metric_for_best_model": "accuracy", "greater_is_better": False, "load_best_model_at_end": True}
    manifest = run(class_recipe(training={**learn, **steering, "learning_rate": 1e-2})).manifest
    folder, kept = tmp_path / "run", manifest["kept_step"]
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert kept == json.loads((newest / "trainer_state.json").read_text())["best_global_step"]
    points = json.loads((folder / "report" / "report.json").read_text())["curves"]["validation"]
    lowest = min(points, key=lambda point: point["loss"])["step"]
    assert kept != lowest, "the worst accuracy is not that of the lowest loss"
    assert f"kept: step {kept}." in manifest["evaluation"]["verdict"]["method"]
    assert f"kept: step {kept}." in evaluate_run(folder)["verdict"]["method"]
    older = {key: value for key, value in manifest.items() if key != "kept_step"}
    (folder / "run.json").write_text(json.dumps(older))
    assert f"kept: step {lowest}." in evaluate_run(folder)["verdict"]["method"]


def test_without_test_rows_the_classes_and_the_other_splits_are_told(class_recipe, tmp_path):
    evaluation = run(class_recipe(), "data.split.test=0").manifest["evaluation"]
    assert evaluation["labels"] == ("fine", "junk", "odd") and set(evaluation["splits"]) == {"train", "validation"}
    assert evaluation["figures"] == {} and evaluation["verdict"]["name"] == "not measured"
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "num_labels=3" in page and "validation rows." in page and "across" not in page


def test_a_classifier_that_learned_nothing_is_no_better_than_a_constant_answer(class_recipe, tmp_path):
    """Whatever it is against a head drawn at random."""
    result = run(class_recipe(training={"learning_rate": 1e-6, "max_steps": 12}), "data.split.test=0.5")
    verdict, constant = result.manifest["evaluation"]["verdict"], result.manifest["evaluation"]["constant"]
    assert "no better than a constant answer" in [finding["name"] for finding in verdict["findings"]]
    assert constant["loss"]["base"]["value"] == pytest.approx(math.log(3), abs=0.05)
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert f"Always “{constant['label']}”, the commonest class in training" in page


def test_a_constant_answer_knows_the_training_rows_and_no_other():
    """Four classes of which the last is not taught, and is asked for all the same."""
    import torch

    from lora_ft.evaluation.classify import compare_constant, score_classes

    taught, wanted = np.array([0] * 5 + [1] * 3 + [2]), np.array([0, 0, 1, 3])
    tuned = score_classes(torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 9, 0, 0], [0, 0, 0, 9]]), wanted)
    constant = compare_constant(taught, wanted, tuned, ("often", "seldom", "rare", "new"))
    logs = [math.log(count / 13) for count in (6, 6, 4, 1)]
    assert constant.label == "often" and constant.loss.base.value == pytest.approx(-sum(logs) / 4)
    assert (constant.accuracy.base.value, constant.accuracy.tuned.value) == (0.5, 0.75)


def test_f1_is_the_mean_over_the_classes_that_were_wanted_or_chosen():
    """As sklearn.metrics.f1_score(average="macro") has it; resamples without a rare class are not marked down."""
    import torch

    from lora_ft.evaluation.bootstrap import estimate_pair
    from lora_ft.evaluation.classify import mean_f1, score_classes

    wanted = np.array([0] * 38 + [1] * 2)
    perfect = score_classes(torch.nn.functional.one_hot(torch.from_numpy(wanted), 3).float(), wanted)[:, 3:]
    assert mean_f1(perfect.sum(0)) == 1.0
    tuned = estimate_pair(perfect, perfect, mean_f1).tuned
    assert (tuned.low, tuned.high) == (1.0, 1.0)
    chosen = torch.tensor([0, 2, 1])
    logits = torch.nn.functional.one_hot(chosen, 4).float()
    sums = score_classes(logits, np.array([0, 0, 1]))[:, 3:].sum(0)
    assert mean_f1(sums) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_stock_reload_gives_the_very_logits(class_recipe, tiny_base, tmp_path):
    """Failure mode 30: saved, read in a fresh process by PEFT alone, and asked the same."""
    import torch

    from lora_ft.data.prepare import build_splits
    from lora_ft.model.load import find_base, load_tokenizer
    from lora_ft.model.machine import probe_machine, settle_validation
    from lora_ft.recipe import load_recipe
    from lora_ft.run import bare_model, prepare_trainer, save_trained
    from lora_ft.settle import settle_recipe
    from lora_ft.training.distributed import read_launch

    recipe = settle_recipe(load_recipe(class_recipe()), probe_machine(), read_launch())
    base = find_base(str(tiny_base))
    tokenizer = load_tokenizer(base.folder, recipe.model)
    splits = build_splits(recipe.data, tokenizer)
    trainer = prepare_trainer(settle_validation(recipe, len(splits.validation)), base, tokenizer, splits, quiet=True)
    trainer.train()
    adapter = save_trained(trainer, tokenizer, splits, base, recipe)
    model, texts = bare_model(trainer).eval(), [*SPAM[:2], *HAM[:2]]
    with torch.no_grad():
        live = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]
    assert stock(HEAD_LOGITS, tiny_base, adapter, json.dumps(texts)) == live


@pytest.mark.parametrize("skipped", [None, ["layers.0"]])
def test_the_head_is_floating_point_and_learns(tiny_base, skipped):
    """Failure mode 31: also where the recipe names other layers to be left alone, so that the head is forgotten."""
    import torch

    from lora_ft.model.adapter import attach_adapter
    from lora_ft.model.load import find_base, load_base
    from lora_ft.sections import ModelSection

    quantization = {**NF4, "llm_int8_skip_modules": skipped} if skipped else NF4
    section = ModelSection(str(tiny_base), dtype="bfloat16")
    model = load_base(
        find_base(str(tiny_base)), section, quantization, task="classification", labels=("a", "b"), pad_token_id=0
    )
    assert type(model.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.score) is torch.nn.Linear and model.score.weight.is_floating_point()
    lora = {"r": 4, "target_modules": "all-linear"}
    model = attach_adapter(model, lora, task="classification")
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert head.dtype == torch.float32 and head.requires_grad
    before = head.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(3, 300, (4, 9))
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits, torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert not torch.equal(head, before)


def test_the_head_follows_from_the_seed(tiny_base):
    import torch

    from lora_ft.model.adapter import attach_adapter
    from lora_ft.model.load import find_base, load_base
    from lora_ft.sections import ModelSection

    heads = []
    for seed in (1, 1, 2):
        torch.rand(len(heads) + 1)
        model = load_base(find_base(str(tiny_base)), ModelSection(str(tiny_base)), task="classification", labels="ab")
        model = attach_adapter(model, {"r": 2, "target_modules": ["q_proj"]}, task="classification", seed=seed)
        heads.append(model.base_model.model.score.modules_to_save["default"].weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("pad_token_id", [0, 2], ids=["own", "eos"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_speaks_however_rows_are_padded(tiny_base, pad_token_id, side):
    """Also where the padding is the end mark, and a row ends with one."""
    import torch

    from lora_ft.model.load import find_base, load_base
    from lora_ft.sections import ModelSection

    model = load_base(
        find_base(str(tiny_base)),
        ModelSection(str(tiny_base), dtype="float32"),
        task="classification",
        labels=("a", "b", "c"),
        pad_token_id=pad_token_id,
    ).eval()
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 2], [13]]
    width = max(map(len, rows))
    filled = [[pad_token_id] * (width - len(row)) for row in rows]
    marks = [[1] * len(row) for row in rows]
    zeros = [[0] * len(filler) for filler in filled]
    ids, mask = (
        [f + r if side == "left" else r + f for r, f in zip(kept, fillers, strict=True)]
        for kept, fillers in ((rows, filled), (marks, zeros))
    )
    with torch.no_grad():
        together = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gpt2_without_a_padding_token_learns_and_is_merged(class_recipe, tmp_path):
    learn = {"max_steps": 80, "learning_rate": 2e-2, "per_device_train_batch_size": 8}
    base = make_gpt2(tmp_path / "gpt2")
    path = class_recipe(model={"base": str(base)}, training=learn, export={"merge": True})
    result = run(path)
    evaluation = result.manifest["evaluation"]
    assert evaluation["splits"]["train"]["accuracy"] > evaluation["figures"]["accuracy"]["base"]["value"]
    assert json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["pad_token_id"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "report" / "predictions.jsonl").read_text().splitlines()]
    texts = json.dumps([row["prompt"] for row in rows])
    assert stock(PIPELINE, tmp_path / "run" / "merged", texts) == [row["tuned"] for row in rows]


def test_only_the_last_block_the_norm_and_the_head(class_recipe):
    """The classic exercise: LoRA in one block alone, the final norm and the head whole."""
    from safetensors import safe_open

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"target_modules": names, "layers_to_transform": [1], "modules_to_save": ["model.norm"]}
    result = run(class_recipe(lora=lora, quantization=NF4))
    assert result.manifest["verification"]["ok"]
    with safe_open(result.folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = [key.removeprefix("base_model.model.") for key in file.keys()]  # noqa: SIM118
    assert {key for key in keys if "lora_" not in key} == {"model.norm.weight", "score.weight"}
    assert {key.split(".")[2] for key in keys if "lora_" in key} == {"1"}


def test_all_linear_in_some_layers_is_refused(class_recipe):
    """By PEFT itself, before anything is read or written."""
    from lora_ft.errors import UserError

    with pytest.raises(UserError, match="cannot be used when"):
        run(class_recipe(lora={"layers_to_transform": [1]}))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.metrics=[f1]", "no meaning for task classification"),
        ("evaluation.generate=4", "no meaning for task classification"),
        ("training.packing=true", "This is decided by data.packing"),
        ("training.dataset_text_field=text", "data.sources.0.columns"),
        ("training.use_liger=true", "transformers.TrainingArguments"),
    ],
)
def test_what_a_classifier_has_no_use_for_is_refused(class_recipe, override, expected, lora_ft):
    done = lora_ft("check", class_recipe(), override, "--no-data")
    assert done.returncode == 2 and expected in done.stderr
