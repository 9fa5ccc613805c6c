"""One model as it is, or scaled; with slices, layers of several models in order."""

import torch

from evomerge.merging.methods.base import Inputs


def merge_passthrough(inputs: Inputs) -> torch.Tensor:
    scale: float = inputs.per_model[0]["scale"]
    return inputs.tensors[0] * scale
