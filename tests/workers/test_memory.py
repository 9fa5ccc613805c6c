"""Memory: bytes are counted as long as tensors live, and a rehearsal on the meta device holds what a worker would."""

import math
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import uniform_field
from evomerge.merging.methods.passes import ROOM
from evomerge.merging.resident.models import ResidentModels
from evomerge.recipe import Recipe, Source
from evomerge.search.preparation import prepare_file
from evomerge.workers.memory import LiveBytes, MemoryPlan, plan_memory, shortage
from tests.conftest import REPOSITORY
from tests.models import load_models

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
@pytest.mark.parametrize("method", METHODS)
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


def test_too_little_memory_is_told_with_what_to_change():
    config = prepare_file(DEMO, ["workers.count=3"]).config
    assert shortage(config, MemoryPlan(1, 1, 1, 1)) is None
    assert "3 workers need 3072.0 GiB, but this machine has" in shortage(config, MemoryPlan(1 << 40, 0, 0, 0))
