"""Whether the nodes of a Ray cluster have what this machine has."""

from collections.abc import Iterator

from evomerge.doctor import Finding, Patient
from evomerge.versions import versions
from evomerge.workers.ray_address import given
from evomerge.workers.ray_pool import versions_by_node


def nodes(patient: Patient) -> Iterator[Finding]:
    """The versions on each node of the cluster, beside those here. There is no finding where no cluster is used."""
    if patient.prepared.config.workers.pool != "ray" and not patient.address:
        return
    mine = versions()
    for node, theirs in versions_by_node(given(patient.address)).items():
        yield Finding("Ray", node, _listed(mine), _told(mine, theirs), theirs == mine)


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _told(mine: dict[str, str], theirs: dict[str, str] | str) -> str:
    if isinstance(theirs, str):
        return f"no answer: {theirs}"
    other = {name: version for name, version in theirs.items() if mine.get(name) != version}
    return _listed(other) if other else "the same"
