"""A run watched from outside, and runs side by side."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from lora_ft.cli import main
from lora_ft.errors import UserError
from lora_ft.evaluation.side_by_side import compare_runs, keep_differences
from lora_ft.evaluation.state import describe_state
from lora_ft.sections import DataSection, ModelSection, Recipe
from lora_ft.training.identity import identify_run
from lora_ft.watch import draw_line, read_state, watch_run

LINES = [
    {"step": 0, "epoch": 0, "time": 1000.0, "max_steps": 40},
    {"step": 10, "epoch": 1.0, "time": 1010.0, "loss": 3.0, "learning_rate": 1e-3},
    {"step": 20, "epoch": 2.0, "time": 1020.0, "loss": 2.0, "learning_rate": 5e-4},
    {"step": 20, "epoch": 2.0, "time": 1022.0, "eval_loss": 2.5},
]


def write_run(folder, lines, state="training", **more):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"state": state, "trainable_parameters": 7, **more}))
    return folder


def test_state_of_a_training_run(tmp_path):
    state = read_state(write_run(tmp_path / "run", LINES), now=1025.0)
    assert (state["state"], state["step"], state["max_steps"]) == ("training", 20, 40)
    assert (state["loss"], state["eval_loss"], state["learning_rate"]) == (2.0, 2.5, 5e-4)
    assert state["seconds_left"] == 20.0, "a second a step"
    assert state["seconds_since"] == 3.0 and not state["is_over"]


def test_a_resumed_run_tells_its_pace_since():
    resumed = [*LINES, {"step": 20, "epoch": 2.0, "time": 5000.0, "max_steps": 40}]
    assert describe_state(resumed, 5001.0).max_steps == 40
    assert describe_state([], 0.0).step == 0


def test_the_hours_a_run_lay_still_are_not_in_its_pace():
    """Killed at step 20, gone on with ten hours later, two seconds a step since."""
    again = 1022.0 + 36_000
    began = {"step": 20, "epoch": 2.0, "time": again, "max_steps": 40}
    since = [{"step": 20 + n, "epoch": 2.0, "time": again + 2 * n, "loss": 1.0} for n in (1, 2, 3)]
    before = [line for line in LINES if "max_steps" not in line]
    assert describe_state([began, *before, *since], since[-1]["time"]).seconds_left == 34.0


def test_watching_ends_with_the_run(tmp_path, monkeypatch):
    import lora_ft.watch

    monkeypatch.setattr(lora_ft.watch, "LOOK_EVERY_SECONDS", 0.05)
    run = write_run(tmp_path / "run", LINES[:2])
    verdict = {"evaluation": {"verdict": {"name": "good fit"}}}
    finish = threading.Timer(
        0.3,
        lambda: write_run(run, [*LINES, {"step": 40, "time": 1040.0, "train_runtime": 40.0}], "finished", **verdict),
    )
    finish.start()
    console = Console(record=True, width=100)
    assert watch_run(run, console)["state"] == "finished"
    said = console.export_text()
    assert "run: finished, good fit" in said and "2.5000 at step 20  lowest" in said


def test_watching_ends_with_a_process_that_was_killed(tmp_path):
    """It cannot say so itself; who held the lock can be looked for."""
    run = write_run(tmp_path / "run", LINES)
    (run / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}))
    assert read_state(run, now=1025.0)["state"] == "training"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run / ".lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": "now"}))
    console = Console(record=True, width=100)
    assert watch_run(run, console)["state"] == "stopped"
    assert "the same lora-ft train goes on" in console.export_text()


def test_watch_prints_the_state_once_as_json(tmp_path, capsys):
    assert main(["watch", str(write_run(tmp_path / "run", LINES)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 20
    assert main(["watch", str(tmp_path / "nowhere")]) == 2


def test_silence_is_said(tmp_path):
    run = write_run(tmp_path / "run", [{**line, "time": time.time() - 600} for line in LINES])
    from lora_ft.evaluation.curves import read_log, trace_curves
    from lora_ft.watch import draw_state

    console = Console(record=True, width=100)
    console.print(draw_state(run, read_state(run, time.time()), trace_curves(read_log(run))))
    assert "nothing logged for 0:10:00" in console.export_text()


def test_line_of_bars():
    assert draw_line([3.0, 2.0, 1.0]) == "█▅▁" and draw_line([]) == "" and len(draw_line([1.0] * 500)) == 32


def test_differences_of_recipes():
    first, second = {"lora.r": 8, "training.seed": 1}, {"lora.r": 16, "training.seed": 1, "lora.use_dora": True}
    assert keep_differences([first, second]) == [
        {"lora.r": 8, "lora.use_dora": None},
        {"lora.r": 16, "lora.use_dora": True},
    ]


def write_evaluated(folder, rank, loss, data="d"):
    identity = vars(identify_run(Recipe(folder, ModelSection("base"), DataSection(())), "b", data, 1, "ddp"))
    write_run(folder, LINES, "finished", training={"train_runtime": 12.0}, identity=identity)
    (folder / "recipe.yaml").write_text(f"output_dir: {folder}\nlora: {{r: {rank}}}\ntraining: {{seed: 1}}\n")
    estimate = {"value": loss, "low": loss - 0.1, "high": loss + 0.1}
    figure = {
        "base": estimate,
        "tuned": estimate,
        "difference": estimate,
        "unit": "nats",
        "better": "lower",
        "num_rows": 9,
    }
    report = {"verdict": {"name": "good fit"}, "figures": {"loss": figure}, "general": None}
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text(json.dumps(report))
    return folder


def test_runs_side_by_side(tmp_path, capsys):
    runs = [write_evaluated(tmp_path / "small", 8, 1.5), write_evaluated(tmp_path / "large", 16, 1.25, data="e")]
    assert main(["compare", *map(str, runs), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["settings"], second["settings"]) == ({"lora.r": 8}, {"lora.r": 16})
    assert second["figures"]["loss"]["tuned"]["value"] == 1.25
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "1.250 [1.150, 1.350]" in said and "lora.r" in said and "different data" in said
    alike = [runs[0], write_evaluated(tmp_path / "alike", 16, 1.25)]
    assert main(["compare", *map(str, alike)]) == 0
    assert "different data" not in capsys.readouterr().out


def test_a_report_of_nothing_is_named(tmp_path):
    run = write_evaluated(tmp_path / "run", 8, 1.5)
    (run / "report" / "report.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"report\.json\n  A report has verdict, figures, general\. Run: lora-ft evaluate"
    ):
        compare_runs([run])


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run in this folder"):
        compare_runs([tmp_path])
    run = write_run(tmp_path / "run", LINES)
    (run / "recipe.yaml").write_text("output_dir: x\n")
    with pytest.raises(UserError, match="has not come to its end"):
        compare_runs([run])
    (run / "adapter").mkdir()
    with pytest.raises(UserError, match="lora-ft evaluate"):
        compare_runs([run])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("log.jsonl", '{"step": 0, "time": 1}\n{"st\n'),
        ("log.jsonl", "[]\n"),
        ("log.jsonl", '{"loss": 1.0}\n'),
    ],
)
def test_damaged_files_are_named(tmp_path, capsys, name, text):
    run = write_evaluated(tmp_path / "run", 8, 1.5)
    (run / name).write_text(text)
    assert main(["watch", str(run), "--json"]) == 2
    assert name in capsys.readouterr().err
    if name == "run.json":
        assert main(["compare", str(run)]) == 2
        assert name in capsys.readouterr().err


def test_a_note_tells_nothing_of_the_pace(tmp_path):
    run = write_run(tmp_path / "run", [*LINES, {"step": 20, "note": "the loss jumped to 9.0"}])
    state = read_state(run, now=1025.0)
    assert (state["epoch"], state["seconds_since"]) == (2.0, 3.0)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    run = write_run(tmp_path / "run", LINES)
    with open(run / "log.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 30, "ti')
    assert read_state(run, now=1025.0)["step"] == 20
