"""Quantized: linear layers whose weights are kept in 8 bits, for candidates that are only screened.

A weight is an integer from -127 to 127 times the scale of its output channel. The matrix product is taken in the
activations' dtype, of weights that are multiplied out for its duration: on CPUs this takes no longer than with weights
that were never quantized, and PyTorch's product with packed integers takes three times as long and more. Embeddings,
the head, norms and all else outside of linear layers stay as they are.
"""

import torch
from torch import nn
from torch.nn import functional

from evomerge.layers import layer_index
from evomerge.merging.naming import Naming

_LARGEST = 127
_PIECE = 1 << 22  # elements that are quantized at a time


class Int8Linear(nn.Module):
    """A linear layer with weights in 8 bits."""

    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """linear: the layer whose place it takes. It has its bias, but not yet its weights."""
        super().__init__()
        self.bias, whole = linear.bias, linear.weight
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, whole.dtype
        self.weight = nn.Parameter(torch.empty_like(whole, dtype=torch.int8, requires_grad=False), requires_grad=False)
        scale = torch.ones(self.out_features, 1, dtype=whole.dtype, device=whole.device)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def take(self, weight: torch.Tensor) -> None:
        """Quantizes weights, shape (out_features, in_features), and keeps them."""
        widest = weight.abs().amax(1, keepdim=True).to(torch.float32)
        self.scale.copy_((widest / _LARGEST).clamp_min(torch.finfo(self.dtype).tiny))
        step = max(1, _PIECE // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            turned = weight[rows].to(torch.float32) / self.scale[rows].to(torch.float32)
            self.weight[rows].copy_(turned.round_().clamp_(-_LARGEST, _LARGEST))

    def multiplied(self) -> torch.Tensor:
        """The weights that the layer stands for, in the dtype that it was made from."""
        return self.weight * self.scale

    def empty(self) -> torch.Tensor:
        """A tensor without content for the layer's weights before they are quantized."""
        return torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, self.multiplied(), self.bias)


def quantize(model: nn.Module, naming: Naming) -> None:
    """Replaces the linear layers of a model by such of 8 bits, as far as a checkpoint has their weights as they are.

    The weights' values are lost: the next merge brings others.

    model: changed in place.
    naming: the model's.
    """
    for path in _linear(model, naming):
        module = model.get_submodule(path)
        if type(module) is nn.Linear:
            model.set_submodule(path, Int8Linear(module))


def restore(model: nn.Module) -> None:
    """Replaces the linear layers of 8 bits by whole ones, whose weights have no content until the next merge."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            model.set_submodule(path, _whole(module))


def int8_layers(model: nn.Module, naming: Naming) -> dict[str, Int8Linear]:
    """The linear layers of 8 bits in a model, by the names that checkpoints have for their weights.

    model: the model.
    naming: the model's.
    """
    found = {name: model.get_submodule(path) for path, name in _linear(model, naming).items()}
    return {name: module for name, module in found.items() if isinstance(module, Int8Linear)}


def _linear(model: nn.Module, naming: Naming) -> dict[str, str]:
    """The paths of the modules in layers that may be quantized, with the names that checkpoints have for their
    weights."""
    names = {held: name for name, held in naming.whole.items()}
    return {
        path: names[f"{path}.weight"]
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Int8Linear)
        and f"{path}.weight" in names
        and layer_index(f"{path}.weight") is not None
    }


def _whole(module: Int8Linear) -> nn.Linear:
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")  # which fills nothing
    made.weight, made.bias = nn.Parameter(module.empty()), module.bias
    return made
