"""RegMean (Jin et al. 2023) and RegMean++ (Nguyen et al. 2025): the linear layer whose outputs are closest to those of
the models' layers, each on its own inputs. See `matrices` for the tensors that they take.
"""

from functools import reduce

import torch

from evomerge.merging.methods.base import Inputs, Kind, Latest
from evomerge.merging.methods.matrices import Matrices, averaged, is_layer_matrix, weighted, wide
from evomerge.merging.methods.passes import Pass

_RIDGE = 1e-6  # of the mean of the diagonal: directions that no input has stay at the average


def merge_regmean(inputs: Inputs) -> Pass:
    """The pass of RegMean: base + lambda times the d that minimizes sum_i |(d - d_i) X_i'|^2 over the inputs X_i of the
    models (Jin et al. 2023, eq. 2), d = sum_i d_i G_i (sum_i G_i)^-1 with G_i = X_i' X_i.

    Products of unlike channels are multiplied by `alpha`, as in section 4.3 of the paper. A weight multiplies the
    model's part of the solution, not its place in the problem. Identical models merge to themselves with weights of 1.
    What is no weight matrix of a layer, or has no inputs of its own, is averaged.
    """
    return _regression(inputs, "grams")


def merge_regmean_plus(inputs: Inputs) -> Pass:
    """The pass of RegMean++: RegMean with the inputs that reach a layer in the model whose layers before it are merged
    already (Nguyen et al. 2025)."""
    return _regression(inputs, "merged_grams")


def _regression(inputs: Inputs, kind: Kind) -> Pass:
    measured = (
        [inputs.statistic(kind, index) for index in range(len(inputs.tensors))] if is_layer_matrix(inputs) else []
    )
    known = [each for each in measured if each is not None]
    if not known or len(known) < len(measured):
        return averaged(inputs)
    alpha = inputs.shared["alpha"]

    def closest(deltas: Matrices) -> Matrices:
        grams = [_shrunk(wide(each.values), alpha) for each in known]
        if known[0].transposed:
            return [part.T for part in closest_outputs([delta.T for delta in deltas], grams)]
        return closest_outputs(deltas, grams)

    return weighted(inputs, Latest(("closest outputs", kind), alpha), closest)


def _shrunk(gram: torch.Tensor, alpha: float) -> torch.Tensor:
    return gram * alpha + torch.diag(gram.diagonal() * (1 - alpha))


def closest_outputs(deltas: Matrices, grams: Matrices) -> Matrices:
    """Each model's part of the solution.

    The solution is sought around the average a of the task vectors, a + sum_i (d_i - a) G_i (sum_i G_i)^-1, so that it
    stays there in directions that no input has.

    deltas: the task vectors, shape (outputs, inputs).
    grams: the models' G_i.
    """
    total, count = reduce(torch.add, grams), len(grams)
    mean = total.diagonal().mean()
    ridge = torch.where(mean > 0, mean * _RIDGE, 1.0)
    factor = torch.linalg.cholesky_ex(total + ridge * torch.eye(len(total), dtype=total.dtype, device=total.device))[0]
    return [
        delta / count + _right_solved(delta @ (gram - total / count), factor)
        for delta, gram in zip(deltas, grams, strict=True)
    ]


def _right_solved(right: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """right @ A^-1 for the symmetric matrix A that has this Cholesky factor."""
    return torch.cholesky_solve(right.T.contiguous(), factor).T.contiguous()
