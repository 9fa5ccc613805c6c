"""Paired statistics on item outcomes, as pure functions on arrays: what a difference between two candidates is worth.

Differences are one array per task, shape (items,), larger is better; tasks are independent, so each is resampled by
itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_DRAWS = range(2000, 20001)  # as many as the numbers below allow
_NUMBERS = 1_000_000  # drawn for a task in all
_BLOCK = 500_000  # and at once
_ROUNDING = 1e-12


def weighted_difference(differences: Sequence[Floats], weights: Floats) -> float:
    """The weighted mean over tasks of their mean differences. weights: one per task, not all 0."""
    return float(weights @ [task.mean() for task in differences] / weights.sum())


def sign_flip(differences: Sequence[Floats], weights: Floats, random: np.random.Generator) -> float:
    """The two-sided p-value of the weighted difference, where each item might as well have come out the other way round
    (Fisher 1935), by Monte Carlo."""
    drawn = _joint(differences, weights, lambda task, draws: _flipped(task, draws, random))
    as_large = np.abs(drawn) >= abs(weighted_difference(differences, weights)) - _ROUNDING
    return float((1 + as_large.sum()) / (1 + len(drawn)))


def interval(differences: Sequence[Floats], weights: Floats, random: np.random.Generator) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the weighted difference (Efron and Tibshirani 1993, chapter 13)."""
    drawn = _joint(differences, weights, lambda task, draws: _resampled(task, draws, random))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _joint(differences: Sequence[Floats], weights: Floats, draw: Callable[[Floats, int], Floats]) -> Floats:
    """Weighted means over tasks of means that are drawn for each, shape (draws,). draw: of a task's differences and how
    many; its cost grows with the number of different values."""
    width = max(len(np.unique(task)) for task in differences)
    draws = min(max(_NUMBERS // width, _DRAWS[0]), _DRAWS[-1])
    block = max(1, _BLOCK // width)
    sizes = [min(block, draws - done) for done in range(0, draws, block)]
    drawn = [np.concatenate([draw(task, size) for size in sizes]) for task in differences]
    return np.asarray(weights @ np.stack(drawn) / weights.sum())


def _flipped(differences: Floats, draws: int, random: np.random.Generator) -> Floats:
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    positive = random.binomial(counts, 0.5, (draws, len(sizes)))
    return np.asarray((2 * positive - counts) @ sizes / len(differences))


def _resampled(differences: Floats, draws: int, random: np.random.Generator) -> Floats:
    values, counts = np.unique(differences, return_counts=True)
    total = len(differences)
    return np.asarray(random.multinomial(total, counts / total, draws) @ values / total)


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
