"""Adam (Kingma and Ba 2015, algorithm 1) with steps that become smaller."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BETAS = (0.9, 0.95)
_EPSILON = 1e-12
_FALLS_TO = 0.1


@dataclass
class Adam:
    """The moments of a gradient.

    shape: the gradient's.
    step: how many gradients have been followed.
    """

    shape: tuple[int, ...]
    step: int = field(default=0, init=False)
    _mean: Array = field(init=False)
    _square: Array = field(init=False)

    def __post_init__(self) -> None:
        self._mean, self._square = np.zeros(self.shape), np.zeros(self.shape)

    def move(self, gradient: Array, rate: float) -> Array:
        """What is subtracted from the numbers in the next step.

        gradient: the derivative of the loss by each number.
        rate: how far a number moves in the step, about.
        """
        self.step += 1
        first, second = _BETAS
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient**2
        mean = self._mean / (1 - first**self.step)
        square = self._square / (1 - second**self.step)
        moved: Array = rate * mean / (np.sqrt(square) + _EPSILON)
        return moved


def falling(rate: float, step: int, steps: int) -> float:
    """The rate of a step; it falls linearly to a tenth.

    rate: that of the first step.
    step: the number of the step, from 1.
    steps: how many there are.
    """
    return rate * (1 - (1 - _FALLS_TO) * min(1.0, (step - 1) / steps))
