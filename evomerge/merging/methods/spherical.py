"""Means on a sphere: models as vectors whose direction is interpolated along arcs (SLERP and its kin).

Each mean is a linear combination of the models. Its coefficients follow from the angles between models, so from their
Gram matrix alone, in float64. The number of threads changes no bit; another device's sine may differ in the last place.
"""

import torch

from evomerge.devices import widened
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.combination import Coefficient, around, combination, heaviest
from evomerge.merging.methods.gram import gram
from evomerge.merging.methods.kernels import divisor, ordered_sum
from evomerge.merging.methods.parts import whole_of
from evomerge.merging.methods.passes import Pass

_NO_NORM = 1e-8
_NO_NORM_BY_ROWS = 1e-7
_NO_WEIGHT = 1e-6
_NO_LENGTH = 1e-7  # of a mean of unit vectors, whose square has an error of about 1e-16
_STRAIGHT = 0.9995  # |cosine| above which slerp is a straight line
_NO_SINE = 1e-16  # the squared sine below which nuslerp is a straight line


def merge_slerp(inputs: Inputs) -> Pass:
    """The pass that computes the point at `t` of the arc from the base to the other model. Where the two are nearly
    parallel, it is the point at `t` of the straight line."""
    assert inputs.base is not None
    t: float = inputs.shared["t"]
    products = gram(inputs, with_base=True)
    norms = products.diagonal().sqrt()
    norms = torch.where(norms > _NO_NORM, norms, 1.0)
    cosine = (products[0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
    from_base, from_other = _on_arc(cosine, cosine.abs() > _STRAIGHT, t)
    models = (inputs.base, inputs.tensors[0])
    return combination(models, (from_base, from_other), from_base + from_other, int(t > 0.5))


def merge_nuslerp(inputs: Inputs) -> Pass | torch.Tensor:
    """The point of the arc between two models, or between their task vectors where there is a base. Its place on the
    arc is the second model's share of the weights.

    Without `nuslerp_flatten` each row has an angle of its own; with what mergekit calls `nuslerp_row_wise`, too, each
    column has.
    """
    first, second = inputs.each("weight")
    t = second / (first + second) if abs(first + second) >= _NO_WEIGHT else 0.5
    if not inputs.shared["nuslerp_flatten"]:
        return _nuslerp_by_lines(inputs, t, axis=0 if inputs.shared["nuslerp_row_wise"] else -1)
    products = gram(inputs)
    coefficients = _on_arc(*_nuslerp_cosine(products[0, 1], products[0, 0], products[1, 1]), t)
    return _from_origin(inputs, coefficients, int(t > 0.5))


def _nuslerp_by_lines(inputs: Inputs, t: float, axis: int) -> torch.Tensor:
    points = [widened(whole_of(tensor)) for tensor in inputs.tensors]
    if inputs.base is not None:
        points = [point - widened(whole_of(inputs.base)) for point in points]
    a, b = (point.transpose(axis, -1) for point in points)
    from_a, from_b = _on_arc(*_nuslerp_cosine(ordered_sum(a * b), ordered_sum(a * a), ordered_sum(b * b)), t)
    merged = (from_a * a + from_b * b).transpose(axis, -1)
    return (merged if inputs.base is None else widened(whole_of(inputs.base)) + merged).to(torch.float32)


def _nuslerp_cosine(
    product: torch.Tensor, square: torch.Tensor, other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine between two vectors, and whether the arc is as good as straight.

    product: the scalar product of the two.
    square: the scalar product of the first with itself.
    other: the scalar product of the second with itself.
    """
    floor = _NO_NORM_BY_ROWS**2
    cosine = (product / (square.clamp(min=floor) * other.clamp(min=floor)).sqrt()).clamp(-1, 1)
    return cosine, 1 - cosine.square() <= _NO_SINE


def merge_multislerp(inputs: Inputs) -> Pass:
    """The pass that computes a weighted mean in the tangent space at the normalized mean direction (Goddard's
    barycentric interpolation).

    Where directions cancel out, the mean has no direction, and the result is the weighted sum.
    """
    if len(inputs.tensors) == 1:
        return around(inputs.tensors[0], (), 1.0, ())
    eps: float = inputs.shared["eps"]
    weights = inputs.each("weight")
    by = divisor(sum(weights)) if inputs.shared["normalize_weights"] else 1.0
    products = gram(inputs)
    shares = torch.stack([torch.as_tensor(weight / by, dtype=torch.float64) for weight in weights]).to(products.device)
    norms = products.diagonal().sqrt()
    units = 1 / (norms + eps)  # a model times its number is a unit vector

    mean = shares * units
    length = _length(mean, products)
    cancelled = length < max(eps, _NO_LENGTH)
    mean = mean / torch.where(cancelled, 1.0, length)
    along = units * ordered_sum(products * mean).flatten()
    tangent = shares * units - ordered_sum(shares * along) * mean
    angle = _length(tangent, products) + eps
    on_sphere = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    coefficients = torch.where(cancelled, shares, on_sphere * ordered_sum(shares * norms))
    return _from_origin(inputs, tuple(coefficients), heaviest(weights))


def merge_karcher(inputs: Inputs) -> Pass:
    """The pass that computes the Riemannian center of mass on the sphere, times the mean norm, by gradient descent in
    at most `max_iter` steps.

    A step shorter than `tol` is the last. Later steps are computed but change nothing: to stop early, the host would
    have to wait for the device.
    """
    if len(inputs.tensors) == 1:
        return around(inputs.tensors[0], (), 1.0, ())
    tol: float = inputs.shared["tol"]
    products = gram(inputs)
    norms = products.diagonal().sqrt()
    divisors = torch.where(norms == 0, 1.0, norms)
    cosines = products / divisors / divisors.unsqueeze(1)
    counted = norms > tol
    shares = counted / counted.sum().clamp(min=1)
    first = (counted & (counted.cumsum(0) == 1)).to(torch.float64)

    mean, arrived = _unit(shares, cosines, tol, first), ~counted.any()
    steps: int = inputs.shared["max_iter"]
    for _ in range(min(steps, 1) if products.is_meta else steps):  # all take the same bytes, which a rehearsal counts
        cosine = ordered_sum(cosines * mean).flatten().clamp(-1, 1)
        theta = torch.acos(cosine)
        near = theta < tol
        pull = shares * torch.where(near, 0.0, theta / torch.where(near, 1.0, torch.sin(theta)))
        tangent = pull - ordered_sum(pull * cosine) * mean  # sum_i pull_i (u_i - cosine_i mean)
        length = _length(tangent, cosines)
        arrived = arrived | (length < tol)
        step = torch.cos(length) * mean + torch.sin(length) * tangent / torch.where(arrived, 1.0, length)
        mean = torch.where(arrived, mean, _unit(step, cosines, tol, step))
    coefficients = mean / divisors * (ordered_sum(norms) / len(norms))
    return combination(inputs.tensors, tuple(coefficients), ordered_sum(coefficients))


def _length(coefficients: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The norm of a linear combination of vectors, shape (1,).

    coefficients: one for each vector.
    products: the scalar products of the vectors.
    """
    squared = ordered_sum(coefficients * ordered_sum(products * coefficients).flatten())
    positive = squared > 0  # the root has no derivative at 0, and a NaN there would spread
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _unit(coefficients: torch.Tensor, cosines: torch.Tensor, tol: float, otherwise: torch.Tensor) -> torch.Tensor:
    length = _length(coefficients, cosines)
    return torch.where(length > tol, coefficients / torch.where(length > tol, length, 1.0), otherwise)


def _from_origin(inputs: Inputs, coefficients: tuple[Coefficient, ...], anchor: int) -> Pass:
    """A linear combination of the models, or of their task vectors, which are then added to the base."""
    if inputs.base is not None:
        return around(inputs.base, inputs.tensors, 1.0, coefficients)
    total = ordered_sum(torch.stack([torch.as_tensor(value).reshape(()) for value in coefficients]))
    return combination(inputs.tensors, coefficients, total, anchor)


def _on_arc(cosine: torch.Tensor, straight: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The coefficients sin((1 - t) θ) / sin θ and sin(t θ) / sin θ, or 1 - t and t where `straight` (Shoemake 1985)."""
    theta = torch.acos(torch.where(straight, 0.0, cosine))
    sine = torch.sin(theta)
    from_a = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sine)
    return from_a, torch.where(straight, t, torch.sin(t * theta) / sine)
