"""What a row of the method table holds, and what a merge function is given."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from evomerge.merging.methods.kernels import UNIFORM_STEPS
from evomerge.merging.methods.passes import Pass, write

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """Where a search looks for a parameter unless told otherwise; a switch goes from 0 (false) to 1 (true)."""

    low: float
    high: float
    start: float
    step: float


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method; no default means that a recipe must give it, no `search` that none looks for it.

    cuts: whether it is a share of the elements, cut off at a magnitude.
    """

    name: str
    kind: type[float] | type[int] | type[bool]
    default: float | bool | None
    within: tuple[float, float] | None = None
    search: Range | None = None
    cuts: bool = False

    def written(self, value: float) -> float:
        """A searched value as recipes have it: a share that is cut off, in steps whose thresholds tables hold."""
        return round(value * UNIFORM_STEPS) / UNIFORM_STEPS if self.cuts else value


class Once(Protocol):
    """Keeps what depends on the sources alone, for the candidates to come: `models` are those that it depends on, by
    index, and -1 for the base."""

    def __call__(self, what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T: ...


def each_time(what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T:
    """For a merge that no other follows."""
    return make()


@dataclass(frozen=True, slots=True)
class Inputs:
    """One tensor of every model as it is stored, with the parameters that hold for it.

    base: the base model's tensor where the method sets it apart, or None. tensors: the other models', in recipe order
    (all of one shape). per_model: for each of them its parameters by name. shared: the other parameters. uniforms:
    gives the fixed uniform field of the i-th model for this tensor, made on first use (`kernels.as_field`). rescale:
    "density" or "l1". once: keeps what depends on the sources alone. drawn: for each model, what its uniforms depend
    on (none: nothing that does is kept). planes: whether fields are kept as planes of bytes.
    """

    base: torch.Tensor | None
    tensors: tuple[torch.Tensor, ...]
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    uniforms: Callable[[int], torch.Tensor]
    rescale: str
    once: Once = each_time
    drawn: tuple[Hashable, ...] = ()
    planes: bool = False

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def count(self) -> int:
        """How many elements the tensor has."""
        return self.tensors[0].numel()

    def each(self, parameter: str) -> list[float]:
        """A per-model parameter of every model."""
        return [values[parameter] for values in self.per_model]


class MergeFunction(Protocol):
    """Works out what the elements need to know of each other, and leaves the rest to a pass; or returns the merge."""

    def __call__(self, inputs: Inputs, /) -> Pass | torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table: a merge function with its name, source and parameters.

    base: whether the base model must be given, may be given, or is a model like any other ("ignored"). least, most:
    how many models it takes, besides the base unless that is ignored; no `most` means any number.
    """

    name: str
    paper: str
    function: MergeFunction
    base: Literal["required", "optional", "ignored"]
    per_model: tuple[Parameter, ...] = ()
    shared: tuple[Parameter, ...] = ()
    random: bool = False
    least: int = 1
    most: int | None = None

    def merge(self, inputs: Inputs) -> torch.Tensor:
        """The merge of one tensor, float32, of the inputs' shape."""
        out = torch.empty(inputs.tensors[0].shape, dtype=torch.float32, device=inputs.device)
        self.merge_into(out, inputs)
        return out

    def merge_into(self, out: torch.Tensor, inputs: Inputs, compiled: bool = False, room: int | None = None) -> None:
        """The same, worked out in float32 and rounded once into the dtype of `out` (`passes.write`)."""
        write(out, self.function(inputs), compiled, room)

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
