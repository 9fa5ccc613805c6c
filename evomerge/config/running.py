"""How a search runs: its optimizer and stages, its controls, its workers."""

from typing import Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from evomerge.config.base import Settings
from evomerge.config.tables import OPTIMIZERS, POOLS, OptimizerName, OptimizerRow, PoolName, StageName


class StageConfig(Settings):
    """A period of the search in which only some kinds of genes move.

    genes: the kinds of genes that move.
    evaluations: how many candidates the stage proposes; the last stage may leave it out and takes the rest.
    name: the stage's optimizer; by default that of the search.
    population: how many candidates a generation has; by default that of the search.
    """

    genes: tuple[str, ...] = Field(min_length=1)
    evaluations: int | None = Field(default=None, ge=1)
    name: StageName | None = None
    population: int | None = Field(default=None, ge=1)


class OptimizerConfig(Settings):
    """How genomes are proposed.

    name: the optimizer; `auto` chooses by the kinds of genes.
    evaluations: how many search candidates there are; controls come on top.
    population: how many candidates a generation has; by default what suits the optimizer.
    schedule: `pipelined` proposes the same candidates with any number of workers. `async` never lets a worker wait, but
        its proposals depend on the order in which evaluations finish; a resumed search keeps to the recorded order.
    lag: how many more generations are proposed before the first one is scored.
    ranking: how scores become ranks; `auto` is `elite` for several objectives, else `weighted_sum`.
    covariance: the covariance of CMA-ES; `auto` is `diagonal` for many genes or few evaluations.
    restarts: whether CMA-ES starts again when it has stalled.
    stages: periods in which only some kinds of genes move, in order.
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
    """What the search must beat, besides the base, the parents and the uniform merge.

    one_knob: whether task arithmetic, TIES and DARE-TIES with one weight and density for all models are controls.
    per_model: whether a grid over one weight per model is a control.
    random_search: whether a random search is a control.
    """

    one_knob: bool = False
    per_model: bool = False
    random_search: bool = False


class WorkersConfig(Settings):
    """Where candidates are evaluated. Nothing here changes a result, except that `attempts` and `time_limit` decide
    when a candidate counts as failed.

    pool: what runs the workers.
    count: how many workers there are; None for as many as the cluster holds, now and later.
    minimum: how many workers must be there for the search to start; by default the count, or one without a count.
    num_cpus: CPU cores of a worker.
    num_gpus: GPUs of a worker: a share of one (such as 0.5), or several, which share the layers of its models.
    placement_timeout: how long to wait for workers to start, in seconds.
    attempts: how many workers a candidate may take down before it counts as failed.
    time_limit: after how many seconds a worker is killed and its candidate counts as failed; None for no limit.
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
