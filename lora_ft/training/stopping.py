"""Asked to stop, training finishes its step and saves it; asked twice, it ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ONE_REQUEST_SECONDS = 1.0
"""Signals within this time are one request: a launcher passes on the Ctrl-C that the terminal has sent to all."""


class StopRequest:
    """Whether SIGINT or SIGTERM has come since training began."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked for an end; None while nothing has."""
        self._since, self._process = 0.0, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the two signals as requests inside the block; outside of the main thread Python cannot."""
        self.signal, self._process = None, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._receive_in_worker(number)
            return
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
            if os.environ.get("RANK", "0") == "0":
                text = f"\n{self.signal.name}: this step is finished and saved; the same signal again ends at once\n"
                os.write(2, text.encode())
        elif now - self._since > ONE_REQUEST_SECONDS:
            _end_by(number)

    @staticmethod
    def _receive_in_worker(number: int) -> None:
        """A data loader's worker has inherited this handler. Ctrl-C reaches it too, and the step it works for is still
        to be finished; SIGTERM comes from its parent, who means it."""
        if number == signal.SIGTERM:
            _end_by(number)


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
