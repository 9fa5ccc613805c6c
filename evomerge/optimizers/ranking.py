"""Ranking: one number per candidate of a generation, smaller is better, from scores on several objectives.

`elite` ranks by non-domination against the front of everything told so far, then by exclusive hypervolume gain, then by
the weighted mean (after Igel et al. 2007, with the archive's front in the place of the population's). `weighted_sum` is
the weighted mean alone. What breaks limits comes after everything that does not, in the order of how much it breaks
them (Deb 2000); failed candidates (NaN) come last.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.pareto import ScoreArray, exclusive_gains, front_mask, ranks
from evomerge.spaces import Genome

_EXACT_OBJECTIVES = 4  # beyond these, exact contributions cost seconds a generation; rank and mean decide alone
_INFEASIBLE = -1e9  # a mean that no score reaches


def weighted_means(scores: ScoreArray, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted mean of each row, -inf where it has NaN; shape (n,)."""
    means = np.asarray(scores @ weights / weights.sum(), dtype=np.float64)
    return np.where(np.isnan(means), -np.inf, means)


class Incumbent:
    """The best genome offered so far by weighted mean; of equals the latest."""

    def __init__(self, start: Genome) -> None:
        self.genome, self.mean = start, -np.inf

    def offer(self, genomes: Genome, means: NDArray[np.float64]) -> None:
        leader = int(np.argmax(means))
        if means[leader] >= self.mean and np.isfinite(means[leader]):
            self.genome, self.mean = np.array(genomes[leader]), float(means[leader])


@dataclass
class Ranking:
    """How scores become ranks. `elite` keeps the front of what it has been told.

    Told scores have shape (n, objectives), or (n, objectives + limits) where the search has limits: by how much each
    candidate breaks each, 0 where it does not.
    """

    weights: NDArray[np.float64]
    elite: bool
    _front: ScoreArray = field(init=False)
    _seen: ScoreArray = field(init=False)

    def __post_init__(self) -> None:
        self._front = np.empty((0, len(self.weights)))
        self._seen = np.empty((0, len(self.weights)))

    def means(self, scores: ScoreArray) -> NDArray[np.float64]:
        """The weighted mean of each row, shape (n,), -inf for failures; of those that break limits far below any."""
        values, broken = self._parts(scores)
        means = weighted_means(values, self.weights)
        return np.where(np.isfinite(means) & (broken > 0), _INFEASIBLE * (1 + np.minimum(broken, 1e6)), means)

    def _parts(self, scores: ScoreArray) -> tuple[ScoreArray, NDArray[np.float64]]:
        """Objectives, and by how much limits are broken in all."""
        return scores[:, : len(self.weights)], scores[:, len(self.weights) :].sum(axis=1)

    def observe(self, scores: ScoreArray) -> None:
        """Takes told scores into the front, those that may be on it."""
        values, broken = self._parts(scores)
        valid = values[~np.isnan(values).any(axis=1) & ~(broken > 0)]
        self._seen = np.vstack([self._seen, valid])
        together = np.vstack([self._front, valid])
        self._front = np.unique(together[front_mask(together)], axis=0)

    def losses(self, scores: ScoreArray) -> NDArray[np.float64]:
        """Values to minimize, shape (n,), all finite: rank order for elite, negated means for weighted sums."""
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
        """Position of each row after sorting by (rank, -gain, -mean); equal rows share a position."""
        rank = ranks(np.vstack([self._front, scores]))[len(self._front) :]
        gains = np.zeros(len(scores))
        if scores.shape[1] <= _EXACT_OBJECTIVES:
            gains = exclusive_gains(scores, self._front, self._reference(scores))
        keys = np.stack([rank, -gains, -means], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].ravel().astype(np.float64)

    def _reference(self, scores: ScoreArray) -> NDArray[np.float64]:
        """The worst value seen of each objective, and a tenth of the range below it."""
        together = np.vstack([self._seen, scores])
        low, high = together.min(axis=0), together.max(axis=0)
        return np.asarray(low - 0.1 * np.maximum(high - low, 1e-9))
