"""Runs that are stopped, killed or broken go on as if they had not been; of numbers that are none nothing is made."""

import json
import math
import os
import signal
import threading
import time

import datasets
import psutil
import pytest
import torch
from transformers import TrainerCallback

from lora_ft.errors import Interrupted, RunFailed
from lora_ft.fingerprint import hash_tensors
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_base, load_tokenizer
from lora_ft.sections import GuardsSection, ModelSection
from lora_ft.training.checkpoint import find_damage, find_intact, is_weights_only, list_checkpoints
from lora_ft.training.trainer import build_arguments, build_trainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
SETTINGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 7,
    "learning_rate": 5e-3,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 10,
}


def make_rows(count=18, packed=False):
    """Rows of different lengths; packed ones hold two documents each."""
    rows = []
    for index in range(count):
        ids = [(3 + index * 7 + position * 5) % 300 + 3 for position in range(12 - index % 3)]
        row = {"input_ids": ids, "labels": [-100] * 5 + ids[5:]}
        rows.append({**row, "seq_lengths": [5, len(ids) - 5]} if packed else row)
    return datasets.Dataset.from_list(rows)


class At(TrainerCallback):
    """Does something right before a step is over, or at an evaluation of that step."""

    def __init__(self, step, action, event="on_step_end"):
        setattr(self, event, lambda args, state, control, **kwargs: action() if state.global_step == step else None)


def stop_by(number):
    return lambda: os.kill(os.getpid(), number)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in between handles it."""


def kill():
    raise Killed


@pytest.fixture
def build(tiny_base, tmp_path):
    """A function that builds a trainer anew, as a new process would."""
    section = ModelSection(base=str(tiny_base), dtype="float32", attn_implementation="sdpa")
    base = find_base(section.base)
    tokenizer = load_tokenizer(base.folder, section)

    def make(name, *callbacks, patience=None, guards=None, rows=None, packed=False, name_row=None, **settings):
        torch.manual_seed(len(callbacks))  # whatever ran before
        model = attach_adapter(load_base(base, section, None), LORA, seed=7)
        arguments = build_arguments({**SETTINGS, **settings}, tmp_path / name)
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = build_trainer(
            model,
            tokenizer,
            make_rows(packed=packed) if rows is None else rows,
            make_rows(5),
            arguments,
            patience=patience,
            guards=guards,
            name_row=name_row,
            quiet=True,
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    return make


def spoil(trainer):
    """Makes the adapter much worse than it was."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data *= 50


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def read_log(folder):
    """What was logged, without what depends on the time of day."""
    timed = ("time", "runtime", "per_second")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "max_steps" not in line]
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in kept]


def assert_same_run(build, tmp_path, whole, *interrupted):
    """The adapter and every logged figure of the last trainer are those of `whole`."""
    expected, got = weights(whole), weights(interrupted[-1])
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert read_log(tmp_path / "broken") == read_log(tmp_path / "whole")


CASES = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_steps": -1},
    "packed": {"packed": True},
    "workers": {"dataloader_num_workers": 2},
    "evaluated_by_step": {"eval_strategy": "steps", "eval_steps": 2},
    "evaluated_by_epoch": {"eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1, "save_steps": 3},
    "saved_by_epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1},
    "best": {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_stopped_and_killed_run_is_the_uninterrupted_one(build, tmp_path, settings):
    """Failure modes 20 and 35: figures, tokens counted and adapter are equal to the last bit.

    The run is stopped within an epoch, then at its end, and then killed on the way to the next checkpoint.
    """
    whole = build("whole", **settings)
    whole.train()
    end = whole.state.max_steps
    boundary = math.ceil(end / 2) if settings.get("max_steps") == -1 else 9
    for step in (3, boundary):
        stopped = build("broken", At(step, stop_by(signal.SIGTERM)), **settings)
        with pytest.raises(Interrupted, match=f"Stopped by SIGTERM after step {step} of {end}"):
            stopped.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
        assert find_intact(tmp_path / "broken").name == f"checkpoint-{step}"
    if boundary + 1 < end:
        killed = build("broken", At(boundary + 1, kill), **settings)
        with pytest.raises(Killed):
            killed.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
    last = build("broken", **settings)
    outcome = last.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
    assert_same_run(build, tmp_path, whole, last)
    assert outcome.metrics["train_loss"] == pytest.approx(whole._total_loss_scalar / end, rel=1e-12)


def test_run_killed_after_its_last_step_makes_none_more(build, tmp_path):
    """transformers 5.23 trains another step on a checkpoint of the last one when `max_steps` ends within an epoch."""
    whole = build("whole")
    whole.train()
    again = build("whole")
    outcome = again.train(resume_from_checkpoint=find_intact(tmp_path / "whole"))
    assert again.state.global_step == 10 and outcome.metrics["train_loss"] > 0
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(whole).items())


def test_changed_intervals_count_from_the_resume_on(build, tmp_path):
    """transformers 5.23 goes by the intervals in the checkpoint, whatever the arguments say."""
    stopped = build("broken", At(3, stop_by(signal.SIGINT)))
    with pytest.raises(Interrupted):
        stopped.train()
    last = build("broken", save_steps=5, logging_steps=1)
    last.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
    assert [path.name for path in list_checkpoints(tmp_path / "broken")] == [
        f"checkpoint-{step}" for step in (10, 5, 3)
    ]
    assert [line["step"] for line in read_log(tmp_path / "broken")][-3:-1] == [9, 10]


def test_checkpoint_holds_everything_and_no_pickle_of_settings(build, tmp_path):
    trainer = build("run", max_steps=4)
    trainer.train()
    (folder,) = list_checkpoints(tmp_path / "run")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert "training_args.bin" not in names
    assert find_damage(folder) is None


def test_stop_saves_everything_where_only_weights_are_saved(build, tmp_path):
    stopped = build("run", At(4, stop_by(signal.SIGTERM)), save_only_model=True)
    with pytest.raises(Interrupted):
        stopped.train()
    folder = find_intact(tmp_path / "run")
    assert folder.name == "checkpoint-4" and not is_weights_only(folder) and (folder / "optimizer.pt").exists()


def test_best_checkpoint_is_the_exported_one(build, tmp_path):
    """Failure mode 38: with one checkpoint kept, the best is another than the newest, and a resume comes in between.

    The weights are spoilt after three steps, so that the best step is one of them on any processor.
    """
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "max_steps": 8,
    }
    stopped = build("broken", At(5, stop_by(signal.SIGTERM)), **settings)
    stopped.add_callback(At(4, lambda: spoil(stopped)))
    with pytest.raises(Interrupted):
        stopped.train()
    last = build("broken", **settings)
    last.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
    recorded = [line for line in read_log(tmp_path / "broken") if "eval_loss" in line]
    best = min(recorded, key=lambda line: line["eval_loss"])
    assert len(recorded) == 8 and best["step"] <= 3
    assert last.state.best_global_step == best["step"]
    assert last.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)


def test_early_stop_is_remembered(build, tmp_path):
    """It ends after two evaluations no better than the best, also where the run was stopped between the two."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 50, "learning_rate": 1.0, "max_steps": 30}
    settings |= {"metric_for_best_model": "loss", "patience": 2}
    whole = build("whole", **settings)
    whole.train()
    end = whole.state.global_step
    assert end < 30
    losses = [line["eval_loss"] for line in read_log(tmp_path / "whole") if "eval_loss" in line]
    assert losses.index(min(losses)) == end - 3
    stopped = build("broken", At(end - 1, stop_by(signal.SIGTERM)), **settings)
    with pytest.raises(Interrupted):
        stopped.train()
    last = build("broken", **settings)
    last.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
    assert last.state.global_step == end


def poison(row):
    """Rows of which one makes the loss NaN: its first tokens are those that `Poisoned` looks for."""
    rows = make_rows().to_list()
    rows[row]["input_ids"][0] = 1
    return datasets.Dataset.from_list(rows)


def poison_model(trainer):
    """Makes the trainer's loss NaN for a batch with token 1 in it."""
    compute = trainer.compute_loss

    def poisoned(model, inputs, **kwargs):
        loss = compute(model, inputs, **kwargs)
        return loss * (math.nan if bool((inputs["input_ids"] == 1).any()) else 1.0)

    trainer.compute_loss = poisoned


def test_loss_that_is_not_finite_ends_the_run(build, tmp_path):
    """Failure mode 18: step and rows are named, and the last good checkpoint stays."""
    trainer = build("run", rows=poison(4), name_row=lambda number: f"rows.jsonl:{number + 1}", save_steps=1)
    poison_model(trainer)
    with pytest.raises(RunFailed) as caught:
        trainer.train()
    step = trainer.state.global_step + 1
    said = str(caught.value)
    assert f"step {step}" in said and "The loss of this step is not finite" in said
    assert "rows.jsonl:5" in said and said.count("rows.jsonl:") == 2, "the two rows of the bad batch"
    assert "No adapter was written" in said
    if step > 1:
        assert f"checkpoint-{step - 1} is the last good checkpoint" in said
        assert find_intact(tmp_path / "run").name == f"checkpoint-{step - 1}"
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_rows_are_named_in_packed_batches(build):
    rows = poison(4)
    lengths = [[5, len(ids) - 5] for ids in rows["input_ids"]]
    trainer = build("run", rows=rows.add_column("seq_lengths", lengths))
    poison_model(trainer)
    with pytest.raises(RunFailed, match="packed row 4 of the training rows"):
        trainer.train()


def test_gradient_that_is_not_finite_ends_the_run(build):
    trainer = build("run")
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunFailed, match="step 1\n  The gradient of this step is not finite"):
        trainer.train()


def test_steps_may_be_left_out_up_to_a_limit(build, capsys):
    """The step counts, weights and moments stay, and figures are as if its batch had not been."""
    trainer = build("run", rows=poison(4), guards=GuardsSection(skip_non_finite=1), logging_steps=1, max_steps=9)
    poison_model(trainer)
    trainer.train()
    assert "is left out: its loss is not finite" in capsys.readouterr().err
    assert trainer.state.global_step == 9
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    again = build("again", rows=poison(4), guards=GuardsSection(skip_non_finite=1), max_steps=18)
    poison_model(again)
    with pytest.raises(RunFailed, match="The loss of this step is not finite"):
        again.train()


def test_evaluation_that_gives_no_number_ends_the_run(build):
    trainer = build("run", eval_strategy="steps", eval_steps=2)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: compute(model, inputs, **kwargs)
    evaluate = trainer.evaluation_loop

    def broken(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = math.nan
        return output

    trainer.evaluation_loop = broken
    with pytest.raises(RunFailed, match="eval_loss nan"):
        trainer.train()


def test_full_disk_leaves_what_was_saved(build, tmp_path, monkeypatch):
    """Failure mode 37: the error names the disk, the checkpoint before is intact, and none is half there."""
    import lora_ft.training.checkpoint as room

    trainer = build("run", save_steps=4)

    def full(path):
        raise OSError(28, "No space left on device")

    trainer.add_callback(At(5, lambda: monkeypatch.setattr(room, "hash_folder", full)))
    with pytest.raises(RunFailed, match=r"checkpoint-8\n.*No space left on device.*What was saved before is as it was"):
        trainer.train()
    monkeypatch.undo()
    assert find_intact(tmp_path / "run").name == "checkpoint-4"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_second_signal_ends_at_once(tmp_path, monkeypatch):
    """Two within a second are one, as a launcher passes on the Ctrl-C that its terminal sent to all."""
    import lora_ft.training.stopping as room

    ended = []
    monkeypatch.setattr(room.signal, "signal", lambda number, handler: None)
    stop = room.StopRequest()
    with stop.listening():
        stop._receive(signal.SIGTERM, None)
    monkeypatch.setattr(room.os, "kill", lambda pid, number: ended.append(number))
    stop._receive(signal.SIGTERM, None)
    assert stop.signal is signal.SIGTERM and ended == []
    stop._since -= 2
    stop._receive(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]


def test_workers_leave_ctrl_c_to_their_parent(build, tmp_path):
    """A terminal sends it to all processes; a worker that ended by it would end the step that is to be finished."""

    def ctrl_c():
        workers = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        assert len(workers) >= 2
        for process in [*workers, psutil.Process()]:
            process.send_signal(signal.SIGINT)

    settings = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}
    trainer = build("run", At(2, ctrl_c, "on_step_begin"), rows=make_rows(60), **settings)
    with pytest.raises(Interrupted, match="Stopped by SIGINT after step 3"):
        trainer.train()


def test_handlers_are_put_back(build):
    before = signal.getsignal(signal.SIGTERM)
    build("run", max_steps=1).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_outside_of_the_main_thread(build):
    """Python can take signals in the main thread only; a server's worker trains all the same."""
    trainer = build("run", max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_watchdog_says_where_it_stands(build, capsys):
    trainer = build("run", At(2, lambda: time.sleep(2.0)), guards=GuardsSection(stall_minutes=0.01), max_steps=3)
    trainer.train()
    said = capsys.readouterr().err
    assert "rank 0 of 1: nothing has moved for 0.0 minutes, since the end of step 2" in said
    assert "time.sleep(2.0)" in said and "test_lasting.py" in said


def test_warm_start_has_the_weights_and_a_new_schedule(build, tmp_path):
    from lora_ft.model.adapter import load_weights

    build("run", max_steps=4).train()
    folder = find_intact(tmp_path / "run")
    trainer = build("new")
    load_weights(trainer.model, folder)
    trainer.save_model(str(tmp_path / "check"))
    kept = hash_tensors(tmp_path / "check" / "adapter_model.safetensors")
    assert kept == hash_tensors(folder / "adapter_model.safetensors")
    assert trainer.state.global_step == 0
