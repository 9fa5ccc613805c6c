"""What people see in a terminal: whole numbers and ids at any width, what is to be beaten, and the last table."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evomerge.config.search import SearchConfig
from evomerge.events import Evaluated, Finished, SearchStarts
from evomerge.reports import terminal, views
from evomerge.runs import directory as runs
from evomerge.runs.journal import Opened
from tests.commands import evomerge
from tests.searches import WriteSearch


def printed(width: int, is_terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width, force_terminal=is_terminal, soft_wrap=True, highlight=False), text


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("width", [40, 60, 80, 160])
@pytest.mark.parametrize("count", [2, 8])
def test_tables_of_progress_show_every_number_and_id_whole(count: int, width: int, finished: Path) -> None:
    status, config = many(finished, count)
    output, text = printed(width)
    terminal.show_status(output, status, config)
    shown = text.getvalue()
    assert all(len(line) <= width for line in shown.splitlines() if line.startswith(("│", "┃")))
    for row in (status.best, status.best_parent, status.best_control):
        assert row is not None
        assert row.id in shown
        assert row.scores is not None
        assert all(f"{score:.3f}" in shown for score in row.scores.values())
    assert all(objective.name in shown.replace("\n", "") for objective in config.objectives if len(objective.name) < 13)


def many(finished: Path, count: int) -> tuple[views.StatusView, SearchConfig]:
    """The status of a run as if it had so many objectives, each with scores of its own."""
    results = runs.read(finished).results
    status, config = views.status(results, running=False), results.config
    names = [f"task_{number}" for number in range(count)]
    objectives = tuple(config.objectives[0].model_copy(update={"task": name}) for name in names)

    def scored(row: views.CandidateView | None, shift: float) -> views.CandidateView:
        assert row is not None
        return replace(row, scores={name: shift + number / 100 for number, name in enumerate(names)})

    rows = {"best": scored(status.best, 0.1), "best_parent": scored(status.best_parent, 0.3)}
    leaders = dict.fromkeys(names, views.Leader("base", 0.5))
    status = replace(status, **rows, best_control=scored(status.best_control, 0.5), best_per_objective=leaders)
    return status, config.model_copy(update={"objectives": objectives})


def test_a_best_candidate_below_a_control_is_said_to_be_so(finished: Path) -> None:
    status, _ = many(finished, 2)
    best, parent, control = status.best, status.best_parent, status.best_control
    assert best is not None
    assert parent is not None
    assert control is not None
    low, high = replace(best, mean=0.5), replace(control, mean=0.75)
    note = terminal.progress_note(replace(status, best=low, best_parent=replace(parent, mean=0.4), best_control=high))
    assert f"{best.id} is still below {control.id}" in note
    assert parent.id not in note


def test_while_a_search_runs_controls_are_counted_apart_and_the_last_table_stays(finished: Path) -> None:
    run = runs.read(finished)
    record = next(r for r in run.archive.records() if r.candidate.kind == "search")
    output, text = printed(80, is_terminal=True)
    view = terminal.SearchView(output)
    view(Opened(run))
    view(SearchStarts("uniform"))
    view(Evaluated(record.candidate, record.evaluation, "search"))
    view.close(interrupted=True)
    shown, status = plain(text.getvalue()), views.status(run.results, running=True)
    last = shown[shown.rindex("best") :]
    assert re.search(rf"controls .* {status.controls.done}/{status.controls.total}", last)
    assert re.search(rf"search .* {status.evaluations}/{status.budget}", last)
    assert status.phase in last
    assert "elapsed" in last
    assert status.best is not None
    assert f"best, {status.best.id}" in shown


def test_elsewhere_a_search_ends_with_a_line_of_all_that_counts(finished: Path) -> None:
    run = runs.read(finished)
    output, text = printed(400)
    view = terminal.SearchView(output)
    view(Opened(run))
    view(Finished(len(run.archive.records())))
    status, line = views.status(run.results, running=True), text.getvalue().splitlines()[-1]
    assert status.best_control is not None
    for part in (f"controls {status.controls.done}/{status.controls.total}", status.phase, status.best_control.id):
        assert part in line


def test_check_says_what_there_is_and_leaves_out_what_there_is_not(search_file: WriteSearch) -> None:
    shown = evomerge("check", search_file(optimizer={"evaluations": 20, "population": 8}))
    summary, _, placements = shown.partition("\nGiB")
    lines = dict(line.split(": ", 1) for line in summary.splitlines())
    assert "a worker" in placements
    assert lines["groups"] == "embeddings 4, layers_0-1 4, layers_2-3 4, layers_4-5 4, head 4"
    assert "weight the best of base, parents and uniform merge" in lines["starts"]
    assert lines["generations"] == "3"
    assert lines["metrics"] == "base_qa acc, cross_math_b acc"
    assert not {"constraints", "report", "equivalents", "steps"} & lines.keys()
    assert all(value.strip() not in ("", "None", "[]") for value in lines.values())


def test_check_warns_of_a_budget_of_few_generations(
    search_file: WriteSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = search_file(optimizer={"name": "cma_es", "evaluations": 20, "population": 10})
    evomerge("check", few)
    assert "the budget of 20 candidates is 2 generations of 10" in capsys.readouterr().err
    evomerge("check", few, "--set", "optimizer.evaluations=60")
    assert "generations of 10" not in capsys.readouterr().err
