"""Gradients of real backward passes against float64 autograd through merges that are written a second time, and against
finite differences of merged checkpoints that transformers itself loads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from evomerge.layers import is_layer, layer_index
from evomerge.merging.building import load_config
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import uniform_field
from evomerge.merging.methods.slopes import Place
from evomerge.merging.naming import naming_of
from evomerge.merging.plan import MergePlan, TensorMerge, make_plan
from evomerge.merging.resident.gradients import checkpointed
from evomerge.merging.resident.models import ResidentModels, fingerprint
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.recipe import FilteredValue, Parameters, Provenance, Recipe, Slice, Source
from tests import architectures
from tests.every_architecture import architectures as every_architecture
from tests.every_architecture import tiny_config
from tests.merging.methods.autograd import leaves_of, merged
from tests.merging.test_naming import EXPERTS
from tests.models import UNMEASURED, load_models

SMOOTH = [name for name in UNMEASURED if METHODS[name].slopes]
NAMES = ("base", "first", "second", "third")
WORDS = torch.arange(3, 27).reshape(2, 12)
Weights = Mapping[str, Mapping[str, torch.Tensor]]


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), WORDS[:, 1:].flatten().to(logits.device))


def backward(model: Any, parts: int = 1) -> None:
    """The loss's backward pass, or one for each share of it."""
    for _ in range(parts):
        (loss_of(model(WORDS, use_cache=False).logits) / parts).backward()


def recipe(method: str, **shared: float | bool) -> Recipe:
    """Three models whose parameters differ by layer and by tensor."""
    levels: dict[str, Parameters] = {
        "first": {"weight": [0.2, 0.9], "density": 0.6, "epsilon": 0.1, "gamma": 0.05, "scale": [0.7, 1.1]},
        "second": {
            "weight": [FilteredValue(filter="mlp", value=0.7), FilteredValue(value=0.4)],
            "density": [0.5, 1.0],
        },
        "third": {"weight": 0.3, "density": 0.3},
    }
    row = METHODS[method]
    return Recipe(
        merge_method=method,
        base_model="base" if row.uses_base else None,
        models=tuple(Source(model=model, parameters=parameters) for model, parameters in levels.items())[: row.most],
        parameters={"t": 0.01 if method == "nearswap" else [0.2, 0.6], "lambda": [0.8, 1.2], **shared},
        evomerge=Provenance(seed=11),
    )


def stacked(*layers: tuple[str, int, float], method: str = "passthrough") -> Recipe:
    """A recipe whose layers are each one layer of one model, scaled."""
    return Recipe(
        merge_method=method,
        slices=tuple(
            Slice(sources=(Source(model=model, layer_range=(layer, layer + 1), parameters={"scale": scale}),))
            for model, layer, scale in layers
        ),
    )


def crossed() -> Recipe:
    """Layers out of their order, each merged from two layers of different places."""

    def run(first: int, second: int, weight: float) -> Slice:
        pairs = ("first", first, weight), ("second", second, [0.6, 0.3])
        return Slice(
            sources=tuple(
                Source(model=model, layer_range=(layer, layer + 2), parameters={"weight": own})
                for model, layer, own in pairs
            )
        )

    return Recipe(merge_method="linear", slices=(run(1, 0, 0.4), run(0, 2, 0.5)), parameters={"normalize": True})


def stored(folders: Mapping[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / WEIGHTS) for name, folder in folders.items()}


def given(plan: MergePlan, merge: TensorMerge, weights: Weights) -> Inputs:
    tensors = tuple(weights[model][name] for model, name in zip(merge.models, merge.sources, strict=True))
    return Inputs(
        base=weights[merge.base][merge.base_source] if merge.base is not None else None,
        tensors=tensors,
        per_model=merge.per_model,
        shared=merge.shared,
        uniforms=lambda i: uniform_field(plan.seed, merge.positions[i], merge.name, tensors[i].numel(), "cpu"),
        rescale=plan.rescale,
        in_layer=layer_index(merge.name) is not None,
    )


def in_float64(
    recipe: Recipe, weights: Weights
) -> tuple[dict[str, torch.Tensor], dict[Place, torch.Tensor], list[int]]:
    """The merged tensors by name, their leaves by place, and the number of the first source's layer for each layer."""
    plan = make_plan(recipe, weights["base"])
    tensors, places = {}, {}
    for merge in plan.tensors:
        inputs = given(plan, merge, weights)
        leaves = leaves_of(plan.method, inputs)
        tensors[merge.name] = merged(plan.method, inputs, leaves)
        for (name, index), leaf in leaves.items():
            places[merge.name, None if index is None else merge.models[index], name] = leaf
    return tensors, places, [next(iter(layer.values())) for layer in plan.layers]


def by_autograd(recipe: Recipe, folder: Path, weights: Weights) -> dict[Place, float]:
    """The derivatives, by autograd in float64 through transformers' own model."""
    tensors, places, layers = in_float64(recipe, weights)
    config = load_config(folder)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    loss_of(functional_call(model, tensors, (WORDS,)).logits).backward()
    return {place: float(leaf.grad) for place, leaf in places.items() if leaf.grad is not None}


def measure(models: ResidentModels, recipe: Recipe, parts: int = 1) -> dict[Place, float]:
    models.materialize(recipe)
    with models.following(METHODS[recipe.merge_method].slopes) as followed:
        backward(models.candidate, parts)
    return followed.totals()


def assert_alike(found: Mapping[Place, float], wanted: Mapping[Place, float], rel: float = 1e-3) -> None:
    assert found.keys() == wanted.keys()
    largest = max(map(abs, wanted.values()))
    for place, value in wanted.items():
        assert found[place] == pytest.approx(value, rel=rel, abs=1e-5 * largest * rel / 1e-3), place


@pytest.fixture(scope="module")
def resident(tiny_models: dict[str, Path]) -> ResidentModels:
    return load_models(tiny_models, tiny_models["base"], "cpu", "float32")


@pytest.fixture(scope="module")
def weights(tiny_models: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return stored(tiny_models)


CASES: list[tuple[str, Recipe]] = [(method, recipe(method)) for method in SMOOTH]
CASES += [
    (f"{method}-normalize-{flag}", recipe(method, normalize=flag))
    for method in ("linear", "ties", "dare_ties", "task_arithmetic")
    for flag in (True, False)
]
CASES += [("nuslerp-base", recipe("nuslerp").model_copy(update={"base_model": "base"}))]
CASES += [
    ("repeated", stacked(("first", 0, 0.7), ("first", 0, 0.9), ("second", 3, 1.1), ("base", 1, 0.5))),
    ("unscaled", stacked(("first", 0, 1.0), ("first", 0, 1.0), ("second", 2, 0.8), ("third", 1, 1.0))),
    ("dropped", stacked(("second", 2, 1.0), ("first", 0, 0.8))),
    ("grown", stacked(*(("third", layer // 2, 1.0 - layer / 20) for layer in range(6)))),
    ("crossed", crossed()),
]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=[name for name, _ in CASES])
def test_derivatives_are_those_of_float64_autograd(name, recipe, resident, tiny_models, weights):
    wanted = by_autograd(recipe, tiny_models["base"], weights)
    assert len(wanted) >= len(resident.plan(recipe).tensors)
    assert_alike(measure(resident, recipe), wanted, rel=3e-3 if name in ("slerp", "nuslerp-base") else 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_table_that_is_also_the_head_gets_the_gradient_of_both(architecture, tmp_path):
    settings = {"tie_word_embeddings": True} if architecture == "llama" else {}
    folders = architectures.family(architecture, tmp_path, NAMES, layers=2, **settings)
    models, weights = load_models(folders, folders["base"], "cpu", "float32"), stored(folders)
    assert models.model.get_output_embeddings().weight is models.model.get_input_embeddings().weight
    for merge in (recipe("ties"), stacked(("first", 1, 0.9), ("second", 0, 1.0), ("second", 0, 0.8))):
        assert_alike(measure(models, merge), by_autograd(merge, folders["base"], weights))
        model = models.candidate
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_gradients_of_a_tied_table_do_not_wait_for_one_another(tmp_path):
    folders = architectures.family("llama", tmp_path, NAMES, layers=2, tie_word_embeddings=True)
    models, seen = load_models(folders, folders["base"], "cpu", "float32"), []
    models.materialize(recipe("linear"))
    with models.following(["weight"]) as followed:
        add = followed.add
        followed.add = lambda merge, gradient: (seen.append(merge.name), add(merge, gradient))[1]
        backward(models.candidate)
    table = "model.embed_tokens.weight"
    assert [place for place, name in enumerate(seen) if name == table] == [0, len(seen) - 1]


def test_a_head_that_is_set_apart_gets_its_own_gradient(tmp_path):
    folders = architectures.family("llama", tmp_path, NAMES, layers=2, tie_word_embeddings=True)
    models = load_models(folders, folders["base"], "cpu", "float32", head_apart=True)
    both = measure(models, recipe("linear"))
    tied = measure(load_models(folders, folders["base"], "cpu", "float32"), recipe("linear"))
    head, table = (both[f"{name}.weight", "second", "weight"] for name in ("lm_head", "model.embed_tokens"))
    assert head != table
    assert head + table == pytest.approx(tied["model.embed_tokens.weight", "second", "weight"], rel=1e-3)


def moved(recipe: Recipe, weights: Weights, directions: Mapping[Place, float], step: float) -> dict[str, torch.Tensor]:
    """The merged tensors of a checkpoint, in float64, a step away."""
    plan = make_plan(recipe, sorted({name for name, _, _ in directions}))
    tensors = {name: tensor.double() for name, tensor in weights["base"].items()}  # buffers are the base's
    for merge in plan.tensors:
        inputs = given(plan, merge, weights)
        leaves = {
            key: leaf.detach() + step * directions[merge.name, None if key[1] is None else merge.models[key[1]], key[0]]
            for key, leaf in leaves_of(plan.method, inputs).items()
        }
        tensors[merge.name] = merged(plan.method, inputs, leaves)
    return tensors


def by_differences(
    recipe: Recipe, weights: Weights, directions: Mapping[Place, float], folder: Path, scratch: Path
) -> float:
    """The derivative along a direction, by the losses of two checkpoints that transformers loads."""
    wide = folder.parent.name != "inkling2_text"  # which takes no float64
    losses, step = [], 1e-3 if wide else 1e-2  # transformers computes norms and softmax in float32
    eager = {"experts_implementation": "eager"} if folder.parent.name in EXPERTS else {}  # that takes float64
    for sign in (1, -1):
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        save_file(moved(recipe, weights, directions, sign * step), scratch / WEIGHTS, {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            scratch, dtype=torch.float64 if wide else torch.float32, **eager
        ).eval()
        with torch.no_grad():
            losses.append(float(loss_of(model(WORDS).logits)))
    return (losses[0] - losses[1]) / (2 * step)


FUSED = ["gpt2", "gpt_neox", "phi3", *EXPERTS]


@pytest.mark.parametrize("architecture", FUSED)
def test_tensors_that_lie_otherwise_in_memory_have_the_derivatives_of_their_checkpoints(
    architecture, tmp_path, monkeypatch
):
    if architecture in EXPERTS:
        kind, settings = EXPERTS[architecture]
        all_of_them = {"num_experts_per_tok": 4}  # to choose among experts would be a step, which no gradient sees
        known = architectures.ARCHITECTURES["llama"][1] | all_of_them
        monkeypatch.setitem(architectures.ARCHITECTURES, architecture, (kind, known | settings))
    folders = architectures.family(architecture, tmp_path / architecture, NAMES[:3], layers=2)
    assert_differences(folders, tmp_path / "merged")


def assert_differences(folders: dict[str, Path], scratch: Path) -> None:
    """Checks derivatives along random directions against differences of losses."""
    models, weights = load_models(folders, folders["base"], "cpu", "float32"), stored(folders)
    merge = recipe("task_arithmetic")
    merge = merge.model_copy(update={"models": merge.models[:2]})
    found = measure(models, merge)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        draws = torch.randn(len(found), generator=generator, dtype=torch.float64).tolist()
        directions = dict(zip(found, draws, strict=True))
        expected = by_differences(merge, weights, directions, folders["base"], scratch)
        size = sum((found[place] * direction) ** 2 for place, direction in directions.items()) ** 0.5
        along = sum(found[place] * direction for place, direction in directions.items())
        assert along == pytest.approx(
            expected, abs=(2e-3 if "inkling2_text" not in folders["base"].parts else 2e-2) * size
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inkling2_text"])
def test_tensors_that_are_made_of_several_in_memory_have_the_derivatives_of_their_checkpoints(kind, tmp_path):
    config = tiny_config(every_architecture()[kind][0], num_experts_per_tok=4)
    folders = {}
    for seed, name in enumerate(NAMES[:3]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        architectures.shake(model, 0, 0.1)
        if seed:
            architectures.shake(model, seed, 0.02)
        folders[name] = architectures.save(model.eval(), tmp_path / kind / name)
    naming = naming_of(config, folders["base"])
    assert naming.made
    assert_differences(folders, tmp_path / "merged")


def test_gradients_of_several_passes_add_up(resident):
    once, parts = (measure(resident, recipe("dare_ties"), parts) for parts in (1, 3))
    assert_alike(parts, once)


def test_nothing_is_left_behind_and_the_weights_stay_bit_for_bit(resident):
    for merge in (recipe("ties"), stacked(("first", 0, 0.7), ("first", 0, 1.0))):
        before = resident.materialize(merge)
        model = resident.candidate
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with resident.following(["weight", "scale"]):
            backward(model)
        parameters = dict(model.named_parameters())
        assert {name: parameter.requires_grad for name, parameter in parameters.items()} == flags
        assert all(parameter.grad is None for parameter in parameters.values())
        assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters.values())
        assert fingerprint(parameters) == before


def test_nothing_is_left_behind_by_a_backward_pass_that_fails(resident):
    resident.materialize(recipe("linear"))
    flags = [parameter.requires_grad for parameter in resident.candidate.parameters()]

    def fail() -> None:
        with resident.following(["weight"]):
            loss = loss_of(resident.candidate(WORDS).logits)
            handle = resident.candidate.model.embed_tokens.weight.register_hook(lambda _: 1 // 0)
            try:
                loss.backward()
            finally:
                handle.remove()

    with pytest.raises(ZeroDivisionError):
        fail()
    parameters = list(resident.candidate.parameters())
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_at_most_two_gradients_of_parameters_are_alive_at_once(resident):
    resident.materialize(recipe("linear"))
    parameters, alive, most = list(resident.candidate.parameters()), WeakIdKeyDictionary(), 0

    def count(gradient: torch.Tensor) -> None:
        nonlocal most
        alive[gradient] = None
        most = max(most, len(alive), sum(parameter.grad is not None for parameter in parameters))

    with resident.following(["weight"]) as followed:
        handles = [parameter.register_hook(count) for parameter in parameters]
        backward(resident.candidate)
        assert all(parameter.grad is None for parameter in parameters)
    for handle in handles:
        handle.remove()
    assert len(followed.totals()) == 3 * len(parameters)
    assert 1 <= most <= 2


def test_only_tensors_whose_derivatives_are_asked_for_get_gradients(resident):
    resident.materialize(recipe("ties"))
    with resident.following(["density"]) as followed:
        assert not any(parameter.requires_grad for parameter in resident.candidate.parameters())
    assert followed.totals() == {}
    with resident.following(["lambda"]) as followed:
        backward(resident.candidate)
    assert {place[1:] for place in followed.totals()} == {(None, "lambda")}


@pytest.mark.parametrize("method", ["dare_ties", "slerp", "passthrough"])
def test_gradients_depend_neither_on_compiling_nor_on_room(method, resident, tiny_models, monkeypatch):
    plain = measure(resident, recipe(method))
    compiled = load_models(tiny_models, tiny_models["base"], "cpu", "float32", compiled=True)
    assert measure(compiled, recipe(method)) == plain
    monkeypatch.setattr("evomerge.merging.resident.models.room_on", lambda device: 1 << 12)
    assert measure(load_models(tiny_models, tiny_models["base"], "cpu", "float32"), recipe(method)) == plain


@pytest.mark.parametrize(
    "merge",
    [recipe("ties"), stacked(("first", 0, 0.7), ("first", 0, 1.0), ("second", 3, 0.9))],
    ids=["in place", "a view"],
)
def test_layers_that_are_computed_again_give_the_same_gradients(merge, resident):
    plain = measure(resident, merge)
    model = resident.candidate
    layers = [module for name, module in model.named_modules() if is_layer(name)]
    calls: list[Any] = []

    def counted(attention: Any) -> Any:
        def forward(*given: Any, **named: Any) -> Any:
            calls.append(attention)
            return type(attention).forward(attention, *given, **named)

        return forward

    for layer in layers:
        layer.self_attn.forward = counted(layer.self_attn)
    with resident.following(METHODS[merge.merge_method].slopes) as followed, checkpointed(model):
        backward(model)
    for layer in layers:
        del layer.self_attn.forward
    assert followed.totals() == plain
    assert [calls.count(layer.self_attn) for layer in layers] == [2] * len(layers)
    assert not any("forward" in layer.__dict__ for layer in layers)


@pytest.mark.parametrize("method", ["linear", "dare_ties", "slerp"])
def test_bfloat16_models_have_about_the_same_gradients(method, resident, tiny_models):
    wide = measure(resident, recipe(method))
    narrow = measure(load_models(tiny_models, tiny_models["base"], "cpu", "bfloat16"), recipe(method))
    assert narrow.keys() == wide.keys()
    pairs = torch.tensor([[narrow[place], wide[place]] for place in wide], dtype=torch.float64).T
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.99
    assert float((pairs[0] - pairs[1]).norm() / pairs[1].norm()) < 0.1


@pytest.mark.parametrize("method", ["linear", "dare_ties", "slerp"])
def test_a_model_that_is_divided_over_devices_has_the_same_gradients(method, resident, tiny_models):
    divided = load_models(tiny_models, tiny_models["base"], "cpu", "float32", count=2)
    assert len(divided.devices) == 2
    assert measure(divided, recipe(method)) == measure(resident, recipe(method))
