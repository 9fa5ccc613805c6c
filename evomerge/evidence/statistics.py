"""Paired statistics on the outcomes of items, as pure functions on arrays: how certain a difference between two
candidates is.

Differences are one array per task, shape (items,); larger is better. Tasks are independent, so each task is resampled
separately.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_DRAWS = range(2000, 20001)  # within it, as many draws as _NUMBERS allows
_NUMBERS = 1_000_000  # drawn for a task in all
_BLOCK = 500_000  # of these, drawn at once
_ROUNDING = 1e-12
_NORMAL = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def weighted_difference(differences: Sequence[Floats], weights: Floats) -> float:
    """The weighted mean over tasks of their mean differences.

    differences: one array per task, shape (items,).
    weights: shape (tasks,), not all 0.
    """
    return float(weights @ [task.mean() for task in differences] / weights.sum())


def sign_flip(differences: Sequence[Floats], weights: Floats, random: np.random.Generator) -> float:
    """The two-sided p-value of the weighted difference by the sign-flip test (Fisher 1935), by Monte Carlo.

    Under its hypothesis, the two candidates' outcomes on each item might as well be swapped.

    differences: one array per task, shape (items,).
    weights: shape (tasks,), not all 0.
    random: draws the signs.
    """
    drawn = _joint(differences, weights, lambda task, draws: _flipped(task, draws, random))
    as_large = np.abs(drawn) >= abs(weighted_difference(differences, weights)) - _ROUNDING
    return float((1 + as_large.sum()) / (1 + len(drawn)))


def interval(differences: Sequence[Floats], weights: Floats, random: np.random.Generator) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the weighted difference (Efron and Tibshirani 1993, chapter 13).

    differences: one array per task, shape (items,).
    weights: shape (tasks,), not all 0.
    random: draws the items.
    """
    drawn = _joint(differences, weights, lambda task, draws: _resampled(task, draws, random))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953), which has a width at 0 and 1 too.

    successes: how many there are.
    count: out of how many, at least 1.
    """
    share, z = successes / count, _NORMAL
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def _joint(differences: Sequence[Floats], weights: Floats, draw: Callable[[Floats, int], Floats]) -> Floats:
    """Weighted means over tasks of means that are drawn for each task, shape (draws,).

    draw: draws means, from a task's differences and the number of draws. Its cost grows with the number of distinct
        differences.
    """
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
    """The two-sided p-value of McNemar's exact test on right and wrong answers.

    mine: 1 where the first candidate is right, else 0; shape (items,).
    theirs: the same for the second candidate.
    """
    won, lost = int((mine > theirs).sum()), int((mine < theirs).sum())
    coins, most = won + lost, max(won, lost)
    ways = math.comb(coins, most)  # in which fair coins show so many heads; whole numbers lose nothing
    more = accumulate(range(most, coins), lambda before, heads: before * (coins - heads) // (heads + 1), initial=ways)
    return min(1.0, float(2 * sum(more) / (1 << coins)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their order (Holm 1979)."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(value) for value in corrected]
