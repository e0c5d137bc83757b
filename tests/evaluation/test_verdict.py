"""What is said of a run, and by which numbers."""

import pytest

from lora_ft.evaluation.curves import read_log, trace_curves
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
    verdict = judge_run(make_evidence(validation=(2.0, 1.1, 1.4, 1.9), keeps_best=True))
    assert verdict.name == "good fit"
    assert "turned at step 100, and the adapter of that step was kept" in verdict.findings[0].because
    assert "validation rows chose the step" in verdict.method


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
    ("train", "because"),
    [
        ([4 - 0.05 * index for index in range(40)], "still falling"),
        ([2.0 - 0.0001 * index for index in range(40)], "only"),
    ],
)
def test_underfit(make_evidence, train, because):
    verdict = judge_run(make_evidence(train=train))
    assert verdict.name == "underfit" and because in verdict.findings[0].because


def test_what_was_forgotten_is_said_beside_the_verdict(make_evidence):
    verdict = judge_run(make_evidence(general=make_figure(2.0, 2.6)))
    assert [finding.name for finding in verdict.findings] == ["good fit", "forgetting"]
    assert len(judge_run(make_evidence(general=make_figure(2.0, 2.05))).findings) == 1


def test_a_figure_where_more_is_better(make_evidence):
    figure = make_figure(0.5, 0.4, 0.05, unit="share", better="higher")
    verdict = judge_run(make_evidence(loss=figure))
    assert verdict.name == "no better than base" and "from 50% to 40%" in verdict.findings[0].because


def test_curves_of_a_resumed_run_count_the_later_line(tmp_path):
    lines = ['{"step": 5, "epoch": 1, "time": 1, "loss": 9.0}', '{"step": 5, "epoch": 1, "time": 2, "loss": 3.0}']
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 10, "lo']))
    curves = trace_curves(read_log(tmp_path))
    assert [point.loss for point in curves.train] == [3.0] and curves.turning is None
    assert trace_curves(read_log(tmp_path / "nowhere")).train == ()


def test_without_test_rows_nothing_is_claimed(make_evidence):
    from dataclasses import replace

    evidence = make_evidence()
    verdict = judge_run(replace(evidence, compared=replace(evidence.compared, figures={})))
    assert verdict.name == "not measured"


def test_a_course_too_short_to_be_judged_is_no_good_fit(make_evidence):
    verdict = judge_run(make_evidence(train=[7.4, 7.0, 6.9, 6.8], validation=(6.9,)))
    assert verdict.name == "not measured" and "logged 4 times" in verdict.findings[0].because
