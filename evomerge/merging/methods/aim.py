"""AIM, activation-informed merging (Nobari et al. 2025): a step behind a merge that keeps the base where it works
most."""

import torch

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.matrices import is_layer_matrix
from evomerge.merging.methods.parts import whole_of


def keep_base(inputs: Inputs) -> torch.Tensor | None:
    """What AIM multiplies a merge's change of each input channel by: 1 - s (1 - omega) (Nobari et al. 2025, eq. 3
    to 5).

    s is the mean magnitude of the channel's activations in the base, divided by that of the layer's largest channel.
    Only weight matrices of layers that were measured are changed. With an omega of 1 nothing is.
    """
    measured = inputs.statistic("activations", -1) if is_layer_matrix(inputs) else None
    if measured is None or inputs.shared["omega"] == 1:
        return None
    magnitudes = whole_of(measured.values).to(inputs.device, torch.float32)
    largest = magnitudes.max()
    shares = magnitudes / torch.where(largest > 0, largest, torch.ones_like(largest))
    kept: torch.Tensor = 1 - shares * (1 - inputs.shared["omega"])
    return kept[:, None] if measured.transposed else kept
