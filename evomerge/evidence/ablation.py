"""What held-out items say of the parts of a winner, from the recorded ablation of a search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.archive.archive import Archive, Record
from evomerge.candidate import Candidate
from evomerge.config.base import Split
from evomerge.errors import InputError
from evomerge.evidence.comparison import SIGNIFICANT, Lead, lead
from evomerge.evidence.statistics import holm
from evomerge.search.ablation import ARCHIVE, Ablation, plan
from evomerge.search.results import Results
from evomerge.spaces import SearchSpace


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the winner that was put back.

    name: the group of tensors, or the model.
    kind: `group` where its genes were put back to those of the uniform merge, `model` where its weights were set to 0.
    mean: what is left of the winner without it, on held-out items; None where that failed.
    lead: of the winner over what is left, with its p-value corrected for all parts; None where it is not known.
    """

    name: str
    kind: str
    mean: float | None
    lead: Lead | None

    @property
    def matters(self) -> bool:
        """Whether the winner is worse without it beyond chance."""
        return self.lead is not None and self.lead.difference > 0 and self.lead.p_value < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Stop:
    """A recipe on the way from the uniform merge to the winner.

    name: the group that was added last; empty at the start.
    chosen: the mean on the items that decided the order; None where it failed.
    heldout: the mean on held-out items; None likewise.
    """

    name: str
    chosen: float | None
    heldout: float | None


@dataclass(frozen=True, slots=True)
class Ablated:
    """A recorded ablation.

    winner: the winner's id.
    parts: the groups, those first that were most important on the items that decide, then the models.
    way: from the start to the winner.
    split: the items that decided the order of the groups.
    from_uniform: whether the way starts at the uniform merge; else at a model unchanged.
    evaluations: how many evaluations it took, on all splits.
    seconds: how long these took.
    """

    winner: str
    parts: tuple[Part, ...]
    way: tuple[Stop, ...]
    split: Split
    from_uniform: bool
    evaluations: int
    seconds: float


def ablated(results: Results, space: SearchSpace) -> Ablated | None:
    """The recorded ablation of a search's winner; None where there is none, or not all of it yet.

    results: the search's.
    space: what genomes are decoded by.
    """
    if not results.archive.has_beside(ARCHIVE):
        return None
    beside = results.archive.beside(ARCHIVE)
    try:
        planned = plan(results, space)
    except InputError:
        return None  # the search goes on, or has another best now
    if planned.left(beside):
        return None
    order = planned.order(beside)
    parts = [(planned.groups[number].name, "group", planned.alone[number]) for number in order]
    parts += [(name, "model", candidate) for name, candidate in planned.without.items()]
    used = {candidate.id for candidate in (*planned.first, *planned.toward(order))}
    records = [record for split in planned.splits for record in beside.records(split) if record.candidate.id in used]
    return Ablated(
        planned.winner.id,
        tuple(_parts(planned, beside, parts)),
        tuple(_way(planned, beside, order)),
        planned.splits[0],
        planned.from_uniform,
        len(records),
        sum(record.evaluation.seconds for record in records),
    )


def _parts(planned: Ablation, beside: Archive, listed: Sequence[tuple[str, str, Candidate]]) -> list[Part]:
    """What held-out items say of each part. p-values are corrected for the number of parts, since any of them might
    have been the one to look at."""
    winner = planned.results.archive.find(planned.winner.id, "heldout")
    made = []
    for name, kind, candidate in listed:
        record = beside.find(candidate.id, "heldout")
        known = winner is not None and record is not None and not record.evaluation.failed
        found = lead(winner, record, planned.results) if known and winner and record else None
        made.append(Part(name, kind, _mean(planned, record, "heldout"), found))
    tested = [part.lead for part in made if part.lead is not None]
    corrected = iter(holm([one.p_value for one in tested]))
    return [
        part if part.lead is None else replace(part, lead=replace(part.lead, p_value=next(corrected))) for part in made
    ]


def _way(planned: Ablation, beside: Archive, order: Sequence[int]) -> list[Stop]:
    split = planned.splits[0]
    names = ["", *(planned.groups[number].name for number in order)]
    archives = [beside] * len(order) + [planned.results.archive]  # the last stop is the winner
    candidates = [*planned.toward(order), planned.winner]
    return [
        Stop(
            name,
            _mean(planned, archive.find(candidate.id, split), split),
            _mean(planned, archive.find(candidate.id, "heldout"), "heldout"),
        )
        for name, archive, candidate in zip(names, archives, candidates, strict=True)
    ]


def _mean(planned: Ablation, record: Record | None, split: Split) -> float | None:
    if record is None or record.evaluation.failed:
        return None
    return planned.results.criteria(split).means([record.evaluation])[0]
