"""The examination: all checks, one after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path

from evomerge.doctor import Finding, Patient
from evomerge.doctor.cluster import nodes
from evomerge.doctor.merges import fingerprints
from evomerge.doctor.searches import memory, scores, smoke
from evomerge.doctor.speeds import speeds
from evomerge.errors import first_line
from evomerge.search.preparation import prepare_file

CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (nodes, memory, speeds, fingerprints, scores, smoke)


def examine(search: Path, overrides: tuple[str, ...] = (), address: str | None = None) -> Iterator[Finding]:
    """The findings about a search on this machine, and on a cluster where it uses one.

    search: the search file.
    overrides: settings that replace those of the file, as KEY=VALUE.
    address: a Ray cluster's.
    Raises InputError for mistakes in the file.
    """
    patient = Patient(search, overrides, prepare_file(search, overrides, address), address)
    for check in CHECKS:
        try:
            yield from check(patient)
        except Exception as error:  # a doctor tells of whatever is broken, and goes on
            yield Finding(check.__name__, "here", "an answer", first_line(error) or type(error).__name__, False)
