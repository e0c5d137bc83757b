"""A sweep: trials of a recipe within a space, remembered in SQLite, so that it goes on after an interruption.

Source: Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework".
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_ft.errors import Interrupted, RunFailed, UserError
from lora_ft.fingerprint import hash_json
from lora_ft.recipe import dump_recipe, load_recipe
from lora_ft.sections import Recipe
from lora_ft.sweep.space import Axis, as_override, describe_space, load_space

RunTrial = Callable[[Recipe, Callable[[int, float], bool], Callable[[str, str], None]], float | None]
"""Recipe, what takes the number and loss of each evaluation, and what takes the fingerprints of base and data."""
SEED = 42
STARTUP_TRIALS = 4
"""Trials drawn at random, and never ended early, before the sampler and the pruner have something to go by."""
STUDY, RESULT, BEST = "sweep.db", "sweep.json", "best.yaml"
FAULT = "fault"
"""Attribute of a trial that broke: what was wrong."""


class InputsChanged(UserError):
    """Base or data are no longer those of the trials before: no trial can be held against them."""


@dataclass(frozen=True)
class Trial:
    """One trial."""

    number: int
    """From 0, in order."""
    state: str
    """`complete`, `pruned` (ended early), `failed` (the run broke), or `interrupted`."""
    loss: float | None
    """Validation loss, in nats a token."""
    settings: dict[str, Any]
    """The keys it was run with."""


@dataclass(frozen=True)
class SweepResult:
    """A sweep as it stands."""

    folder: Path
    """Where all of it lies."""
    trials: tuple[Trial, ...]
    """All that ended, those of earlier starts too."""
    best: Trial | None
    """The one with the lowest validation loss."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "best_recipe": str(self.folder / BEST) if self.best else None,
        }


def sweep(
    recipe: str | Path,
    space: Path,
    num_trials: int,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    run_trial: RunTrial | None = None,
) -> SweepResult:
    """Trials until there are `num_trials` in all, by the validation loss alone; the best recipe is written out.

    Raises:
        UserError: Optuna is absent, the space does not fit the recipe, the folder holds another sweep, or several
            processes were launched.
        Interrupted: a signal ended a trial; the same sweep begins it again.
        RunFailed: no trial was complete.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweep", None, "The package optuna is not installed.", "Run: pip install 'lora-ft[sweep]'")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        rule = f"A sweep is one process, and {processes} were launched."
        raise UserError("environment  WORLD_SIZE", processes, rule, "Run lora-ft sweep without a launcher.")
    plain = load_recipe(recipe, overrides)
    axes = load_space(space, recipe, overrides)
    folder = folder or plain.output_dir.with_name(f"{plain.output_dir.name}-sweep")
    folder.mkdir(parents=True, exist_ok=True)
    train = run_trial or _load_run_trial()
    try:
        with FileLock(folder / ".lock", timeout=0):
            study = open_study(folder, plain, axes)
            while (number := count_ended(study)) < num_trials:
                print(f"trial {number + 1} of {num_trials}", file=sys.stderr)
                run_one(study, axes, recipe, overrides, folder, train)
            result = write_result(study, axes, recipe, overrides, folder)
    except Timeout:
        rule = "Another process sweeps into this folder."
        raise UserError(str(folder), None, rule, "Wait for it, or name another --out.") from None
    if result.best is None:
        faults = [trial.user_attrs[FAULT] for trial in study.trials if FAULT in trial.user_attrs]
        fault = faults[-1] if faults else "each was ended early."
        rule = f"None of {number} trials was complete. The last fault: {fault}"
        raise RunFailed(str(folder), None, rule, "Mend that, or narrow the space, and name another --out.")
    return result


def _load_run_trial() -> RunTrial:
    """Torch is imported only when the space was read without a fault."""
    from lora_ft.sweep.trial import run_trial

    return run_trial


def open_study(folder: Path, recipe: Recipe, axes: Sequence[Axis]) -> Any:
    """The study of the folder; trials that an interruption left half done are put in line again.

    Raises:
        UserError: it was begun with another recipe or another space, or its database is none.
    """
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    identity = hash_json([dump_recipe(replace(recipe, output_dir=Path())), describe_space(axes)])
    create = partial(
        optuna.create_study,
        study_name="sweep",
        storage=find_storage(folder),
        direction="minimize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
    )
    try:
        study = create()
    except sqlalchemy.exc.DatabaseError as fault:
        rule = f"This is no database of a sweep: {fault.orig}."
        raise UserError(str(folder / STUDY), None, rule, "Name another --out, or remove the file.") from fault
    if study.user_attrs.get("identity", identity) != identity and count_ended(study) == 0:
        optuna.delete_study(study_name="sweep", storage=find_storage(folder))  # its first trial was refused
        shutil.rmtree(folder / "trials", ignore_errors=True)
        study = create()
    if study.user_attrs.get("identity", identity) != identity:
        rule = "The sweep in this folder was begun with another recipe or another space."
        raise UserError(str(folder), None, rule, "Name another --out, or remove the folder.")
    study.set_user_attr("identity", identity)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
        shutil.rmtree(find_trial_folder(folder, trial.number), ignore_errors=True)
    study.sampler = optuna.samplers.TPESampler(seed=SEED + len(study.trials), n_startup_trials=STARTUP_TRIALS)
    return study


def find_trial_folder(folder: Path, number: int) -> Path:
    """Where a trial writes its log."""
    return folder / "trials" / str(number)


def find_storage(folder: Path) -> str:
    """The database of the folder as Optuna takes it: a URL, and a template whose braces stand for something."""
    import sqlalchemy

    url = sqlalchemy.URL.create("sqlite", database=str(folder / STUDY)).render_as_string()
    return url.replace("{", "{{").replace("}", "}}")


def count_ended(study: Any) -> int:
    """Trials that came to an end of their own, whatever it was; one that was interrupted does not count."""
    return sum(trial.state.is_finished() and name_state(trial) != "interrupted" for trial in study.trials)


def name_state(trial: Any) -> str:
    """The state of a trial of Optuna's, as `Trial` calls it."""
    if trial.state.name == "FAIL":
        return "failed" if FAULT in trial.user_attrs else "interrupted"
    return trial.state.name.lower()


def run_one(
    study: Any, axes: Sequence[Axis], recipe: str | Path, overrides: Sequence[str], folder: Path, run_trial: RunTrial
) -> None:
    """The next trial. One that breaks, by a learning rate too high, say, counts as failed and the sweep goes on.

    One that this raises at has not ended, and is put in line again by the next start.

    Raises:
        UserError: the first trial was refused: the fault is the recipe's. Or base or data have changed.
        Interrupted: a signal ended it.
    """
    from optuna.trial import TrialState

    is_first = count_ended(study) == 0
    trial = study.ask()
    drawn = [as_override(axis.key, axis.suggest(trial)) for axis in axes]
    own_folder = find_trial_folder(folder, trial.number)

    def report(number: int, loss: float) -> bool:
        trial.report(loss, number)
        return trial.should_prune()

    def check_inputs(base: str, data: str) -> None:
        refuse_changes(study, folder, {"model.base": base, "data": data})

    try:
        drawn_recipe = load_recipe(recipe, [*overrides, *drawn, as_override("output_dir", str(own_folder))])
        loss = run_trial(drawn_recipe, report, check_inputs)
        if loss is not None and not math.isfinite(loss):
            raise RunFailed(f"trial {trial.number}", loss, "The validation loss is not finite.", "")
    except Interrupted:
        shutil.rmtree(own_folder, ignore_errors=True)  # with the checkpoint, from which no trial goes on
        rule = f"Trial {trial.number} was stopped by a signal."
        raise Interrupted(str(folder), None, rule, "The same command begins it again.") from None
    except (UserError, RuntimeError, MemoryError) as error:  # a device without memory left raises a RuntimeError
        is_refused = isinstance(error, UserError) and not isinstance(error, RunFailed)
        if isinstance(error, InputsChanged) or (is_first and is_refused):
            raise
        trial.set_user_attr(FAULT, str(error))
        study.tell(trial, state=TrialState.FAIL)
        print(error, file=sys.stderr)
        return
    if loss is None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, loss)


def refuse_changes(study: Any, folder: Path, fingerprints: dict[str, str]) -> None:
    """Keeps the fingerprints of base and data, against which later trials are held.

    Raises:
        InputsChanged: a trial is complete, and had others.
    """
    from optuna.trial import TrialState

    before = study.user_attrs if study.get_trials(states=[TrialState.COMPLETE]) else {}
    changed = [name for name, found in fingerprints.items() if before.get(name, found) != found]
    if changed:
        rule = f"Changed since its trials: {' and '.join(changed)}. No loss could be held against theirs."
        raise InputsChanged(str(folder), None, rule, "Name another --out, or bring back what there was.")
    for name, found in fingerprints.items():
        study.set_user_attr(name, found)


def write_result(
    study: Any, axes: Sequence[Axis], recipe: str | Path, overrides: Sequence[str], folder: Path
) -> SweepResult:
    """`sweep.json`, pictures, and the best recipe, ready for `lora-ft train`."""
    labels = {axis.key: axis.labels for axis in axes if axis.options}
    trials = tuple(
        Trial(t.number, name_state(t), t.value, {k: labels.get(k, {v: v})[v] for k, v in t.params.items()})
        for t in study.trials
        if t.state.is_finished()
    )
    complete = [trial for trial in trials if trial.state == "complete" and trial.loss is not None]
    best = min(complete, key=lambda trial: trial.loss or 0.0, default=None)
    result = SweepResult(folder, trials, best)
    (folder / RESULT).write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if best is not None:
        drawn = [as_override(key, value) for key, value in best.settings.items()]
        own_folder = as_override("output_dir", str(folder / "best"))
        chosen = load_recipe(recipe, [*overrides, *drawn, own_folder])
        told = f"# The best of {len(trials)} trials: validation loss {best.loss:.4f} (trial {best.number}).\n"
        (folder / BEST).write_text(told + dump_recipe(chosen), encoding="utf-8")
        draw_pictures(study, folder)
    return result


def draw_pictures(study: Any, folder: Path) -> None:
    """`history.png`: loss trial by trial; `slices.png`: loss over each key."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    pyplot.switch_backend("agg")  # no window, on a desktop neither
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pictures are called experimental since 2020
        for name, plot in (("history", pictures.plot_optimization_history), ("slices", pictures.plot_slice)):
            plot(study, target_name="validation loss")
            pyplot.savefig(folder / f"{name}.png", dpi=144, bbox_inches="tight")
            pyplot.close()
