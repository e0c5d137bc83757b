"""What is said of a run, and by which numbers."""

from dataclasses import replace

import numpy as np
import pytest

from lora_ft.evaluation.classify import Classification, Constant
from lora_ft.evaluation.curves import Point, read_log, trace_curves
from lora_ft.evaluation.verdict import judge_run
from tests.evaluation.conftest import make_figure


def test_a_good_fit_says_how_it_is_known(make_evidence):
    verdict = judge_run(make_evidence())
    assert verdict.name == "good fit"
    assert "from 3 to 0.9" in verdict.findings[0].because
    assert "100 validation rows watched" in verdict.method and "100 test rows were read once" in verdict.method


def test_overfit_names_the_step_where_validation_turned(make_evidence):
    verdict = judge_run(make_evidence(validation=(2.0, 1.1, 1.4, 1.9)))
    assert verdict.name == "overfit"
    assert "lowest at step 100 (epoch 2.0) with 1.100, and rose to 1.900 by step 200" in verdict.findings[0].because
    assert "train 2 epochs instead of 4" in verdict.findings[0].advice


def test_noise_is_no_turn(make_evidence):
    assert judge_run(make_evidence(validation=(2.0, 1.0, 0.95, 0.955))).name == "good fit"


def test_a_run_that_kept_its_best_step_did_not_overfit(make_evidence):
    verdict = judge_run(make_evidence(validation=(2.0, 1.1, 1.4, 1.9), kept_step=100))
    assert verdict.name == "good fit"
    assert "turned at step 100, and the adapter of that step was kept" in verdict.findings[0].because
    assert "validation rows chose the step" in verdict.method


def test_a_step_kept_by_another_metric_is_judged_by_its_own_loss(make_evidence):
    turned = (2.0, 1.1, 1.105, 1.9)
    verdict = judge_run(make_evidence(validation=turned, kept_step=150))
    assert verdict.name == "good fit", "within noise of the lowest"
    assert "adapter of step 150 was kept: validation loss was 1.105 there, and 1.100" in verdict.findings[0].because
    assert "was kept: step 150." in verdict.method
    verdict = judge_run(make_evidence(validation=turned, kept_step=50))
    assert verdict.name == "good fit" and "step 50 was kept: validation loss was 2.000" in verdict.findings[0].because
    verdict = judge_run(make_evidence(validation=(2.0, 1.1, 1.6, 1.105), kept_step=150))
    assert verdict.name == "overfit", "the last step had not turned, the one that was kept had"
    assert "rose to 1.600 by step 150, whose adapter was kept" in verdict.findings[0].because
    assert "metric_for_best_model: loss" in verdict.findings[0].advice


def test_validation_rows_that_nothing_measured_watched_nothing(make_evidence):
    verdict = judge_run(make_evidence(validation=()))
    assert "watched" not in verdict.method and "no validation row chose it" in verdict.method


def test_a_leak_comes_before_all_else(make_evidence):
    verdict = judge_run(make_evidence(leaked=30, validation=(2.0, 1.1, 1.4, 1.9)))
    assert [finding.name for finding in verdict.findings] == ["leaking split", "overfit"]
    assert "Of 200 held-out rows, 15%" in verdict.findings[0].because
    assert judge_run(make_evidence(leaked=1)).name == "good fit", "half a percent changes no figure that matters"


@pytest.mark.parametrize(
    ("tuned", "train", "advice"),
    [
        (3.05, None, "one kind"),
        (3.0, [2.0 - 0.0001 * index for index in range(40)], "raise training.learning_rate"),
    ],
)
def test_no_better_than_base(make_evidence, tuned, train, advice):
    verdict = judge_run(make_evidence(loss=make_figure(3.0, tuned), train=train))
    assert verdict.name == "no better than base" and advice in verdict.findings[0].advice


def test_too_few_test_rows_to_tell(make_evidence):
    """An interval 2.5 times as wide as the difference needs 2.5² as many rows."""
    verdict = judge_run(make_evidence(loss=make_figure(3.0, 2.9, half_width=0.25, num_rows=8)))
    assert verdict.name == "not enough data"
    assert "About 50 test rows" in verdict.findings[0].advice


def test_too_few_training_rows(make_evidence):
    verdict = judge_run(make_evidence(num_train=12))
    assert verdict.name == "not enough data" and "12 training rows" in verdict.findings[0].because
    verdict = judge_run(make_evidence(loss=make_figure(3.0, 0.9, num_rows=4)))
    assert verdict.name == "not enough data" and "4 test rows" in verdict.findings[0].because


@pytest.mark.parametrize(
    ("validation", "because"),
    [
        ((), "The training loss was still falling: 25%"),
        ((3.0, 2.5, 2.0, 1.5), "validation loss was still falling: 27%"),
    ],
)
def test_underfit(make_evidence, validation, because):
    verdict = judge_run(make_evidence(train=[4 - 0.05 * index for index in range(40)], validation=validation))
    assert verdict.name == "underfit" and because in verdict.findings[0].because


@pytest.mark.parametrize("validation", [(1.3, 1.0, 1.005, 1.019), (1.2, 1.0, 1.0, 0.995)], ids=["rising", "flat"])
def test_rows_learned_by_heart_are_no_reason_to_train_longer(make_evidence, validation):
    """The training loss falls to the end, and validation does not."""
    evidence = make_evidence(train=[2.5 - 0.05 * index for index in range(40)], validation=validation)
    assert judge_run(evidence).name == "good fit"


@pytest.mark.parametrize(
    ("train", "because", "advice"),
    [
        ([2.0 - 0.0001 * index for index in range(40)], "from 2.000 to 1.996 only", "raise training.learning_rate"),
        ([2.0 + 0.02 * index for index in range(40)], "rose from 2.070 to 2.710", "lower training.learning_rate"),
    ],
)
def test_a_training_loss_that_did_not_fall_is_underfit_unless_the_test_says_otherwise(
    make_evidence, train, because, advice
):
    findings = judge_run(make_evidence(train=train, loss=make_figure(3.0, 2.95))).findings
    assert [finding.name for finding in findings] == ["not enough data", "underfit"]
    assert because in findings[1].because and advice in findings[1].advice
    assert judge_run(make_evidence(train=train)).name == "good fit"


def test_single_noisy_losses_decide_nothing(make_evidence):
    """Batches of one row: neither the first nor the last of them, nor which fifth they fall into."""
    for validation in ((), (2.2, 2.19)):
        wrong = 0
        for noise in np.random.default_rng(0).normal(0, 0.5, (50, 200)):
            fallen = [1.0, *(0.9 + 2.1 * 0.9 ** np.arange(200) + noise), 2.5]
            flat = [2.0, *(2.2 + noise[:38]), 2.9]
            wrong += judge_run(make_evidence(train=fallen, validation=validation)).name != "good fit"
            found = judge_run(make_evidence(train=flat, validation=validation, loss=make_figure(3.0, 2.95))).findings
            wrong += [finding.name for finding in found] != ["not enough data"]
        assert wrong <= 5, "of 100, as two standard errors leave"


def test_what_was_forgotten_is_said_beside_the_verdict(make_evidence):
    verdict = judge_run(make_evidence(general=make_figure(2.0, 2.6)))
    assert [finding.name for finding in verdict.findings] == ["good fit", "forgetting"]
    assert len(judge_run(make_evidence(general=make_figure(2.0, 2.05))).findings) == 1


def test_a_figure_where_more_is_better(make_evidence):
    figure = make_figure(0.5, 0.4, 0.05, unit="share", better="higher")
    verdict = judge_run(make_evidence(loss=figure))
    assert verdict.name == "no better than base" and "from 50% to 40%" in verdict.findings[0].because


def make_constant(loss, accuracy):
    """A tuned model with a loss of 0.5 and 80% of its rows right, against a constant answer."""
    figures = (make_figure(loss, 0.5), make_figure(accuracy, 0.8, 0.05, unit="share", better="higher"))
    return Constant("often", *figures)


@pytest.mark.parametrize(
    ("loss", "accuracy", "name"),
    [
        (0.9, 0.6, "good fit"),
        (0.9, 0.82, "good fit"),
        (0.55, 0.6, "good fit"),
        (0.55, 0.79, "not enough data"),
        (0.45, 0.79, "no better than a constant answer"),
        (0.9, 0.9, "no better than a constant answer"),
    ],
)
def test_a_classifier_is_held_against_a_constant_answer(make_evidence, loss, accuracy, name):
    """Its base has a head drawn at random, than which almost anything is better."""
    evidence = make_evidence()
    constant = make_constant(loss, accuracy)
    compared = Classification(evidence.compared.figures, 100, labels=("often", "seldom"), constant=constant)
    verdict = judge_run(replace(evidence, compared=compared))
    assert verdict.name == name
    said = (
        "Against a constant answer" if name == "not enough data" else f'Always "often" would be right on {accuracy:.1%}'
    )
    assert said in verdict.findings[0].because


def test_curves_of_a_resumed_run_count_the_later_line(tmp_path):
    lines = ['{"step": 5, "epoch": 1, "time": 1, "loss": 9.0}', '{"step": 5, "epoch": 1, "time": 2, "loss": 3.0}']
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 10, "lo']))
    curves = trace_curves(read_log(tmp_path))
    assert [point.loss for point in curves.train] == [3.0] and curves.turning is None
    assert trace_curves(read_log(tmp_path / "nowhere")).train == ()


def test_without_test_rows_nothing_is_claimed(make_evidence):
    evidence = make_evidence()
    nothing = replace(evidence.compared, figures={}, num_supervised_tokens=0)
    verdict = judge_run(replace(evidence, compared=nothing))
    assert verdict.name == "not measured" and "There is no test row" in verdict.findings[0].because


def test_figures_that_are_no_numbers_are_not_called_absent_rows(make_evidence):
    evidence = make_evidence()
    lost = replace(evidence.compared, figures={}, notes=("loss is left out: it is no finite number.",))
    verdict = judge_run(replace(evidence, compared=lost))
    assert verdict.name == "not measured" and "loss is left out" in verdict.findings[0].because


def test_validation_far_apart_does_not_say_what_the_last_steps_did(make_evidence):
    """After one and after two epochs; the training loss had long been flat."""
    assert judge_run(make_evidence(validation=(1.1, 1.0))).name == "good fit"


def test_a_run_that_only_made_it_worse_is_told_to_learn_slower(make_evidence):
    evidence = make_evidence(kept_step=50)
    watched = (Point(0, 0.0, 1.0), Point(50, 1.0, 3.0))
    verdict = judge_run(replace(evidence, curves=replace(evidence.curves, validation=watched)))
    assert verdict.name == "overfit" and verdict.findings[0].advice.startswith(
        "Every step made it worse: lower training.learning_rate"
    )


def test_a_course_too_short_to_be_judged_is_no_good_fit(make_evidence):
    verdict = judge_run(make_evidence(train=[7.4, 7.0, 6.9, 6.8], validation=(6.9,)))
    assert verdict.name == "not measured" and "logged 4 times" in verdict.findings[0].because
