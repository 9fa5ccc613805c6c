"""How a search runs: its optimizer and stages, its controls, its workers."""

from typing import Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from evomerge.config.base import Settings
from evomerge.config.tables import OPTIMIZERS, POOLS, OptimizerName, OptimizerRow, PoolName, StageName


class StageConfig(Settings):
    """A part of the search that moves only some kinds of genes; the last stage takes what is left of the budget.

    `name` is the stage's optimizer, by default that of the search.
    """

    genes: tuple[str, ...] = Field(min_length=1)
    evaluations: int | None = Field(default=None, ge=1)
    name: StageName | None = None
    population: int | None = Field(default=None, ge=1)


class OptimizerConfig(Settings):
    """How genomes are proposed. `evaluations` counts search candidates; controls come on top.

    schedule: `pipelined` proposes the same whatever the number of workers; `async` never lets a worker wait, but what
    it proposes depends on the order in which evaluations finish. That order is recorded, and resuming keeps to it.
    """

    name: OptimizerName = "auto"
    evaluations: int = Field(default=300, ge=1)
    population: int | None = Field(default=None, ge=1)
    schedule: Literal["pipelined", "async"] = "pipelined"
    lag: int = Field(default=1, ge=0, le=16)
    ranking: Literal["auto", "elite", "weighted_sum"] = "auto"
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    restarts: bool = True
    stages: tuple[StageConfig, ...] = ()

    @model_validator(mode="after")
    def _stages(self) -> Self:
        for index, stage in enumerate(self.stages[:-1]):
            if stage.evaluations is None:
                raise ValueError(f".stages[{index}].evaluations is missing; every stage but the last needs a number")
        return self

    @property
    def row(self) -> OptimizerRow | None:
        """The optimizer's row; None while its name is `auto`."""
        return OPTIMIZERS.get(self.name)

    @model_validator(mode="after")
    def _sequence(self) -> Self:
        if self.row is None or not self.row.sequential:
            return self
        if self.stages:
            raise ValueError(f".stages are given, but {self.name} has none; leave them out")
        if self.schedule == "async":
            raise ValueError(
                f".schedule is async, but {self.name} builds each candidate on the one before; use pipelined"
            )
        return self


class ControlsConfig(Settings):
    """What the search must beat. Base, parents and the uniform merge are always there."""

    one_knob: bool = False
    per_model: bool = False
    random_search: bool = False


class WorkersConfig(Settings):
    """Where candidates are evaluated. Nothing here changes a result, but for what becomes of candidates that do harm:
    after `time_limit` seconds a worker is killed and its candidate recorded as failed, and so is one that has taken
    `attempts` workers down.

    A worker may have a part of a GPU (`num_gpus: 0.5`) or several, which then share the layers of its models.

    Without a count there are as many workers as the cluster holds, now and later. `minimum` of them must be there for
    the search to start: all of a count by default, else one.
    """

    pool: PoolName = "ray"
    count: int | None = Field(default=None, ge=1)
    minimum: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    placement_timeout: float = Field(default=45, gt=0)
    attempts: int = Field(default=2, ge=1)
    time_limit: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _limit(self) -> Self:
        if self.time_limit is not None and not POOLS[self.pool].processes:
            raise ValueError(
                f".time_limit is {self.time_limit:g}, but only a worker in a process of its own can be stopped; "
                "use pool: ray, or set it to null"
            )
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f".num_gpus is {self.num_gpus:g}; use a part of one GPU (such as 0.5), or whole ones")
        return self
