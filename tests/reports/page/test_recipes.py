"""Pictures of recipes show what the genomes say."""

from pathlib import Path as File

import numpy as np
import pytest

from evomerge.recipe import linear
from evomerge.reports.page.recipes import Grid, kind_of, picture, place_of, spread
from evomerge.runs import directory as runs
from evomerge.spaces.data_flow import DataFlowSpace
from evomerge.spaces.hybrid import HybridSpace
from tests.reports.page.conftest import Run


def test_every_weight_of_a_tensor_stands_in_its_row_and_column(zoo_run: File) -> None:
    run = runs.read(zoo_run)
    record = run.results.best()
    assert record is not None
    genes = run.archive.genes(record.candidate) or {}
    grid = picture(record.candidate.recipe, run.config, run.prepared.models).grids["weight"]
    seen = 0
    for name, value in genes.items():
        kind, model, *tensor = name.split(":")
        if kind != "weight" or not tensor or "layers." not in tensor[0]:
            continue
        row, column = grid.rows.index((model, kind_of(tensor[0]))), grid.columns.index(place_of(tensor[0]))
        assert grid.values[row][column] == pytest.approx(value)
        seen += 1
    assert seen == 2 * 9 * 6
    assert grid.columns == ("embeddings", "0", "1", "2", "3", "4", "5", "head")


def test_a_model_with_one_weight_everywhere_has_one_row(finished: File) -> None:
    run = runs.read(finished)
    weights = {reference: 0.25 + index for index, reference in enumerate(run.config.models.values())}
    grid = picture(linear(weights), run.config, run.prepared.models).grids["weight"]
    assert grid.rows == (("first", "all tensors"), ("second", "all tensors"))
    assert {value for row in grid.values for value in row} == {0.25, 1.25}


def test_a_method_without_weights_shows_what_its_models_share(tiny_run: Run) -> None:
    run = runs.read(tiny_run(space={"method": "slerp"}))
    shown = [picture(record.candidate.recipe, run.config, run.prepared.models) for record in run.results.front()]
    slerped = [one for one in shown if one.method == "slerp"]
    assert slerped
    for one in slerped:
        assert {owner for owner, _ in one.grids["t"].rows} == {"all models"}


def test_the_path_of_a_recipe_is_that_of_its_genome(tiny_run: Run) -> None:
    space = {"kind": "data_flow", "sources": ["first", "second", "base"], "embeddings": "free", "head": "free"}
    scaled = space | {"scale": {"low": 0.5, "high": 1.5, "step": 0.3}}
    run = runs.read(tiny_run(space=scaled))
    assert isinstance(run.prepared.space, DataFlowSpace)
    seen = 0
    for record in run.archive.records():
        if record.candidate.genome is None:
            continue
        path = run.prepared.space.path(np.array(record.candidate.genome))
        shown = picture(record.candidate.recipe, run.config, run.prepared.models).path
        assert shown is not None
        assert [(stop.lane, stop.layer) for stop in shown.stops] == [(hop.model, hop.layer) for hop in path.hops]
        assert [stop.scale for stop in shown.stops] == pytest.approx([hop.scale for hop in path.hops])
        assert (shown.embeddings, shown.head) == (path.embeddings, path.head)
        seen += 1
    assert seen


def test_the_path_of_a_hybrid_has_a_lane_for_merged_layers(tiny_run: Run) -> None:
    space = {
        "kind": "hybrid",
        "parameter": {"method": "task_arithmetic", "layer_granularity": 2},
        "path": {"sources": ["second", "base"], "granularity": 1, "max_layers": 6},
    }
    run = runs.read(tiny_run(space=space, optimizer={"evaluations": 12, "population": 4}))
    decoder = run.prepared.space
    assert isinstance(decoder, HybridSpace)
    lanes = set()
    for record in run.archive.records():
        if record.candidate.genome is None:
            continue
        hops = decoder._flow.path(np.array(record.candidate.genome[decoder._cut :])).hops
        shown = picture(record.candidate.recipe, run.config, run.prepared.models)
        assert shown.path is not None
        assert [(stop.lane, stop.layer) for stop in shown.path.stops] == [(hop.model, hop.layer) for hop in hops]
        lanes |= {stop.lane for stop in shown.path.stops}
    assert "merge" in lanes
    assert lanes > {"merge"}


def test_the_spread_is_that_of_numpy() -> None:
    columns = ("embeddings", "0", "head")
    first = Grid((("math", "all tensors"),), columns, ((1.0, 2.0, None),))
    second = Grid((("math", "q_proj"), ("math", "k_proj")), columns, ((3.0, 4.0, 1.0), (5.0, 0.0, 1.0)))
    mean, deviation = spread([first, second])
    assert mean.rows == (("math", "q_proj"), ("math", "k_proj"))
    assert mean.values == ((2.0, 3.0, 1.0), (3.0, 1.0, 1.0))
    assert deviation.values[1][:2] == (np.std([1.0, 5.0]), np.std([2.0, 0.0]))


@pytest.mark.parametrize(
    ("tensor", "place", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "12", "self_attn.q_proj"),
        ("transformer.h.3.mlp.c_proj.bias", "3", "mlp.c_proj.bias"),
        ("model.embed_tokens.weight", "embeddings", ""),
        ("lm_head.weight", "head", ""),
        ("model.norm.weight", "head", ""),
    ],
)
def test_a_tensor_has_a_place_and_a_kind(tensor: str, place: str, kind: str) -> None:
    assert (place_of(tensor), kind_of(tensor)) == (place, kind)
