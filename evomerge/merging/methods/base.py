"""What a row of the method table holds, and what a merge function is given."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from evomerge.merging.methods.drawn import Field
from evomerge.merging.methods.kernels import UNIFORM_STEPS
from evomerge.merging.methods.parts import Elements, whole_of
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
    """A parameter of a method.

    name: its name in recipes.
    kind: the type of its values.
    default: its value where a recipe gives none; None where a recipe must give one.
    within: the least and the largest value that recipes may give; None where any value will do.
    search: where a search looks for it; None where no search does, or where searches have a range of their own.
    cuts: whether it is a share of the elements that is cut off at a magnitude.
    """

    name: str
    kind: type[float] | type[int] | type[bool]
    default: float | bool | None
    within: tuple[float, float] | None = None
    search: Range | None = None
    cuts: bool = False

    def written(self, value: float) -> float:
        """A searched value as recipes have it. A share that is cut off is rounded to 1/65536, since the tables of
        thresholds hold those shares (`order.OrderStatistics`)."""
        return round(value * UNIFORM_STEPS) / UNIFORM_STEPS if self.cuts else value


class Once(Protocol):
    """Returns what `make` returns, and may keep it for later candidates, since it depends on the sources alone.

    what: the name under which the result is kept.
    models: the indices of the models that the result depends on; -1 is the base.
    make: computes the result.
    """

    def __call__(self, what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T: ...


def each_time(what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T:
    """The result of `make`, which is not kept: the `Once` of a single merge, where no later candidate could use it."""
    return make()


Kind = Literal["fisher", "grams", "merged_grams", "activations", "outputs", "row_weights"]
JOINT: tuple[Kind, ...] = ("merged_grams", "row_weights")
"""Statistics that are measured for all models at once, and that depend on the base, too."""


@dataclass(frozen=True, slots=True)
class Needed:
    """Statistics that a method needs.

    kind: what is measured: `fisher`, the diagonal Fisher information of every tensor; `grams`, the mean outer product
        of what goes into each linear layer; `merged_grams`, the same, where the layers before are merged already;
        `activations`, the mean magnitude of each channel of what goes into each linear layer; `row_weights`, weights of
        the rows of every tensor.
    of: whose they are: of the models that are merged, of the base, or of all of them.
    """

    kind: Kind
    of: Literal["models", "base", "all"] = "models"


@dataclass(frozen=True, slots=True)
class Statistic:
    """A statistic of one tensor of one model.

    values: float32; Fisher information in the tensor's shape, a Gram matrix, or one number for each input channel or
        row.
    mean: the mean of all values of the model; 1 where no method asks for it.
    transposed: whether the tensor has a row, not a column, for each input channel.
    """

    values: Elements
    mean: float = 1.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Latest:
    """The name of a result that depends on a number which a search may change: only that of the last value is kept.

    what: the name.
    value: the number.
    """

    what: Hashable
    value: float


def unmeasured(kind: Kind, index: int, /) -> Statistic | None:
    """None: the `Inputs.statistic` of a tensor that has no statistics."""
    return None


@dataclass(frozen=True, slots=True)
class Inputs:
    """One tensor of every model as it is stored, with the parameters that hold for it.

    base: the base model's tensor; None where the method does not set the base apart.
    tensors: the other models' tensors, in recipe order, all of one shape.
    per_model: each model's parameters by name, in the order of `tensors`.
    shared: the parameters that all models share, by name.
    uniforms: index of a model -> its uniform field for this tensor: kept (`kernels.as_field`), or made again.
    rescale: `density` or `l1`.
    once: keeps what depends on the sources alone.
    drawn: for each model, what its uniform field depends on; empty where nothing that depends on fields is kept.
    planes: whether fields are kept as planes of bytes.
    in_layer: whether the tensor belongs to a layer; embeddings, the final norm and the head do not.
    statistic: the kind of a statistic, and the index of a model (-1 is the base) -> what was measured; None where the
        tensor has none of the kind.
    """

    base: Elements | None
    tensors: tuple[Elements, ...]
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    uniforms: Callable[[int], Field]
    rescale: str
    once: Once = each_time
    drawn: tuple[Hashable, ...] = ()
    planes: bool = False
    in_layer: bool = True
    statistic: Callable[[Kind, int], Statistic | None] = unmeasured

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def count(self) -> int:
        """How many elements the tensor has."""
        return self.tensors[0].numel()

    def each(self, parameter: str) -> list[float]:
        """A parameter's value for every model, in the order of `tensors`."""
        return [values[parameter] for values in self.per_model]


class MergeFunction(Protocol):
    """Returns the merge, or the pass that makes it. Before a pass it computes only what needs more than one element,
    such as a norm or a threshold."""

    def __call__(self, inputs: Inputs, /) -> Pass | Elements: ...


class PostStep(Protocol):
    """What a merge's change of the base is multiplied by in each input channel, float32, shape (columns,) or (rows, 1);
    None where the merge stays as it is."""

    def __call__(self, inputs: Inputs, /) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table: a merge function with its name, source and parameters.

    name: what recipes call it (`merge_method`).
    paper: where the method was published.
    function: computes the merge of one tensor.
    base: whether the base model must be given, may be given, or is a model like any other (`ignored`).
    per_model: the parameters that each model has a value of.
    shared: the parameters that have one value for all models.
    random: whether it draws random numbers.
    least: how many models it needs; the base counts only where it is ignored.
    most: how many models it takes at most, counted alike; None for any number.
    slopes: the parameters by which the merge can be differentiated.
    smooth_where: the switch that must be on for that; None where there is none.
    mergekit: whether mergekit has the method, too.
    statistics: what must have been measured.
    post: what is done to each merge before it is rounded; None for nothing.
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
    slopes: tuple[str, ...] = ()
    smooth_where: str | None = None
    mergekit: bool = True
    statistics: tuple[Needed, ...] = ()
    post: PostStep | None = None

    def merge(self, inputs: Inputs) -> torch.Tensor:
        """The merge of one tensor, float32, in the shape of the inputs."""
        out = torch.empty(inputs.tensors[0].shape, dtype=torch.float32, device=inputs.device)
        self.merge_into(out, inputs)
        return out

    def merge_into(self, out: torch.Tensor, inputs: Inputs, compiled: bool = False, room: int | None = None) -> None:
        """Writes the merge of one tensor into `out`: computed in float32, rounded once into its dtype.

        out: a tensor of the inputs' shape, of any float dtype.
        inputs: the tensors to merge.
        compiled: whether large tensors are merged by compiled code.
        room: how many bytes an eager pass takes at a time; by default what suits the device.
        """
        kept = self.post(inputs) if self.post is not None else None
        if kept is None:
            write(out, self.function(inputs), compiled, room)
            return
        assert inputs.base is not None
        base = whole_of(inputs.base).to(out.device, torch.float32)
        merged = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        write(merged, self.function(inputs), compiled, room)
        merged -= base
        merged *= kept
        merged += base
        out.copy_(merged)

    @property
    def plain(self) -> str:
        """The method's name without that of a post-step."""
        return self.name.partition("+")[0]

    @property
    def needs_base(self) -> bool:
        return self.base == "required"

    @property
    def uses_base(self) -> bool:
        """Whether a base is set apart from the models that are merged."""
        return self.base != "ignored"

    @property
    def count(self) -> str:
        """How many models the method takes, in words."""
        if self.most is None:
            return f"{self.least} or more models"
        return f"{self.least} model{'s' * (self.least > 1)}"  # no method has a range that ends

    def accepts(self, count: int) -> bool:
        """Whether the method takes so many models."""
        return self.least <= count and (self.most is None or count <= self.most)

    @property
    def own(self) -> tuple[Parameter, ...]:
        """The parameters with a range to search: all but weight, density and lambda, which methods have in common."""
        return tuple(parameter for parameter in (*self.per_model, *self.shared) if parameter.search is not None)

    def takes(self, parameter: str) -> bool:
        """Whether each model has a value of the parameter of that name."""
        return any(own.name == parameter for own in self.per_model)

    def shares(self, parameter: str) -> bool:
        """Whether the parameter of that name has one value for all models."""
        return any(common.name == parameter for common in self.shared)


def needed(method: Method, base: str | None, models: Iterable[str]) -> Iterator[tuple[Kind, str]]:
    """The statistics that a merge needs, each with the model's reference.

    method: the merge's.
    base: the base's reference.
    models: the references of the models that are merged, without the base.
    """
    others = [model for model in dict.fromkeys(models) if model != base]
    for need in method.statistics:
        for reference in [base] * (need.of != "models") + others * (need.of != "base"):
            assert reference is not None
            yield need.kind, reference
