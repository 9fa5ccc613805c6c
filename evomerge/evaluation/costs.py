"""Costs of a candidate that can be objectives. Each is a function of the model in memory and of the seconds that the
evaluation took, or of the texts that the model has written.

To add one: write a function here and add a row to `COSTS` in the config.
"""

from collections.abc import Callable, Sequence
from typing import Any


def layers(model: Any, _seconds: float) -> float:
    """How many layers the model has."""
    return float(model.config.num_hidden_layers)


def parameters(model: Any, _seconds: float) -> float:
    """How many numbers the model's weights hold in all."""
    return float(sum(tensor.numel() for tensor in model.parameters()))


def seconds(_model: Any, seconds: float) -> float:
    """How many seconds the evaluation took on this machine."""
    return seconds


def tokens(texts: Sequence[str], encode: Callable[[str], Sequence[int]]) -> float:
    """The mean number of tokens of the texts that the model wrote to an item. A text counts up to where its task stops
    it, so that the number does not depend on what else stood in the batch."""
    return sum(len(encode(text)) for text in texts) / len(texts)
