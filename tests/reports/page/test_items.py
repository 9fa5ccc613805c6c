"""Items that flipped are those that the evidence counts."""

from pathlib import Path

from evomerge.evidence.comparison import against
from evomerge.reports.page.items import flips, questions, shown_questions
from evomerge.runs import directory as runs


def test_as_many_items_flipped_as_the_evidence_says(zoo_run: Path) -> None:
    results = runs.read(zoo_run).results
    best = results.best()
    assert best is not None
    found = {(one.rival, one.metric): one for one in flips(results, best.candidate.id)}
    seen = 0
    for compared in against(results, [best.candidate.id])[best.candidate.id]:
        for metric, task in compared.objectives.items():
            one = found.get((compared.rival, metric))
            if one is not None:
                assert (len(one.gained), len(one.lost)) == (task.won, task.lost)
                seen += 1
    assert seen
    assert {metric for _, metric in found} == {metric.name for metric in results.config.reported}


def test_a_candidate_without_held_out_scores_has_no_flips(zoo_run: Path) -> None:
    results = runs.read(zoo_run).results
    without = next(r for r in results.archive.records() if results.archive.find(r.candidate.id, "heldout") is None)
    assert flips(results, without.candidate.id) == []


def test_questions_are_those_that_were_scored(zoo_run: Path) -> None:
    """They stand in the order of the outcomes: the worker's own division of items has the same documents."""
    from evomerge.workers.worker import Worker

    run = runs.read(zoo_run)
    asked = questions(run.config, run.prepared.models)
    worker = Worker(run.config, run.prepared.models)
    parts = worker._harness._prepared("heldout")
    scored = {task.task.config.task: task for part in parts for task in part._tasks}
    for metric, texts in asked.items():
        documents = [instances[0].doc for instances in scored[metric].documents]
        assert [question.text for question in texts] == [str(scored[metric].task.doc_to_text(d)) for d in documents]
    best = run.results.best()
    assert best is not None
    found = flips(run.results, best.candidate.id)
    for one in found:
        shown = shown_questions(asked, found)[one.rival, one.metric]
        assert sorted(shown) == sorted([*one.gained, *one.lost])
        assert all(shown[number] == asked[one.metric][number] for number in shown)
