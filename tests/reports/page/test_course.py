"""The course of a search agrees with what its results say."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from evomerge.archive.gradients import GradientRecord
from evomerge.reports.page.course import costs, course, losses
from evomerge.runs import directory as runs
from tests.reports.page.conftest import Run


def test_the_cost_is_that_of_the_results(zoo_run: Path) -> None:
    results = runs.read(zoo_run).results
    spent = course(results).points[-1].spent
    assert spent.passes == pytest.approx(results.equivalents)
    assert spent.steps == results.steps == 12
    assert costs(results).searched == spent
    archive = results.archive
    seconds = [record.evaluation.seconds for study in results.config.splits for record in archive.records(study)] + [
        record.seconds for record in archive.gradients()
    ]
    assert costs(results).hours == pytest.approx(sum(seconds) / 3600)
    searched = [record for record in archive.tried() if record.candidate.kind == "search"]
    assert spent.evaluations == len(searched)
    assert costs(results).controls == len(archive.tried()) - len(searched)


def test_the_best_so_far_never_falls_and_ends_at_the_best_candidate(zoo_run: Path) -> None:
    results = runs.read(zoo_run).results
    shown = course(results)
    best = [point.best for point in shown.points if point.best is not None]
    assert all(before <= after for before, after in pairwise(best))
    feasible = [record for record in results.archive.records() if results.criteria().feasible(record.evaluation)]
    searched = [record.evaluation for record in feasible if record.candidate.kind == "search"]
    assert best[-1] == max(results.criteria().means(searched))
    for before, after in pairwise(shown.points):
        assert before.spent.passes < after.spent.passes
        assert before.spent.items < after.spent.items


def test_a_stage_begins_behind_the_last_candidate_of_the_gradients(zoo_run: Path) -> None:
    shown = course(runs.read(zoo_run).results)
    (mark,) = [mark for mark in shown.marks if mark.text.startswith("stage 2")]
    learned = [point.id for point in shown.points if point.id.startswith("l")]
    assert [point.id for point in shown.points[: mark.at]] == learned
    assert [step for step, _ in next(iter(shown.losses.values()))] == list(range(1, 13))


@pytest.mark.slow
def test_stages_begin_with_the_generation_behind_their_budget(tiny_run: Run) -> None:
    stages = [{"genes": ["weight"], "evaluations": 5}, {"genes": ["density"]}]
    space = {"method": "dare_ties", "layer_granularity": 2}
    name = {"name": "cma_es", "evaluations": 10, "population": 4, "stages": stages}
    run = runs.read(tiny_run(space=space, optimizer=name))
    results = run.results
    (mark,) = course(results).marks
    by_id = {record.candidate.id: record.candidate for record in results.archive.records()}
    searched = [by_id[point.id] for point in course(results).points]
    kinds = {gene.name: gene.kind for gene in run.prepared.space.genes}
    assert mark.at == 8
    weights = [
        tuple(value for name, value in (results.archive.genes(candidate) or {}).items() if kinds[name] == "weight")
        for candidate in searched[mark.at :]
    ]
    assert len(set(weights)) == 1


def test_the_losses_of_shards_add_up() -> None:
    def record(step: int, shard: int, loss: float) -> GradientRecord:
        return GradientRecord(step, shard, "0" * 16, {"task": loss}, np.zeros(1))

    found = losses([record(0, 0, 9.0), record(1, 0, 0.25), record(1, 1, 0.5), record(2, 0, 1.0)])
    assert found == {"task": ((1, 0.75), (2, 1.0))}
