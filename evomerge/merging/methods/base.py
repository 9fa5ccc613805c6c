"""What a row of the method table holds, and what a merge function is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Range:
    """Where a search looks for a parameter unless told otherwise; a switch goes from 0 (false) to 1 (true)."""

    low: float
    high: float
    start: float
    step: float


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method; no default means that a recipe must give it, no `search` that none looks for it."""

    name: str
    kind: type[float] | type[int] | type[bool]
    default: float | bool | None
    within: tuple[float, float] | None = None
    search: Range | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """One tensor of every model in float32, with the parameters that hold for it.

    base: the base model's tensor where the method sets it apart, or None. tensors: the other models', in recipe order
    (all of one shape). per_model: for each of them its parameters by name. shared: the other parameters. uniforms:
    gives the fixed uniform field of the i-th model for this tensor (int16, flat), made on first use. rescale:
    "density" or "l1".
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
    """A row of the table: a merge function with its name, source and parameters.

    base: whether the base model must be given, may be given, or is a model like any other ("ignored"). least, most:
    how many models it takes, besides the base unless that is ignored; no `most` means any number.
    """

    name: str
    paper: str
    merge: MergeFunction
    base: Literal["required", "optional", "ignored"]
    per_model: tuple[Parameter, ...] = ()
    shared: tuple[Parameter, ...] = ()
    random: bool = False
    least: int = 1
    most: int | None = None

    @property
    def needs_base(self) -> bool:
        return self.base == "required"

    @property
    def uses_base(self) -> bool:
        """Whether a base is set apart from the models that are merged."""
        return self.base != "ignored"

    @property
    def count(self) -> str:
        """How many models it takes, in words."""
        if self.most is None:
            return f"{self.least} or more models"
        return f"{self.least} model{'s' * (self.least > 1)}"  # no method has a range that ends

    def accepts(self, count: int) -> bool:
        return self.least <= count and (self.most is None or count <= self.most)

    @property
    def own(self) -> tuple[Parameter, ...]:
        """The parameters with a range to search: all but weight, density and lambda, which methods have in common."""
        return tuple(known for known in (*self.per_model, *self.shared) if known.search is not None)

    def takes(self, parameter: str) -> bool:
        return any(known.name == parameter for known in self.per_model)

    def shares(self, parameter: str) -> bool:
        return any(known.name == parameter for known in self.shared)
