"""ResidentModels: what it writes, where, and that nothing but the recipe decides it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge import recipe as recipes
from evomerge.errors import CandidateFailed, InputError
from evomerge.layers import layer_index
from evomerge.merging import methods
from evomerge.merging.building import load_model
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import uniform_field
from evomerge.merging.plan import make_plan
from evomerge.merging.resident.models import ResidentModels, fingerprint
from evomerge.merging.resident.sources import OnDevice
from evomerge.recipe import FilteredValue, Parameters, Provenance, Recipe, Slice, Source
from tests.models import UNMEASURED, load_models

PARENTS = ("first", "second", "third")
RANDOM = [name for name, method in METHODS.items() if method.random]
TASK_VECTORS = [name for name in UNMEASURED if METHODS[name].shares("lambda")]


def recipe(method: str, seed: int = 0, rescale: str = "l1", density: float = 0.6, **shared: float | bool) -> Recipe:
    """Three models whose weights and densities differ between kinds of tensors and between layers."""
    levels: dict[str, Parameters] = {
        "first": {"weight": [0.2, 0.9], "density": density, "scale": 0.7},
        "second": {
            "weight": [FilteredValue(filter="mlp", value=0.7), FilteredValue(value=0.4)],
            "density": [density, 1.0],
        },
        "third": {"weight": -0.3, "density": density / 2},
    }
    row = methods.get(method, "the test")
    return Recipe(
        merge_method=method,
        base_model="base" if row.uses_base else None,
        models=tuple(Source(model=model, parameters=parameters) for model, parameters in levels.items())[: row.most],
        parameters={"epsilon": 0.02, "t": [0.2, 0.6], **shared},
        evomerge=Provenance(seed=seed, rescale=rescale),
    )


@pytest.fixture(scope="module")
def resident(tiny_models) -> ResidentModels:
    return load_models(tiny_models, tiny_models["base"], "cpu", "float32")


@pytest.fixture(scope="module")
def narrow(tiny_models) -> dict[torch.dtype, ResidentModels]:
    return {
        dtype: load_models(tiny_models, tiny_models["base"], "cpu", str(dtype).removeprefix("torch."))
        for dtype in (torch.bfloat16, torch.float16)
    }


@pytest.fixture(scope="module")
def reversed_order(tiny_models) -> ResidentModels:
    return load_models(dict(reversed(tiny_models.items())), tiny_models["base"], "cpu", "float32")


@pytest.fixture(scope="module")
def weights(tiny_models) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / "model.safetensors") for name, folder in tiny_models.items()}


@pytest.fixture
def changed(tiny_models, tmp_path) -> Callable[..., Path]:
    """A copy of a model with some of its tensors replaced (None removes one)."""

    def change(model: str, **replaced: torch.Tensor | None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_models[model], folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in replaced.items()}
        save_file({k: t for k, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


def parameters(models: ResidentModels) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in models.model.named_parameters()}


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# What is written


@pytest.mark.parametrize("rescale", ["l1", "density"])
@pytest.mark.parametrize("method", UNMEASURED)
def test_a_merge_is_its_method_applied_tensor_by_tensor(method, rescale, resident, weights):
    merge = recipe(method, seed=5, rescale=rescale)
    expected = {}
    for tensor in make_plan(merge, weights["base"]).tensors:
        sources = [weights[model][tensor.name] for model in tensor.models]
        inputs = Inputs(
            base=weights["base"][tensor.name] if METHODS[method].uses_base else None,
            tensors=tuple(sources),
            per_model=tensor.per_model,
            shared=tensor.shared,
            uniforms=lambda i, name=tensor.name: uniform_field(5, i, name, weights["base"][name].numel(), "cpu"),
            rescale=rescale,
            in_layer=layer_index(tensor.name) is not None,
        )
        expected[tensor.name] = METHODS[method].merge(inputs)
    found = resident.materialize(merge)
    assert_equal(parameters(resident), expected)
    assert found == fingerprint(expected)


@pytest.mark.parametrize("model", ["base", *PARENTS])
def test_the_merge_of_a_single_model_is_that_model(model, resident, weights):
    found = resident.materialize(recipes.single(model))
    assert_equal(parameters(resident), weights[model])
    assert found == fingerprint(weights[model])


@pytest.mark.parametrize("method", TASK_VECTORS)
def test_task_vectors_of_weight_zero_give_the_base(method, resident, weights):
    models = tuple(Source(model=model, parameters={"weight": 0.0, "density": 0.5}) for model in PARENTS)
    found = resident.materialize(Recipe(merge_method=method, base_model="base", models=models))
    assert found == fingerprint(weights["base"])


def test_candidates_are_written_in_place(resident):
    before = {name: (id(tensor), tensor.data_ptr()) for name, tensor in resident.model.named_parameters()}
    for method in UNMEASURED:
        resident.materialize(recipe(method))
    assert {name: (id(tensor), tensor.data_ptr()) for name, tensor in resident.model.named_parameters()} == before


def test_sources_are_left_as_they_were(resident, weights):
    for method in UNMEASURED:
        resident.materialize(recipe(method))
    for model in PARENTS:
        assert resident.materialize(recipes.single(model)) == fingerprint(weights[model])


@pytest.mark.parametrize("method", UNMEASURED)
def test_arithmetic_is_in_float32_with_one_rounding_into_the_model_s_dtype(method, resident, narrow):
    resident.materialize(recipe(method))
    for dtype, models in narrow.items():
        models.materialize(recipe(method))
        assert_equal(parameters(models), {name: tensor.to(dtype) for name, tensor in parameters(resident).items()})


def test_sources_keep_the_precision_they_are_stored_in(changed, tiny_models, weights):
    """A float32 source of a bfloat16 model is not rounded before the merge, a bfloat16 source is read as it is."""
    name = "model.norm.weight"
    narrow = changed("second", model__norm__weight=weights["second"][name].bfloat16())
    models = load_models(tiny_models | {"second": narrow}, tiny_models["base"], "cpu", "bfloat16")
    models.materialize(recipes.linear({"first": 1.0, "second": 1.0}))
    exact = (weights["first"][name].double() + weights["second"][name].bfloat16().double()) / 2
    assert torch.equal(parameters(models)[name], exact.float().bfloat16())


# That nothing else decides it


@pytest.mark.parametrize("method", UNMEASURED)
def test_the_same_recipe_gives_the_same_fingerprint_in_every_process_state(method, resident, reversed_order):
    merge, threads, found = recipe(method, seed=3), torch.get_num_threads(), set()
    for count, models in ((1, resident), (1, resident), (2, reversed_order)):
        torch.set_num_threads(count)
        found.add(models.materialize(merge))
        torch.manual_seed(count)
    torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("method", RANDOM)
def test_masks_do_not_depend_on_the_candidates_before(method, resident, tiny_models):
    fresh = load_models(tiny_models, tiny_models["base"], "cpu", "float32")
    expected = fresh.materialize(recipe(method, seed=9))
    for earlier in (
        recipe(method, seed=1),
        recipe("ties"),
        recipe(method, seed=9, density=0.1),
        recipes.single("first"),
    ):
        resident.materialize(earlier)
    assert resident.materialize(recipe(method, seed=9)) == expected


@pytest.mark.parametrize("method", RANDOM)
def test_the_seed_decides_the_masks(method, resident):
    assert resident.materialize(recipe(method, seed=1)) != resident.materialize(recipe(method, seed=2))


@pytest.mark.parametrize("method", [name for name in UNMEASURED if name not in RANDOM])
def test_a_method_without_masks_takes_no_notice_of_the_seed(method, resident):
    assert resident.materialize(recipe(method, seed=1)) == resident.materialize(recipe(method, seed=2))


@pytest.mark.parametrize("method", RANDOM)
def test_two_models_with_the_same_weights_have_masks_of_their_own(method, tiny_models):
    folders = tiny_models | {"twin": tiny_models["first"]}
    models = load_models(folders, tiny_models["base"], "cpu", "float32")

    def merge(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        sources = tuple(Source(model=name, parameters={"weight": 1 / len(names), "density": 0.5}) for name in names)
        models.materialize(Recipe(merge_method=method, base_model="base", models=sources))
        return parameters(models)

    name = "model.layers.0.mlp.up_proj.weight"
    base = load_file(tiny_models["base"] / "model.safetensors")[name]
    kept_by_one, kept_by_two = merge(("first",))[name] != base, merge(("first", "twin"))[name] != base
    assert kept_by_one.float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert kept_by_two.float().mean().item() == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize("method", RANDOM)
def test_a_model_keeps_its_masks_in_slices_that_others_sit_out(method, resident, weights):
    def merge(second_slice: tuple[str, ...]) -> dict[str, torch.Tensor]:
        slices = tuple(
            Slice(
                sources=tuple(
                    Source(
                        model=model, layer_range=layers, parameters={"weight": float(model != "first"), "density": 0.5}
                    )
                    for model in ("base", *models)
                )
            )
            for layers, models in (((0, 2), ("first", "second")), ((2, 4), second_slice))
        )
        resident.materialize(Recipe(merge_method=method, base_model="base", slices=slices))
        return parameters(resident)

    assert_equal(merge(("second",)), merge(("first", "second")))  # where the first has no weight


# What fails


def test_a_model_with_a_value_that_is_not_finite_is_refused_when_it_is_loaded(changed, tiny_models):
    bad = torch.full((48, 32), 0.1)
    bad[3, 4] = float("nan")
    folder = changed("first", model__layers__2__mlp__up_proj__weight=bad)
    with pytest.raises(InputError, match=r"up_proj\.weight holds values that are not finite"):
        load_models(tiny_models | {"first": folder}, tiny_models["base"], "cpu", "float32")


def test_non_finite_weights_fail_the_candidate_and_name_the_first_tensor(tiny_models):
    models = load_models(tiny_models, tiny_models["base"], "cpu", "float32")
    models._sources["first"]["model.layers.2.mlp.up_proj.weight"] = OnDevice(torch.full((48, 32), float("nan")))
    for method in UNMEASURED:
        with pytest.raises(CandidateFailed, match=r"non-finite weights .* in model\.layers\.2\.mlp\.up_proj\.weight$"):
            models.materialize(recipe(method))
    others = recipes.linear({"second": 1.0, "third": 1.0})  # the next candidate is unharmed
    assert models.materialize(others) == load_models(tiny_models, tiny_models["base"], "cpu", "float32").materialize(
        others
    )


def test_weights_that_overflow_only_in_the_model_s_dtype_fail_the_candidate(resident, tiny_models):
    huge = Recipe(merge_method="linear", models=(Source(model="first", parameters={"weight": 1e6}),))
    huge = huge.model_copy(update={"parameters": {"normalize": False}})
    resident.materialize(huge)
    with pytest.raises(CandidateFailed, match="non-finite weights"):
        load_models(tiny_models, tiny_models["base"], "cpu", "float16").materialize(huge)


@pytest.mark.parametrize("method", ["linear", *TASK_VECTORS])
def test_weights_beyond_float32_fail_the_candidate(method, resident):
    models = tuple(Source(model=model, parameters={"weight": 1e300}) for model in PARENTS)
    for normalize in (True, False):
        enormous = Recipe(merge_method=method, base_model="base", models=models, parameters={"normalize": normalize})
        enormous = enormous if METHODS[method].needs_base else enormous.model_copy(update={"base_model": None})
        if (method, normalize) == ("linear", True):
            resident.materialize(enormous)  # an average, in float64 until the end
            continue
        with pytest.raises(CandidateFailed, match="non-finite weights"):
            resident.materialize(enormous)


def test_a_recipe_that_cannot_be_planned_is_an_input_error(resident):
    with pytest.raises(InputError, match="weight of first is missing"):
        resident.materialize(Recipe(merge_method="linear", models=(Source(model="first"),)))


def test_a_source_that_lacks_a_tensor_of_the_model_is_an_input_error(changed, tiny_models):
    folder = changed("first", model__norm__weight=None)
    with pytest.raises(InputError, match=r"lack model\.norm\.weight, which LlamaForCausalLM needs"):
        load_models({"first": folder}, tiny_models["base"], "cpu", "float32")


def test_a_source_of_another_shape_is_an_input_error(changed, tiny_models):
    folder = changed("first", model__norm__weight=torch.zeros(31))
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \[31\], expected \[32\]"):
        load_models({"first": folder}, tiny_models["base"], "cpu", "float32")


def test_a_model_that_transformers_cannot_load_is_an_input_error(changed):
    folder = changed("first")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(InputError, match=r"transformers cannot (build|load) this model"):
        load_model(folder, torch.float32)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "no_such_model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"transformers cannot (build|load) this model"):
        load_model(folder, torch.float32)
