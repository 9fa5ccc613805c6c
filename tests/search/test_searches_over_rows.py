"""Searches that weigh rows: learned once, resumed, exported, merged to the scored fingerprint."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.config.files import load
from evomerge.events import Event, StatisticsMeasured, unheard
from evomerge.library.runs import open_run
from evomerge.merging.sources.statistics import read
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.optimizers.make import passes_for_rows
from evomerge.reports.page.course import costs, course
from evomerge.runs import directory as runs
from evomerge.search.controls import further_controls
from evomerge.search.preparation import reopen
from tests.bad_input import Refuses
from tests.commands import content, evomerge
from tests.searches import WriteSearch, small_search
from tests.stopping import Stop, stopper

SEARCH: dict[str, Any] = {
    "objectives": [{"task": "base_qa"}, {"task": "cross_math_b"}],
    "items": {"search": 24, "heldout": 24},
    "space": {"layer_granularity": 6, "rows": {"steps": 5, "share": 0.5}},
    "optimizer": {"name": "group_evolution", "evaluations": 16},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished search."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "search.yaml").write_text(yaml.safe_dump(small_search(**SEARCH)))
    evomerge("run", folder / "search.yaml", "--output", folder / "whole")
    return folder / "whole"


def test_a_killed_search_over_rows_learns_them_once_and_leaves_the_same_archive(
    whole: Path, search_file: WriteSearch, tmp_path: Path
) -> None:
    cut, heard = tmp_path / "cut", list[Event]()
    with pytest.raises(Stop):
        runs.start(search_file(**SEARCH), cut, (), None, stopper(6, heard))
    assert [event.kind for event in heard if isinstance(event, StatisticsMeasured)] == ["row_weights"]  # of both models
    kept = {file: file.stat().st_mtime_ns for file in (cut / "statistics").rglob("*")}
    evomerge("resume", cut)
    assert {file: file.stat().st_mtime_ns for file in (cut / "statistics").rglob("*")} == kept
    assert content(cut) == content(whole)
    assert [path.name for path in (cut / "statistics").iterdir()] == [
        path.name for path in (whole / "statistics").iterdir()
    ]


def test_what_is_exported_merges_to_what_was_scored(whole: Path, tmp_path: Path, search_file: WriteSearch) -> None:
    row = next(row for row in content(whole)[0] if row["genome"] and row["state"] == "done")
    recipe, merged = tmp_path / "recipe.yaml", tmp_path / "merged"
    evomerge("export", whole, "--candidate", row["id"], "-o", recipe)
    assert yaml.safe_load(recipe.read_text())["merge_method"] == "dare_ties+rows"
    assert row["fingerprint"] in evomerge("merge", recipe, merged)


def test_every_row_of_a_layer_has_a_weight_and_every_other_tensor_one(whole: Path) -> None:
    (folder,) = (whole / "statistics").iterdir()
    stored = read(folder)
    weights = {name: stored.weights.read(name) for name in stored.weights.table}
    assert weights["0:model.layers.0.mlp.gate_proj.weight"].shape == (160,)
    assert weights["1:model.layers.5.mlp.down_proj.weight"].shape == (64,)
    for single in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.input_layernorm.weight"):
        assert weights[f"0:{single}"].shape == (1,)
    assert all(bool(((own >= 0) & (own <= 1.5)).all()) for own in weights.values())
    assert float(torch.cat(list(weights.values())).std()) > 0.05
    assert len(stored.notes.models) == 2


def test_weights_of_models_start_at_1_and_the_budget_counts_what_rows_cost(whole: Path) -> None:
    run = runs.read(whole)
    assert passes_for_rows(run.config) == 0.5 * (4 + 3 * 5)
    searched = [record for record in run.archive.records() if record.candidate.kind == "search"]
    assert len(searched) == int(16 - passes_for_rows(run.config))  # no more than fit whole
    assert run.results.equivalents == costs(run.results).searched.passes == 15.5
    found = course(run.results).points
    assert [point.spent.passes for point in found] == [10.5, 11.5, 12.5, 13.5, 14.5, 15.5]
    space = reopen(run.config).space
    assert {gene.start for gene in space.genes if gene.kind == "weight"} == {1.0}
    weights = np.array([gene.kind == "weight" for gene in space.genes])
    first = np.array(searched[0].candidate.genome)[weights]
    assert np.count_nonzero(first == 1) >= len(first) - 2  # one group of one child has moved


def test_weights_that_have_changed_are_not_used_by_a_resumed_search(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoiled = Path(shutil.copytree(whole, tmp_path / "spoiled"))
    (folder,) = (spoiled / "statistics").iterdir()
    (spoiled / "statistics" / ".row_weights-killed").mkdir()
    save_file({name: 0 * own for name, own in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    evomerge("resume", spoiled, "--set", "optimizer.evaluations=17", status=2)
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"evomerge: {folder}: its values have changed")
    assert error.endswith("restore the files, or remove the folder, and give the command again, which measures it.")
    assert content(spoiled) == content(whole)
    assert [path.name for path in (spoiled / "statistics").iterdir()] == [folder.name]  # what the kill left is gone


def test_an_export_warns_where_the_weights_are_gone(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoiled = Path(shutil.copytree(whole, tmp_path / "spoiled"))
    (folder,) = (spoiled / "statistics").iterdir()
    row = next(row for row in content(whole)[0] if row["genome"] and row["state"] == "done")
    for gone in (False, True):
        if gone:
            shutil.rmtree(folder)
        evomerge("export", spoiled, "--candidate", row["id"], "-o", tmp_path / "recipe.yaml")
        told = " ".join(capfd.readouterr().err.split())
        assert (f"the recipe needs {folder.name}, which" in told) == gone
        with pytest.warns(UserWarning, match=f"^the recipe needs {folder.name}") if gone else nullcontext():
            open_run(spoiled).candidate(row["id"]).export(tmp_path / "recipe.yaml")


def test_random_search_leaves_rows_as_they_are(search_file: WriteSearch) -> None:
    prepared = reopen(load(search_file(**SEARCH, controls={"random_search": True})))
    drawn = further_controls(prepared.config, prepared.space)
    assert {candidate.recipe.merge_method for candidate in drawn} == {"dare_ties"}
    assert {candidate.genome for candidate in drawn} == {None}


@pytest.mark.slow
def test_rows_that_were_weighted_by_hand_serve_a_recipe(
    whole: Path, search_file: WriteSearch, tmp_path: Path, refuses: Refuses
) -> None:
    path, folder, recipe = search_file(**SEARCH), tmp_path / "by hand", tmp_path / "recipe.yaml"
    evomerge("measure", path, "-o", folder, "--kind", "row_weights")
    assert [own.name for own in folder.iterdir()] == [own.name for own in (whole / "statistics").iterdir()]
    row = next(row for row in content(whole)[0] if row["genome"] and row["state"] == "done")
    evomerge("export", whole, "--candidate", row["id"], "-o", recipe)
    document = yaml.safe_load(recipe.read_text())
    del document["evomerge"]["statistics"]
    recipe.write_text(yaml.safe_dump(document))
    merged = evomerge("merge", recipe, tmp_path / "merged", "--statistics", folder)
    assert row["fingerprint"] in merged
    without = search_file(**SEARCH | {"space": {"method": "ties"}, "evaluation": {"quantize": "int8"}})
    refuses("measure", without, "--kind", "row_weights", says=("weights of rows follow gradients", "int8"))


def test_an_asynchronous_search_counts_what_rows_cost_too(search_file: WriteSearch, tmp_path: Path) -> None:
    path = search_file(**SEARCH | {"optimizer": {"name": "random_search", "evaluations": 14, "schedule": "async"}})
    evomerge("run", path, "--output", tmp_path / "run")
    run = runs.read(tmp_path / "run")
    assert run.results.equivalents == 13.5
    assert sum(record.candidate.kind == "search" for record in run.archive.records()) == 4


def test_check_says_what_rows_cost_in_passes_and_in_memory(search_file: WriteSearch) -> None:
    plans = {}
    for name, rows in (("with", SEARCH["space"]["rows"]), ("without", False)):
        path = search_file(f"{name}.yaml", **SEARCH | {"space": SEARCH["space"] | {"rows": rows}})
        plans[name] = json.loads(evomerge("check", path, "--json"))
    assert plans["with"]["rows"] == {"steps": 5, "forward passes": 9.5}
    assert "rows" not in plans["without"] or not plans["without"]["rows"]
    candidate = {name: plan["gib_per_worker"]["candidate"] for name, plan in plans.items()}
    assert candidate["with"] > candidate["without"]  # for the pass back


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_leave_the_archive_of_one(whole: Path, search_file: WriteSearch, tmp_path: Path) -> None:
    path = search_file(**SEARCH, workers={"pool": "ray", "num_cpus": 0.5})
    runs.start(path, tmp_path / "two", ("workers.count=2",), None, unheard)
    assert content(tmp_path / "two") == content(whole)


@pytest.mark.slow
def test_gradients_may_follow_weights_of_tensors_behind_those_of_rows(search_file: WriteSearch, tmp_path: Path) -> None:
    optimizer = {"name": "auto", "evaluations": 40, "learning": {"steps": 10, "every": 5}}
    path = search_file(**SEARCH | {"optimizer": optimizer})
    evomerge("run", path, "--output", tmp_path / "run")
    run = runs.read(tmp_path / "run")
    assert run.config.optimizer.follows_gradients
    assert {record.step for record in run.archive.gradients()} == set(range(1, 11))
    assert run.results.equivalents <= 40
    start = run.archive.find("l0000", "search")  # no control lies where rows are weighted
    assert start is not None
    genes = zip(reopen(run.config).space.genes, start.candidate.genome or (), strict=True)
    assert {value for gene, value in genes if gene.kind == "weight"} == {1.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": {"evaluations": 10}}, ("space.rows costs 9.5 forward passes", "space.rows.steps")),
        ({"evaluation": {"quantize": "int8"}}, ("space.rows asks", "evaluation.quantize is int8")),
        ({"optimizer": {"learning": {"loss": "activations"}}}, ("space.rows asks", "compares whole models")),
        ({"space": {"method": "linear", "rows": True}}, ("'linear+rows'", "linear sets no base apart")),
        ({"space": {"rows": {"steps": 0}}}, ("space.rows.steps",)),
        ({"space": {"rows": {"step": 5}}}, ("space.rows.step", "did you mean 'steps'")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rows_that_cannot_be_learned_are_refused(
    changes: dict[str, Any], says: tuple[str, ...], search_file: WriteSearch, refuses: Refuses
) -> None:
    refuses("check", search_file(**SEARCH | changes), says=says)
