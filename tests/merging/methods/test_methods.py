"""The merge functions beside mergekit's own, and what must hold for each of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import mergekit.merge_methods
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import ParameterScope, TensorEntry, TensorGroup

from evomerge.errors import InputError
from evomerge.merging import methods
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs, unmeasured
from evomerge.merging.methods.kernels import largest_magnitudes, ordered_sum, uniform_field
from evomerge.merging.methods.sparsify import largest_epsilon
from evomerge.merging.methods.task_vectors import TaskVectorMerge
from tests.merging.methods.masks import keep_mask
from tests.merging.methods.measured import statistics

MERGEKIT = [name for name, method in METHODS.items() if method.mergekit]
TASK_VECTORS = [name for name, method in METHODS.items() if isinstance(method.function, TaskVectorMerge)]
RANDOM = [name for name, method in METHODS.items() if method.random]
UNIFORM = ["dare_linear", "dare_ties"]  # the same probability for every element
SPARSE = [name for name in TASK_VECTORS if METHODS[name].takes("density")]
OTHERS = [name for name in MERGEKIT if name not in TASK_VECTORS and name != "linear"]
ANGLES = ["slerp", "nuslerp", "multislerp", "karcher", "arcee_fusion"]
LINEAR_IN_THE_MODELS = ["linear", "task_arithmetic", "dare_linear"]  # no election, so no jumps

few = settings(max_examples=25, deadline=None, derandomize=True)
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


def complete(method: str, per_model: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], ...]:
    """Every parameter of every model: as given, else its default, for DELLA's epsilon as far as the density allows."""
    defaults = {parameter.name: parameter.default for parameter in METHODS[method].per_model}
    found = [{**defaults, **values} for values in per_model]
    for values in found:
        if "epsilon" in defaults:
            values["epsilon"] = largest_epsilon(values["density"], values["epsilon"])
    return tuple(found)


def fitting(method: str, per_model: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """As many models as the method takes."""
    row = METHODS[method]
    return [*per_model, *per_model][: row.most or max(row.least, len(per_model))]


def merged(
    method: str,
    models: Models,
    per_model: Sequence[Mapping[str, float]],
    shared: Mapping[str, float | bool] | None = None,
    rescale: str = "l1",
    with_base: bool = True,
) -> torch.Tensor:
    row = METHODS[method]
    inputs = Inputs(
        base=models.base if row.uses_base and (row.needs_base or with_base) else None,
        tensors=models.tensors,
        per_model=complete(method, per_model),
        shared={p.name: 0.3 if p.default is None else p.default for p in row.shared} | dict(shared or {}),
        uniforms=models.fields.__getitem__,
        rescale=rescale,
        statistic=statistics(models.base) if row.statistics else unmeasured,
    )
    return row.merge(inputs)


def merged_by_mergekit(
    method: str,
    models: Models,
    per_model: Sequence[Mapping[str, float]],
    shared: Mapping[str, float | bool],
    with_base: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    theirs, row = mergekit.merge_methods.get(method), METHODS[method]
    has_base = row.uses_base and (row.needs_base or with_base)
    base = [TensorEntry(id="base", tensor=models.base.to(dtype), is_base=True)] if has_base else []
    others = [TensorEntry(id=index, tensor=tensor.to(dtype)) for index, tensor in enumerate(models.tensors)]
    known = {parameter.name for parameter in theirs.spec.parameters}
    parameters: dict[str, Any] = {"t": 0.3} if row.shares("t") else {}
    parameters |= {name: value for name, value in shared.items() if name in known}
    values = complete(method, per_model)
    for parameter in row.per_model:
        parameters[parameter.name] = {index: each[parameter.name] for index, each in enumerate(values)}
    (result,) = theirs((TensorGroup(entries=(*base, *others)),), parameters=parameters)
    return result


def with_masks_of(method: str, models: Models, per_model: Sequence[Mapping[str, float]]) -> mock._patch:
    """Has mergekit's random sparsification draw evomerge's masks from the probabilities that it works out.

    It draws for densities below 1, and for DELLA above 0.
    """
    least = 0.0 if METHODS[method].takes("epsilon") else -1.0
    drawn = iter(
        (field, values["density"])
        for field, values in zip(models.fields, per_model, strict=True)
        if least < values["density"] < 1
    )

    def draw(probabilities: torch.Tensor) -> torch.Tensor:
        field, density = next(drawn)
        exact = density if method in UNIFORM else probabilities.double()
        return keep_mask(field.view_as(probabilities), exact).to(probabilities.dtype)

    return mock.patch("mergekit.sparsify.torch.bernoulli", draw)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, scale: float) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= 1e-6 * max(scale, theirs.abs().max().item())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# Beside mergekit


@pytest.mark.parametrize("method", MERGEKIT)
def test_parameters_and_their_defaults_are_mergekit_s(method):
    spec = mergekit.merge_methods.get(method).spec
    theirs = {parameter.name: replace(parameter) for parameter in spec.parameters}
    if method == "passthrough":  # whose scale is None where nothing is scaled
        theirs["scale"] = replace(theirs["scale"], default=1.0)
    for parameter in METHODS[method].shared:
        assert theirs[parameter.name].scope == ParameterScope.SHARED
        default = None if theirs[parameter.name].required else theirs[parameter.name].default
        assert (parameter.kind, parameter.default) == (theirs[parameter.name].value_type, default)
    for parameter in METHODS[method].per_model:
        assert theirs[parameter.name].scope != ParameterScope.SHARED
        assert theirs[parameter.name].required == (parameter.default is None)
        assert theirs[parameter.name].required or theirs[parameter.name].default == parameter.default
    unknown_here = set(theirs) - {parameter.name for parameter in METHODS[method].shared + METHODS[method].per_model}
    assert unknown_here <= {"density"}  # task_arithmetic accepts one and ignores it


@pytest.mark.parametrize("method", MERGEKIT)
def test_bases_and_numbers_of_models_are_mergekit_s(method):
    row, contract = METHODS[method], mergekit.merge_methods.get(method).spec.contract
    assert row.base == contract.base.value
    for count, has_base in product(range(1, 5), (False, True)):
        if row.needs_base and not has_base:
            continue
        ids = ["base"] * has_base + list(range(count))
        try:
            contract.validate_ids(ids, "base" if has_base else None)
        except ValueError:
            assert not row.accepts(count + (has_base and not row.uses_base))
        else:
            assert row.accepts(count + (has_base and not row.uses_base))


@pytest.mark.parametrize("method", ["task_arithmetic", *UNIFORM])
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_merges_of_random_models_are_mergekit_s(method, shape, seed, per_model, shared):
    models = random_models(shape, len(per_model), seed)
    with with_masks_of(method, models, per_model):
        theirs = merged_by_mergekit(method, models, per_model, shared)
    assert_close(merged(method, models, per_model, shared), theirs, models.scale)


@pytest.mark.parametrize("method", TASK_VECTORS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_merges_without_tied_magnitudes_are_mergekit_s(method, shape, seed, per_model, shared):
    assume("della" not in method or shape[min(1, len(shape) - 1)] > 1)  # mergekit's probability of a lone one is NaN
    models = models_without_ties(shape, len(per_model), seed)
    with with_masks_of(method, models, per_model):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", OTHERS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, t=st.floats(-0.5, 1.5), with_base=st.booleans())
def test_other_methods_are_mergekit_s_in_either_precision(method, dtype, shape, seed, per_model, t, with_base):
    """Weights are positive, and models alike: near a pole of an arc mergekit's float32 is far from its float64."""
    models_alike, shared = 0.3, {"t": t}
    per_model = [{"weight": abs(values["weight"]) + 1 / 64} for values in fitting(method, per_model)]
    models = random_models((*shape, 16), len(per_model), seed, models_alike)
    if method == "passthrough":
        per_model = [{"scale": t}]
    with_base = with_base and method != "nuslerp"  # below, since independent task vectors may oppose each other
    theirs = merged_by_mergekit(method, models, per_model, shared, with_base, dtype)
    ours = merged(method, models, per_model, shared, with_base=with_base)
    assert_close(ours, theirs, models.scale)


@pytest.mark.parametrize("flags", [{}, *({"nuslerp_flatten": False, "nuslerp_row_wise": on} for on in (False, True))])
@few
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=seeds, weights=st.tuples(weights, weights))
def test_nuslerp_of_task_vectors_is_mergekit_s(flags, rows, columns, seed, weights):
    per_model = [{"weight": weight} for weight in weights]
    models = random_models((rows, columns), 2, seed)
    shared_direction = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed + 1))
    models = replace(models, tensors=tuple(tensor + shared_direction for tensor in models.tensors))
    theirs = merged_by_mergekit("nuslerp", models, per_model, flags, dtype=torch.float64)
    ours = merged("nuslerp", models, per_model, flags)
    assert_close(ours, theirs, models.scale * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        ("model_stock", "filter_wise", [True, False]),
        ("sce", "select_topk", [-1.0, 0.0, 0.01, 0.3, 0.5, 0.99, 1.0]),
        ("ram", "epsilon", [0.0, 0.1, 0.5, 10.0]),
        ("ramplus_tl", "epsilon", [1e-5, 0.1, 0.5, 10.0]),
        ("ramplus_tl", "r", [0.0, 0.5, 3.0]),
        ("ramplus_tl", "alpha", [0.0, 0.1, 1e3]),
        ("nearswap", "t", [0.0, 1e-4, 0.1, 2.0]),
        ("multislerp", "normalize_weights", [True, False]),
        ("karcher", "max_iter", [0, 1, 3]),
        ("karcher", "tol", [1e-8, 0.1, 3.0, 1e4]),
    ],
)
@pytest.mark.parametrize("shape", [(40,), (9, 7), (1,)])
def test_every_setting_of_a_shared_parameter_is_mergekit_s(method, name, values, shape):
    per_model = fitting(method, [{"weight": 0.3}, {"weight": 0.9}, {"weight": 0.5}])
    models = random_models(shape, len(per_model), 5)
    for value in values:
        theirs = merged_by_mergekit(method, models, per_model, {name: value})
        assert_close(merged(method, models, per_model, {name: value}), theirs, models.scale)


@pytest.mark.parametrize("method", [name for name in MERGEKIT if name != "passthrough"])
def test_tensors_of_zeros_and_tensors_alike_are_merged_as_by_mergekit(method):
    """Where angles, variances and sums vanish. Random methods have nothing to draw from."""
    zeros, model = torch.zeros(12), torch.randn(12, generator=torch.Generator().manual_seed(3))
    per_model = fitting(method, [{"weight": 0.25, "density": 0.5}, {"weight": 0.75, "density": 0.5}])
    for base, others in ((zeros, (zeros, zeros)), (model, (model, model)), (zeros, (model, model))):
        if method in ("multislerp", *RANDOM) and others[0] is base and method != "multislerp":
            continue
        models = Models(base, others[: len(per_model)], fields(2, 12))
        with with_masks_of(method, models, per_model):
            theirs = merged_by_mergekit(method, models, per_model, {})
        if not METHODS[method].takes("density"):
            assert_close(merged(method, models, per_model), theirs, 1.0)


def test_directions_that_cancel_out_are_merged_on_a_line_whatever_their_number():
    """mergekit does so for two models and refuses three."""
    model = torch.tensor([1.0, -2.0, 3.0])
    two, equal = Models(torch.zeros(3), (model, -model), ()), [{"weight": 1.0}] * 2
    assert torch.equal(merged("multislerp", two, equal), merged_by_mergekit("multislerp", two, equal, {}))
    four = Models(torch.zeros(3), (model, -model, 2 * model, -2 * model), ())
    assert torch.equal(merged("multislerp", four, [{"weight": 1.0}] * 4), torch.zeros(3))


@few
@given(seed=seeds, density=st.floats(0.0, 0.99), gamma=st.floats(0, 1))
def test_breadcrumbs_keeps_what_mergekit_keeps(seed, density, gamma):
    models = models_without_ties((10, 20), 1, seed)
    per_model = [{"weight": 1.0, "density": density, "gamma": gamma}]
    ours = merged("breadcrumbs", models, per_model)
    assert torch.equal(ours, merged_by_mergekit("breadcrumbs", models, per_model, {}))
    assert (ours != models.base).sum() == int(density * 200)


@pytest.mark.parametrize("row", [7, 50])
def test_della_keeps_each_element_with_the_probability_of_its_rank(row):
    """A thousand fields: for every rank the share kept, within five standard errors."""
    density, epsilon, draws = 0.4, 0.25, 1000
    base = torch.zeros(2, row)
    delta = torch.stack([torch.arange(1, row + 1), -torch.arange(row, 0, -1)]).float()
    kept = torch.zeros(2, row)
    for seed in range(draws):
        models = Models(base, (delta,), (uniform_field(seed, 0, "tensor", 2 * row, "cpu"),))
        found = merged("della", models, [{"weight": 1.0, "density": density, "epsilon": epsilon}], {"rescale": False})
        kept += found != 0
    expected = density - epsilon + 2 * epsilon * torch.arange(row) / (row - 1)
    for share in (kept[0] / draws, kept[1].flip(0) / draws):
        assert ((share - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


@few
@given(shape=shapes, seed=seeds, density=st.floats(0.01, 0.99))
def test_della_s_masks_nest_as_the_density_grows(shape, seed, density):
    models = random_models(shape, 1, seed)

    def kept(at: float) -> torch.Tensor:
        chosen = [{"weight": 1.0, "density": at, "epsilon": 0.005}]
        return merged("della", models, chosen, {"rescale": False}) != models.base

    assert not (kept(density) & ~kept(min(density + 0.2, 1.0))).any()


def test_della_rescaled_by_density_divides_by_each_element_s_own_probability():
    models, values = models_without_ties((300,), 1, 2), {"weight": 1.0, "density": 0.5, "epsilon": 0.4}
    kept, rescaled = (merged("della_linear", models, [values], {"rescale": on}, "density") for on in (False, True))
    delta = models.tensors[0] - models.base
    ranks = delta.abs().argsort().argsort()
    probability = 0.1 + 0.8 * ranks / 299
    assert_close(rescaled - models.base, (kept - models.base) / probability, 10 * models.scale)


@few
@given(seed=seeds, count=st.integers(1, 400))
def test_a_sum_in_order_is_the_sum(seed, count):
    values = torch.randn((3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert ordered_sum(values).shape == (3, 1)
    exact = [math.fsum(row) for row in values.tolist()]
    assert ordered_sum(values).flatten().tolist() == pytest.approx(exact, abs=1e-12)


def test_arcee_fusion_takes_the_quartiles_of_all_elements_however_many():
    """mergekit draws a million of them; both agree on nearly all elements."""
    models = random_models((1100, 1000), 1, 4)
    torch.manual_seed(0)
    theirs = merged_by_mergekit("arcee_fusion", models, [{}], {})
    ours = merged("arcee_fusion", models, [{}])
    assert same_bits(ours, merged("arcee_fusion", models, [{}]))
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-2


# What a sparsified task vector is divided by


@pytest.mark.parametrize("method", UNIFORM)
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
    if not torch.equal(ours, models.base):
        before = (models.tensors[0] - models.base).double().abs().sum().item()
        after = (ours.double() - models.base.double()).abs().sum().item()
        assert after == pytest.approx(before, rel=1e-4)
    elif method in UNIFORM:
        assert not keep_mask(models.fields[0], density).any()


@pytest.mark.parametrize("method", SPARSE)
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


@pytest.mark.parametrize("method", OTHERS)
@few
@given(seed=seeds, exponent=st.integers(-10, 40), weight=st.floats(0.1, 2), t=st.floats(0, 1))
def test_other_methods_merge_identical_models_to_themselves(method, seed, exponent, weight, t):
    """Down to norms that count as none."""
    model = random_models((30,), 0, seed).base * 2.0**exponent
    per_model = fitting(method, [{"weight": weight}, {"weight": 2 * weight}, {"weight": weight / 3}])
    models = Models(model, (model.clone(),) * len(per_model), ())
    for with_base in (True, False):
        assert same_bits(merged(method, models, per_model, {"t": t}, with_base=with_base), model)


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


@pytest.mark.parametrize("method", SPARSE)
@few
@given(shape=shapes, seed=seeds, weight=weights, shared=shared)
def test_a_lone_model_at_density_one_is_merged_as_by_task_arithmetic(method, shape, seed, weight, shared):
    models, chosen = random_models(shape, 1, seed), [{"weight": weight, "density": 1.0}]
    assert torch.equal(merged(method, models, chosen, shared), merged("task_arithmetic", models, chosen, shared))


@pytest.mark.parametrize("method", METHODS)
@few
@given(shape=shapes, seed=seeds, per_model=per_model, shared=shared)
def test_inputs_are_left_as_they_were(method, shape, seed, per_model, shared):
    per_model = fitting(method, per_model)
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


@pytest.mark.parametrize("shape", [(100_003,), (411, 243)])
@pytest.mark.parametrize(
    ("method", "normalize"),
    [(name, normalize) for name, row in METHODS.items() for normalize in (False, True)[: 1 + row.shares("normalize")]],
)
def test_the_number_of_threads_changes_no_bit(method, normalize, shape):
    per_model = fitting(method, [{"weight": weight, "density": 0.6} for weight in (0.3, 0.7, -0.45)])
    models = random_models(shape, len(per_model), 1)
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
    per_model = [{"weight": weight, "density": 0.6} for weight in (0.3, 0.7, -0.45, 0.11, 0.9, 0.2)]
    per_model = fitting(method, per_model)
    models = random_models((10_007,), len(per_model), 1)
    on_device = Models(
        models.base.cuda(), tuple(t.cuda() for t in models.tensors), tuple(field.cuda() for field in models.fields)
    )
    ours, theirs = (merged(method, each, per_model, {"normalize": normalize}) for each in (models, on_device))
    if method in ANGLES:
        assert_close(ours, theirs.cpu(), models.scale)  # sines and exponentials are a device's own, in the last place
    else:
        assert same_bits(ours, theirs.cpu())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_tensors_without_data(method):
    """So no result waits for a value to be read back, and nothing branches on one."""
    per_model = fitting(method, [{"weight": 0.3, "density": 0.6}] * 3)
    for shape in ((4, 6), (5,), (1,), (2, 3, 4)):
        base = torch.empty(shape, device="meta")
        field = uniform_field(0, 0, "tensor", base.numel(), "meta")
        models = Models(base, (base,) * len(per_model), (field,) * len(per_model))
        found = merged(method, models, per_model)
        assert (found.shape, found.dtype, found.device.type) == (base.shape, torch.float32, "meta")


def test_an_unknown_method_is_an_input_error_that_names_the_closest():
    with pytest.raises(
        InputError, match=r"^space.method is 'dare_tie', no known merge method; did you mean 'dare_ties'"
    ):
        methods.get("dare_tie", "space.method")
