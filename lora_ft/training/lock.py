"""One writer for a run's folder. The operating system keeps the lock, so it ends with the process."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_ft.errors import UserError

LOCK = ".lock"
"""Name of the file in a run's folder; it says who holds it."""


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """The run's folder for this process alone.

    Raises:
        UserError: another process has it; names that process.
    """
    with _acquire(run):
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        (run / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield


def refuse_if_locked(run: Path) -> None:
    """Nothing, if no other process writes to the folder; of several ranks, only the first one looks, as it will write.

    Raises:
        UserError: one does.
    """
    if not (run / LOCK).exists() or os.environ.get("RANK", "0") != "0":
        return
    with _acquire(run):
        pass


def has_ended(run: Path) -> bool:
    """Whether the process that wrote to the folder last was one of this machine, and is no more.

    The lock itself is not tried: a run that starts meanwhile would find it taken.
    """
    import psutil

    holder = _read_holder(run)
    return holder is not None and holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"])


@contextmanager
def _acquire(run: Path) -> Iterator[None]:
    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            "output_dir", str(run), f"{_describe_holder(run)} is writing there.", "Wait for it to end."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _describe_holder(run: Path) -> str:
    holder = _read_holder(run)
    if holder is None:
        return "Another process"
    return f"Process {holder['pid']} on {holder['host']}, begun {holder['since']},"


def _read_holder(run: Path) -> dict[str, Any] | None:
    """What the last process to write to the folder said of itself; None if that cannot be read."""
    try:
        holder = json.loads((run / LOCK).read_text(encoding="utf-8"))
        return {"pid": int(holder["pid"]), "host": holder["host"], "since": holder["since"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
