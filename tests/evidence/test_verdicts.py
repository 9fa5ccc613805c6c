"""What is said of a winner that is better, worse or neither; and of a search in which nobody could be scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import evomerge
from tests.searches import WriteSearch


@pytest.fixture
def worse(search_file: WriteSearch) -> Path:
    """A search among weights far too large."""
    weight = {"low": 4, "high": 5, "start": 4.5, "step": 0.1}
    return search_file(
        objectives=[{"task": "math_a"}, {"task": "lang_b"}],
        items={"search": 12, "heldout": 40},
        space={"method": "task_arithmetic", "weight": weight},
        optimizer={"name": "cma_es", "evaluations": 4, "population": 4},
    )


@pytest.fixture
def failing(search_file: WriteSearch) -> Callable[..., Path]:
    """A search among weights that no float holds."""
    weight = {"low": 1e37, "high": 1e38, "start": 5e37, "step": 1e36}

    def write(**changes: Any) -> Path:
        return search_file(
            objectives=[{"task": "math_a"}],
            items={"search": 10, "heldout": 10},
            space={"method": "task_arithmetic", "weight": weight},
            **{"optimizer": {"name": "cma_es", "evaluations": 4, "population": 4}} | changes,
        )

    return write


def test_the_run_the_front_the_export_and_the_card_say_that_a_winner_is_worse(
    worse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = [evomerge("run", worse, "--output", tmp_path / "run"), evomerge("front", tmp_path / "run")]
    evomerge("export", tmp_path / "run", "-o", tmp_path / "recipe.yaml")
    warned = capsys.readouterr().err
    evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    says = "worse than parent-lang on held-out items: -0."
    assert f"warning: {says}" in warned
    assert "not distinguishable" not in warned
    for text in (*printed, (tmp_path / "merged" / "README.md").read_text()):
        assert says in text
    (row,) = json.loads(evomerge("status", tmp_path / "run", "--json"))["evidence"]["against"]
    assert (row["verdict"], row["distinguishable"]) == ("worse", False)
    assert row["interval"][1] < 0


def test_a_search_whose_every_candidate_failed_ends_with_1_and_the_commonest_reasons(
    failing: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    evomerge("run", failing(), "--output", run, status=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("evomerge: all 4 candidates failed (")
    assert " x " in error
    evomerge("resume", run, status=1)
    status = json.loads(evomerge("status", run, "--json"))
    assert sum(status["failures"].values()) == 4


def test_of_a_search_whose_every_candidate_failed_a_control_is_exported_only_by_its_name(
    failing: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    evomerge("run", failing(), "--output", run, status=1)
    evomerge("export", run, "-o", recipe, status=1)
    assert "candidates failed" in capsys.readouterr().err
    assert not recipe.exists()
    evomerge("export", run, "--candidate", "parent-lang", "-o", recipe)
    assert "parent-lang is a control, a model unchanged" in capsys.readouterr().err
    assert recipe.exists()


def test_one_candidate_that_can_be_scored_is_enough(search_file: WriteSearch, tmp_path: Path) -> None:
    search = search_file(optimizer={"evaluations": 4, "population": 4})
    evomerge("run", search, "--output", tmp_path / "run")
    evomerge("export", tmp_path / "run", "--candidate", "uniform", "-o", tmp_path / "recipe.yaml")
