"""Experiment trackers by one recipe key, `training.report_to`: transformers calls them, here they are looked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from lora_ft.errors import Fault

TRACKERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "swanlab": ("swanlab",),
    "dvclive": ("dvclive",),
    "codecarbon": ("codecarbon",),
    "neptune": ("neptune",),
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "azure_ml": ("azureml",),
    "kubeflow": (),
}
"""Name in a recipe → modules, any of which will do; none where the tracker is the place it runs in."""
EVERYTHING = ("none", "all")


def check_trackers(training: Mapping[str, Any]) -> Iterator[Fault]:
    """A fault for each tracker that is not known or whose package is absent: transformers finds out when training."""
    asked = training.get("report_to") or "none"
    for name in [asked] if isinstance(asked, str) else asked:
        if name in EVERYTHING:
            continue
        packages = TRACKERS.get(name)
        if packages is None:
            yield Fault("training.report_to", name, f"Known: {', '.join(TRACKERS)}, none.", "Choose among these.")
        elif packages and not any(importlib.util.find_spec(package) for package in packages):
            rule = f"The package {packages[0]} is not installed."
            yield Fault("training.report_to", name, rule, f"Run: pip install {packages[0].replace('_', '-')}")
