"""Slopes: the derivative of a loss by the parameters of a merge, from the loss's gradient on the merged tensor.

The derivative by a number of the merge's pass is a scalar product: of the gradient with the derivative of every element
(`Pass.slopes`). Numbers depend on parameters through a few scalars, such as the coefficients of an arc, which torch's
own autograd follows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from evomerge.devices import exact_device, widened
from evomerge.merging.methods.base import Inputs, Method
from evomerge.merging.methods.drawn import field_part
from evomerge.merging.methods.kernels import piece_size
from evomerge.merging.methods.parts import part_of
from evomerge.merging.methods.passes import Pass, for_each_chunk

Key = tuple[str, int | None]
"""A parameter by its name, and the index of the model whose value it is; None where models share it."""
Place = tuple[str, str | None, str]
"""A parameter of a merge: the name of the output's tensor, the reference of the model whose value it is (None where
models share it), and the parameter's name."""


def smooth_parameters(method: Method, shared: Mapping[str, Any], wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of the wanted parameters by which a merge can be differentiated.

    method: its method.
    shared: the parameters that models share, by name.
    wanted: names of parameters.
    """
    if method.smooth_where is not None and not shared[method.smooth_where]:
        return ()
    return tuple(name for name in wanted if name in method.slopes)


def slopes(method: Method, inputs: Inputs, gradient: torch.Tensor, wanted: Iterable[str]) -> dict[Key, torch.Tensor]:
    """The derivatives of a loss by parameters of the merge of one tensor, float64 scalars on the inputs' device,
    or on the CPU where it has no float64.

    Masks, elected signs and thresholds are held fixed.

    method: the merge's method.
    inputs: the tensors that are merged.
    gradient: the loss's gradient on the merged tensor, in its shape, of any float dtype.
    wanted: the names of the parameters.
    """
    kept = method.post(inputs) if method.post is not None else None
    gradient = gradient if kept is None else gradient * kept.to(gradient.dtype)
    names = smooth_parameters(method, inputs.shared, wanted)
    per_model = [name for name in names if method.takes(name)]
    leaves: dict[Key, torch.Tensor] = {
        (name, index): _leaf(values[name], inputs.device)
        for index, values in enumerate(inputs.per_model)
        for name in per_model
    }
    leaves |= {(name, None): _leaf(inputs.shared[name], inputs.device) for name in names if method.shares(name)}
    with torch.enable_grad():
        work = method.function(
            replace(
                inputs,
                per_model=tuple(
                    {**values, **{name: leaves[name, index] for name in per_model}}
                    for index, values in enumerate(inputs.per_model)
                ),
                shared={**inputs.shared, **{name: leaf for (name, index), leaf in leaves.items() if index is None}},
            )
        )
    assert isinstance(work, Pass)
    products = _products(work, gradient)
    follows = {key: number for key, number in _numbers(work).items() if key in products and number.requires_grad}
    if follows:
        derivatives = [products[key].to(torch.float32).to(number.device) for key, number in follows.items()]
        torch.autograd.backward(list(follows.values()), derivatives)
    return {key: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for key, leaf in leaves.items()}


def _leaf(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=exact_device(device), requires_grad=True)


def _numbers(work: Pass) -> dict[tuple[str, int], torch.Tensor]:
    return {(name, index): number for name, group in work.numbers.items() for index, number in enumerate(group)}


@torch.no_grad()
def _products(work: Pass, gradient: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """The scalar product of a gradient with the derivative by each number of a pass, float64, by name and index."""
    assert work.slopes is not None
    flat, tensors = gradient.reshape(-1), work.tensors
    numbers = {name: tuple(number.detach() for number in group) for name, group in work.numbers.items()}
    totals: dict[tuple[str, int], torch.Tensor] = {}

    def add(start: int) -> None:
        piece = slice(start, min(start + size, flat.numel()))
        wide = tuple(part_of(tensor, piece).to(torch.float32, copy=True) for tensor in tensors)
        own = widened(flat[piece])
        fields = tuple(field_part(field, piece, flat.device) for field in work.fields)
        assert work.slopes is not None
        for name, index, slope in work.slopes(wide, fields, numbers):
            product = torch.dot(own, widened(slope))
            totals[name, index] = totals[name, index] + product if (name, index) in totals else product

    size = piece_size(flat.device)
    for_each_chunk(add, range(0, flat.numel(), size), flat.device)
    return totals
