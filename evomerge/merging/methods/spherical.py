"""Means on a sphere: models as vectors whose direction is interpolated along arcs (SLERP and its kin).

Angles are worked out in float64 from sums of a fixed order and the result is rounded once, so the number of threads
changes no bit; another device's sine may, in the last place.
"""

import torch

from evomerge.merging.kernels import divisor, ordered_sum
from evomerge.merging.methods.base import Inputs

_NO_NORM = 1e-8
_NO_NORM_BY_ROWS = 1e-7
_NO_WEIGHT = 1e-6
_STRAIGHT = 0.9995  # |cosine| above which slerp is a straight line
_NO_SINE = 1e-16  # its square, below which nuslerp is one


def merge_slerp(inputs: Inputs) -> torch.Tensor:
    """The point at `t` of the arc from the base to the other model; of the line where they are nearly parallel."""
    assert inputs.base is not None
    a, b = inputs.base.to(torch.float64), inputs.tensors[0].to(torch.float64)
    norms = [torch.where(norm > _NO_NORM, norm, 1.0) for norm in (_norm(a.flatten()), _norm(b.flatten()))]
    cosine = (_dot(a.flatten(), b.flatten()) / (norms[0] * norms[1])).clamp(-1, 1)
    merged = _on_arc(a.flatten(), b.flatten(), cosine, cosine.abs() > _STRAIGHT, inputs.shared["t"])
    return merged.reshape(a.shape).to(torch.float32)


def merge_nuslerp(inputs: Inputs) -> torch.Tensor:
    """The same between two models at the second's share of the weights; between task vectors where there is a base.

    Without `nuslerp_flatten` each row has an angle of its own, or, with what mergekit calls `nuslerp_row_wise`, each
    column.
    """
    first, second = (parameters["weight"] for parameters in inputs.per_model)
    t = second / (first + second) if abs(first + second) >= _NO_WEIGHT else 0.5
    axis = 0 if inputs.shared["nuslerp_row_wise"] else -1
    flatten = inputs.shared["nuslerp_flatten"]
    a, b = (point.flatten() if flatten else point.transpose(axis, -1) for point in _points(inputs))
    floor = _NO_NORM_BY_ROWS**2
    cosine = _dot(a, b) / (_dot(a, a).clamp(min=floor) * _dot(b, b).clamp(min=floor)).sqrt()
    cosine = cosine.clamp(-1, 1)
    merged = _on_arc(a, b, cosine, 1 - cosine.square() <= _NO_SINE, t)
    return _from_origin(inputs, merged if flatten else merged.transpose(axis, -1))


def merge_multislerp(inputs: Inputs) -> torch.Tensor:
    """A weighted mean in the tangent space at the normalized mean direction (Goddard's barycentric interpolation).

    Where directions cancel out there is no such mean, and the result is the weighted sum.
    """
    if len(inputs.tensors) == 1:
        return inputs.tensors[0].clone()
    eps: float = inputs.shared["eps"]
    points = [point.flatten() for point in _points(inputs)]
    weights: list[float] = [parameters["weight"] for parameters in inputs.per_model]
    total = divisor(sum(weights), points[0]) if inputs.shared["normalize_weights"] else torch.ones_like(points[0][:1])
    shares = [weight / total for weight in weights]
    norms = [_norm(point) for point in points]
    units = [point / (norm + eps) for point, norm in zip(points, norms, strict=True)]

    mean = _weighted(shares, units)
    length = _norm(mean)
    cancelled = length < eps
    mean = mean / torch.where(cancelled, 1.0, length)
    tangent = _weighted(shares, [unit - _dot(unit, mean) * mean for unit in units])
    angle = _norm(tangent) + eps
    on_sphere = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    merged = torch.where(cancelled, _weighted(shares, points), on_sphere * _weighted(shares, norms))
    return _from_origin(inputs, merged)


def merge_karcher(inputs: Inputs) -> torch.Tensor:
    """The Riemannian centre of mass on the sphere, times the mean norm (gradient descent, `max_iter` steps at most).

    All steps stay in the span of the models, so they are taken on N coefficients, with the models' N x N cosines. A
    step shorter than `tol` is the last; later ones are computed and dropped, since to look would wait for the device.
    """
    if len(inputs.tensors) == 1:
        return inputs.tensors[0].clone()
    tol: float = inputs.shared["tol"]
    points = [tensor.to(torch.float64).flatten() for tensor in inputs.tensors]
    norms = torch.cat([_norm(point) for point in points])
    units = [point / torch.where(norm == 0, 1.0, norm) for point, norm in zip(points, norms, strict=True)]
    cosines = _cosines(units)
    counted = norms > tol
    shares = counted / counted.sum().clamp(min=1)
    first = (counted & (counted.cumsum(0) == 1)).to(torch.float64)

    mean, arrived = _unit(shares, cosines, tol, first), ~counted.any()
    for _ in range(inputs.shared["max_iter"]):
        cosine = ordered_sum(cosines * mean).flatten().clamp(-1, 1)
        theta = torch.acos(cosine)
        near = theta < tol
        pull = shares * torch.where(near, 0.0, theta / torch.where(near, 1.0, torch.sin(theta)))
        tangent = pull - ordered_sum(pull * cosine) * mean  # sum_i pull_i (u_i - cosine_i mean)
        length = _length(tangent, cosines)
        arrived = arrived | (length < tol)
        step = torch.cos(length) * mean + torch.sin(length) * tangent / torch.where(arrived, 1.0, length)
        mean = torch.where(arrived, mean, _unit(step, cosines, tol, step))
    merged = _weighted(list(mean), units) * (ordered_sum(norms) / len(units))
    return merged.reshape(inputs.tensors[0].shape).to(torch.float32)


def _cosines(units: list[torch.Tensor]) -> torch.Tensor:
    """Those between all pairs of unit vectors, shape (N, N)."""
    pairs = {(i, j): _dot(units[i], units[j]) for i in range(len(units)) for j in range(i + 1)}
    rows = [torch.cat([pairs[max(i, j), min(i, j)] for j in range(len(units))]) for i in range(len(units))]
    return torch.stack(rows)


def _length(coefficients: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """The norm of a combination of unit vectors."""
    squared = ordered_sum(coefficients * ordered_sum(cosines * coefficients).flatten())
    return squared.clamp(min=0).sqrt()


def _unit(coefficients: torch.Tensor, cosines: torch.Tensor, tol: float, otherwise: torch.Tensor) -> torch.Tensor:
    length = _length(coefficients, cosines)
    return torch.where(length > tol, coefficients / torch.where(length > tol, length, 1.0), otherwise)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ordered_sum(a * b)


def _norm(a: torch.Tensor) -> torch.Tensor:
    return _dot(a, a).sqrt()


def _points(inputs: Inputs) -> list[torch.Tensor]:
    """The models, or their task vectors where there is a base, in float64."""
    points = [tensor.to(torch.float64) for tensor in inputs.tensors]
    return points if inputs.base is None else [point - inputs.base.to(torch.float64) for point in points]


def _from_origin(inputs: Inputs, merged: torch.Tensor) -> torch.Tensor:
    merged = merged.reshape(inputs.tensors[0].shape)
    return (merged if inputs.base is None else inputs.base.to(torch.float64) + merged).to(torch.float32)


def _weighted(weights: list[torch.Tensor], points: list[torch.Tensor]) -> torch.Tensor:
    total = weights[0] * points[0]
    for weight, point in zip(weights[1:], points[1:], strict=True):
        total = total + weight * point
    return total


def _on_arc(a: torch.Tensor, b: torch.Tensor, cosine: torch.Tensor, straight: torch.Tensor, t: float) -> torch.Tensor:
    """(sin((1 - t) θ) a + sin(t θ) b) / sin θ, or (1 - t) a + t b where `straight` (Shoemake 1985)."""
    theta = torch.acos(torch.where(straight, 0.0, cosine))
    sine = torch.sin(theta)
    from_a = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sine)
    return from_a * a + torch.where(straight, t, torch.sin(t * theta) / sine) * b
