"""One model as it is, or scaled; with slices, layers of several models in order."""

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.combination import around
from evomerge.merging.passes import Pass


def merge_passthrough(inputs: Inputs) -> Pass:
    return around(inputs.tensors[0], (), inputs.per_model[0]["scale"], ())
