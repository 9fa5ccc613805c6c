"""The methods that mergekit has not, beside a second derivation in float64 (derived.py), and what they promise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging import methods
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs, Kind, unmeasured
from evomerge.merging.methods.regmean import closest_outputs
from evomerge.merging.methods.task_vectors import TaskVectorMerge
from tests.merging.methods import derived
from tests.merging.methods.measured import statistics

OURS = [name for name, method in METHODS.items() if not method.mergekit]
OF_MATRICES = ["tsv", "iso", "knots", "wudi", "ace"]
MEASURED = ["fisher", "gradient_matching", "regmean", "regmean_plus"]
WEIGHTS = (0.7, 1.2, -0.4)
few = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(6, 20), st.integers(6, 60))
seeds = st.integers(0, 2**32)


def inputs_of(
    method: str, deltas: list[np.ndarray], weights: tuple[float, ...] = WEIGHTS, in_layer: bool = True, **own: Any
) -> Inputs:
    """The models whose task vectors are given, in float64, so that only the merge rounds. The base is 0."""
    row = METHODS[method]
    known = {parameter.name: parameter.default for parameter in (*row.per_model, *row.shared)} | own
    return Inputs(
        base=torch.zeros(deltas[0].shape, dtype=torch.float64),
        tensors=tuple(torch.from_numpy(delta.copy()) for delta in deltas),
        per_model=tuple(
            {each.name: known[each.name] for each in row.per_model} | {"weight": weight}
            for weight in weights[: len(deltas)]
        ),
        shared={each.name: known[each.name] for each in row.shared},
        uniforms=lambda index: torch.empty(0),
        rescale="density",
        in_layer=in_layer,
        statistic=statistics(torch.from_numpy(deltas[0])) if row.statistics else unmeasured,
    )


def merged(method: str, deltas: list[np.ndarray], *rest: Any, **own: Any) -> np.ndarray:
    return np.asarray(METHODS[method].merge(inputs_of(method, deltas, *rest, **own)).double().numpy())


def task_vectors(shape: tuple[int, ...], seed: int, count: int = 3, scale: float = 1.0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [scale * random.standard_normal(shape) for _ in range(count)]


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 2e-6) -> None:
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


# Beside the second derivation


@few
@given(shape=shapes, seed=seeds, threshold=st.sampled_from([0.0, 0.2, 0.6, 1.5]), agree=st.integers(1, 4))
def test_consensus_keeps_what_enough_models_claim(shape, seed, threshold, agree):
    deltas = task_vectors(shape, seed)
    ours = merged("consensus", deltas, threshold=threshold, agree=agree, **{"lambda": 0.8})
    assert_close(ours, 0.8 * derived.consensus(deltas, WEIGHTS, [threshold] * 3, agree))


@few
@given(shape=shapes, seed=seeds, density=st.floats(0.02, 1.0))
def test_localize_and_stitch_averages_where_patches_overlap(shape, seed, density):
    deltas = task_vectors(shape, seed)
    ours = merged("localize_and_stitch", deltas, density=density, **{"lambda": 1.3})
    assert_close(ours, 1.3 * derived.localize_and_stitch(deltas, WEIGHTS, [density] * 3))


@few
@given(shape=shapes, seed=seeds, count=st.integers(1, 3))
def test_tsv_keeps_a_share_of_singular_vectors_and_sets_them_apart(shape, seed, count):
    deltas = task_vectors(shape, seed, count)
    theirs = sum(weight * part for weight, part in zip(WEIGHTS, derived.tsv(deltas), strict=False))
    assert_close(merged("tsv", deltas), np.asarray(theirs), 1e-5)


@few
@given(shape=shapes, seed=seeds)
def test_iso_makes_all_singular_values_of_the_sum_equal(shape, seed):
    deltas = task_vectors(shape, seed)
    ours = merged("iso", deltas, alpha=0.9)
    assert_close(ours, 0.9 * derived.iso(deltas), 1e-5)
    values = np.linalg.svd(ours, compute_uv=False)
    assert values.min() == pytest.approx(values.max(), rel=1e-5)


@few
@given(shape=shapes, seed=seeds, normalize=st.booleans())
def test_knots_with_all_elements_is_ties_of_coordinates(shape, seed, normalize):
    """Rotations within the basis would change what is trimmed, so the bases are compared by what spans them."""
    deltas = task_vectors(shape, seed)
    left, values, right = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    coordinates = np.split(values[:, None] * right, 3, axis=1)
    theirs = left @ derived.ties(coordinates, WEIGHTS, [0.6] * 3, normalize)
    assert_close(merged("knots", deltas, density=0.6, normalize=normalize), theirs, 1e-5)


@few
@given(seed=seeds)
def test_knots_of_one_low_rank_model_gives_it_back_from_a_small_basis(seed):
    random = np.random.default_rng(seed)
    delta = random.standard_normal((24, 2)) @ random.standard_normal((2, 16))
    made: list[tuple[torch.Tensor, ...]] = []

    def once(what: Any, models: tuple[int, ...], make: Callable[[], Any], /) -> Any:
        found = make()
        made.extend([found] if isinstance(found, tuple) else [])
        return found

    inputs = inputs_of("knots", [delta], (1.0,))
    ours = METHODS["knots"].merge(Inputs(**{name: getattr(inputs, name) for name in inputs.__slots__} | {"once": once}))
    assert_close(ours.double().numpy(), delta, 1e-6)
    assert made[0][0].shape == (24, 2)


@few
@given(shape=shapes, seed=seeds, count=st.integers(1, 3))
def test_wudi_minimizes_the_interference(shape, seed, count):
    deltas = task_vectors(shape, seed, count)
    assert_close(merged("wudi", deltas), derived.wudi(deltas, WEIGHTS[:count]), 1e-5)


@few
@given(shape=shapes, seed=seeds, sizes=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.05, 3.0), (1.0, 1e-3, 20.0)]))
def test_ace_weighs_models_by_the_covariance_of_their_changes(shape, seed, sizes):
    deltas = [size * delta for size, delta in zip(sizes, task_vectors(shape, seed), strict=True)]
    assert_close(merged("ace", deltas, alpha=1.1), 1.1 * derived.ace(deltas, 1e-2), 1e-5)


def test_ace_is_tested_with_and_without_its_refinement():
    spreads = []
    for sizes in ((1.0, 1.0, 1.0), (1.0, 0.05, 3.0)):
        deltas = [size * delta for size, delta in zip(sizes, task_vectors((12, 9), 0), strict=True)]
        logs = np.log([np.square(delta).sum() for delta in deltas])
        spreads.append(logs.var(ddof=1) / logs.mean() ** 2)
    assert spreads[0] < 0.3 < spreads[1]


def of(kind: Kind, deltas: list[np.ndarray], models: range) -> tuple[list[np.ndarray], list[float]]:
    """What was measured of models, and the means."""
    found = statistics(torch.from_numpy(deltas[0]))
    measured = [each for index in models if (each := found(kind, index)) is not None]
    return [np.asarray(each.values, dtype=np.float64) for each in measured], [each.mean for each in measured]


@few
@given(shape=shapes, seed=seeds, count=st.integers(1, 3), floor=st.sampled_from([0.0, 1e-3, 0.5]))
def test_fisher_averages_by_information(shape, seed, count, floor):
    deltas, weights = task_vectors(shape, seed, count), (0.7, 1.2, 0.4)[:count]
    theirs = derived.fisher(deltas, weights, *of("fisher", deltas, range(count)), floor)
    assert_close(merged("fisher", deltas, weights, floor=floor, **{"lambda": 0.8}), 0.8 * theirs, 1e-5)


@few
@given(shape=shapes, seed=seeds, count=st.integers(1, 3), delta=st.sampled_from([0.01, 1.0]))
def test_gradient_matching_is_task_arithmetic_less_the_mismatch_of_gradients(shape, seed, count, delta):
    deltas, weights = task_vectors(shape, seed, count), (0.7, 1.2, 0.4)[:count]
    theirs = derived.gradient_matching(deltas, weights, *of("fisher", deltas, range(-1, count)), delta)
    assert_close(merged("gradient_matching", deltas, weights, delta=delta), theirs, 1e-5)


def test_gradient_matching_goes_over_into_task_arithmetic_and_fisher_merging():
    """With a large delta, and with none where the base knows nothing."""
    deltas, weights = task_vectors((7, 9), 4), (0.3, 0.3, 0.4)
    arithmetic = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    assert_close(merged("gradient_matching", deltas, weights, delta=1e6), np.asarray(arithmetic), 1e-4)
    information, means = of("fisher", deltas, range(3))
    nothing = [np.zeros_like(deltas[0]), *information]
    theirs = derived.gradient_matching(deltas, weights, nothing, [1.0, *means], 0.0)
    assert_close(merged("fisher", deltas, weights, floor=0.0), theirs, 1e-5)


@pytest.mark.parametrize(("method", "kind"), [("regmean", "grams"), ("regmean_plus", "merged_grams")])
@few
@given(shape=shapes, seed=seeds, count=st.integers(1, 3), alpha=st.sampled_from([0.1, 0.9, 1.0]))
def test_regmean_gives_the_outputs_closest_to_those_of_the_models(method, kind, shape, seed, count, alpha):
    deltas = task_vectors(shape, seed, count)
    theirs = derived.regmean(deltas, WEIGHTS[:count], of(kind, deltas, range(count))[0], alpha)
    assert_close(merged(method, deltas, alpha=alpha, **{"lambda": 1.1}), 1.1 * theirs, 1e-3)


def test_regmean_stays_at_the_average_where_no_input_is():
    deltas, grams = task_vectors((5, 8), 3, 2), [torch.diag(torch.tensor([*([1.0] * 6), 0.0, 0.0]))] * 2
    found = closest_outputs([torch.from_numpy(delta) for delta in deltas], [gram.double() for gram in grams])
    assert_close(sum(found).numpy(), sum(deltas) / 2)  # type: ignore[union-attr, arg-type]


def test_aim_keeps_the_base_in_the_channels_that_are_the_most_active():
    deltas = task_vectors((6, 5), 2, 2)
    row = methods.get("task_arithmetic+aim", "here")
    inputs = replace(
        inputs_of("task_arithmetic", deltas, (0.5, 0.8)),
        shared={"normalize": False, "rescale": False, "lambda": 1.0, "omega": 0.3},
        statistic=statistics(torch.from_numpy(deltas[0])),
    )
    magnitudes = of("activations", deltas, range(-1, 0))[0][0]
    theirs = (0.5 * deltas[0] + 0.8 * deltas[1]) * (1 - magnitudes / magnitudes.max() * 0.7)
    assert_close(row.merge(inputs).double().numpy(), theirs)
    plain = METHODS["task_arithmetic"].merge(inputs)
    assert torch.equal(row.merge(replace(inputs, shared={**inputs.shared, "omega": 1.0})), plain)
    assert torch.equal(row.merge(replace(inputs, in_layer=False)), plain)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "task_arithmetic+aim"])
def test_matrices_that_are_stored_the_other_way_round_are_merged_as_their_transposes(method: str) -> None:
    deltas = task_vectors((6, 5), 2, 2)
    shared = {"normalize": False, "rescale": False, "lambda": 1.0, "omega": 0.3, "alpha": 0.9}
    measured = statistics(torch.from_numpy(deltas[0]))
    inputs = replace(inputs_of(method.partition("+")[0], deltas, (0.5, 0.8)), shared=shared, statistic=measured)

    def round_about(kind: Any, index: int) -> Any:
        return replace(measured(kind, index), transposed=True)

    assert inputs.base is not None
    turned = replace(
        inputs, base=inputs.base.T, tensors=tuple(tensor.T for tensor in inputs.tensors), statistic=round_about
    )
    row = methods.get(method, "here")
    assert torch.equal(row.merge(turned).T, row.merge(inputs))


# What becomes of tensors that are no matrices of layers


@pytest.mark.parametrize("shape", [(15,), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("method", ["tsv", "wudi", "iso", "ace", "regmean", "regmean_plus"])
def test_what_is_no_matrix_of_a_layer_is_averaged(method, shape):
    deltas = task_vectors(shape, 3)
    weights = WEIGHTS if METHODS[method].takes("weight") else (1.0,) * 3
    theirs = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True)) / 3
    assert_close(merged(method, deltas, WEIGHTS, False), np.asarray(theirs))


def test_knots_merges_what_is_no_matrix_of_a_layer_by_ties():
    deltas = task_vectors((5, 3), 3)
    ours = merged("knots", deltas, WEIGHTS, False, density=0.5)
    assert_close(ours, derived.ties(deltas, WEIGHTS, [0.5] * 3, True))


# Promises


@pytest.mark.parametrize("method", ["wudi", "localize_and_stitch", "knots", "fisher", "regmean", "regmean_plus"])
@few
@given(shape=shapes, seed=seeds)
def test_fine_tunes_that_are_the_same_merge_to_themselves(method, shape, seed):
    (delta,) = task_vectors(shape, seed, 1)
    assert_close(merged(method, [delta] * 3, (1.0,) * 3, density=1.0), delta, 1e-5)


@pytest.mark.parametrize("method", [name for name in OURS if name not in ("iso", "ace")])
@few
@given(shape=shapes, seed=seeds)
def test_a_lone_model_of_weight_one_comes_back(method, shape, seed):
    (delta,) = task_vectors(shape, seed, 1)
    assert_close(merged(method, [delta], (1.0,), density=1.0), delta, 1e-5)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("others", [0, 1, 2])
def test_models_that_equal_the_base_leave_a_merge_finite_and_change_nothing_alone(method, others):
    deltas = [np.zeros((6, 5))] * 3
    deltas[:others] = task_vectors((6, 5), 4, others)
    ours = merged(method, deltas)
    assert np.isfinite(ours).all()
    assert others or not ours.any()


@pytest.mark.parametrize("method", OF_MATRICES)
def test_directions_that_no_model_has_stay_as_they_are(method):
    """Vectors of singular values of 0 are arbitrary, so none may enter."""
    random = np.random.default_rng(5)
    outer = [random.standard_normal((12, 1)) @ random.standard_normal((1, 10)) for _ in range(3)]
    rank = 3 if method != "ace" else 4  # whose mean row takes part
    assert np.linalg.matrix_rank(merged(method, outer), tol=1e-4) <= rank


@pytest.mark.parametrize("method", OURS)
def test_a_weight_of_zero_for_every_model_gives_the_base(method):
    deltas = task_vectors((7, 5), 1)
    ours = merged(method, deltas, (0.0,) * 3, alpha=0.0)
    assert not ours.any()


@pytest.mark.parametrize("method", [*OF_MATRICES, *MEASURED])
def test_a_broken_model_makes_nans_and_no_error_of_a_library(method):
    deltas = task_vectors((7, 5), 1)
    deltas[1][2, 3] = np.nan
    assert np.isnan(merged(method, deltas)).any()


def test_methods_that_mergekit_has_not_are_all_here():
    assert {*OURS} == {*OF_MATRICES, *MEASURED, "consensus", "localize_and_stitch"}
    assert all(not isinstance(METHODS[name].function, TaskVectorMerge) for name in OURS)
