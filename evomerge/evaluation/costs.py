"""What a candidate costs, as objectives measure it: functions of the model in memory and of the seconds that its
evaluation took.

To add one: write a function here and add a row to `COSTS` in the config.
"""

from typing import Any


def layers(model: Any, _seconds: float) -> float:
    """How many layers the model has."""
    return float(model.config.num_hidden_layers)


def parameters(model: Any, _seconds: float) -> float:
    """How many numbers the model's weights are."""
    return float(sum(tensor.numel() for tensor in model.parameters()))


def seconds(_model: Any, seconds: float) -> float:
    """How long the evaluation took on the machine at hand."""
    return seconds
