"""How a search runs: its optimizer and stages, its controls, its workers."""

from typing import Any, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from evomerge.config.base import Settings
from evomerge.config.documents import shown
from evomerge.config.tables import LEARNED, OPTIMIZERS, POOLS, OptimizerName, OptimizerRow, PoolName, StageName


class StageConfig(Settings):
    """A period of the search in which only some kinds of genes move.

    genes: the kinds of genes that move.
    evaluations: how many candidates the stage proposes; the last stage may leave it out and takes the rest.
    name: the stage's optimizer; by default that of the search. Only the first stage can be `learned`.
    population: how many candidates a generation has; by default that of the search.
    scaled: whether the weights of a group's tensors move together, as multiples of those at which the stage starts.
    """

    genes: tuple[str, ...] = Field(min_length=1)
    evaluations: int | None = Field(default=None, ge=1)
    name: StageName | None = None
    population: int | None = Field(default=None, ge=1)
    scaled: bool = False


class LearningConfig(Settings):
    """How the optimizer `learned` follows the gradient of a loss on search items.

    loss: `likelihood` is that of the right answers. `entropy` needs no answers: it makes the model surer of its own,
        over the options of an item, or over the first token that it would write (Yang et al. 2024, AdaMerging).
        `activations` needs none either: it brings what layers put out on prompts close to a weighted average of what
        those of the models put out there (after Xu et al. 2025, ProDistill).
    steps: how many steps there are at most; with 0, `auto` follows no gradients.
    share: the share of the search items that a step reads.
    rate: how far a gene moves in the first steps, in its own units; it falls to a tenth. By default what suits the
        number of genes.
    every: after how many steps the candidate is scored on all search items.
    patience: the stage ends when so many of these scores in a row have not risen.
    shards: into how many parts a step is divided, so that so many workers can share it.
    batch_size: how many rows a model reads at a time in a step; by default as in evaluations.
    checkpointing: whether the outputs of layers are computed again on the way back instead of kept, which saves memory
        and takes more time; `auto` does so for models with at least a billion parameters.
    """

    loss: Literal["likelihood", "entropy", "activations"] = "likelihood"
    steps: int = Field(default=60, ge=0)
    share: float = Field(default=0.25, gt=0, le=1)
    rate: float | None = Field(default=None, gt=0)
    every: int = Field(default=10, ge=1)
    patience: int = Field(default=2, ge=1)
    shards: int = Field(default=1, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    checkpointing: bool | Literal["auto"] = "auto"


class OptimizerConfig(Settings):
    """How genomes are proposed.

    name: the optimizer. `auto` follows gradients first (`learned`) and then evolves, where the objectives have
        reference answers and the method has derivatives. Elsewhere it only evolves, by an optimizer that suits the
        kinds of genes and the budget.
    evaluations: how many search candidates there are; controls come on top. A step along a gradient counts as three
        times the share of the search items that it reads.
    equivalents: how much a search may cost in the place of `evaluations`: an evaluation on all search items counts 1,
        one on some of them as much as their share, and a step along a gradient three times that.
    stop_after: the search ends when the best score on selection items has not risen for so many candidates; None where
        only the budget ends it.
    population: how many candidates a generation has; by default what suits the optimizer.
    schedule: `pipelined` proposes the same candidates with any number of workers. `async` never lets a worker wait, but
        its proposals depend on the order in which evaluations finish; a resumed search keeps to the recorded order.
    lag: how many more generations are proposed before the first one is scored.
    ranking: how scores become ranks; `auto` is `elite` for several objectives, else `weighted_sum`.
    covariance: the covariance of CMA-ES; `auto` is `diagonal` for many genes or few evaluations.
    restarts: whether CMA-ES starts again when it has stalled.
    stages: periods in which only some kinds of genes move, in order.
    learning: how `learned` follows gradients.
    """

    name: OptimizerName = "auto"
    evaluations: int = Field(default=300, ge=1)
    equivalents: float | None = Field(default=None, gt=0)
    stop_after: int | None = Field(default=None, ge=1)
    population: int | None = Field(default=None, ge=1)
    schedule: Literal["pipelined", "async"] = "pipelined"
    lag: int = Field(default=1, ge=0, le=16)
    ranking: Literal["auto", "elite", "weighted_sum"] = "auto"
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    restarts: bool = True
    stages: tuple[StageConfig, ...] = ()
    learning: LearningConfig = LearningConfig()

    @model_validator(mode="after")
    def _stages(self) -> Self:
        for index, stage in enumerate(self.stages[:-1]):
            if stage.evaluations is None and stage.name != LEARNED:
                raise ValueError(f".stages[{index}].evaluations is missing; every stage but the last needs a number")
        for index, stage in enumerate(self.stages):
            if stage.name == LEARNED and index > 0:
                raise ValueError(f".stages[{index}].name is learned, which can only come first; move it")
            if stage.name == LEARNED and stage.evaluations is not None:
                raise ValueError(f".stages[{index}].evaluations belongs to no learned stage; set learning.steps")
        if self.follows_gradients and self.schedule == "async":
            raise ValueError(".schedule is async, but gradients are followed step by step; use pipelined")
        if self.name == LEARNED and self.stages:
            raise ValueError(".stages are given, but learned has none; make learned the first of the stages")
        if self.follows_gradients and self.learning.steps == 0:
            raise ValueError(".learning.steps is 0, but learned takes at least 1; set it, or use another optimizer")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the optimizers that take part."""
        own = [stage.name for stage in self.stages if stage.name is not None]
        return tuple(dict.fromkeys(own if own and len(own) == len(self.stages) else [self.name, *own]))

    @property
    def follows_gradients(self) -> bool:
        """Whether the search begins with steps along gradients."""
        return self.name == LEARNED or bool(self.stages and self.stages[0].name == LEARNED)

    @property
    def evolving(self) -> "OptimizerConfig":
        """The config without the steps along gradients."""
        return self.model_copy(update={"stages": self.stages[1:]}) if self.follows_gradients else self

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
    time_limit: after how many seconds a worker is killed and its candidate counts as failed; None for no limit. Where
        evaluations are divided, this is the limit of a shard.
    shards: into how many shards an evaluation is divided, which workers score side by side; `auto` is decided by the
        size of the model and the number of search items. A shard is at least a batch (`evaluation.batch_size`). The
        scores are the same to the bit for any number.
    """

    pool: PoolName = "ray"
    count: int | None = Field(default=None, ge=1)
    minimum: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    placement_timeout: float = Field(default=45, gt=0)
    attempts: int = Field(default=2, ge=1)
    time_limit: float | None = Field(default=None, gt=0)
    shards: int | Literal["auto"] = "auto"

    @field_validator("shards", mode="before")
    @classmethod
    def _some_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and value is not True and value > 0):
            return value
        raise ValueError(f"it is {shown(value)}; use auto, or a whole number of at least 1")

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
