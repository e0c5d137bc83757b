"""The process that answers: started ahead where it can be, used once, and gone with whoever started it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lora_ft.errors import RunFailed
from lora_ft.export import fresh
from lora_ft.export.adapter import open_adapter
from lora_ft.export.base import base_of_adapter
from lora_ft.export.verify import check_samples


def waiting() -> list[int]:
    """The processes of this one that wait for a question."""
    children = psutil.Process().children()
    return [child.pid for child in children if "lora_ft.export.fresh" in child.cmdline()]


def answers(adapter) -> str:
    """What the verification of an adapter's answers says."""
    opened = open_adapter(adapter)
    return check_samples(opened, base_of_adapter(opened)).detail


def test_the_process_started_ahead_answers_once(plain, monkeypatch):
    with fresh.process_ahead():
        (ahead,) = waiting()
        asked = []
        communicate = subprocess.Popen.communicate
        monkeypatch.setattr(
            subprocess.Popen, "communicate", lambda self, *a, **k: asked.append(self.pid) or communicate(self, *a, **k)
        )
        first = answers(plain.adapter)
        assert asked == [ahead] and not waiting()
        assert answers(plain.adapter) == first and len(set(asked)) == 2
    assert not waiting()


def test_within_another_one_none_is_started():
    with fresh.process_ahead():
        before = waiting()
        with fresh.process_ahead():
            assert waiting() == before
        assert waiting() == before, "it is not the inner one's to end"
    assert not waiting()


def test_one_that_was_killed_meanwhile_is_replaced(plain):
    with fresh.process_ahead():
        (ahead,) = waiting()
        os.kill(ahead, signal.SIGKILL)
        while psutil.Process(ahead).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert "2 prompts" in answers(plain.adapter)


def test_without_a_question_it_is_ended_though_there_was_an_error():
    with pytest.raises(ZeroDivisionError), fresh.process_ahead():
        1 / 0  # noqa: B018
    assert not waiting()


def test_other_ranks_start_none(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with fresh.process_ahead():
        assert not waiting()


def test_it_ends_when_what_started_it_is_killed():
    program = (
        "import subprocess, sys, time\n"
        "from lora_ft.export import fresh\n"
        "with fresh.process_ahead():\n"
        "    print(fresh._ahead[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=120)  # it finishes loading first


def test_a_question_it_cannot_answer_is_told_in_one_line(tmp_path):
    request = {"adapters": [(str(tmp_path), 1.0)], "base": {}, "arithmetic": {}, "trust_remote_code": False}
    with pytest.raises(RunFailed, match=r"could not load it: .*adapter_config.json"):
        fresh.ask_fresh("answer_adapter", **request, prompts=[])
