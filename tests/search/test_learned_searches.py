"""Searches that follow gradients on the zoo, from the command to the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.events import unheard
from evomerge.runs import directory as runs
from tests.commands import content, evomerge
from tests.searches import WriteSearch
from tests.stopping import Stop, stopper

OBJECTIVES = [{"task": "base_qa"}, {"task": "cross_math_b"}]
LEARNING = {"steps": 6, "every": 3, "share": 0.25, "shards": 2}
STAGES = [{"name": "learned", "genes": ["weight"]}, {"name": "group_evolution", "genes": ["weight"]}]
SEARCH: dict[str, Any] = {
    "objectives": OBJECTIVES,
    "items": {"search": 24, "heldout": 24},
    "space": {"layer_granularity": 6, "density": {"fixed": 1.0}, "tensor_weights": True},
    "optimizer": {"evaluations": 12, "population": 4, "learning": LEARNING, "stages": STAGES},
}


def gradients(directory: Path) -> list[Any]:
    """What the archive has of gradients, but for times."""
    return [
        (record.step, record.shard, record.genome, record.losses, record.slopes.tobytes(), record.fingerprint)
        for record in runs.read(directory).archive.gradients()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["entropy", "activations"])
def test_without_labels_the_loss_falls_and_a_killed_search_takes_the_same_path(
    search_file: WriteSearch, tmp_path: Path, loss: str
) -> None:
    optimizer = SEARCH["optimizer"] | {"learning": LEARNING | {"loss": loss}}
    path, whole, cut = search_file(**SEARCH | {"optimizer": optimizer}), tmp_path / "whole", tmp_path / "cut"
    evomerge("run", path, "--output", whole)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stopper(4 + 3))
    evomerge("resume", cut)
    assert gradients(cut) == gradients(whole)
    assert content(cut) == content(whole)
    first, *_, last = (sum(sum(row[3].values()) for row in gradients(whole) if row[0] == step) for step in range(1, 7))
    assert last < first


@pytest.mark.slow
def test_a_search_along_gradients_is_interrupted_resumed_shown_exported_and_merged(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    path, whole, cut = search_file(**SEARCH), tmp_path / "whole", tmp_path / "cut"
    evomerge("run", path, "--output", whole)
    with pytest.raises(Stop):
        runs.start(path, cut, (), None, stopper(4 + 3))  # within the steps
    with pytest.raises(Stop):
        runs.resume(cut, (), None, stopper(6))  # among the candidates after them
    evomerge("resume", cut)
    assert content(cut) == content(whole)
    assert gradients(cut) == gradients(whole)
    assert len(gradients(whole)) == 6 * 2
    first, *_, last = (sum(sum(row[3].values()) for row in gradients(whole) if row[0] == step) for step in range(1, 7))
    assert last < first
    rows = {row["id"]: row for row in json.loads(evomerge("candidates", whole, "--json"))}
    status = json.loads(evomerge("status", whole, "--json"))
    assert (status["state"], status["failed"]) == ("finished", 0)
    assert {"l0003", "l0006"} <= rows.keys()
    assert json.loads(evomerge("front", whole, "--json"))
    recipe, merged = tmp_path / "recipe.yaml", tmp_path / "merged"
    evomerge("export", whole, "--candidate", "l0006", "-o", recipe)
    assert rows["l0006"]["fingerprint"] in evomerge("merge", recipe, merged)
    scored = json.loads(evomerge("evaluate", merged, "--config", path, "--json"))
    assert (scored["scores"], scored["fingerprint"]) == (rows["l0006"]["scores"], rows["l0006"]["fingerprint"])


@pytest.mark.ray
@pytest.mark.slow
def test_one_worker_and_two_that_share_each_step_leave_the_same_archive(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    learning = LEARNING | {"loss": "activations"}  # for which workers read what others have measured
    read_before = 3  # passes over all items: of the base and of two models
    optimizer = SEARCH["optimizer"] | {"learning": learning, "evaluations": 12 + 2 * read_before}
    path = search_file(**SEARCH | {"optimizer": optimizer, "workers": {"pool": "ray", "num_cpus": 0.5}})
    for count in (1, 2):
        runs.start(path, tmp_path / f"{count}", (f"workers.count={count}",), None, unheard)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert gradients(tmp_path / "1") == gradients(tmp_path / "2")
    assert len(gradients(tmp_path / "1")) == 6 * 2
