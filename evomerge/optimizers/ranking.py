"""Ranking: one number per candidate of a generation, smaller is better, from scores on several objectives.

`elite` ranks by non-domination against the front of everything told so far, then by exclusive hypervolume gain, then by
the weighted mean (after Igel et al. 2007, with the archive's front in the place of the population's). `weighted_sum`
ranks by the weighted mean alone. Candidates that break limits come after all others, in the order of how much they
break them (Deb 2000). Failed candidates (NaN) come last.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.pareto import ScoreArray, exclusive_gains, front_mask, ranks
from evomerge.spaces import Genome

_EXACT_OBJECTIVES = 4  # beyond these, exact contributions cost seconds a generation; rank and mean decide alone
_INFEASIBLE = -1e9  # a mean that no score reaches


def weighted_means(scores: ScoreArray, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted mean of each row, shape (n,); -inf for rows with NaN.

    scores: shape (n, objectives).
    weights: shape (objectives,).
    """
    means = np.asarray(scores @ weights / weights.sum(), dtype=np.float64)
    return np.where(np.isnan(means), -np.inf, means)


class Incumbent:
    """The best genome offered so far by weighted mean; where means are equal, the latest.

    genome: shape (dimension,); the start until a better one is offered.
    mean: its weighted mean; -inf at the start.
    """

    def __init__(self, start: Genome) -> None:
        self.genome, self.mean = start, -np.inf

    def offer(self, genomes: Genome, means: NDArray[np.float64]) -> None:
        """Takes the best of several genomes if it is not worse.

        genomes: shape (n, dimension).
        means: their weighted means, shape (n,).
        """
        leader = int(np.argmax(means))
        if means[leader] >= self.mean and np.isfinite(means[leader]):
            self.genome, self.mean = np.array(genomes[leader]), float(means[leader])


@dataclass
class Ranking:
    """How scores become ranks.

    Scores have shape (n, objectives). In a search with limits they have shape (n, objectives + limits): the further
    columns say by how much a candidate breaks each limit, 0 where it does not.

    weights: the weights of the objectives, shape (objectives,).
    elite: whether to rank by `elite`, which needs the front of all told scores, or by `weighted_sum`.
    """

    weights: NDArray[np.float64]
    elite: bool
    _front: ScoreArray = field(init=False)
    _seen: ScoreArray = field(init=False)

    def __post_init__(self) -> None:
        self._front = np.empty((0, len(self.weights)))
        self._seen = np.empty((0, len(self.weights)))

    def means(self, scores: ScoreArray) -> NDArray[np.float64]:
        """The weighted mean of each row, shape (n,). It is -inf for failures, and far below any score for candidates
        that break limits."""
        values, broken = self._parts(scores)
        means = weighted_means(values, self.weights)
        return np.where(np.isfinite(means) & (broken > 0), _INFEASIBLE * (1 + np.minimum(broken, 1e6)), means)

    def _parts(self, scores: ScoreArray) -> tuple[ScoreArray, NDArray[np.float64]]:
        """The scores on objectives, and the sum of the amounts by which limits are broken, shape (n,)."""
        return scores[:, : len(self.weights)], scores[:, len(self.weights) :].sum(axis=1)

    def observe(self, scores: ScoreArray) -> None:
        """Adds told scores to the front, unless candidates failed or break limits."""
        values, broken = self._parts(scores)
        valid = values[~np.isnan(values).any(axis=1) & ~(broken > 0)]
        self._seen = np.vstack([self._seen, valid])
        together = np.vstack([self._front, valid])
        self._front = np.unique(together[front_mask(together)], axis=0)

    def losses(self, scores: ScoreArray) -> NDArray[np.float64]:
        """Values to minimize, shape (n,), all finite: ranks for `elite`, negated means for `weighted_sum`."""
        means = self.means(scores)
        values, broken = self._parts(scores)
        valid = np.isfinite(means)
        losses = np.full(len(scores), float(len(scores) + 1))
        if not self.elite:
            losses[valid] = -means[valid]
            losses[~valid] = losses[valid].max(initial=-np.inf) + 1.0 if valid.any() else 0.0
            return losses
        feasible = valid & ~(broken > 0)
        if feasible.any():
            losses[feasible] = self._order(values[feasible], means[feasible])
        infeasible = valid & ~feasible
        losses[infeasible] = feasible.sum() + np.unique(broken[infeasible], return_inverse=True)[1].ravel()
        return losses

    def _order(self, scores: ScoreArray, means: NDArray[np.float64]) -> NDArray[np.float64]:
        """The position of each row after sorting by rank, then gain, then mean; equal rows share a position."""
        rank = ranks(np.vstack([self._front, scores]))[len(self._front) :]
        gains = np.zeros(len(scores))
        if scores.shape[1] <= _EXACT_OBJECTIVES:
            gains = exclusive_gains(scores, self._front, self._reference(scores))
        keys = np.stack([rank, -gains, -means], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].ravel().astype(np.float64)

    def _reference(self, scores: ScoreArray) -> NDArray[np.float64]:
        """The reference point: for each objective the worst value seen, less a tenth of the range of values."""
        together = np.vstack([self._seen, scores])
        low, high = together.min(axis=0), together.max(axis=0)
        return np.asarray(low - 0.1 * np.maximum(high - low, 1e-9))
