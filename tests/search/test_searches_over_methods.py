"""Searches over methods that mergekit has not: interrupted, resumed, exported, merged to the scored fingerprint."""

import json
from pathlib import Path

import pytest

from evomerge.events import Evaluated, Event
from evomerge.runs import directory as runs
from tests.commands import content, evomerge
from tests.searches import WriteSearch
from tests.stopping import Stop

pytestmark = pytest.mark.slow  # searches from end to end
METHODS = ["dare_ties", "localize_and_stitch", "consensus", "wudi", "tsv", "iso", "knots", "ace", "regmean"]
SEED = 523  # with which each of the nine candidates has another method


def test_a_search_over_methods_with_and_without_data_is_resumed_exported_and_merged(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    path = search_file(
        objectives=[{"task": "base_qa"}],
        items={"search": 8, "heldout": 8},
        space={"method": METHODS, "participate": True, "parameters": {"consensus": {"threshold": {}, "agree": {}}}},
        statistics={"items": 4},
        optimizer={"name": "random_search", "evaluations": 9},
        seed=SEED,
    )
    whole, cut, count = tmp_path / "whole", tmp_path / "cut", 0

    def stop_midway(event: Event) -> None:
        nonlocal count
        count += isinstance(event, Evaluated)
        if count == 8:
            raise Stop

    evomerge("run", path, "--output", whole)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stop_midway)
    evomerge("resume", cut)
    assert content(cut) == content(whole)
    rows = content(whole)[0]
    assert all(row["state"] == "done" for row in rows)
    found = {row["genes"]["method"]: row for row in rows if row["genome"]}
    assert {*found} == {*METHODS}
    for name, row in found.items():
        recipe = tmp_path / f"{name}.yaml"
        evomerge("export", whole, "--candidate", row["id"], "-o", recipe)
        assert row["fingerprint"] in evomerge("merge", recipe, tmp_path / name), name
    again = json.loads(evomerge("evaluate", tmp_path / "regmean.yaml", "--config", path, "--json"))
    row = found["regmean"]
    assert (again["scores"], again["fingerprint"]) == (row["scores"], row["fingerprint"])
