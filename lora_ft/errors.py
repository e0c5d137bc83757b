"""What a user can mend, said in one place: where it stands, what was found, the rule, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, as a user sees it."""

    place: str
    """Where it stands: `recipe.yaml:9  lora.r`, `data.jsonl:12`, a path, a command-line option."""
    value: object
    """What was found there; left out of the message when None."""
    rule: str
    """What would have been right, in a sentence."""
    fix: str
    """What to do now."""

    def __str__(self) -> str:
        head = self.place if self.value is None else f"{self.place}: {self.value}"
        return f"{head}\n  {self.rule} {self.fix}".rstrip()


class UserError(Exception):
    """The user must change something; the command ends with exit code 2 and no traceback."""

    exit_code = 2

    def __init__(self, place: str, value: object, rule: str, fix: str):
        self.faults: tuple[Fault, ...] = (Fault(place, value, rule, fix),)
        super().__init__(str(self.faults[0]))

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> UserError:
        """One error that carries all `faults`, in their order."""
        error = cls.__new__(cls)
        error.faults = tuple(faults)
        Exception.__init__(error, "\n".join(str(fault) for fault in error.faults))
        return error


class RunFailed(UserError):
    """A run broke its own promise (a loss that is not finite, an adapter that does not verify): exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """A run was asked to stop, and did so after a checkpoint from which it goes on: exit code 130."""

    exit_code = 130


def raise_faults(faults: Iterable[Fault]) -> None:
    """Nothing when there are no faults; otherwise one `UserError` with all of them."""
    found = tuple(faults)
    if found:
        raise UserError.of(found)
