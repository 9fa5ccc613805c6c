"""Doctor: minutes on a user's own machine or cluster that answer whether evomerge works there.

To add a check: write a generator of findings that takes a `Patient`, and put it into `CHECKS` of examination.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomerge.search.preparation import Prepared


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table.

    check: what was checked.
    where: on which device, node or way.
    expected: what was expected.
    found: what was found.
    good: whether that is as expected.
    """

    check: str
    where: str
    expected: str
    found: str
    good: bool


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined.

    search: the search file.
    overrides: settings that replace those of the file, as KEY=VALUE.
    prepared: the search.
    address: a Ray cluster's; None where none is looked at.
    """

    search: Path
    overrides: tuple[str, ...]
    prepared: "Prepared"
    address: str | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices to be examined: this machine's CPU, and all of the search's kind that are here."""
        from evomerge.devices import device_count

        kind = self.prepared.config.evaluation.device.partition(":")[0]
        count = device_count(kind)
        return ("cpu", *(f"{kind}:{number}" for number in range(count))) if kind != "cpu" else ("cpu",)
