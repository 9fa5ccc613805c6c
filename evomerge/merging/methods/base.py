"""What a row of the method table holds, and what a merge function is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method; no default means that a recipe must give it."""

    name: str
    kind: type[float] | type[bool]
    default: float | bool | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """One tensor of every model in float32, with the parameters that hold for it.

    base: the base model's tensor, or None. tensors: the models', in recipe order (all of one shape). per_model: for
    each of them its parameters by name. shared: the other parameters. uniforms: gives the fixed uniform field of the
    i-th model for this tensor (int16, flat), made on first use. rescale: "density" or "l1".
    """

    base: torch.Tensor | None
    tensors: tuple[torch.Tensor, ...]
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    uniforms: Callable[[int], torch.Tensor]
    rescale: str


class MergeFunction(Protocol):
    def __call__(self, inputs: Inputs, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table: a merge function with its name, source and parameters."""

    name: str
    paper: str
    merge: MergeFunction
    needs_base: bool
    random: bool
    per_model: tuple[Parameter, ...]
    shared: tuple[Parameter, ...]

    def takes(self, parameter: str) -> bool:
        return any(known.name == parameter for known in self.per_model)
