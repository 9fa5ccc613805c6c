"""Gradients: what a backward pass through the resident model says of the parameters of its merge.

A tensor's gradient is turned into a few scalar products as soon as it is complete, and then dropped. So memory grows by
the gradients of one or two tensors and by the activations, not by a model's size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from evomerge.layers import is_layer
from evomerge.merging.methods.slopes import Key, Place
from evomerge.merging.naming import Naming
from evomerge.merging.plan import TensorMerge
from evomerge.merging.sources.tensor_files import Piece

SlopesOf = Callable[[TensorMerge, torch.Tensor], Mapping[Key, torch.Tensor]]


class Followed:
    """The derivatives that backward passes have brought so far."""

    def __init__(self, slopes_of: SlopesOf) -> None:
        """slopes_of: a tensor's merge and the gradient on it -> the derivatives by its parameters."""
        self._slopes_of = slopes_of
        self._totals: dict[Place, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, merge: TensorMerge, gradient: torch.Tensor) -> None:
        """Adds what the gradient on one merged tensor says.

        merge: the tensor's merge.
        gradient: in the tensor's shape.
        """
        for (name, index), slope in self._slopes_of(merge, gradient).items():
            place = merge.name, None if index is None else merge.models[index], name
            self._totals[place] = self._totals[place] + slope if place in self._totals else slope

    @property
    def sums(self) -> Mapping[Place, torch.Tensor]:
        """The derivatives by place, as tensors."""
        return self._totals

    def totals(self) -> dict[Place, float]:
        """The derivatives by place. Tensors that no loss depends on are missing."""
        return {place: float(total) for place, total in self._totals.items()}


@contextmanager
def followed(
    model: Any, naming: Naming, pieces: Mapping[str, Piece], merges: Sequence[TensorMerge], slopes_of: SlopesOf
) -> Iterator[Followed]:
    """A context in which backward passes through a model are followed.

    model: the candidate.
    naming: the names of its tensors in checkpoints.
    pieces: where merged tensors lie in the model's, by name; those with the same name there may be missing.
    merges: the merges whose parameters are asked for.
    slopes_of: see `Followed`.
    """
    sums = Followed(slopes_of)
    parts: dict[str, list[tuple[TensorMerge, Piece | None]]] = defaultdict(list)
    for merge in merges:
        piece = pieces.get(merge.name)
        parts[piece.tensor if piece is not None else merge.name].append((merge, piece))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made = {merge.name: merge for name, members in parts.items() if name not in parameters for merge, _ in members}
    covered = {piece.tensor for piece in naming.pieces.values()}
    waiting = [name for name in parameters if made and name not in covered]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            uses = stack.enter_context(_apart(model))
            for name in [*(name for name in parts if name in parameters), *waiting]:
                for use in uses[id(parameters[name])]:
                    use.requires_grad_(True)
            for name in parts.keys() & parameters.keys():
                for use in uses[id(parameters[name])]:
                    handle = use.register_post_accumulate_grad_hook(_hook(sums, parts[name]))  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            yield sums
            if made:  # tensors in memory of which checkpoint tensors are made, such as the experts of a layer
                held = {name: _gradient(uses[id(parameters[name])]) for name in waiting}
                for name, gradient in naming.made_of(held).items():
                    if name in made:
                        sums.add(made[name], gradient)
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None


@contextmanager
def _apart(model: Any) -> Iterator[Mapping[int, list[nn.Parameter]]]:
    """A context in which a tied parameter is a parameter of its own wherever it is used, in the same memory. So the
    gradients of its uses need not wait for one another, and a table that is also the head costs no more than one
    gradient at a time. Yields the uses of each parameter, by its id."""
    uses: dict[int, list[nn.Parameter]] = {}
    replaced = []
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and id(own) in uses:
                replaced.append((module, name, own))
                uses[id(own)].append(nn.Parameter(own.detach(), requires_grad=False))
                module._parameters[name] = uses[id(own)][-1]
            elif own is not None:
                uses[id(own)] = [own]
    try:
        yield uses
    finally:
        for module, name, own in replaced:
            module._parameters[name] = own


def _gradient(uses: Sequence[nn.Parameter]) -> torch.Tensor:
    gradients = [use.grad for use in uses if use.grad is not None]
    return torch.stack(gradients).sum(0) if gradients else torch.zeros_like(uses[0])


def _hook(sums: Followed, members: Sequence[tuple[TensorMerge, Piece | None]]) -> Callable[[torch.Tensor], None]:
    def take(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        gradient = gradient.contiguous()
        for merge, piece in members:
            sums.add(merge, piece.of(gradient) if piece is not None else gradient)

    return take


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """A context in which a model keeps only what goes into its layers, and computes a layer again on the way back.

    transformers does this only in training mode, in which layers drop out.
    """
    layers = [module for name, module in model.named_modules() if is_layer(name)]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer in layers:
            del layer.forward
