"""Paired statistics on item outcomes, as pure functions on arrays: what a difference between two candidates is worth.

Differences are one array per task, shape (items,), larger is better; tasks are independent, so each is resampled by
itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_DRAWS = 5000
_BLOCK = 1_000_000  # numbers drawn at once
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Comparison:
    """A weighted mean of differences, its bootstrap interval of 95 %, and the probability of one at least as large,
    either way, where neither candidate is better."""

    difference: float
    low: float
    high: float
    p_value: float


def compare(differences: Sequence[Floats], weights: Floats, random: np.random.Generator) -> Comparison:
    """The weighted mean over tasks of their mean differences: percentile bootstrap over items (Efron and Tibshirani
    1993, chapter 13), and a sign-flip test (Fisher 1935), both within each task. weights: one per task, not all 0."""
    shares = weights / weights.sum()
    means = np.array([task.mean() for task in differences])
    resampled, flipped = np.zeros(_DRAWS), np.zeros(_DRAWS)
    for share, task in zip(shares, differences, strict=True):
        flipped += share * _flipped(task, random)
        resampled += share * _resampled(task, random)
    difference = float(shares @ means)
    low, high = np.quantile(resampled, [0.025, 0.975])
    as_large = int((np.abs(flipped) >= abs(difference) - _ROUNDING).sum())
    return Comparison(difference, float(low), float(high), (1 + as_large) / (_DRAWS + 1))


def _resampled(differences: Floats, random: np.random.Generator) -> Floats:
    """Means of as many differences drawn with replacement, shape (draws,)."""
    values, counts = np.unique(differences, return_counts=True)
    shares, count = counts / counts.sum(), len(differences)
    return _drawn(lambda draws: random.multinomial(count, shares, size=draws) @ values / count, len(values))


def _flipped(differences: Floats, random: np.random.Generator) -> Floats:
    """Means of the differences, each with a sign drawn anew, shape (draws,)."""
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    shape, total = len(sizes), len(differences)
    return _drawn(lambda draws: (2 * random.binomial(counts, 0.5, (draws, shape)) - counts) @ sizes / total, shape)


def _drawn(draw: Callable[[int], Floats], width: int) -> Floats:
    """Draws in blocks that fit into memory."""
    block = max(1, _BLOCK // width)
    return np.concatenate([draw(min(block, _DRAWS - done)) for done in range(0, _DRAWS, block)])


def mcnemar(mine: Floats, theirs: Floats) -> float:
    """The two-sided p-value of McNemar's exact test on right and wrong answers (1 and 0), shapes (items,)."""
    from scipy.stats import binomtest

    won, lost = int((mine > theirs).sum()), int((mine < theirs).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for how many they are, in their order (Holm 1979)."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(value) for value in corrected]
