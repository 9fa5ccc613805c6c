"""One model as it is, or scaled; with slices, layers of several models in order."""

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.combination import around
from evomerge.merging.methods.parts import Elements
from evomerge.merging.methods.passes import Pass


def merge_passthrough(inputs: Inputs) -> Pass | Elements:
    """The model's tensor itself where `scale` is 1, else the pass that multiplies it by `scale`."""
    scale: float = inputs.per_model[0]["scale"]
    return inputs.tensors[0] if isinstance(scale, float) and scale == 1 else around(inputs.tensors[0], (), scale, ())
