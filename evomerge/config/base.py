"""What all blocks of a search file have in common, and the settings of genes."""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
RESERVED_NAMES = {"base", "uniform", "merge", "free"}
Split = Literal["search", "selection", "heldout"]
SPLITS: tuple[Split, ...] = ("search", "selection", "heldout")


class Settings(BaseModel):
    """A frozen block of settings that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class GeneConfig(Settings):
    """One kind of gene, in its own units.

    low: the least value.
    high: the largest value, above `low`.
    start: where a search starts; None for a default that depends on the models.
    step: the first step of a search, above 0.
    fixed: a value that takes the genes out of the search; None where they are searched.
    """

    low: float
    high: float
    start: float | None = None
    step: float = Field(gt=0)
    fixed: float | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f".low is {self.low:g}; use a value below high, which is {self.high:g}")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f".start is {self.start:g}; use a value from low to high ({self.low:g} to {self.high:g})")
        return self


def metric_name(value: str) -> str:
    """A metric's name, unless it is written as lm-eval prints it, with its filter behind a comma."""
    metric, comma, after = value.partition(",")
    if not comma:
        return value
    named = f" and filter: {after}" if after != "none" else ""
    raise ValueError(f"'{value}' is a metric with its filter, as lm-eval prints them; write metric: {metric}{named}")


MetricName = Annotated[str, AfterValidator(metric_name)]


def python_function(value: str) -> str:
    """The name of a function in a file, `MODULE:FUNCTION`: a module beside the search file, or a path that ends in .py.
    Raises ValueError for anything else."""
    place, _, function = value.rpartition(":")
    module = all(part.isidentifier() for part in place.split("."))
    if not function.isidentifier() or not (place.endswith(".py") or module):
        raise ValueError(f"'{value}' names no function; write MODULE:FUNCTION, as in my_scores:politeness")
    return value


PythonFunction = Annotated[str, AfterValidator(python_function)]


class GeneChange(Settings):
    """What a user changes about a gene that has bounds of its own; None leaves a value as it is.

    low: the least value.
    high: the largest value.
    start: where a search starts.
    step: the first step of a search.
    fixed: a value that takes the genes out of the search.
    """

    low: float | None = None
    high: float | None = None
    start: float | None = None
    step: float | None = None
    fixed: float | None = None
