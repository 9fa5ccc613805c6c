"""Parallel: layers that run side by side (Sun et al. 2024, Transformer Layers as Painters, arXiv:2407.09298).

All layers of a block read the input of the block, and the mean of their outputs goes on. The layers keep their places
in the model: each has its own mask, position embeddings and number in the cache. Only what goes into them and what
comes out is changed, by hooks.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from evomerge.recipe import Blocks

_HIDDEN = "hidden_states"


def run_side_by_side(layers: Sequence[nn.Module]) -> None:
    """Lets layers that a model calls one after the other run side by side.

    layers: the layers of one block, in the model's order. Layers that were copied from others stay apart from them.
    """
    block = _Block(len(layers))
    for number, layer in enumerate(layers):
        for name in [name for name in layer.__dict__ if name.startswith("_forward_")]:
            layer.__dict__[name] = layer.__dict__[name].copy()  # a copied layer shares its hooks with the original
        # before all other hooks, since one of them may move the input to the layer's device
        layer.register_forward_pre_hook(partial(block.enter, number), prepend=True, with_kwargs=True)
        layer.register_forward_hook(partial(block.leave, number))


def with_blocks(fingerprint: str, blocks: Blocks) -> str:
    """A fingerprint that tells candidates apart that have the same weights in other blocks, 16 hexadecimal digits.

    fingerprint: that of the weights, which is given back where there are no blocks.
    blocks: see `Provenance.parallel`.
    """
    if not blocks:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {blocks}".encode()).hexdigest()[:16]


class _Block:
    """What a pass through a block needs from one layer to the next. The mean is taken in float32."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._input: Any = None
        self._total: Any = None

    def enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer's call, with the input of the block."""
        if number == 0:
            self._input, self._total = (args[0] if args else kwargs[_HIDDEN]), None
            return None
        if args:
            return (self._input, *args[1:]), kwargs
        return args, {**kwargs, _HIDDEN: self._input}

    def leave(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A layer's output; after the last layer the mean of all."""
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        wide = hidden.to(torch.float32)
        self._total = wide if self._total is None else self._total.to(wide.device) + wide
        if number + 1 < self._size:
            return None
        mean = (self._total / self._size).to(hidden.dtype)
        self._input = self._total = None
        return (mean, *output[1:]) if isinstance(output, tuple) else mean
