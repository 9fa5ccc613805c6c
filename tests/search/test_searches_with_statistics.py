"""Searches over methods that need statistics: measured once, resumed, exported, merged to the scored fingerprint."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.events import Event, StatisticsMeasured
from evomerge.runs import directory as runs
from tests.bad_input import Refuses
from tests.commands import content, evomerge
from tests.searches import WriteSearch
from tests.stopping import Stop, stopper

METHODS = ["dare_ties", "regmean", "fisher", "gradient_matching"]
SEED = 3


def written(search_file: WriteSearch, **changes: Any) -> Path:
    return search_file(
        objectives=[{"task": "base_qa"}, {"task": "cross_math_b"}],
        statistics={"tasks": {"math": ["cross_math_b"], "lang": ["base_qa"]}, "items": 4},
        items={"search": 8, "heldout": 8},
        **{"optimizer": {"name": "random_search", "evaluations": 6}, "seed": SEED, **changes},
    )


@pytest.mark.slow
def test_a_search_with_statistics_is_resumed_exported_and_merged(search_file: WriteSearch, tmp_path: Path) -> None:
    path = written(search_file, space={"method": METHODS, "post": {"aim": {"omega": {"low": 0.2}}}})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    heard: list[Event] = []
    evomerge("run", path, "--output", whole)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stopper(5, heard))
    assert (
        sum(isinstance(event, StatisticsMeasured) for event in heard) == 6
    )  # grams of two models, Fisher information of three, activations of the base
    kept = {file: file.stat().st_mtime_ns for file in (cut / "statistics").rglob("*")}
    evomerge("resume", cut)
    assert {file: file.stat().st_mtime_ns for file in (cut / "statistics").rglob("*")} == kept
    assert content(cut) == content(whole)
    names = sorted(path.name for path in (cut / "statistics").iterdir())
    assert names == sorted(path.name for path in (whole / "statistics").iterdir())
    found = {row["genes"]["method"]: row for row in content(whole)[0] if row["genome"]}
    assert len(found) >= 3
    for number, (name, row) in enumerate(found.items()):
        assert row["state"] == "done"
        recipe = tmp_path / f"{number}.yaml"
        evomerge("export", whole, "--candidate", row["id"], "-o", recipe)
        assert yaml.safe_load(recipe.read_text())["merge_method"] == name
        assert name.endswith("+aim")
        assert row["fingerprint"] in evomerge("merge", recipe, tmp_path / f"merged{number}"), name


@pytest.mark.slow
def test_what_was_measured_by_hand_serves_runs_and_recipes(
    search_file: WriteSearch, tmp_path: Path, refuses: Refuses
) -> None:
    path, folder = written(search_file, space={"method": "regmean"}), tmp_path / "run" / "statistics"
    recipe = tmp_path / "recipe.yaml"
    sources = [{"model": f"zoo:{name}", "parameters": {"weight": 1.0}} for name in ("math", "lang")]
    recipe.write_text(yaml.safe_dump({"merge_method": "regmean", "base_model": "zoo:base", "models": sources}))
    refuses("merge", recipe, "out", says=(f"evomerge: {recipe}: the merge needs the Gram matrices", "evomerge measure"))
    refuses("measure", path, "--kind", "gram", says=("--kind is gram; did you mean 'grams'",))
    evomerge("measure", path, "-o", folder)
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    fingerprint = evomerge("merge", recipe, tmp_path / "merged", "--statistics", folder).split()[2]
    evomerge("run", path, "--output", tmp_path / "run", "--set", "optimizer.evaluations=1")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == kept
    told = evomerge("merge", recipe, tmp_path / "again", "--statistics", folder)
    assert fingerprint in told
