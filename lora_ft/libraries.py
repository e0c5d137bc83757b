"""The large libraries: kept quiet, and imported without what makes that slow."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Turns off what libraries send to their makers, and the bars they draw through ours.

    The variables are read when a library is imported; one that already is, as in a notebook, is told by hand.
    """
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")

    from huggingface_hub import constants
    from transformers.utils import logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.disable_progress_bar()


def own_process() -> None:
    """For a process that is ours alone, and no notebook: libraries say only what a user must know, and draw no bars.

    At its end Python does not look through all that they hold, which takes a second and more.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    atexit.register(gc.freeze)


def load_libraries(*others: str) -> None:
    """Imports PEFT, with torch, transformers and bitsandbytes, and the modules `others`, unless they are there.

    Imports make a million objects that stay, and Python looks through them for garbage again and again; without that
    they take about a third less time.
    """
    if sys.modules.keys() >= {"bitsandbytes", "peft", *others}:
        return
    with garbage_kept():
        with _no_compiler(), _no_fetched_kernel():
            importlib.import_module("bitsandbytes")
        for name in ("peft", *others):
            importlib.import_module(name)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Python does not look for garbage meanwhile: for a short time in which many objects are made that stay.

    Afterwards they are old, and are not looked through twice more on the way there.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        if was_collecting:
            gc.enable()


@contextmanager
def _no_compiler() -> Iterator[None]:
    """torch.compile returns what it is given.

    bitsandbytes compiles what it has for devices without kernels of its own, and loads Inductor for it wherever it is
    imported, which takes a second. CPUs and CUDA have its kernels, but for odd widths and blocks of 2,048 on a CPU.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@contextmanager
def _no_fetched_kernel() -> Iterator[None]:
    """The package `kernels` is not there, and nobody is told so.

    Where it is, bitsandbytes 0.50.2 fetches compiled code from the Hub as it is imported on a CPU with AVX512-BF16, for
    products of packed weights that we never ask for (`model.load.use_safe_4bit_kernels`).
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    was_silent, is_hidden = logger.disabled, "kernels" not in sys.modules
    logger.disabled = True
    if is_hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.disabled = was_silent
        if is_hidden:
            del sys.modules["kernels"]
