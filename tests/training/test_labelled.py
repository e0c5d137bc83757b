"""Losses of classes and answers are means over all labels of a step, however its rows are cut into batches."""

import pytest


def build(task, base, folder, rows, **training):
    """A trainer over the same rows for training and validation."""
    from datasets import Dataset

    from lora_ft.model.adapter import attach_adapter
    from lora_ft.model.load import find_base, load_base, load_tokenizer
    from lora_ft.sections import ModelSection
    from lora_ft.tasks import TASKS

    section = ModelSection(str(base), dtype="float32")
    identity = find_base(str(base))
    tokenizer = load_tokenizer(identity.folder, section)
    model = load_base(identity, section, task=task, labels=("a", "b", "c"), pad_token_id=tokenizer.pad_token_id)
    model = attach_adapter(model, {"r": 2, "target_modules": "all-linear"}, task=task, seed=1)
    settings = {"use_cpu": True, "seed": 1, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    settings |= {"learning_rate": 1e-2, "max_steps": 2, "bf16": False, **training}
    arguments = TASKS[task].build_arguments(settings, folder)
    dataset = Dataset.from_list(rows)
    return TASKS[task].build_trainer(model, tokenizer, dataset, dataset, arguments, quiet=True)


ROWS = {
    "classification": [{"input_ids": [3 + n, 20, 30][: 1 + n % 3], "labels": n % 3} for n in range(8)],
    "seq2seq": [{"input_ids": [3 + n, 20], "labels": [*range(5, 6 + n), 2]} for n in range(8)],
}


@pytest.fixture(params=["classification", "seq2seq"])
def case(request, tiny_base, tmp_path_factory):
    from tests.test_seq2seq import make_t5

    base = tiny_base if request.param == "classification" else make_t5(tmp_path_factory.mktemp("t5"))
    return request.param, base


def trained(trainer):
    """The trained weights, after training."""
    import torch

    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_eight_rows_at_once_or_one_by_one(case, tmp_path):
    import torch

    task, base = case
    tmp_path.joinpath("a").mkdir()
    tmp_path.joinpath("b").mkdir()
    sizes = [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}]
    at_once, one_by_one = (
        trained(build(task, base, tmp_path / name, ROWS[task], **size)) for name, size in zip("ab", sizes, strict=True)
    )
    assert torch.allclose(at_once, one_by_one, atol=2e-5)


def test_validation_does_not_depend_on_the_batch(case, tmp_path):
    task, base = case
    figures = []
    for size in (1, 3, 8):
        trainer = build(task, base, tmp_path, ROWS[task], per_device_eval_batch_size=size)
        figures.append(trainer.evaluate())
    name = "eval_accuracy" if task == "classification" else "eval_mean_token_accuracy"
    assert {round(found["eval_loss"], 5) for found in figures} == {round(figures[0]["eval_loss"], 5)}
    assert len({found[name] for found in figures}) == 1


def test_lora_plus_and_label_smoothing_reach_the_trainer(case, tmp_path):
    task, base = case
    plain = build(task, base, tmp_path, ROWS[task])
    smooth = build(task, base, tmp_path, ROWS[task], label_smoothing_factor=0.2)
    assert plain.evaluate()["eval_loss"] != smooth.evaluate()["eval_loss"]
    plain._loraplus_ratio = 16.0
    rates = {group["lr"] for group in plain.create_optimizer().param_groups}
    assert {1e-2, 0.16} <= rates


def test_stopped_run_of_another_task_is_the_uninterrupted_one(case, tmp_path):
    """Failure mode 35: a head, dropout and a decoder resume to the last bit, too."""
    import signal

    from lora_ft.errors import Interrupted
    from lora_ft.training.checkpoint import find_intact
    from tests.training.test_lasting import At, read_log, stop_by, weights

    task, base = case
    steady = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    steady |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    def start(name):
        tmp_path.joinpath(name).mkdir(exist_ok=True)
        return build(task, base, tmp_path / name, ROWS[task], **steady)

    whole = start("whole")
    whole.train()
    stopped = start("broken")
    stopped.add_callback(At(3, stop_by(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        stopped.train()
    last = start("broken")
    last.train(resume_from_checkpoint=find_intact(tmp_path / "broken"))
    expected, got = weights(whole), weights(last)
    assert expected.keys() == got.keys() and len(read_log(tmp_path / "whole")) >= 9
    assert all((got[name] == tensor).all() for name, tensor in expected.items())
    assert read_log(tmp_path / "broken") == read_log(tmp_path / "whole")
