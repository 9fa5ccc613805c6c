"""Subsets: fewer items for most candidates, all of them for whoever counts, and the same archive whatever happens."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate, Evaluation, Subset, failure
from evomerge.config.files import load
from evomerge.config.scoring import ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.evaluation.items import part
from evomerge.events import unheard
from evomerge.outcomes import Outcomes
from evomerge.search.best import front_of
from evomerge.search.criteria import Criteria, Limit, criteria_of
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, prepare
from evomerge.search.results import Results
from evomerge.search.subsets import Subsets
from evomerge.workers import Job
from tests import commands
from tests.fakes import FakePool, Killed
from tests.searches import WriteSearch

ITEMS = 120
BARS = np.random.default_rng(5).normal(size=(2, ITEMS))


class ItemPool(FakePool):
    """Answers items by a hidden skill of the genome, each when it lies above the item's bar."""

    def wait(self) -> tuple[Job, Evaluation]:
        if self._dies_after is not None and len(self.evaluated) >= self._dies_after:
            raise Killed
        job = self._jobs.pop(self._next())
        self.evaluated.append((job.candidate.id, job.study))
        return job, answered(self._names, job.candidate, job.subset)


def skills(candidate: Candidate) -> np.ndarray:
    if candidate.genome is None:
        return np.array([-1.0, -1.5])
    genome = np.array(candidate.genome)
    return 1 - 2 * np.array([((genome - 1.0) ** 2).mean(), ((genome - 0.6) ** 2).mean()])


def answered(names: list[str], candidate: Candidate, subset: Subset | None) -> Evaluation:
    if candidate.kind == "search" and candidate.index == 2 and candidate.generation % 3 == 0:
        return failure("out of memory")
    outcomes = {}
    for name, skill, bars in zip(names, skills(candidate), BARS, strict=True):
        places = range(ITEMS) if subset is None else part(0, subset, name, ITEMS)
        chosen = np.isin(np.arange(ITEMS), places)
        outcomes[name] = Outcomes.of((skill > bars)[chosen].astype(float), None, None if subset is None else chosen)
    scores = {name: float(each.values.mean()) for name, each in outcomes.items()}
    items = sum(each.count for each in outcomes.values())
    return Evaluation(scores, outcomes=outcomes, items=items, fingerprint=candidate.recipe.content_id())


@pytest.fixture
def prepared(search_file: WriteSearch) -> Prepared:
    optimizer = {"name": "cma_es", "evaluations": 45, "population": 6}
    return prepare(load(search_file(optimizer=optimizer, space={"density": {"fixed": 1.0}}, subsets=True)))


def names(config: SearchConfig) -> list[str]:
    return [objective.name for objective in config.objectives]


def run(prepared: Prepared, directory: Path, **pool: Any) -> tuple[Archive, ItemPool]:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, prepared.config, prepared.space.genes)
    items = ItemPool(names(prepared.config), lambda candidate: (), **pool)
    Search(prepared.config, prepared.space, archive, items, unheard).run()
    return archive, items


def content(archive: Archive, prepared: Prepared) -> Any:
    screened = [(record.candidate, record.evaluation.scores, record.evaluation.subset) for record in archive.tried()]
    return screened, commands.candidates(archive, prepared.config), commands.front(archive, prepared.config)


def test_the_archive_depends_neither_on_the_number_of_workers_nor_on_who_finishes_first(prepared, tmp_path):
    alone, _ = run(prepared, tmp_path / "alone")
    for size, seed in ((2, 1), (5, 2), (16, 3)):
        together, _ = run(prepared, tmp_path / f"together-{size}", size=size, seed=seed)
        assert content(together, prepared) == content(alone, prepared)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [1, 9, 40])
def test_killed_at_any_moment_it_resumes_to_the_same_archive_and_repeats_no_finished_evaluation(
    prepared, tmp_path, kill
):
    whole, undisturbed = run(prepared, tmp_path / "whole")
    evaluated: list[Any] = []
    for attempt in range(len(undisturbed.evaluated)):
        try:
            archive, pool = run(prepared, tmp_path / "killed", size=3, seed=attempt, dies_after=kill)
        except Killed:
            continue
        evaluated += pool.evaluated
        break
    assert content(archive, prepared) == content(whole, prepared)
    assert max(Counter(evaluated).values()) == 1


def test_an_extended_search_tries_what_the_larger_budget_would_have_tried(prepared, tmp_path):
    """Whom a generation that the budget had cut sends on to all items may differ, but nothing is forgotten."""
    optimizer = prepared.config.optimizer.model_copy(update={"evaluations": 60})
    longer = Prepared(
        prepared.config.model_copy(update={"optimizer": optimizer}), prepared.space, prepared.models, prepared.warnings
    )
    expected, _ = run(longer, tmp_path / "expected")
    short, _ = run(prepared, tmp_path / "extended")
    before = {record.candidate.id for record in short.records()}
    extended, _ = run(longer, tmp_path / "extended")
    for archive in (expected, extended):
        assert commands.status(archive, longer.config)["state"] == "finished"
    assert [each.candidate for each in extended.tried()] == [each.candidate for each in expected.tried()]
    assert before <= {record.candidate.id for record in extended.records()}


def test_only_candidates_scored_on_all_search_items_are_on_the_front_or_best(prepared, tmp_path):
    archive, _ = run(prepared, tmp_path / "run")
    criteria = criteria_of(archive, prepared.config)
    best = Results(archive, prepared.config).best()
    assert best is not None
    for record in (*front_of(archive.records(), criteria), best):
        assert record.evaluation.subset is None
        assert record.evaluation.items == 2 * ITEMS
    searched = [record for record in archive.tried() if record.candidate.kind == "search"]
    partial = [record for record in searched if record.evaluation.subset is not None]
    assert 0 < len(partial) < len(searched)
    assert all(record.evaluation.items < ITEMS for record in partial)


def test_the_budget_counts_candidates_and_most_cost_a_fraction_of_the_items(prepared, tmp_path):
    archive, pool = run(prepared, tmp_path / "run")
    status = commands.status(archive, prepared.config)
    assert (status["evaluations"], status["state"]) == (45, "finished")
    searched = [(name, study) for name, study in pool.evaluated if name.startswith("g")]
    assert sum(study == "subset" for _, study in searched) == 45
    assert status["on_all_items"] == sum(study == "search" for _, study in searched) < 20


def test_a_generation_shares_one_subset_and_the_next_has_a_fresh_one(prepared, tmp_path):
    archive, _ = run(prepared, tmp_path / "run")
    places: dict[int, set[bytes]] = {}
    for record in archive.records("subset"):
        for outcomes in record.evaluation.outcomes.values():
            places.setdefault(record.candidate.generation, set()).add(outcomes.places.tobytes())
    assert all(len(drawn) == 2 for drawn in places.values())  # one per task
    assert len(set.union(*places.values())) == 2 * len(places)


def test_an_archive_with_another_subset_is_refused(prepared, tmp_path, monkeypatch):
    run(prepared, tmp_path / "run")
    monkeypatch.setattr("evomerge.search.subsets._START", 0.2)
    with pytest.raises(WorkFailed, match="g0000-00 is recorded with another subset of items"):
        run(prepared, tmp_path / "run")


OBJECTIVES = (ObjectiveConfig(task="a", goal="maximize"), ObjectiveConfig(task="b", goal="maximize"))


def scored(values: np.ndarray, chosen: np.ndarray | None = None, layers: float = 1.0) -> Evaluation:
    """values: shape (2, items)."""
    kept = values if chosen is None else values[:, chosen]
    outcomes = {name: Outcomes.of(row, None, chosen) for name, row in zip("ab", kept, strict=True)}
    scores = {name: float(row.mean()) for name, row in zip("ab", kept, strict=True)} | {"layers": layers}
    return Evaluation(scores, outcomes=outcomes, subset=None if chosen is None else Subset(0, float(chosen.mean())))


def answers(rate: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((2, ITEMS)) < rate).astype(float)


def test_an_estimate_sets_the_score_off_against_the_best_known_candidates_on_the_same_items():
    known = answers(0.5)
    hard = np.flatnonzero(known.sum(axis=0) == 0)[:10]
    easy = np.flatnonzero(known.sum(axis=0) == 2)[:1]
    chosen = np.isin(np.arange(ITEMS), [*hard, *easy])
    subsets = Subsets(Criteria(OBJECTIVES), [scored(known)])
    (estimate,) = subsets.settle([scored(np.zeros((2, ITEMS)), chosen)])
    assert estimate is not None
    lost = 1 / 11  # the one item of the subset that the best known candidate has right
    assert estimate.scores == pytest.approx({"a": known[0].mean() - lost, "b": known[1].mean() - lost, "layers": 1.0})
    better = known.copy()
    better[:, hard[0]] = 1
    assert subsets.settle([scored(better, chosen)]) == [None]


def test_estimates_are_right_on_average_over_subsets():
    known, candidate = answers(0.9), answers(0.4, seed=1)
    subsets = Subsets(Criteria(OBJECTIVES), [scored(known)])
    estimates = []
    for number in range(400):
        chosen = np.isin(np.arange(ITEMS), part(0, Subset(number, 0.2), "a", ITEMS))
        (estimate,) = subsets.settle([scored(candidate * 0.5, chosen)])
        estimates.append(estimate.scores["a"])
    assert np.mean(estimates) == pytest.approx(candidate[0].mean() * 0.5, abs=4 * np.std(estimates) / 20)


def test_whoever_fails_or_breaks_a_limit_is_never_scored_on_all_items():
    some = np.arange(ITEMS) % 4 == 0
    criteria = Criteria(OBJECTIVES, (Limit("layers", -1.0, -2.0, "max"),))
    subsets = Subsets(criteria, [scored(answers(0.2))])
    good = answers(0.9, seed=2)
    kept = subsets.settle([failure("gone"), scored(good, some, layers=3.0), scored(good, some, layers=2.0)])
    assert [each is None for each in kept] == [False, False, True]


@pytest.mark.parametrize(("agree", "grows"), [(True, False), (False, True)])
def test_subsets_shrink_where_the_ranks_of_their_halves_agree_and_grow_where_they_do_not(agree, grows):
    subsets = Subsets(Criteria(OBJECTIVES), [scored(answers(0.5))])
    before = subsets.draw(0)
    for seed in range(3):
        candidates = [
            scored(answers(rate if agree else 0.5, seed)) for seed, rate in enumerate(np.linspace(0, 1, 9), 9 * seed)
        ]
        subsets.adapt(subsets.halves(candidates))
    after = subsets.draw(1)
    assert before is not None
    assert after is not None
    assert (after.share > before.share) == grows
    assert after.share != before.share


def test_candidates_that_all_score_the_same_do_not_agree():
    subsets = Subsets(Criteria(OBJECTIVES), [scored(answers(0.5))])
    for _ in range(30):
        subsets.adapt(subsets.halves([scored(answers(0.5))] * 8))
    assert subsets.draw(0) is None  # subsets that large save nothing


def test_a_subset_holds_its_share_of_every_task_and_at_least_one_item():
    assert [len(part(0, Subset(3, 0.25), "task", count)) for count in (1, 2, 40, 41)] == [1, 1, 10, 10]
    drawn = part(7, Subset(3, 0.5), "task", 40)
    assert drawn == sorted(set(drawn))
    assert drawn != part(7, Subset(4, 0.5), "task", 40)
    assert set(part(7, Subset(3, 0.2), "task", 40)) <= set(drawn)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"subsets": False}, False),
        ({"items": {"search": 99, "heldout": 24}}, False),
        ({"optimizer": {"name": "group_evolution"}}, False),
        ({"optimizer": {"name": "cma_es", "schedule": "async"}}, False),
        ({"objectives": [{"task": "base_qa"}, {"cost": "seconds"}]}, False),
    ],
)
def test_auto_takes_subsets_where_they_pay(search_file, changes, expected):
    usual = {"items": {"search": 100, "heldout": 24}, "optimizer": {"name": "cma_es"}}
    assert prepare(load(search_file(**usual | changes))).config.subsets is expected
