"""Memory: bytes are counted as long as tensors live, and a rehearsal on the meta device holds what a worker would."""

import math
import os
import re
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge.config.search import SearchConfig
from evomerge.devices import device_count
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import checksum, uniform_field
from evomerge.merging.methods.passes import ROOM
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.rehearsal import RehearsedModels
from evomerge.recipe import Recipe, Source
from evomerge.search.preparation import prepare_file
from evomerge.workers.memory import (
    LiveBytes,
    Placement,
    SearchPlan,
    make_worker,
    plan_memory,
    plan_placements,
    shortage,
    with_choice,
)
from tests.conftest import REPOSITORY
from tests.merging.ways import ALIKE
from tests.models import load_models, models

DEMO = REPOSITORY / "search_spaces" / "demo.yaml"
PARENTS = ("first", "second", "third")


def recipe(method: str, density: float = 0.5) -> Recipe:
    row = METHODS[method]
    parameters = {"weight": 0.4, "density": density, "epsilon": 0.1, "scale": 0.5}
    return Recipe(
        merge_method=method,
        base_model="base" if row.uses_base else None,
        models=tuple(Source(model=model, parameters=parameters) for model in PARENTS)[: row.most],
        parameters={"t": 0.3},
    )


def rehearsed(tiny_models) -> ResidentModels:
    return load_models(tiny_models, tiny_models["base"], "cpu", "float32", rehearsal=True)


def test_bytes_count_as_long_as_a_tensor_or_a_view_of_it_lives():
    with LiveBytes() as live:
        tensor = torch.empty(1000, device="meta")
        part = (tensor * 2).view(10, 100)[3]
        assert (live.now, live.peak) == (8000, 8000)
        del tensor
        assert live.now == 4000
        del part
    assert (live.now, live.peak) == (0, 8000)


def test_a_rehearsal_holds_the_sources_as_they_are_stored_and_one_model(tiny_models):
    with LiveBytes() as live:
        models = rehearsed(tiny_models)
    stored = [load_file(folder / "model.safetensors").values() for folder in tiny_models.values()]
    expected = sum(tensor.nbytes for tensors in stored for tensor in tensors)
    model = sum(tensor.numel() * 4 for tensor in models.model.parameters())
    buffers = sum(tensor.nbytes for tensor in models.model.buffers())
    assert expected + model <= live.now <= expected + model + 2 * buffers + 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.exhaustive] * (method in ALIKE)) for method in METHODS]
)
def test_a_whole_merge_runs_without_data_and_leaves_nothing_behind(method, tiny_models):
    """A tensor on another device would raise, and so would waiting for a value. What a second candidate makes beyond
    the first is gone when it is done."""
    with LiveBytes() as live:
        models = rehearsed(tiny_models)
        models.rehearse(recipe(method))
        kept = live.now
        models.rehearse(recipe(method, density=0.25))
        assert live.now == kept


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties", "ties"])
def test_a_candidate_takes_no_more_than_twice_its_room(method):
    """However large the tensor, once what candidates share has been made."""
    shape, row = (64, 1 << 16), METHODS[method]
    kept: dict[Hashable, Any] = {}

    def once(what: Hashable, models: tuple[int, ...], make: Callable[[], Any], /) -> Any:
        if (what, models) not in kept:
            kept[what, models] = make()
        return kept[what, models]

    with LiveBytes() as live:
        tensors = {model: torch.empty(shape, device="meta") for model in ("base", *PARENTS)}
        inputs = Inputs(
            base=tensors["base"] if row.uses_base else None,
            tensors=tuple(tensors[model] for model in PARENTS),
            per_model=tuple({"weight": 0.4, "density": 0.5} for _ in PARENTS),
            shared={parameter.name: parameter.default for parameter in row.shared},
            uniforms=lambda index: once("uniforms", (index,), lambda: uniform_field(0, index, "t", 64 << 16, "meta")),
            rescale="density",
            once=once,
        )
        out = torch.empty(shape, device="meta")
        row.merge_into(out, inputs, room=ROOM)
        live.peak = live.now
        row.merge_into(out, inputs, room=ROOM)
        assert live.peak - live.now <= 2 * ROOM


def test_what_a_search_needs_is_told_part_by_part():
    prepared = prepare_file(DEMO, ["workers.pool=local"])
    plan = plan_memory(prepared.config, prepared.space)
    elements = sum(math.prod(info.shape) for info in prepared.models.table.values())
    assert plan.models >= 4 * 4 * elements  # three sources and the merge, in float32
    assert plan.shared >= 2 * 2 * elements  # sixteen bits of each model's masks
    assert plan.candidate > 0
    assert sum(plan.parts().values()) == 2 * plan.total


def plan(overrides: tuple[str, ...] = (), path: Path = DEMO, address: str | None = None) -> SearchPlan:
    prepared = prepare_file(path, overrides, address)
    return plan_placements(prepared.config, prepared.space, prepared.models, prepared.targets)


def memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Has the machine have so many bytes."""
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)


@pytest.fixture(scope="module")
def searched() -> tuple[SearchConfig, SearchPlan]:
    prepared = prepare_file(DEMO, ("workers.count=3",))
    return prepared.config, plan_placements(prepared.config, prepared.space, prepared.models, prepared.targets)


def taken(monkeypatch: pytest.MonkeyPatch, searched: tuple[SearchConfig, SearchPlan], size: int) -> Placement:
    """The placement that is taken on a machine with so many bytes."""
    config, wide = searched
    memory(monkeypatch, size)
    return SearchPlan(tuple(with_choice(config, wide.placements)), wide.tokens).chosen


def test_too_little_memory_is_told_with_what_to_change(monkeypatch, searched):
    assert shortage(searched[1].chosen) is None
    told = shortage(taken(monkeypatch, searched, 1 << 30))
    assert told is not None
    assert re.match(r"3 workers need \d\.\d GiB of memory, but this machine has 1\.0 GiB; use fewer workers", told)


def test_the_first_placement_that_fits_is_taken(monkeypatch, searched):
    placements = searched[1].placements
    places = [(placement.sources, placement.fields) for placement in placements]
    assert places == [("host", "kept"), ("host", "made"), ("disk", "kept"), ("disk", "made")]
    needs = [placement.host for placement in placements]
    assert needs[0] > needs[1] > needs[3]
    for number in (0, 1, 3):
        chosen = taken(monkeypatch, searched, int(needs[number] / 0.9) + 1)
        first = next(place for place, need in zip(places, needs, strict=True) if need <= needs[number])
        assert (chosen.sources, chosen.fields, chosen.lacking) == (*first, None)
    assert taken(monkeypatch, searched, needs[3]).lacking is not None


def test_a_worker_places_its_sources_as_the_plan_of_its_machine_says(monkeypatch, searched):
    config, wide = searched
    here = taken(monkeypatch, searched, int(wide.placements[1].host / 0.9) + 1)
    models = make_worker(config).models
    assert (models.where, models.fields) == (here.sources, here.fields) == ("host", "made")


def test_what_the_search_file_says_is_taken_wherever_the_device_is():
    away = ("workers.pool=ray", "evaluation.device=cuda")
    if not device_count("cuda"):
        assert not any(placement.chosen for placement in plan(away, address="auto").placements)
    wanted = plan((*away, "evaluation.sources=host", "evaluation.fields=made"), address="auto").placements
    assert [(place.sources, place.fields) for place in wanted if place.chosen] == [("host", "made")]


@pytest.mark.parametrize(
    ("sources", "fields"),
    [
        ("disk", "made"),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in (("device", "kept"), ("device", "made"), ("disk", "kept"))
        ),
    ],
)
def test_merging_one_tensor_of_each_kind_counts_as_much_as_merging_all(tiny_models, sources, fields):
    """One method after the other, as in a search that chooses among them. Checksums and extremes are a few bytes for
    each tensor, which are computed for one tensor of each shape."""
    checksum(torch.empty(1 << 16, device="meta"), "makes what all checksums have in common")
    taken, different = [], [method for method in METHODS if method not in ALIKE]
    for kind in (ResidentModels, RehearsedModels):
        with LiveBytes(says_yes=True) as live:
            found = models(tiny_models, tiny_models["base"])
            resident = kind(found, "cpu", "float32", rehearsal=True, sources=sources, fields=fields)
            counts = [live.now]
            for method in different:
                peak = live.now + live.more(partial(resident.rehearse, recipe(method)))
                counts += [peak, live.now]
        taken.append(counts)
    assert taken[0] == pytest.approx(taken[1], abs=1 << 14)
    assert max(taken[0]) > 1 << 20


def test_a_rehearsal_counts_the_bytes_that_a_merge_moves(tiny_models):
    resident = RehearsedModels(models(tiny_models, tiny_models["base"]), "cpu", "float32")
    elements = sum(parameter.numel() for parameter in resident.model.parameters())
    for method, sources, kept in (("dare_ties", 4, 3), ("linear", 3, 0)):
        resident.rehearse(recipe(method))
        stored = {"base": 4, "first": 4, "second": 4, "third": 4}
        assert resident.traffic.written == 4 * elements
        assert resident.traffic.kept == pytest.approx(2 * kept * elements, rel=0.01)
        assert 0 < resident.traffic.sources <= sum(stored.values()) * elements * sources / 4
