"""The merge functions beside mergekit's own, and what must hold for each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import mergekit.merge_methods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import ParameterScope, TensorEntry, TensorGroup

from evomerge.errors import InputError
from evomerge.merging import methods
from evomerge.merging.kernels import keep_mask, largest_magnitudes, uniform_field
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs

TASK_VECTORS = [name for name, method in METHODS.items() if method.needs_base]
RANDOM = [name for name, method in METHODS.items() if method.random]
LINEAR_IN_THE_MODELS = ["linear", "task_arithmetic", "dare_linear"]  # no election, so no jumps

few = settings(max_examples=50, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 13), min_size=1, max_size=3)
seeds = st.integers(0, 2**32)
# Multiples of 1/64 add up without rounding, so a sum of weights is zero in every precision or in none.
weights = st.integers(-128, 128).map(lambda steps: steps / 64)
densities = st.one_of(st.just(1.0), st.floats(0, 1))
per_model = st.lists(st.fixed_dictionaries({"weight": weights, "density": densities}), min_size=1, max_size=4)
shared = st.fixed_dictionaries(
    {"normalize": st.booleans(), "rescale": st.booleans(), "lambda": st.floats(-2, 2, width=32)}
)


@dataclass(frozen=True)
class Models:
    """One tensor of a base and its fine-tunes, with a uniform field per fine-tune."""

    base: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    fields: tuple[torch.Tensor, ...]

    @property
    def scale(self) -> float:
        return max(tensor.abs().max().item() for tensor in (self.base, *self.tensors))


def fields(count: int, elements: int) -> tuple[torch.Tensor, ...]:
    return tuple(uniform_field(0, position, "tensor", elements, "cpu") for position in range(count))


def random_models(shape: Sequence[int], count: int, seed: int, drift: float = 0.3) -> Models:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tensors = tuple(base + drift * torch.randn(shape, generator=generator) for _ in range(count))
    return Models(base, tensors, fields(count, base.numel()))


def models_without_ties(shape: Sequence[int], count: int, seed: int) -> Models:
    """Task vectors are multiples of 2^-12, exact in float32, and no two elements of one have the same magnitude."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-64, 65, tuple(shape), generator=generator) / 16
    tensors = []
    for _ in range(count):
        magnitude = torch.randperm(base.numel(), generator=generator).reshape(base.shape) + 1
        sign = torch.randint(0, 2, base.shape, generator=generator) * 2 - 1
        tensors.append(base + magnitude * sign / 4096)
    return Models(base, tuple(tensors), fields(count, base.numel()))


def merged(
    method: str,
    models: Models,
    per_model: Sequence[Mapping[str, float]],
    shared: Mapping[str, float | bool] | None = None,
    rescale: str = "l1",
) -> torch.Tensor:
    row = METHODS[method]
    inputs = Inputs(
        base=models.base if row.needs_base else None,
        tensors=models.tensors,
        per_model=tuple(per_model),
        shared={parameter.name: parameter.default for parameter in row.shared} | dict(shared or {}),
        uniforms=models.fields.__getitem__,
        rescale=rescale,
    )
    return row.merge(inputs)


def merged_by_mergekit(
    method: str, models: Models, per_model: Sequence[Mapping[str, float]], shared: Mapping[str, float | bool]
) -> torch.Tensor:
    theirs = mergekit.merge_methods.get(method)
    base = [TensorEntry(id="base", tensor=models.base, is_base=True)] if METHODS[method].needs_base else []
    others = [TensorEntry(id=index, tensor=tensor) for index, tensor in enumerate(models.tensors)]
    known = {parameter.name for parameter in theirs.spec.parameters}
    parameters = {name: value for name, value in shared.items() if name in known}
    for name in {"weight", "density"} & known:
        parameters[name] = {index: values[name] for index, values in enumerate(per_model)}
    (result,) = theirs((TensorGroup(entries=(*base, *others)),), parameters=parameters)
    return result


def with_masks_of(models: Models, per_model: Sequence[Mapping[str, float]]) -> mock._patch:
    """Has mergekit's random sparsification, which asks only for densities below 1, draw evomerge's masks."""
    masks = iter(
        keep_mask(field, values["density"])
        for field, values in zip(models.fields, per_model, strict=True)
        if values["density"] < 1
    )

    def draw(probabilities: torch.Tensor) -> torch.Tensor:
        return next(masks).view_as(probabilities).to(probabilities.dtype)

    return mock.patch("mergekit.sparsify.torch.bernoulli", draw)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, scale: float) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= 1e-6 * max(scale, theirs.abs().max().item())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# Beside mergekit


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_their_defaults_are_mergekit_s(method):
    theirs = {parameter.name: parameter for parameter in mergekit.merge_methods.get(method).spec.parameters}
    for parameter in METHODS[method].shared:
        assert theirs[parameter.name].scope == ParameterScope.SHARED
        assert (parameter.kind, parameter.default) == (
            theirs[parameter.name].value_type,
            theirs[parameter.name].default,
        )
    for parameter in METHODS[method].per_model:
        assert theirs[parameter.name].scope != ParameterScope.SHARED
        assert theirs[parameter.name].required == (parameter.default is None)
        assert theirs[parameter.name].required or theirs[parameter.name].default == parameter.default
    unknown_here = set(theirs) - {parameter.name for parameter in METHODS[method].shared + METHODS[method].per_model}
    assert unknown_here <= {"density"}  # task_arithmetic accepts one and ignores it


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "dare_ties"])
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_merges_of_random_models_are_mergekit_s(method, shape, seed, per_model, shared):
    models = random_models(shape, len(per_model), seed)
    with with_masks_of(models, per_model):
        theirs = merged_by_mergekit(method, models, per_model, shared)
    assert_close(merged(method, models, per_model, shared), theirs, models.scale)


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_merges_without_tied_magnitudes_are_mergekit_s(method, shape, seed, per_model, shared):
    models = models_without_ties(shape, len(per_model), seed)
    with with_masks_of(models, per_model):
        theirs = merged_by_mergekit(method, models, per_model, shared)
    assert_close(merged(method, models, per_model, shared), theirs, models.scale)


@few
@given(shape=shapes, seed=seeds, per_model=per_model, normalize=st.booleans())
def test_linear_is_mergekit_s_wherever_the_weights_do_not_cancel(shape, seed, per_model, normalize):
    models = random_models(shape, len(per_model), seed)
    if sum(values["weight"] for values in per_model) == 0:
        assert merged("linear", models, per_model).isfinite().all()  # mergekit divides by zero
        normalize = False
    theirs = merged_by_mergekit("linear", models, per_model, {"normalize": normalize})
    assert_close(merged("linear", models, per_model, {"normalize": normalize}), theirs, models.scale)


@few
@given(seed=seeds, density=st.floats(0.01, 0.99))
def test_ties_differs_from_mergekit_only_at_elements_tied_at_the_threshold(seed, density):
    """mergekit's unstable sort takes some of them, evomerge takes all."""
    models = random_models((400,), 1, seed)
    coarse = (models.tensors[0] - models.base).mul(8).round().div(8)
    models = Models(torch.zeros(400), (coarse,), models.fields)
    per_model = [{"weight": 1.0, "density": density}]
    ours, theirs = merged("ties", models, per_model), merged_by_mergekit("ties", models, per_model, {})
    threshold = coarse.abs().sort(descending=True).values[max(1, int(density * 400)) - 1]
    assert torch.equal(ours[coarse.abs() > threshold], theirs[coarse.abs() > threshold])
    assert not theirs[coarse.abs() < threshold].any()
    assert torch.equal(ours, coarse * (coarse.abs() >= threshold))


def test_an_even_vote_elects_plus_as_in_mergekit():
    models = Models(torch.zeros(3), (torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, -1.0, 0.0])), fields(2, 3))
    per_model = [{"weight": 1.0, "density": 1.0}] * 2
    assert merged("ties", models, per_model).tolist() == [1.0, 2.0, 0.0]
    assert merged_by_mergekit("ties", models, per_model, {}).tolist() == [1.0, 2.0, 0.0]


# What a sparsified task vector is divided by


@pytest.mark.parametrize("method", RANDOM)
@few
@given(shape=shapes, seed=seeds, density=st.floats(0.01, 1))
def test_rescale_by_density_divides_what_is_kept_by_the_density(method, shape, seed, density):
    models = random_models(shape, 1, seed)
    ours = merged(method, models, [{"weight": 1.0, "density": density}], rescale="density")
    kept = keep_mask(models.fields[0], density).view(shape)
    expected = models.base + torch.where(kept, models.tensors[0] - models.base, 0.0) / density
    assert_close(ours, expected, models.scale / density)


@pytest.mark.parametrize("method", RANDOM)
@few
@given(shape=shapes, seed=seeds, density=st.floats(0.01, 0.99))
def test_rescale_l1_restores_the_l1_norm_of_the_task_vector(method, shape, seed, density):
    models = random_models(shape, 1, seed)
    ours = merged(method, models, [{"weight": 1.0, "density": density}], rescale="l1")
    if keep_mask(models.fields[0], density).any():
        before = (models.tensors[0] - models.base).double().abs().sum().item()
        after = (ours.double() - models.base.double()).abs().sum().item()
        assert after == pytest.approx(before, rel=1e-4)
    else:
        assert torch.equal(ours, models.base)


@pytest.mark.parametrize("method", [*RANDOM, "ties"])
@pytest.mark.parametrize("rescale", ["l1", "density"])
def test_without_rescale_what_is_kept_stays_as_it_is(method, rescale):
    models = random_models((40, 50), 1, 3)
    ours = merged(method, models, [{"weight": 1.0, "density": 0.4}], {"rescale": False}, rescale)
    kept = ours != models.base
    assert_close(ours[kept], models.tensors[0][kept], models.scale)
    assert kept.float().mean().item() == pytest.approx(0.4, abs=0.05)


def test_ties_keeps_the_largest_magnitudes():
    models = models_without_ties((10, 50), 1, 3)
    ours = merged("ties", models, [{"weight": 1.0, "density": 0.3}])
    assert torch.equal(ours != models.base, largest_magnitudes(models.tensors[0] - models.base, 150))


# Properties


@pytest.mark.parametrize("rescale", ["l1", "density"])
@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(seed=seeds, exponent=st.integers(-40, 40), per_model=per_model, shared=shared)
def test_task_vector_methods_merge_identical_models_to_themselves(method, rescale, seed, exponent, per_model, shared):
    model = random_models((30,), 0, seed).base * 2.0**exponent
    models = Models(model, (model.clone(),) * len(per_model), fields(len(per_model), 30))
    assert same_bits(merged(method, models, per_model, shared, rescale), model)


@few
@given(seed=seeds, exponent=st.integers(-40, 40), chosen=st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_linear_merges_identical_models_to_themselves(seed, exponent, chosen):
    """As long as weights do not cancel to less than a thousandth of themselves."""
    if abs(sum(chosen)) < 1e-3:
        chosen[0] += 1.0
    model = random_models((30,), 0, seed).base * 2.0**exponent
    models = Models(model, (model.clone(),) * len(chosen), ())
    assert same_bits(merged("linear", models, [{"weight": weight} for weight in chosen]), model)


def test_a_single_model_keeps_even_the_sign_of_its_zeros_under_linear():
    model = torch.tensor([-0.0, 0.0, 1e-45, -3.0])
    assert same_bits(merged("linear", Models(model, (model,), ()), [{"weight": 1.0}]), model)


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_weights_of_zero_give_the_base(method, shape, seed, per_model, shared):
    models = random_models(shape, len(per_model), seed)
    nothing = [values | {"weight": 0.0} for values in per_model]
    assert same_bits(merged(method, models, nothing, shared), models.base)


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_a_lambda_of_zero_gives_the_base(method, shape, seed, per_model, shared):
    models = random_models(shape, len(per_model), seed)
    assert same_bits(merged(method, models, per_model, shared | {"lambda": 0.0}), models.base)


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds, drift=st.floats(1e-6, 100), normalize=st.booleans())
def test_a_lone_parent_comes_back_up_to_two_roundings(method, shape, seed, drift, normalize):
    """One rounding of x - base and one of the sum, half a unit in the last place each."""
    models = random_models(shape, 1, seed, drift)
    ours = merged(method, models, [{"weight": 1.0, "density": 1.0}], {"normalize": normalize})
    parent, half_ulp = models.tensors[0], 2.0**-24
    allowed = half_ulp * ((parent - models.base).abs() + parent.abs()) * (1 + 1e-6)
    assert ((ours - parent).abs() <= allowed).all()


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds)
def test_a_lone_parent_within_half_and_twice_the_base_comes_back_bit_for_bit(method, shape, seed):
    """There x - base is exact (Sterbenz' lemma), and so is base + (x - base)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    parent = base * (0.5 + 1.5 * torch.rand(shape, generator=generator)).clamp(0.5001, 1.9999)
    models = Models(base, (parent,), fields(1, base.numel()))
    assert same_bits(merged(method, models, [{"weight": 1.0, "density": 1.0}]), parent)


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds)
def test_a_lone_parent_in_bfloat16_comes_back_bit_for_bit(method, shape, seed):
    """Numbers of 8 bits, at most 15 powers of two apart, differ by a number that 24 bits hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        magnitude = 2.0 ** (14 * torch.rand(shape, generator=generator) - 10)
        return (magnitude * (torch.randint(0, 2, magnitude.shape, generator=generator) * 2 - 1)).bfloat16().float()

    models = Models(draw(), (draw(),), fields(1, torch.Size(shape).numel()))
    assert same_bits(merged(method, models, [{"weight": 1.0, "density": 1.0}]), models.tensors[0])


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
@few
@given(shape=shapes, seed=seeds, weight=weights, shared=shared)
def test_a_lone_model_at_density_one_is_merged_as_by_task_arithmetic(method, shape, seed, weight, shared):
    models, chosen = random_models(shape, 1, seed), [{"weight": weight, "density": 1.0}]
    assert torch.equal(merged(method, models, chosen, shared), merged("task_arithmetic", models, chosen, shared))


@pytest.mark.parametrize("method", METHODS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_inputs_are_left_as_they_were(method, shape, seed, per_model, shared):
    models = random_models(shape, len(per_model), seed)
    before = [tensor.clone() for tensor in (models.base, *models.tensors, *models.fields)]
    result = merged(method, models, per_model, shared)
    result.add_(1.0)  # nor is the result one of them
    assert all(map(torch.equal, before, (models.base, *models.tensors, *models.fields)))


@pytest.mark.parametrize("method", LINEAR_IN_THE_MODELS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared, data=st.data())
def test_the_order_of_models_does_not_matter_up_to_rounding(method, shape, seed, per_model, shared, data):
    models = random_models(shape, len(per_model), seed)
    order = data.draw(st.permutations(range(len(per_model))))
    ours = merged(method, models, per_model, shared)
    moved = Models(models.base, tuple(models.tensors[i] for i in order), tuple(models.fields[i] for i in order))
    assert_close(merged(method, moved, [per_model[i] for i in order], shared), ours, models.scale)


def on_threads(count: int, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_changes_no_bit(method, normalize):
    models = random_models((100_003,), 3, 1)
    per_model = [{"weight": weight, "density": 0.6} for weight in (0.3, 0.7, -0.45)]
    one, three = (
        on_threads(count, lambda: merged(method, models, per_model, {"normalize": normalize})) for count in (1, 3)
    )
    assert same_bits(one, three)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_an_element_is_merged_the_same_wherever_it_lies(method, normalize):
    """Vector and scalar code paths round alike: nothing is fused, nothing multiplied by a reciprocal."""
    models, per_model = random_models((997,), 3, 1), [{"weight": weight} for weight in (0.3, 0.7, -0.45)]
    whole = merged(method, models, per_model, {"normalize": normalize})
    parts = [
        merged(
            method, Models(models.base[i], tuple(t[i] for t in models.tensors), ()), per_model, {"normalize": normalize}
        )
        for i in torch.arange(997).split(3)
    ]
    assert same_bits(whole, torch.cat(parts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_device_changes_no_bit(method, normalize):
    models = random_models((10_007,), 6, 1)
    on_device = Models(
        models.base.cuda(), tuple(t.cuda() for t in models.tensors), tuple(field.cuda() for field in models.fields)
    )
    per_model = [{"weight": weight, "density": 0.6} for weight in (0.3, 0.7, -0.45, 0.11, 0.9, 0.2)]
    ours, theirs = (merged(method, each, per_model, {"normalize": normalize}) for each in (models, on_device))
    assert same_bits(ours, theirs.cpu())


def test_an_unknown_method_is_an_input_error_that_names_the_closest():
    with pytest.raises(
        InputError, match=r"^space.method is 'dare_tie', no known merge method; did you mean 'dare_ties'"
    ):
        methods.get("dare_tie", "space.method")
