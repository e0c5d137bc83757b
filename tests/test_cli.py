"""The command line: exit codes, one message, one JSON document, and a quick start."""

import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft.chat import _read_lines
from lora_ft.cli import FIRST_RANK_SECONDS, LAST_WORD_SECONDS, main, parse_arguments
from lora_ft.commands import _read_weight
from lora_ft.errors import Interrupted, UserError


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "lora_ft", *map(str, words)], capture_output=True, text=True, **options
    )


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from lora_ft.cli import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help(capsys):
    for command in ("train", "check", "evaluate", "merge", "verify", "chat", "recipes"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_version_is_told_without_a_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lora-ft {importlib.metadata.version('lora-ft')}\n"


def test_overrides_may_stand_around_options():
    options = parse_arguments(["train", "r.yaml", "a.b=1", "--fresh", "c.d=2"])
    assert options.overrides == ["a.b=1", "c.d=2"] and options.fresh


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["nonsense"],
        ["train", "r.yaml", "--no-such-option"],
        ["train", "r.yaml", "--fresh", "--warm-start"],
        ["merge", "x"],
    ],
)
def test_wrong_words_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and "usage: lora-ft" in said.err and ": error: " in said.err
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    assert ended.value.code == 2
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert fault["place"] == "command line" and fault["rule"] in said.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "absent.yaml"], "absent.yaml\n  The recipe cannot be read: No such file or directory."),
        (["train", "builtin:nothing"], "Nothing of that name is embedded"),
        (["verify", "absent"], "absent"),
        (["chat", "absent"], "absent"),
        (["evaluate", "absent"], "recipe.yaml"),
        (["merge", "absent", "--out", "x"], "absent"),
        (["recipes", "nothing"], "Nothing of that name is embedded"),
    ],
)
def test_user_errors_end_with_2_and_one_message(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    shown = capsys.readouterr()
    assert expected in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_rank_leaves_the_word_to_the_first_one(recipe_file, capsys, monkeypatch):
    """A launcher ends all ranks with the first that ends: one that did not wait would cut the first one short."""
    waited = []
    monkeypatch.setattr("lora_ft.cli.time.sleep", waited.append)
    path = str(recipe_file(lora={"r": 0}))
    monkeypatch.setenv("RANK", "0")
    assert main(["check", path]) == 2
    assert waited == []
    said = capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["check", path]) == 2
    assert waited == [FIRST_RANK_SECONDS]
    assert capsys.readouterr().err == said.replace("\n", "\nrank 1: ", 1)


def test_ranks_that_agreed_to_stop_do_not_wait_to_say_so(recipe_file, capsys, monkeypatch):
    """A launcher that was told to end is given 30 seconds before its processes are killed."""
    waited = []

    def stop(*args: object, **options: object) -> None:
        raise Interrupted("run", None, "Stopped by SIGTERM after step 3 of 9; checkpoint-3 is saved.", "")

    monkeypatch.setattr("lora_ft.cli.time.sleep", waited.append)
    monkeypatch.setattr("lora_ft.run.run_recipe", stop)
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(recipe_file())]) == 130
    assert waited == [LAST_WORD_SECONDS] and capsys.readouterr().err == ""


def test_json_of_an_error_is_one_document(recipe_file):
    done = run("train", recipe_file(lora={"r": 0}), "--json")
    assert done.returncode == 2
    (fault,) = json.loads(done.stdout)["faults"]
    assert fault["place"].endswith("lora.r") and fault["value"] == 0


def test_check_prints_the_recipe_with_reasons(recipe_file, capsys):
    assert main(["check", str(recipe_file(model={"dtype": "auto"}))]) == 0
    out = capsys.readouterr().out
    assert "attn_implementation: sdpa  # chosen: " in out
    assert "  dtype: " in out and "# chosen: " in out.partition("dtype: ")[2].splitlines()[0]


def test_plan_says_what_fits_and_what_would(recipe_file, capsys):
    path = str(recipe_file())
    assert main(["plan", path, "--device", "24 GiB", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] and planned["peak_bytes"] == sum(cause["num_bytes"] for cause in planned["causes"])
    assert main(["plan", path, "--device", "1 MiB"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_recipes_are_listed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "--json"]) == 0
    assert "quickstart" in json.loads(capsys.readouterr().out)
    assert main(["recipes", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").is_file()
    assert main(["recipes", "quickstart"]) == 2, "a file that is there is not overwritten"


@pytest.mark.parametrize("setting", ["model.dtype=float16", "training.fp16=true", "training.tf32=true"])
def test_what_a_cpu_cannot_do_is_refused_before_anything_is_written(recipe_file, setting, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU can")
    done = run("train", recipe_file(), setting)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_plan_follows_an_accelerate_config(recipe_file, capsys):
    """ZeRO-2 on two GPUs halves what the optimizer and the gradients take on each."""
    causes = {}
    for words in ([], ["--config-file", "accelerate_configs/zero2.yaml"]):
        assert main(["plan", str(recipe_file()), "--device", "8 GiB", *words, "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        causes[bool(words)] = {cause["name"]: cause["num_bytes"] for cause in planned["causes"]}
    assert causes[True]["optimizer"] == causes[False]["optimizer"] // 2
    assert causes[True]["base, linear layers"] == causes[False]["base, linear layers"]


def test_check_counts_memory_and_takes_the_largest_batch_that_fits(recipe_file, capsys):
    path = recipe_file(training={"per_device_train_batch_size": "auto"})
    assert main(["check", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["memory"]["fits"] and said["memory"]["peak_bytes"] > 0
    assert {"key": "training.per_device_train_batch_size", "value": 16}.items() <= said["choices"][-3].items()


def test_check_refuses_a_metric_that_nothing_measures(recipe_file, capsys):
    """Failure mode 21: found before training, by `check` as by `train`."""
    steered = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "bleu"}
    assert main(["check", str(recipe_file(training=steered))]) == 2
    assert "training.metric_for_best_model: bleu" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["recipes --json", "recipes", "check no-such.yaml --json"])
def test_a_reader_that_leaves_is_no_traceback(words):
    command = f"{sys.executable} -m lora_ft {words} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode in ((1, 2) if "check" in words else (0, 1))
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "r.yaml", "--gpus", "-2"],
        ["plan", "r.yaml", "--gpus", "0"],
        ["chat", "run", "--max-new-tokens", "0"],
        ["preview", "r.yaml", "--rows", "-1"],
        ["sweep", "r.yaml", "--space", "s.yaml", "--trials", "many"],
    ],
)
def test_counts_are_of_one_at_least(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "a whole number of 1 or more" in capsys.readouterr().err


def test_a_folder_with_an_equals_sign_in_its_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2").mkdir()
    assert _read_weight("lr=2") == (Path("lr=2"), 1.0)
    assert _read_weight("lr=2=0.5") == (Path("lr=2"), 0.5)
    assert _read_weight("adapter") == (Path("adapter"), 1.0)
    for word in ("adapter=nan", "adapter=half"):
        with pytest.raises(UserError, match="A weight is a number"):
            _read_weight(word)


def test_a_run_is_named_where_its_adapter_is_meant(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    assert _read_weight(f"{tmp_path / 'run'}=0.5") == (tmp_path / "run" / "adapter", 0.5)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_said_in_another_encoding_is_refused(monkeypatch, errors):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\ngr\xfc\xdf dich\n"), "utf-8", errors))
    with pytest.raises(UserError, match="must be UTF-8"):
        list(_read_lines(quiet=True))


def test_check_refuses_what_train_refuses_under_strict(recipe_file, capsys):
    """A gate built on `check` holds."""
    strict = ["data.strict=true", "data.max_length=42"]
    assert main(["check", str(recipe_file()), *strict]) == 2
    assert "data.strict refuses them." in capsys.readouterr().out
    assert main(["check", str(recipe_file()), "--json", *strict]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor"),
        ("training.lr_scheduler_type=cosin", "SchedulerType"),
        ("training.weight_decay=-1", "weight_decay"),
        ("training.max_seq_length=64", "data.max_length"),
        ("training.warmup_ratio=0.1", "warmup_steps"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--no-data"]], ids=["data", "no data"])
def test_check_refuses_what_no_training_starts_from(recipe_file, capsys, setting, expected, flags):
    assert main(["check", str(recipe_file()), setting, *flags]) == 2
    assert expected in capsys.readouterr().err


def test_an_adapter_is_not_merged_at_nothing(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert main(["merge", f"{adapter}=0", "--out", str(tmp_path / "merged")]) == 2
    assert "would do nothing" in capsys.readouterr().err
