"""The whole way, from a recipe to a folder that stock PEFT and transformers read without lora_ft."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import make_base

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def run_command(*words, **environment):
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "lora_ft", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def adapter_hash(folder: Path) -> str:
    from lora_ft.fingerprint import hash_tensors

    return hash_tensors(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, chat_rows):
    """A finished 4-bit run that overfits its forty rows, and what the command printed."""
    folder = tmp_path_factory.mktemp("finished")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"base": str(tiny_base)},
        "quantization": NF4,
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {
            "sources": [{"path": str(data), "split": "train"}, {"path": str(data), "split": "test"}],
            "max_length": 96,
        },
        "training": {"num_train_epochs": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        "evaluation": {"generate": 8, "max_new_tokens": 40},
        "export": {"merge": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = run_command("train", path, "--json", LORA_FT_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads(done.stdout)


def test_run_folder_holds_what_the_design_says(finished):
    folder, manifest = finished
    assert {"recipe.yaml", "run.json", "log.jsonl", "adapter", "merged", "report"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "run.json").read_text()) == manifest
    assert manifest["state"] == "finished"
    assert manifest["verification"]["ok"]
    assert manifest["adapter_sha256"] == adapter_hash(folder)
    assert {"torch", "peft", "trl", "lora-ft"} <= set(manifest["versions"])
    assert "adapter/adapter_model.safetensors" in manifest["files"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines) and all("step" in line for line in lines)


def test_a_run_and_its_proof_read_one_quantised_base(finished, monkeypatch):
    """Proving what was trained does not quantise the base a second time."""
    from lora_ft.model.quant_cache import list_cached

    folder, manifest = finished
    monkeypatch.setenv("LORA_FT_CACHE", str(folder.parent / "cache"))
    (cached,) = list_cached()
    assert cached.base == manifest["base"]["name"]
    assert manifest["verification"]["ok"]


def test_loss_goes_down_and_tuned_beats_base(finished):
    _, manifest = finished
    figures = manifest["evaluation"]["figures"]
    assert figures["perplexity"]["tuned"]["value"] < figures["perplexity"]["base"]["value"] / 3
    assert figures["loss"]["difference"]["high"] < 0, "no accident of these rows"
    assert figures["exact_match"]["difference"]["low"] > 0
    assert manifest["evaluation"]["general"]["num_rows"] == 96
    assert manifest["evaluation"]["verdict"]["name"] == "leaking split", "the test rows are the training rows"


def test_resolved_recipe_reads_back_and_gives_reasons(finished):
    from lora_ft.recipe import load_recipe

    folder, manifest = finished
    text = (folder / "recipe.yaml").read_text()
    for choice in manifest["choices"]:
        key = choice["key"].partition(".")[2]
        assert f"  {key}: " in text and f"# chosen: {choice['reason']}" in text
    load_recipe(folder / "recipe.yaml")


STOCK_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
turns = [{"role": "user", "content": question}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=40, do_sample=False)
new = out[0, ids["input_ids"].shape[1]:]
assert "lora_ft" not in sys.modules
print(json.dumps({"text": tokenizer.decode(new, skip_special_tokens=True), "last": int(new[-1]), "count": len(new)}))
"""

STOCK_PIPELINE = """
import json, sys
from transformers import pipeline
merged, question = sys.argv[1:]
turns = [{"role": "user", "content": question}]
answer = pipeline("text-generation", model=merged)(turns, max_new_tokens=40, do_sample=False)
assert "lora_ft" not in sys.modules
print(json.dumps(answer[0]["generated_text"][-1]["content"]))
"""


def stock(program, *arguments):
    """A program's last line, from a process that has never heard of lora_ft."""
    command = [sys.executable, "-I", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stock_peft_and_pipeline_give_the_trained_answers(finished, tiny_base, chat_rows):
    """Failure modes 3 and 42: the overfit model stops by itself, on the terminator, and merged says the same."""
    folder, _ = finished
    question, answer = (message["content"] for message in chat_rows[3]["messages"])
    said = stock(STOCK_PEFT, tiny_base, folder / "adapter", question)
    assert said["text"] == answer
    assert said["last"] == 2, "<|im_end|> ends the answer"
    assert said["count"] < 40
    assert stock(STOCK_PIPELINE, folder / "merged", question) == answer


def test_template_renders_alike_everywhere(finished, tiny_base, chat_rows):
    """Failure mode 8."""
    from transformers import AutoTokenizer

    folder, _ = finished
    rendered = set()
    for place in (tiny_base, folder / "adapter", folder / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        text = tokenizer.apply_chat_template(chat_rows[0]["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(chat_rows[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt)
        rendered.add(text)
    assert len(rendered) == 1


def test_verify_accepts_the_run_and_refuses_a_changed_one(finished, tmp_path, lora_ft):
    """Failure mode 39."""
    folder, _ = finished
    done = lora_ft("verify", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    copy = tmp_path / "adapter"
    shutil.copytree(folder / "adapter", copy)
    path = copy / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    done = lora_ft("verify", copy, "--quick")
    assert done.returncode == 1 and "adapter_model.safetensors" in done.stdout


def test_verify_holds_the_merged_model_against_the_run(finished, tmp_path, lora_ft):
    """One of another run is as whole as the run's own, and answers as it did when it was made."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    assert "ok    merged adapter: the run's own" in lora_ft("verify", run, "--quick").stdout
    report = run / "merged" / "merge_report.json"
    said = json.loads(report.read_text())
    for adapters in ([["0" * 64, 1.0]], [[said["adapters"][0][0], 0.5]], said["adapters"] * 2):
        report.write_text(json.dumps({**said, "adapters": adapters}))
        done = lora_ft("verify", run, "--quick")
        assert done.returncode == 1 and "FAIL  merged adapter: it was made of another adapter" in done.stdout
    report.unlink()
    done = lora_ft("verify", run, "--quick")
    assert done.returncode == 1 and "FAIL  merged adapter: merge_report.json" in done.stdout
    (run / "merged" / "config.json").unlink()
    done = lora_ft("verify", run, "--quick")
    assert done.returncode == 1 and "FAIL  merged: its config.json is missing" in done.stdout
    shutil.rmtree(run / "merged")
    done = lora_ft("verify", run, "--quick")
    assert done.returncode == 0 and "merged: the run made a merged model, and it is gone" in done.stdout


@pytest.mark.parametrize("part", ["adapter", "merged"])
@pytest.mark.parametrize("name", ["special_tokens_map.json", "additional_chat_templates/x.jinja", "added_tokens.json"])
def test_verify_names_files_that_were_added_and_would_be_read(finished, tmp_path, lora_ft, part, name):
    """transformers takes a token from a special_tokens_map.json that nobody saved, and splits words another way."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / part / "notes.md").write_text("of no effect")
    assert lora_ft("verify", run, "--quick").returncode == 0
    (run / part / name).parent.mkdir(exist_ok=True)
    (run / part / name).write_text('{"eos_token": "a"}')
    done = lora_ft("verify", run, "--quick")
    assert done.returncode == 1 and f"{name} was added" in done.stdout


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_nothing_is_made_of_an_adapter_that_is_not_the_one_trained(finished, tmp_path, lora_ft, recipe_file, name):
    """A merge would be proven equal to what lies there; figures would be told of what was never trained."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    path = run / "adapter" / name
    raw = path.read_bytes()
    alpha = b'"lora_alpha": '
    changed = raw.replace(alpha, alpha + b"1") if name.endswith("json") else raw[:-3] + b"\1" + raw[-2:]
    assert changed != raw
    path.write_bytes(changed)
    (tmp_path / "other").mkdir()
    again = recipe_file(model={"adapter": str(run / "adapter")}, lora=None, output_dir=str(tmp_path / "other"))
    for words in (
        ("evaluate", run),
        ("merge", run / "adapter", "--out", tmp_path / "merged"),
        ("chat", run),
        ("train", again),
    ):
        done = lora_ft(*words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert f"{path}\n  It has changed since the adapter was saved." in done.stderr
    assert not (tmp_path / "merged").exists() and not list((tmp_path / "other").iterdir())


def test_evaluate_again_gives_the_same_figures(finished, lora_ft):
    folder, manifest = finished
    done = lora_ft("evaluate", folder, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["figures"] == manifest["evaluation"]["figures"]
    assert figures["general"] == manifest["evaluation"]["general"]


def test_evaluate_refuses_what_the_run_was_not_trained_with(finished, lora_ft, tmp_path):
    """With another row the split is another one, and tests on rows that were learned."""
    folder, _ = finished
    rows, report = folder.parent / "rows.jsonl", (folder / "report" / "report.json").read_bytes()
    before = rows.read_text()
    rows.write_text(before + before.splitlines()[0].replace("battery", "light") + "\n")
    try:
        done = lora_ft("evaluate", folder)
    finally:
        rows.write_text(before)
    assert done.returncode == 2 and "trained on other rows" in done.stderr
    recipe, other = folder / "recipe.yaml", make_base(tmp_path / "other", num_hidden_layers=1)
    before = recipe.read_text()
    recipe.write_text(before.replace(yaml.safe_load(before)["model"]["base"], str(other)))
    try:
        done = lora_ft("evaluate", folder)
    finally:
        recipe.write_text(before)
    assert done.returncode == 2 and "trained on other weights" in done.stderr
    assert (folder / "report" / "report.json").read_bytes() == report


@pytest.mark.parametrize("command", ["check", "train"])
def test_what_train_refuses_check_refuses(recipe_file, lora_ft, command):
    for override, expected in {
        "lora.target_modules=[q_proj, v_prj]": "v_prj",
        "training.adam_beta1=1.5": "No optimizer can be made",
        "training.lr_scheduler_type=cosin": "cosin",
    }.items():
        done = lora_ft(command, recipe_file(), override)
        assert done.returncode == 2 and expected in done.stderr, done.stderr


def test_an_adapter_to_go_on_with_is_a_folder_of_one(finished, lora_ft, recipe_file, tmp_path):
    folder, _ = finished
    recipe = yaml.safe_load(recipe_file().read_text())
    recipe.pop("lora")
    for adapter, expected in ((folder, f"Write {folder / 'adapter'}"), (tmp_path / "none", "No adapter lies there")):
        path = tmp_path / "on.yaml"
        path.write_text(yaml.safe_dump({**recipe, "model": {**recipe["model"], "adapter": str(adapter)}}))
        done = lora_ft("check", path)
        assert done.returncode == 2 and expected in done.stderr


def test_a_run_that_has_not_ended_says_how_to_go_on(lora_ft, tmp_path, finished):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(finished[0] / name, folder / name)
    for command in ("verify", "chat", "evaluate"):
        done = lora_ft(command, folder)
        assert done.returncode == 2 and f"lora-ft train {folder / 'recipe.yaml'}" in done.stderr


def test_an_adapter_does_not_go_on_with_another_base(finished, lora_ft, recipe_file, tmp_path):
    """Failure mode 41; the shapes may well be the same."""
    folder, _ = finished
    other = make_base(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    recipe = yaml.safe_load(recipe_file().read_text()) | {
        "model": {"base": str(other), "adapter": str(folder / "adapter")}
    }
    recipe.pop("lora")
    path = tmp_path / "on.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = lora_ft("train", path)
    assert done.returncode == 2 and "model.adapter" in done.stderr and "It was trained on" in done.stderr


def test_chat_answers_from_a_pipe(finished, chat_rows):
    folder, _ = finished
    question, answer = (message["content"] for message in chat_rows[3]["messages"])
    done = subprocess.run(
        [sys.executable, "-m", "lora_ft", "chat", str(folder), "--base", "--json"],
        input=f"{question}\n\n/new\n{question}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    turns = json.loads(done.stdout)["turns"]
    assert [turn["tuned"] for turn in turns] == [answer, answer]
    assert all(turn["base"] != answer for turn in turns)


def test_finished_run_is_not_overwritten(finished, lora_ft):
    folder, _ = finished
    before = (folder / "run.json").read_bytes()
    done = lora_ft("train", folder / "recipe.yaml")
    assert done.returncode == 2
    assert "holds this very run, finished" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "run.json").read_bytes() == before


def test_same_seed_same_adapter(recipe_file, tmp_path):
    """Failure mode 26."""
    from lora_ft.recipe import load_recipe
    from lora_ft.run import run_recipe

    path = recipe_file(evaluation={"generate": 0})
    hashes = {}
    for name, seed in {"first": 1, "again": 1, "other": 2}.items():
        recipe = load_recipe(path, [f"output_dir={tmp_path / name}", f"training.seed={seed}"])
        hashes[name] = run_recipe(recipe, quiet=True).manifest["adapter_sha256"]
    assert hashes["first"] == hashes["again"] != hashes["other"]


def test_loss_is_on_answers_only(finished, chat_rows, tiny_base):
    """Failure mode 1: supervised are the answers and one terminator each, and the count is reported."""
    from transformers import AutoTokenizer

    _, manifest = finished
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    answers = [row["messages"][1]["content"] for row in chat_rows]
    expected = sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)
    assert manifest["evaluation"]["num_supervised_tokens"] == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources.0.path=/nowhere/rows.jsonl", "/nowhere/rows.jsonl"),
        ("model.base=/nowhere/base", "/nowhere/base"),
        ("evaluation.metrics=[accuracyy]", "Known: exact_match"),
        ("lora.target_modules=[nonesuch]", "PEFT cannot attach this adapter"),
        ("training.optim=nonesuch", "refuses these values"),
        ("lora.target_modules=[q_proj, nonesuch_2]", "no such module"),
    ],
)
def test_refusals_write_nothing(recipe_file, tmp_path, override, expected, lora_ft):
    done = lora_ft("train", recipe_file(), override)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_interrupted_run_goes_on_to_the_same_adapter(recipe_file, tmp_path):
    """A run that ends after its first checkpoint, then the same command again."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    path = recipe_file(training=settings, evaluation={"generate": 0})
    whole = run_command("train", path, f"output_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    stop_early = (
        "import sys, transformers\n"
        "class Stop(transformers.TrainerCallback):\n"
        "    def on_save(self, args, state, control, **kw):\n"
        "        if state.global_step == 4: import os; os._exit(9)\n"
        "import lora_ft.training.trainer as room\n"
        "build = room.build_trainer\n"
        "def wrapped(*a, **k):\n"
        "    trainer = build(*a, **k); trainer.add_callback(Stop()); return trainer\n"
        "room.build_trainer = wrapped\n"
        "from lora_ft.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", stop_early, "train", str(path)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    resumed = run_command("train", path, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")
