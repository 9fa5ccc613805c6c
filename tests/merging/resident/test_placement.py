"""Placement over several devices: no GPU is there, so tensors without data pretend to be on two of them.

A fake tensor keeps its device, and an operation on tensors of two devices raises, as it would with real ones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError
from evomerge.evaluation.likelihoods import PreparedRequests, Request
from evomerge.layers import layer_index
from evomerge.merging import building
from evomerge.merging.building import empty_model
from evomerge.merging.naming import named_weights
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.placement import divide, parts
from evomerge.merging.sources.weights import Weights
from evomerge.recipe import Recipe, Slice, Source
from evomerge.workers.memory import LiveBytes
from tests.architectures import ARCHITECTURES, TIED, build
from tests.models import load_models
from tests.workers.test_memory import recipe

pytestmark = pytest.mark.slow
MORE = pytest.mark.exhaustive

LAYERS = 6
PRETENDED = "lazy"  # a kind of device that torch knows on any machine, and that may have numbers
GPUS = [torch.device(PRETENDED, 0), torch.device(PRETENDED, 1)]
NOWHERE = Path("here")


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return empty_model(build(request.param, layers=LAYERS).config, NOWHERE)


def test_every_tensor_is_in_one_part(model: Any) -> None:
    found = parts(model)
    ours = {id(tensor) for part in found.values() for tensor in (*part.parameters(), *part.buffers())}
    assert ours == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert sum(layer_index(f"{name}.weight") is not None for name in found) == LAYERS


@pytest.mark.parametrize("count", [2, 3])
def test_devices_get_like_shares_of_whole_layers_one_after_the_other(model: Any, count: int) -> None:
    numbers = divide(model, [1e12] * count, 3)
    layers = [number for name, number in numbers.items() if layer_index(f"{name}.weight") is not None]
    assert layers == sorted(layers)
    assert set(numbers.values()) == set(range(count))
    assert all(1 <= layers.count(number) <= 2 * LAYERS / count for number in range(count))
    embeddings = next(name for name, part in parts(model).items() if part is model.get_input_embeddings())
    assert numbers[embeddings] == 0
    if model.config.model_type in (*TIED, "gemma3_text"):
        head = next(name for name, part in parts(model).items() if part is model.get_output_embeddings())
        assert numbers[head] == 0


def test_gpus_with_too_little_memory_are_a_sentence() -> None:
    model = empty_model(build("llama", layers=LAYERS).config, NOWHERE)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert divide(model, [4 * size, 4 * size], 4)
    with pytest.raises(InputError, match=r"num_gpus is 2, but 4 times .* do not fit on so many GPUs.*more of them"):
        divide(model, [size, size], 4)


@pytest.fixture(scope="module")
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture
def pretending(fake: FakeTensorMode) -> Iterator[None]:
    """Tensors without data, and yes to every question about what they hold."""
    with fake, LiveBytes(says_yes=True):
        yield


@pytest.fixture
def spread(pretending: None, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> ResidentModels:
    """The tiny models on two GPUs."""

    def load(folder: Path, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_config(building.load_config(folder), dtype=dtype).eval()

    def move(module: torch.nn.Module, device: torch.device) -> None:
        for part in module.modules():
            for name, tensor in part.named_parameters(recurse=False):
                part._parameters[name] = torch.nn.Parameter(tensor.detach().to(device), requires_grad=False)
            for name, tensor in part.named_buffers(recurse=False):
                part._buffers[name] = tensor.to(device)

    monkeypatch.setattr(torch.nn.Module, "to", move)  # which torch cannot do with fake tensors
    monkeypatch.setattr(building, "load_model", load)
    monkeypatch.setattr(
        Weights, "read", lambda self, name, device="cpu": torch.empty(self.table[name].shape, device=device)
    )
    monkeypatch.setattr("evomerge.merging.resident.placement._room", lambda device: 1e9)
    return load_models(tiny_models, tiny_models["base"], PRETENDED, "float32", count=2)


def requests() -> list[Request]:
    return [Request((1, 2, 3 + number), (4, option, 5), number) for number in range(3) for option in range(3)]


def path(first: int, second: int) -> Recipe:
    """Layers out of their order; the middle one is merged from two of different places."""

    def run(*sources: tuple[str, int]) -> Slice:
        return Slice(
            sources=tuple(
                Source(model=model, layer_range=(layer, layer + 1), parameters={"weight": 0.5})
                for model, layer in sources
            )
        )

    slices = run(("first", 3)), run(("first", first), ("second", second)), run(("second", 0))
    return Recipe(merge_method="linear", slices=slices)


@pytest.mark.parametrize("packed", [False, True])
def test_what_flows_between_parts_is_brought_to_where_they_are(spread: ResidentModels, packed: bool) -> None:
    prepared = PreparedRequests(requests(), 4, 64, GPUS[0], packed)
    assert packed == any(batch.segments is not None for batch in prepared.batches)
    prepared.rehearse(spread.model)
    ids = torch.zeros((2, 5), dtype=torch.int64, device=GPUS[0])
    cache = spread.model(input_ids=ids, use_cache=True).past_key_values
    again = spread.model(input_ids=ids[:, :1], use_cache=True, past_key_values=cache)
    assert {layer.keys.device for layer in cache.layers} == set(GPUS)
    assert again.logits.device == GPUS[1]


@pytest.mark.parametrize(
    "method",
    ["linear", "dare_ties", "slerp", *(pytest.param(name, marks=MORE) for name in ("ties", "sce", "arcee_fusion"))],
)
def test_a_merge_computes_each_tensor_where_it_is(spread: ResidentModels, method: str) -> None:
    before = {name: tensor.device for name, tensor in named_weights(spread.model).items()}
    assert set(before.values()) == set(GPUS)
    spread.rehearse(recipe(method))
    assert {name: tensor.device for name, tensor in named_weights(spread.candidate).items()} == before


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 3), (3, 0)])
def test_layers_that_change_places_keep_their_devices_and_fetch_what_they_need(
    spread: ResidentModels, first: int, second: int
) -> None:
    spread.rehearse(path(first, second))
    view = spread.candidate
    devices = [next(layer.parameters()).device for layer in view.model.layers]
    assert devices == [GPUS[1], GPUS[first // 2], GPUS[0]]
    for layer in view.model.layers:
        assert len({tensor.device for tensor in layer.parameters()}) == 1
    PreparedRequests(requests(), 4, 64, GPUS[0]).rehearse(view)


@pytest.mark.parametrize(
    "candidate",
    [
        pytest.param(recipe("dare_ties"), marks=MORE, id="dare_ties"),
        pytest.param(recipe("linear"), id="linear"),
        pytest.param(path(0, 3), id="path"),
    ],
)
def test_gradients_are_taken_where_their_tensors_are(spread: ResidentModels, candidate: Recipe) -> None:
    spread.rehearse(candidate)
    with spread.following(["weight"]) as followed:
        ids = torch.zeros((2, 5), dtype=torch.int64, device=GPUS[0])
        spread.candidate(input_ids=ids, use_cache=False).logits.sum().backward()
    devices = {name: tensor.device for name, tensor in named_weights(spread.candidate).items()}
    assert followed._totals
    assert all(slope.device == devices[name] for (name, _, _), slope in followed._totals.items())
