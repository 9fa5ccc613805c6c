"""What programs and notebooks find in a run is what the commands find."""

import json
from pathlib import Path

import pytest

import evomerge
from evomerge.errors import InputError
from evomerge.events import Evaluated, Event, Finished, SearchStarts
from evomerge.library import notebook
from evomerge.merging.naming import named_weights
from evomerge.merging.resident.models import fingerprint
from tests.commands import evomerge as command
from tests.searches import small_search

BUDGET = {"evaluations": 12, "population": 4}


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> evomerge.Run:
    output = tmp_path_factory.mktemp("runs") / "<b>run</b>"
    return evomerge.search(small_search(optimizer=BUDGET), output=output, callbacks=[events.append])


def test_a_callback_sees_every_event_with_its_type(run: evomerge.Run, events: list[Event]) -> None:
    searched = [event for event in events if isinstance(event, Evaluated) and event.study == "search"]
    assert len(searched) == len(run.candidates)
    assert any(isinstance(event, SearchStarts) for event in events)
    assert isinstance(events[-1], Finished)


def test_a_run_holds_what_the_commands_print(run: evomerge.Run) -> None:
    printed = {row["id"]: row for row in json.loads(command("candidates", run.directory, "--json"))}
    table = run.candidates
    assert list(table.index) == list(printed)
    for id, row in printed.items():
        assert table.loc[id, "search.base_qa"] == row["scores"]["base_qa"]
        assert table.loc[id, "fingerprint"] == row["fingerprint"]
    assert [one.id for one in run.front] == [row["id"] for row in json.loads(command("front", run.directory, "--json"))]
    status = json.loads(command("status", run.directory, "--json"))
    assert (run.state, run.best.id if run.best else None) == ("finished", status["best"]["id"])


def test_the_best_model_has_the_weights_that_were_scored(run: evomerge.Run) -> None:
    best = run.best
    assert best is not None
    model = best.load()
    assert fingerprint(named_weights(model)) == best.fingerprint
    assert best.recipe.evomerge.fingerprint == best.fingerprint


def test_weights_stand_by_layer_and_model(run: evomerge.Run) -> None:
    best = run.best
    assert best is not None
    assert best.genes is not None
    weights = best.weights()
    assert list(weights.columns) == ["math", "lang"]
    assert weights.loc["2", "math"] == pytest.approx(best.genes["weight:math:layers_2-3"])
    assert weights.loc["head", "lang"] == pytest.approx(best.genes["weight:lang:head"])
    with pytest.raises(InputError, match=r"has no wieght; did you mean 'weight'"):
        best.weights("wieght")
    with pytest.raises(InputError, match="leaves the layers where they are"):
        best.path()


def test_the_mean_of_the_items_is_the_score(run: evomerge.Run) -> None:
    best = run.best
    assert best is not None
    assert best.heldout is not None
    items = run.items(best.id, text=True)
    for name, score in best.heldout.items():
        assert items[items.metric == name].value.mean() == pytest.approx(score)
    assert items.question.str.len().min() > 0
    with pytest.raises(InputError, match="has no scores on selection items"):
        run.items(best.id, "selection")


def test_a_stopped_search_goes_on_to_the_archive_that_it_would_have_had(run: evomerge.Run, tmp_path: Path) -> None:
    seen = []

    def stop(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Evaluated) and event.candidate.kind == "search":
            raise evomerge.StopSearch

    stopped = evomerge.search(small_search(optimizer=BUDGET), output=tmp_path / "run", callbacks=[stop])
    assert stopped.state == "interrupted"
    assert 0 < len(stopped.candidates) < len(run.candidates)
    done = stopped.resume()
    assert done.state == "finished"
    assert done.candidates.equals(run.candidates)


def test_the_same_call_again_returns_the_run_that_is_there(run: evomerge.Run) -> None:
    again = evomerge.search(small_search(optimizer=BUDGET), output=run.directory)
    assert again.candidates.equals(run.candidates)
    with pytest.raises(InputError, match="already holds another search"):
        evomerge.search(small_search(optimizer=BUDGET, seed=7), output=run.directory)


def test_objectives_and_settings_take_the_place_of_the_file_s(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^the search: optimizer.evaluatoins is not a known key"):
        evomerge.search(small_search(), output=tmp_path / "run", settings={"optimizer.evaluatoins": 3})
    with pytest.raises(InputError, match=r"^the search: objectives\[0\]\.task is 'bse_qa'.*did you mean 'base_qa'"):
        evomerge.search(small_search(), output=tmp_path / "run", objectives=[{"task": "bse_qa"}])
    assert not (tmp_path / "run").exists()


def test_what_a_notebook_shows_is_text(run: evomerge.Run) -> None:
    best = run.best
    assert best is not None
    shown = run._repr_html_() + best._repr_html_() + notebook.progress_html(run._opened, True)
    assert "<b>run</b>" not in shown
    assert best.id in shown
    assert "<progress" in shown


def test_the_page_lies_beside_the_run(run: evomerge.Run) -> None:
    assert run.report().read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_candidate_that_was_only_screened_is_found_and_loads_unquantized(tmp_path: Path) -> None:
    search = small_search(optimizer={"evaluations": 24, "population": 8}, evaluation={"quantize": "int8"})
    run = evomerge.search(search, output=tmp_path / "run")
    screened = [id for id, row in run.candidates.iterrows() if row["subset"] is None and row["kind"] == "search"]
    finalists = {candidate.id for candidate in run._opened.results.finalists()}
    only = next(id for id in screened if id not in finalists)
    candidate = run.candidate(only)
    assert candidate.scores is not None
    assert fingerprint(named_weights(candidate.load())) == candidate.fingerprint
    with pytest.raises(InputError, match="no such candidate"):
        run.candidate("g9999-99")


def test_a_page_may_show_the_winner_without_its_parts(run_directory: Path) -> None:
    assert "which are not counted as the search" in evomerge.open_run(run_directory).report(ablate=True).read_text()
    assert "which are not counted as the search" in evomerge.open_run(run_directory).report().read_text()
