"""A measured number, and the ways of measuring: in turns, and in processes of their own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ENTRY = Path(__file__).parents[1] / "benchmark.py"


@dataclass(frozen=True)
class Options:
    """How to measure."""

    scratch: Path
    """Folder for bases, rows and outputs."""
    data: Path
    """Folder of real data (gsm8k_train.json)."""
    rounds: int
    """How often each system takes its turn; medians count."""


@dataclass(frozen=True)
class Figure:
    """One number, with what it should be where something was promised."""

    topic: str
    """What it belongs to."""
    name: str
    """What was measured."""
    value: float
    """The number."""
    unit: str
    """Its unit; `×` for a ratio of two that took turns."""
    at_least: float | None = None
    """What it should reach."""
    at_most: float | None = None
    """What it should not exceed."""

    @property
    def goal(self) -> str:
        """What it should be, in words; empty where it only explains another."""
        bounds = (("≥", self.at_least), ("≤", self.at_most))
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    @property
    def is_met(self) -> bool | None:
        """Whether it is what it should be; None where nothing was promised."""
        if not self.goal:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def shown(self) -> str:
        """The number with its unit, in three digits."""
        number = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.3g}"
        return f"{number} {self.unit}".strip()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "is_met": self.is_met}


def take_turns(systems: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each system returns; all take a turn in each round, so a slow minute slows all of them."""
    found: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            found[name].append(run())
    return {name: median(values) for name, values in found.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run_worker(topic: str, *words: object, **environment: str) -> dict[str, Any]:
    """What `work(words)` of a topic's room found in a fresh process."""
    command = [sys.executable, str(ENTRY), "--worker", topic, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_call(call: Callable[[], object]) -> dict[str, float]:
    """Seconds, processor seconds, and the peak of memory above what is held now, all in this process."""
    forget_peak()
    before, started, cpu_started = memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
    call()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": max(0, memory_bytes("VmHWM") - before)}


def forget_peak() -> None:
    """Lets the kernel count this process's peak of memory anew; what is mapped from files counts too."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(field: str) -> int:
    """A field of this process's memory: `VmRSS`, what is resident, or `VmHWM`, the most that was.

    `getrusage` would not do: its peak starts from that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@dataclass(frozen=True)
class Command:
    """What a command line took."""

    seconds: float
    """Wall time."""
    peak_bytes: int
    """Peak resident memory."""
    output: str
    """What it said, on both streams."""


def time_command(command: list[str], expected: int = 0, **environment: str) -> Command:
    """A command line run to its end."""
    started = time.perf_counter()
    stream = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None, "a pipe was asked for"
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != expected:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return Command(seconds, _peak_bytes(usage), output)


def _peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
