"""The masks of random sparsification, made in the plainest way."""

import torch

from evomerge.merging.methods.kernels import field_steps, steps_of


def keep_mask(uniforms: torch.Tensor, density: float | torch.Tensor) -> torch.Tensor:
    """True where a uniform number is less than the density. The mask of a density contains those of smaller ones.

    uniforms: a uniform field.
    density: from 0 to 1, one for all elements or one per element.
    """
    return field_steps(uniforms) < steps_of(density)
