"""The report's page: escaped, complete without a network, and loaded by a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lora_ft.evaluation.charts import HEIGHT, WIDTH, draw_losses, nice_ticks
from lora_ft.evaluation.curves import Curves, Point
from lora_ft.evaluation.page import write_page
from lora_ft.evaluation.report import write_report
from lora_ft.evaluation.samples import mark_differences
from tests.evaluation.conftest import make_figure

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Tags, and addresses that would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value != "data:,"]


def page_of(run):
    return write_page(run).read_text(encoding="utf-8")


def back_in_training(run, num_lines):
    """The run as it was before its end."""
    shutil.rmtree(run / "report", ignore_errors=True)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:num_lines]))
    manifest = json.loads((run / "run.json").read_text())
    kept = {name: manifest[name] for name in manifest if name not in ("training", "memory", "evaluation", "export")}
    (run / "run.json").write_text(json.dumps({**kept, "state": "training"}))


def test_page_needs_nothing_beside_it_and_runs_no_text_of_rows(make_run):
    run = make_run(general=make_figure(2.0, 2.6))
    text = page_of(run)
    page = Page(text)
    assert "script" not in page.tags and not page.fetched and "url(" not in text and "@import" not in text
    assert "alert(1)" in text and "&lt;script&gt;" in text, "the row is shown, as text"
    assert "org/&lt;b&gt;base&lt;/b&gt;" in text
    assert text.index("Good fit") < text.index("Base against tuned") < text.index("Side by side")
    for said in (
        "Also: forgetting",
        "general text loss",
        "Lengths in tokens",
        "800 MB",
        "900 MB",
        "of the base",
        "training.seed",
        "fixed",
    ):
        assert said in text, said
    assert "refresh" not in text.split("<style>")[0], "a finished report stays as it is"
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_page_marks_where_validation_turned(make_run):
    text = page_of(make_run(validation=(2.0, 1.1, 1.4, 1.9)))
    assert '<circle class="turning"' in text and "Validation was lowest at step 100" in text
    assert 'class="verdict bad"' in text and "<h2>Overfit</h2>" in text


@pytest.mark.parametrize(("leaked", "is_claimed"), [(0, True), (30, False)])
def test_page_does_not_call_leaked_rows_unseen(make_run, leaked, is_claimed):
    text = page_of(make_run(leaked=leaked))
    assert ("nobody trained on" in text) == is_claimed and "On 100 test rows" in text


def test_page_of_a_training_run_loads_itself_anew(make_run):
    run = make_run()
    back_in_training(run, 11)
    text = page_of(run)
    assert '<meta http-equiv="refresh" content="5">' in text
    assert "Step 50 of 200" in text and "about 150 s left" in text and '<polyline class="train' in text
    (run / "log.jsonl").unlink()
    assert "Step 0" in page_of(run), "before the first step too"


def test_differences_are_marked():
    assert mark_differences("the <b> light is red", "the green <b> light is") == (
        "the<del> green</del> &lt;b&gt; light is<mark> red</mark>"
    )
    assert mark_differences("x & y", "nothing like it") == "<mark>x &amp; y</mark>"
    assert mark_differences("same", "same") == "same" and mark_differences("", "gone") == ""


@pytest.mark.parametrize("losses", [(5.0, 0.01, 0.02), (2.0, 2.0), (1.0, float("nan"), 0.9), (0.0, 3.0)])
def test_curves_stay_inside_the_drawing(losses):
    points = tuple(Point(10 * index, index, loss) for index, loss in enumerate(losses))
    chart = draw_losses(Curves(points, points))
    places = [float(number) for number in re.findall(r"-?[\d.]+", chart.train)]
    assert all(0 <= x <= WIDTH for x in places[::2]) and all(0 <= y <= HEIGHT for y in places[1::2])
    assert chart.y_ticks and chart.is_logarithmic == (losses == (5.0, 0.01, 0.02))


def test_ticks_are_round():
    assert nice_ticks(0, 350, 6) == [0, 100, 200, 300]
    assert nice_ticks(0.13, 0.94, 5) == [0.2, 0.4, 0.6, 0.8]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("state", ["finished", "training"])
def test_browser_loads_the_page_without_a_complaint(make_run, tmp_path, state):
    run = make_run()
    if state == "training":
        back_in_training(run, 20)
    page_of(run)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{run}/report/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr, done.stderr
    assert ("Good fit" if state == "finished" else "Training") in done.stdout


def test_a_report_is_json_whatever_diverged(tmp_path, make_evidence):
    def refuse(word):
        raise AssertionError(word)

    write_report(make_evidence(train=[3.0, float("nan"), float("inf")] * 10), tmp_path, 1.0)
    report = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=refuse)
    assert [point["loss"] for point in report["curves"]["train"]][:3] == [3.0, None, None]
