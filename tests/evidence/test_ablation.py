"""What held-out items say of the winner's parts agrees with the recorded outcomes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from evomerge.events import unheard
from evomerge.evidence.ablation import Ablated, Part, ablated
from evomerge.evidence.comparison import Lead
from evomerge.runs import directory as runs
from evomerge.runs.journal import OpenRun
from evomerge.search.ablation import ARCHIVE, plan


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    directory = tmp_path_factory.mktemp("parts") / "run"
    shutil.copytree(finished, directory)
    runs.ablate(directory, (), None, unheard)
    return runs.read(directory)


@pytest.fixture(scope="module")
def found(run: OpenRun) -> Ablated:
    shown = ablated(run.results, run.prepared.space)
    assert shown is not None
    return shown


def outcomes(run: OpenRun, identity: str, beside: bool) -> list[np.ndarray]:
    archive = run.archive.beside(ARCHIVE) if beside else run.archive
    record = archive.find(identity, "heldout")
    assert record is not None
    return [record.evaluation.outcomes[objective.name].values for objective in run.config.objectives]


def test_a_search_without_an_ablation_has_none(finished: Path) -> None:
    plain = runs.read(finished)
    assert ablated(plain.results, plain.prepared.space) is None
    assert not plain.archive.has_beside(ARCHIVE)


def test_the_lead_over_each_part_is_the_difference_of_the_mean_outcomes(run: OpenRun, found: Ablated) -> None:
    planned = plan(run.results, run.prepared.space)
    by_name = {group.name: candidate for group, candidate in zip(planned.groups, planned.alone, strict=True)}
    by_name |= planned.without
    assert {part.name for part in found.parts} == set(by_name)
    winner = outcomes(run, found.winner, beside=False)
    for part in found.parts:
        other = outcomes(run, by_name[part.name].id, beside=True)
        expected = np.mean([mine.mean() - theirs.mean() for mine, theirs in zip(winner, other, strict=True)])
        assert part.lead is not None
        assert part.lead.difference == pytest.approx(expected)
        assert part.mean == pytest.approx(np.mean([values.mean() for values in other]))
        assert part.lead.interval[0] <= part.lead.difference <= part.lead.interval[1]


def test_the_way_ends_at_the_winner_and_adds_what_brings_most_first(run: OpenRun, found: Ablated) -> None:
    winner = outcomes(run, found.winner, beside=False)
    assert found.way[-1].heldout == pytest.approx(np.mean([values.mean() for values in winner]))
    assert [stop.name for stop in found.way[1:]] == [part.name for part in found.parts if part.kind == "group"]
    planned = plan(run.results, run.prepared.space)
    beside = run.archive.beside(ARCHIVE)
    records = [beside.find(planned.alone[number].id, "search") for number in planned.order(beside)]
    means = [np.mean([(record.evaluation.scores or {})[metric.name] for metric in run.config.objectives])
             for record in records if record is not None]  # fmt: skip
    assert means == sorted(means)


def test_its_evaluations_are_counted(run: OpenRun, found: Ablated) -> None:
    beside = run.archive.beside(ARCHIVE)
    assert found.evaluations == sum(len(beside.records(split)) for split in run.config.splits)


@pytest.mark.parametrize(
    ("lead", "matters"),
    [
        (Lead(0.2, (0.1, 0.3), 0.01), True),
        (Lead(0.2, (-0.1, 0.5), 0.3), False),
        (Lead(-0.2, (-0.3, -0.1), 0.01), False),
    ],
)
def test_a_part_matters_where_the_winner_is_worse_without_it_beyond_chance(lead: Lead, matters: bool) -> None:
    assert Part("layer_1", "group", 0.5, lead).matters == matters
    assert not Part("layer_1", "group", None, None).matters
