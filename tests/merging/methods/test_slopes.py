"""Slopes against float64 autograd through merges that are written here a second time, and only share the masks."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs, Method
from evomerge.merging.methods.kernels import as_field, uniform_field
from evomerge.merging.methods.slopes import slopes, smooth_parameters
from evomerge.merging.methods.sparsify import SPARSIFIERS
from evomerge.merging.methods.task_vectors import TaskVectorMerge, _scale

SMOOTH = [name for name, method in METHODS.items() if method.slopes]
SHAPE = (24, 17)
Leaves = Mapping[tuple[str, int | None], torch.Tensor]
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
    )


def masks(method: Method, inputs: Inputs) -> list[torch.Tensor]:
    """What each task vector is multiplied by before its weight: the mask, and the factor that makes up for it."""
    function = method.function
    assert isinstance(function, TaskVectorMerge)
    assert inputs.base is not None
    kept = []
    for index, tensor in enumerate(inputs.tensors):
        delta = (tensor.float() - inputs.base.float()).flatten()
        if function.sparsify is None:
            kept.append(torch.ones(SHAPE, dtype=torch.float64))
            continue
        sparsifier = SPARSIFIERS[function.sparsify]
        values = sparsifier.numbers(inputs, index)
        numbers = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
        fields = sparsifier.fields(inputs, index)
        mask = sparsifier.keep(delta.clone(), fields, numbers).double()
        if inputs.shared["rescale"]:
            probability = sparsifier.probability(fields, numbers) if inputs.rescale == "density" else None
            factor = _scale(inputs, index, function.sparsify, values) if probability is None else 1 / probability
            mask = mask * torch.as_tensor(factor).double()
        kept.append(mask.reshape(SHAPE))
    return kept


def merged(method: Method, inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """The merge in float64, as papers write it."""
    base = inputs.base.double() if inputs.base is not None else None
    models = [tensor.double() for tensor in inputs.tensors]
    if method.name == "linear":
        weights = [leaves["weight", index] for index in range(len(models))]
        total = sum(weight * model for weight, model in zip(weights, models, strict=True))
        return total / sum(weights) if inputs.shared["normalize"] else total  # type: ignore[operator, return-value]
    if method.name == "passthrough":
        return models[0] * leaves["scale", 0]
    if method.name in ("slerp", "nuslerp"):
        return arc(method, inputs, leaves)
    if method.name == "multislerp":
        return barycenter(inputs, leaves)
    assert base is not None
    if method.name == "nearswap":
        away = base - models[0]
        return base - away * torch.clamp(leaves["t", None] / away.abs().clamp(min=1e-9), max=1.0)
    weights = [leaves["weight", index] for index in range(len(models))]
    kept = masks(method, inputs)
    deltas = [(model - base) * mask for model, mask in zip(models, kept, strict=True)]
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    function = method.function
    assert isinstance(function, TaskVectorMerge)
    total = torch.stack(weighted).sum(0)
    if function.consensus:
        elected = torch.where(total.detach() >= 0, 1.0, -1.0)
        agree = [
            ((delta if weight == 0 else own).detach() * elected > 0).double()
            for own, delta, weight in zip(weighted, deltas, weights, strict=True)
        ]
        total = sum(own * mine for own, mine in zip(weighted, agree, strict=True))  # type: ignore[assignment]
        if inputs.shared["normalize"]:
            by = sum(weight * mine for weight, mine in zip(weights, agree, strict=True))
            total = total / torch.where(by.detach() == 0, 1.0, by)  # type: ignore[union-attr, arg-type]
    elif inputs.shared["normalize"]:
        total = total / sum(weights)
    return base + leaves["lambda", None] * total


def arc(method: Method, inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """The point of the arc between two models, or between two task vectors."""
    models = [tensor.double() for tensor in inputs.tensors]
    origin: Any = 0.0
    if method.name == "slerp":
        assert inputs.base is not None
        t, ends = leaves["t", None], [inputs.base.double(), models[0]]
    else:
        t, ends = leaves["weight", 1] / (leaves["weight", 0] + leaves["weight", 1]), models
        if inputs.base is not None:
            origin = inputs.base.double()
            ends = [end - origin for end in ends]
    cosine = (ends[0] * ends[1]).sum() / (ends[0].norm() * ends[1].norm())
    angle = torch.acos(cosine)
    point = torch.sin((1 - t) * angle) * ends[0] + torch.sin(t * angle) * ends[1]
    return origin + point / torch.sin(angle)


def barycenter(inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """The weighted mean in the tangent space at the normalized mean direction."""
    weights = torch.stack([leaves["weight", index] for index in range(len(inputs.tensors))])
    shares = weights / weights.sum() if inputs.shared["normalize_weights"] else weights
    origin = inputs.base.double() if inputs.base is not None else torch.zeros(SHAPE, dtype=torch.float64)
    vectors = torch.stack([(tensor.double() - origin).flatten() for tensor in inputs.tensors])
    eps = inputs.shared["eps"]
    norms = vectors.norm(dim=1)
    units = vectors / (norms + eps)[:, None]
    mean = (shares[:, None] * units).sum(0)
    mean = mean / mean.norm()
    tangents = units - (units @ mean)[:, None] * mean
    step = (shares[:, None] * tangents).sum(0)
    angle = step.norm() + eps
    point = torch.cos(angle) * mean + torch.sin(angle) * step / angle
    return origin + (point * (shares * norms).sum()).reshape(SHAPE)


def expected(method: Method, inputs: Inputs, gradient: torch.Tensor) -> dict[tuple[str, int | None], float]:
    def leaf(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    leaves: dict[tuple[str, int | None], torch.Tensor] = {
        (name, index): leaf(values[name])
        for name in method.slopes
        for index, values in enumerate(inputs.per_model)
        if method.takes(name)
    }
    leaves |= {(name, None): leaf(inputs.shared[name]) for name in method.slopes if method.shares(name)}
    (merged(method, inputs, leaves) * gradient.double()).sum().backward()  # type: ignore[no-untyped-call]
    return {key: float(value.grad) for key, value in leaves.items() if value.grad is not None}


CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in SMOOTH]
CASES += [(name, {"normalize": True}) for name in SMOOTH if METHODS[name].shares("normalize")]
CASES += [(name, {"normalize": False}) for name in SMOOTH if METHODS[name].shares("normalize")]
CASES += [(name, {"weight": (0.8, 0.0, 0.5)}) for name in ("ties", "dare_ties", "breadcrumbs_ties", "della")]
CASES += [(name, {"rescaled": "l1"}) for name in ("dare_ties", "dare_linear", "della", "della_linear")]
CASES += [(name, {"with_base": True}) for name in ("nuslerp", "multislerp")]
CASES += [("multislerp", {"normalize_weights": False}), ("task_arithmetic", {"lambda": 1.0}), ("slerp", {"t": 0.9})]
CASES += [("dare_ties", {"density": (1.0, 1.0, 1.0)}), ("ties", {"density": (0.0, 0.2, 1.0)})]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{name}-{changes}" for name, changes in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_derivatives_are_those_of_autograd_in_float64(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    method, gradient = METHODS[name], torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
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
