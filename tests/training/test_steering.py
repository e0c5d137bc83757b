"""What steers training is known before its first step."""

import pytest

from lora_ft.recipe import load_recipe
from lora_ft.training.guards import describe_loss
from lora_ft.training.steering import check_reach, check_steering, is_out_of_patience


@pytest.mark.parametrize(
    ("sections", "place"),
    [
        (
            {"training": {"metric_for_best_model": "acuracy", "eval_strategy": "epoch"}},
            "metric_for_best_model: acuracy",
        ),
        ({"training": {"load_best_model_at_end": True}}, "training.load_best_model_at_end: True"),
        ({"training": {"metric_for_best_model": "loss"}}, "needs evaluations during training"),
        ({"training": {"eval_strategy": "epoch", "early_stopping_patience": 2}}, "training.early_stopping_patience: 2"),
    ],
)
def test_what_is_not_measured_is_refused(recipe_file, sections, place):
    """Failure mode 21."""
    faults = list(check_steering(load_recipe(recipe_file(**sections))))
    assert any(place in str(fault) for fault in faults)


@pytest.mark.parametrize(
    ("task", "metric", "is_measured"),
    [
        ("sft", "loss", True),
        ("sft", "eval_loss", True),
        ("sft", "mean_token_accuracy", True),
        ("sft", "accuracy", False),
        ("classification", "accuracy", True),
        ("classification", "mean_token_accuracy", False),
        ("seq2seq", "mean_token_accuracy", True),
    ],
)
def test_what_is_measured_may_steer(recipe_file, task, metric, is_measured):
    training = {"metric_for_best_model": metric, "eval_strategy": "epoch", "early_stopping_patience": 2}
    recipe = load_recipe(recipe_file(training=training, data={"task": task}, evaluation=None))
    assert (not list(check_steering(recipe))) is is_measured


@pytest.mark.parametrize(("values", "over"), [([], 0), ([3, 2, 1], 0), ([1, 2], 0), ([1, 2, 3], 1), ([2, 1, 1, 1], 1)])
def test_patience(values, over):
    history = [{"eval_loss": value, "step": step} for step, value in enumerate(values)] + [{"loss": 9.0}]
    assert is_out_of_patience(history, "loss", False, 2) is bool(over)
    upward = [{"eval_mean_token_accuracy": -value} for value in values]
    assert is_out_of_patience(upward, "mean_token_accuracy", True, 2) is bool(over)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 100}, "training.eval_delay: 100"),
        ({"eval_strategy": "steps", "eval_steps": 500}, None),
        ({"eval_strategy": "steps", "eval_steps": 500, "eval_delay": 6}, None),
        ({"eval_strategy": "epoch", "eval_delay": 0.6, "num_train_epochs": 0.5}, None),
        ({"eval_strategy": "epoch", "eval_delay": 0.7, "num_train_epochs": 0.5}, "training.eval_delay: 0.7"),
        ({"eval_strategy": "epoch", "eval_delay": 4}, "training.eval_delay: 4"),
        ({"eval_strategy": "steps", "eval_steps": 6}, None),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, None),
        ({"eval_strategy": "epoch", "eval_delay": 3}, None),
        ({"eval_strategy": "steps", "eval_steps": 500, "load_best_model_at_end": False}, None),
    ],
)
def test_a_best_checkpoint_needs_an_evaluation_before_the_end(tmp_path, settings, place):
    """Ten rows in batches of four, two of them a step, three times: six steps, the last of which is evaluated anyway.

    Half an epoch is one step of two batches, and so two thirds of one.
    """
    from lora_ft.training.trainer import build_arguments

    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    chosen = {"load_best_model_at_end": True, "save_strategy": settings["eval_strategy"], "use_cpu": True}
    saves = {"save_steps": settings["eval_steps"]} if "eval_steps" in settings else {}
    arguments = build_arguments({"report_to": "none", **batches, **chosen, **saves, **settings}, tmp_path)
    faults = [str(fault) for fault in check_reach(arguments, 10)]
    assert faults == [] if place is None else place in faults[0] and "nothing is best" in faults[0]


def test_loss_that_jumps_and_loss_that_stays():
    assert describe_loss([2.0 - step / 50 for step in range(50)]) is None
    assert describe_loss([1.0, 1.1] * 6 + [3.0]).startswith("the loss jumped to 3.000; it was 1.050")
    assert describe_loss([1.0, 1.1] * 3 + [3.0]) is None, "too early to say"
    assert describe_loss([1.0] * 50).startswith("the loss has not fallen for 50 logged values")
    assert describe_loss([1.0] * 51) is None, "said once"
