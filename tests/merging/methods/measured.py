"""Statistics that were never measured: random ones, for methods that need some."""

from collections.abc import Callable

import torch

from evomerge.merging.methods.base import Kind, Statistic
from evomerge.merging.methods.rows import row_count

WIDEST = 600  # columns of a tensor that has Gram matrices


def statistics(base: torch.Tensor, seed: int = 0, in_layer: bool = True) -> Callable[[Kind, int], Statistic | None]:
    """Statistics of one tensor of any models over a base, as far as a tensor of its shape has them."""

    def statistic(kind: Kind, index: int) -> Statistic | None:
        generator = torch.Generator().manual_seed(97 * seed + 7 * index + len(kind))
        if kind == "fisher":
            values = torch.rand(base.shape, generator=generator).pow(4) * 3e-7
            return Statistic(values.to(base.device), 1e-7 * (index + 2))
        if kind == "row_weights":
            return Statistic((torch.rand(row_count(base.shape, in_layer), generator=generator) * 1.5).to(base.device))
        if base.dim() != 2 or base.shape[1] > WIDEST:
            return None
        if kind == "activations":
            return Statistic(torch.rand(base.shape[1], generator=generator).to(base.device))
        return Statistic(gram(base.shape[1], 13 * seed + index).to(base.device))

    return statistic


def gram(size: int, seed: int) -> torch.Tensor:
    """The mean outer product of random inputs, more than there are channels, of which some are alike."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((3 * size + 5, size), generator=generator)
    inputs[:, 0] += inputs[:, -1]
    return inputs.T @ inputs / len(inputs)
