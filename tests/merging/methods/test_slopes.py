"""Slopes against float64 autograd through merges that are written here a second time, and only share the masks."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from evomerge.merging import methods
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs, Method, unmeasured
from evomerge.merging.methods.kernels import as_field, uniform_field
from evomerge.merging.methods.slopes import slopes, smooth_parameters
from tests.merging.methods.autograd import leaves_of, merged
from tests.merging.methods.measured import statistics

SMOOTH = [name for name, method in METHODS.items() if method.slopes]
SHAPE = (24, 17)
OWN = {"weight": (0.7, 0.4, -0.3), "density": (0.6, 0.5, 0.9), "epsilon": (0.1,) * 3, "gamma": (0.05,) * 3}
SHARED = {"lambda": 1.3, "t": 0.35}


def inputs_of(method: Method, changes: Mapping[str, Any], dtype: torch.dtype, planes: bool = False) -> Inputs:
    """Random tensors around a base, with the parameters above and some changed."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(SHAPE, generator=generator)
    count = method.most or 3
    tensors = tuple((base + 0.2 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(count))
    own = {**OWN, **{name: value for name, value in changes.items() if isinstance(value, tuple)}}
    shared = {
        parameter.name: changes.get(parameter.name, SHARED.get(parameter.name, parameter.default))
        for parameter in method.shared
    }
    if method.name == "nearswap":
        shared["t"] = 0.05
    return Inputs(
        base=base.to(dtype) if method.base == "required" or changes.get("with_base") else None,
        tensors=tensors,
        per_model=tuple(
            {parameter.name: own.get(parameter.name, (0.8,) * 3)[index] for parameter in method.per_model}
            for index in range(count)
        ),
        shared=shared,
        uniforms=lambda index: as_field(uniform_field(7, index, "here", base.numel(), "cpu"), planes),
        rescale=changes.get("rescaled", "density"),
        planes=planes,
        statistic=statistics(base) if method.statistics else unmeasured,
    )


def expected(method: Method, inputs: Inputs, gradient: torch.Tensor) -> dict[tuple[str, int | None], float]:
    leaves = leaves_of(method, inputs)
    (merged(method, inputs, leaves) * gradient.double()).sum().backward()  # type: ignore[no-untyped-call]
    return {key: float(value.grad) for key, value in leaves.items() if value.grad is not None}


CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in SMOOTH]
CASES += [(name, {"normalize": True}) for name in SMOOTH if METHODS[name].shares("normalize")]
CASES += [(name, {"normalize": False}) for name in SMOOTH if METHODS[name].shares("normalize")]
CASES += [(name, {"weight": (0.8, 0.0, 0.5)}) for name in ("ties", "dare_ties", "breadcrumbs_ties", "della")]
CASES += [(name, {"rescaled": "l1"}) for name in ("dare_ties", "dare_linear", "della", "della_linear")]
CASES += [(name, {"with_base": True}) for name in ("nuslerp", "multislerp")]
CASES += [("multislerp", {"normalize_weights": False}), ("task_arithmetic", {"lambda": 1.0}), ("slerp", {"t": 0.9})]
CASES += [(f"{name}+aim", {"omega": 0.3}) for name in ("task_arithmetic", "regmean", "gradient_matching")]
CASES += [(f"{name}+rows", {}) for name in ("task_arithmetic", "dare_ties", "ties", "slerp", "fisher")]
CASES += [("fisher", {"floor": 1.0}), ("gradient_matching", {"delta": 2.0}), ("regmean", {"alpha": 0.2})]
CASES += [("dare_ties", {"density": (1.0, 1.0, 1.0)}), ("ties", {"density": (0.0, 0.2, 1.0)})]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{name}-{changes}" for name, changes in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_derivatives_are_those_of_autograd_in_float64(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    method, gradient = methods.get(name, "here"), torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    inputs = inputs_of(method, changes, dtype)
    if name == "multislerp" and not changes.get("with_base"):
        inputs = inputs_of(method, {"weight": (0.7, 0.4, 0.3), **changes}, dtype)
    measured = {key: float(value) for key, value in slopes(method, inputs, gradient, method.slopes).items()}
    wanted = expected(method, inputs, gradient)
    assert measured.keys() == wanted.keys()
    size = float(gradient.norm() * torch.stack([tensor.float() for tensor in inputs.tensors]).norm())
    for key, value in wanted.items():
        assert measured[key] == pytest.approx(value, rel=2e-4, abs=2e-6 * size), key


@pytest.mark.parametrize("planes", [False, True], ids=["numbers", "planes"])
def test_fields_may_have_either_form(planes: bool) -> None:
    method, gradient = METHODS["dare_ties"], torch.ones(SHAPE)
    given = [
        slopes(method, inputs_of(method, {}, torch.float32, form), gradient, ["weight"]) for form in (False, planes)
    ]
    assert given[0] == given[1]


def test_a_model_of_weight_0_can_move_away_from_it_where_signs_are_elected() -> None:
    method = METHODS["ties"]
    inputs = inputs_of(method, {"weight": (1.0, 0.0, 0.0), "density": (1.0, 1.0, 1.0)}, torch.float32)
    base = inputs.base
    assert base is not None
    towards = inputs.tensors[1] - base
    assert float(slopes(method, inputs, towards, ["weight"])["weight", 1]) > 0


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(SMOOTH)))
def test_methods_that_claim_no_derivative_give_none(name: str) -> None:
    method = METHODS[name]
    shared = {parameter.name: parameter.default for parameter in method.shared}
    assert smooth_parameters(method, shared, ["weight", "lambda", "t", "scale", "density"]) == ()


def test_nuslerp_by_rows_gives_no_derivative() -> None:
    method = METHODS["nuslerp"]
    shared = {"nuslerp_flatten": False, "nuslerp_row_wise": False}
    assert smooth_parameters(method, shared, ["weight"]) == ()
    assert smooth_parameters(method, {**shared, "nuslerp_flatten": True}, ["weight"]) == ("weight",)


def test_the_gradient_may_lie_in_memory_in_any_way() -> None:
    method = METHODS["task_arithmetic"]
    inputs, gradient = inputs_of(method, {}, torch.float32), torch.randn(SHAPE[::-1]).T
    plain = slopes(method, inputs, gradient.contiguous(), ["weight"])
    assert slopes(method, inputs, gradient, ["weight"]) == plain


def test_only_wanted_parameters_are_answered() -> None:
    method = METHODS["ties"]
    measured = slopes(method, inputs_of(method, {}, torch.float32), torch.ones(SHAPE), ["lambda"])
    assert measured.keys() == {("lambda", None)}
