"""What a run holds as values: genes by name, and held-out scores or the reason why there are none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.reports import terminal
from evomerge.runs import directory as runs
from tests import commands
from tests.commands import evomerge
from tests.conftest import REPOSITORY
from tests.searches import WriteSearch

DATA = REPOSITORY / "tests" / "data" / "format_1"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "run", tmp_path / "run"))


def rows(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in json.loads(evomerge("candidates", directory, "--json"))}


def test_every_gene_has_a_name_and_the_value_that_the_genome_has(directory: Path) -> None:
    run = runs.read(directory)
    for row in rows(directory).values():
        if row["genome"] is None:
            assert row["genes"] is None
            continue
        assert row["genes"] == dict(zip((gene.name for gene in run.prepared.space.genes), row["genome"], strict=True))


def test_choices_are_named_and_genes_that_do_not_count_are_left_out(search_file: WriteSearch, tmp_path: Path) -> None:
    space = {"method": ["ties", "task_arithmetic"], "participate": True}
    evomerge("run", search_file(space=space, optimizer={"evaluations": 8}), "--output", tmp_path / "run")
    searched = [row for row in rows(tmp_path / "run").values() if row["kind"] == "search"]
    for row in searched:
        genes = row["genes"]
        assert genes["method"] in ("ties", "task_arithmetic")
        assert {genes["take:math"], genes["take:lang"]} <= {"in", "out"}
        for name in genes:
            assert not name.startswith("density") or genes["method"] == "ties"
            assert "math" not in name or name == "take:math" or genes["take:math"] == "in"


def test_every_row_has_held_out_scores_or_says_why_not(directory: Path) -> None:
    found = rows(directory)
    assert all((row["heldout"] is None) == (row["heldout_missing"] is not None) for row in found.values())
    assert found["g0000-07"]["heldout"] is not None
    reasons = {row["heldout_missing"] for row in found.values()} - {None}
    assert {"failed", "not on the front"} <= reasons
    assert all(row["heldout_missing"] == "failed" for row in found.values() if row["error"])


def test_failures_are_counted_by_their_reasons_in_the_status(directory: Path) -> None:
    status = json.loads(evomerge("status", directory, "--json"))
    assert sum(status["failures"].values()) == status["failed"] == 8
    printed = evomerge("status", directory)
    for reason, count in status["failures"].items():
        assert f"{count} failed: {reason}" in printed


@pytest.mark.slow
def test_what_is_only_reported_stands_beside_the_held_out_scores_and_changes_nothing_else(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    few = {"optimizer": {"evaluations": 4, "population": 4}, "items": {"search": 24, "selection": 12, "heldout": 24}}
    plain, beside = tmp_path / "plain", tmp_path / "beside"
    evomerge("run", search_file(**few), "--output", plain)
    search = search_file(**few, report=[{"task": "math_a_words"}])
    printed = evomerge("run", search, "--output", beside)
    assert "only reported, so neither searched on nor in the mean: math_a_words" in printed
    known = rows(beside)
    scores = {name: row["heldout"].pop("math_a_words") for name, row in known.items() if row["heldout"]}
    assert known == rows(plain)
    assert scores["parent-math"] > 0.9 > 0.1 > scores["base"]
    (header,) = [line for line in printed.splitlines() if "math_a_words ┃" in line]
    assert header.index("mean") < header.index("math_a_words")
    (row,) = [line for line in printed.splitlines() if "parent math" in line]
    assert row.split("│")[-2].strip() == terminal.number(scores["parent-math"])
    again = json.loads(evomerge("evaluate", "zoo:math", "--config", search, "--split", "heldout", "--json"))
    assert again["scores"]["math_a_words"] == scores["parent-math"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("command", ["candidates", "front", "status"])
def test_no_table_is_wider_than_the_terminal_and_none_cuts_a_number_or_an_id(
    command: str, width: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    printed = evomerge(command, directory)
    lines = [line for line in printed.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines).replace("in …", "")
    run = runs.read(directory)
    shown = commands.front(run.archive, run.config)
    if command == "front":
        for row in shown:
            assert row["id"] in printed
            for score in row["scores"].values():
                assert terminal.number(score) in printed
