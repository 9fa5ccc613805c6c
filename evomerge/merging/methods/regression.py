"""Methods that solve least-squares problems made of the task vectors themselves: WUDI (Cheng et al. 2025) and ACE (Xu
et al. 2026).

Both take the rows of a layer's task vector for samples of what goes into the layer. See `matrices` for the tensors that
they take, and for what becomes of the others.
"""

from collections.abc import Callable
from functools import partial, reduce

import torch

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.matrices import Matrices, pseudo_inverse, scaled, singular, weighted
from evomerge.merging.methods.passes import Pass

_UNEQUAL = 0.3  # the spread of sizes from which on ACE divides each model's covariance by its own size
_REFINED = 0.3  # the share of the singular values that ACE's refinement takes
_TINY = 1e-12


def merge_wudi(inputs: Inputs) -> Pass:
    """The pass of WUDI: base + lambda times the task vector m that minimizes sum_i |(m - d_i) d_i'|^2 / |d_i|^2.

    The paper takes 300 steps of Adam from the sum of the task vectors. This is the minimum itself, the one of the least
    norm where there are many. A weight multiplies the model's vector in the solution, not its place in the problem.
    Identical models merge to themselves with weights of 1.
    """
    return weighted(inputs, "least interference", partial(_in_row_space, solve=_least_interference))


def _in_row_space(deltas: Matrices, solve: Callable[[Matrices, torch.Tensor], Matrices]) -> Matrices:
    """What `solve` makes of task vectors and a vector of ones. Where there are fewer rows than columns, it is given
    their coordinates in the space of all rows, in which the solutions lie, too, so that it works on smaller matrices.
    """
    ones = deltas[0].new_ones((1, deltas[0].shape[1]))
    rows = torch.cat([*deltas, ones])
    if rows.shape[0] >= rows.shape[1]:
        return solve(deltas, ones)
    basis = torch.linalg.qr(rows.T)[0]
    return [own @ basis.T for own in solve([delta @ basis for delta in deltas], ones @ basis)]


def _least_interference(deltas: Matrices, _ones: torch.Tensor) -> Matrices:
    grams = [delta.T @ delta / _above_zero(delta.square().sum()) for delta in deltas]
    inverse = pseudo_inverse(reduce(torch.add, grams))
    return [delta @ (gram @ inverse) for delta, gram in zip(deltas, grams, strict=True)]


def _above_zero(size: torch.Tensor) -> torch.Tensor:
    return torch.where(size > 0, size, 1.0)


def merge_ace(inputs: Inputs) -> Pass:
    """The pass of ACE-Merging: base + alpha m, where m = (sum_i d_i S_i) (sum_i S_i + C)^-1.

    S_i is the covariance of the rows of d_i, whose mean is taken away, plus `eps`. C is the collective prior: each of
    its rows is the mean row of the sum of the covariances. Where the models' sizes differ much, each S_i is divided by
    its trace, and m is refined: the leading singular directions of m plus what sets the models apart are added, with
    equal values. The steps and constants are those of the authors' code.
    """
    eps = inputs.shared["eps"]
    return scaled(inputs, ("adaptive covariance", eps), partial(_in_row_space, solve=partial(_covariances, eps=eps)))


def _covariances(deltas: Matrices, ones: torch.Tensor, eps: float) -> Matrices:
    sizes = torch.stack([delta.square().sum() for delta in deltas])
    unequal = _spread(sizes) > _UNEQUAL
    centered = [delta - delta.mean(dim=0, keepdim=True) for delta in deltas]
    raw = [delta.T @ delta for delta in centered]
    traces = [torch.where(unequal, matrix.trace() + _TINY, 1.0) for matrix in raw]
    covariances = [matrix / trace for matrix, trace in zip(raw, traces, strict=True)]
    unit = torch.eye(raw[0].shape[0], dtype=raw[0].dtype, device=raw[0].device)
    damped = [matrix + (eps / trace) * unit for matrix, trace in zip(covariances, traces, strict=True)]
    total = reduce(torch.add, damped)
    prior = ones.T @ (ones @ reduce(torch.add, covariances)) / ones.square().sum()
    prior = prior / torch.where(unequal, sizes.mean() + _TINY, 1.0)
    weighed = reduce(torch.add, [delta @ own for delta, own in zip(centered, damped, strict=True)])
    merged: torch.Tensor = torch.linalg.solve_ex(total + prior, weighed, left=False)[0]  # not finite where singular
    apart = [delta @ (own - total / len(deltas)) for delta, own in zip(centered, covariances, strict=True)]
    refined = merged + _leading(reduce(torch.add, apart) + merged)
    return [torch.where((sizes > 0).any(), torch.where(unequal, refined, merged), 0.0)]


def _spread(sizes: torch.Tensor) -> torch.Tensor:
    """How much the logarithms of the models' sizes differ: their variance over their squared mean."""
    logs = torch.log(sizes + _TINY)
    mean = logs.mean()
    return (logs - mean).square().sum() / max(1, len(logs) - 1) / (mean.square() + _TINY)


def _leading(matrix: torch.Tensor) -> torch.Tensor:
    """The leading singular directions of a matrix, with the mean of their values for each."""
    left, values, right = singular(matrix)
    count = max(1, int(len(values) * _REFINED))
    return values[:count].mean() * (left[:, :count] @ right[:count])
