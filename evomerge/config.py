"""SearchConfig: what a search file says, checked key by key and frozen.

`load` reads YAML, applies `--set` overrides, and reports the first problem with its file and key path. `preparation`
fills in everything that the machine or the search space decides (device, population, covariance), so that the frozen
copy in a run directory says all that the archive depends on. Paths are relative to the file they stand in.
"""

import hashlib
import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from evomerge.documents import read_yaml, set_value, shown, validate
from evomerge.errors import InputError, choices, naming
from evomerge.storage import refuse_password

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
RESERVED_NAMES = {"base", "uniform", "merge", "free"}
Split = Literal["search", "selection", "heldout"]
SPLITS: tuple[Split, ...] = ("search", "selection", "heldout")


class Settings(BaseModel):
    """A frozen block of settings that rejects keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class GeneConfig(Settings):
    """Bounds, start and initial step of one kind of gene, in its own units; `fixed` takes it out of the search."""

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


class GeneChange(Settings):
    """What a user changes about a gene that has bounds of its own; nothing at all asks for the gene as it is."""

    low: float | None = None
    high: float | None = None
    start: float | None = None
    step: float | None = None
    fixed: float | None = None


class SpaceSettings(Settings):
    """What every kind of search space has: its kind, by which the table `SPACES` knows it.

    changes_layers: whether its recipes have other layers than the base, or the same in another order.
    """

    kind: str = "parameter"
    changes_layers: ClassVar[bool] = False

    @property
    def merging(self) -> "SpaceConfig | None":
        """How models are merged in this space; None where no weights are merged."""
        return None


class SpaceConfig(SpaceSettings):
    """The parameter space: which numbers of a merge are searched, per model and per group of tensors.

    method: one, or a list, of which the search chooses (it starts with the first). participate: the search chooses
    which models take part. parameters: genes for the methods' own parameters, as METHOD: {PARAMETER: bounds}; those of
    methods without weights are searched anyway. normalize: `auto` leaves it to each method.
    """

    kind: Literal["parameter"] = "parameter"
    method: str | tuple[str, ...] = "dare_ties"
    participate: bool = False
    parameters: dict[str, dict[str, GeneChange]] = Field(default_factory=dict)
    layer_groups: tuple[str, ...] | None = Field(default=None, min_length=1)
    layer_granularity: int | None = Field(default=None, ge=1)
    filters: tuple[str, ...] = ()
    weight: GeneConfig = GeneConfig(low=0.0, high=1.5, step=0.3)
    density: GeneConfig = GeneConfig(low=0.1, high=1.0, start=1.0, step=0.03)
    lambda_: GeneConfig = Field(default=GeneConfig(low=0.5, high=1.5, start=1.0, step=0.1, fixed=1.0), alias="lambda")
    normalize: bool | Literal["auto"] = False
    rescale: Literal["density", "l1"] = "density"

    @field_validator("weight", "density", "lambda_", mode="before")
    @classmethod
    def _partial(cls, value: Any, info: Any) -> Any:
        """A user who writes only `step` keeps the defaults of the rest."""
        if not isinstance(value, Mapping) or info.field_name is None:
            return value
        default = cls.model_fields[info.field_name].default.model_dump()
        if info.field_name == "lambda_" and "fixed" not in value:
            default["fixed"] = None  # to write bounds for lambda is to ask for it
        return {**default, **value}

    @property
    def merging(self) -> "SpaceConfig | None":
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods that candidates may use."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @field_validator("method")
    @classmethod
    def _each_once(cls, method: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not method:
            raise ValueError("the list is empty; name a method, or several")
        for index, name in enumerate(() if isinstance(method, str) else method):
            if name in method[:index]:
                raise ValueError(f"{name} is named twice; name each once")
        return method

    @field_validator("parameters", mode="before")
    @classmethod
    def _as_they_are(cls, value: Any) -> Any:
        """`t:` with nothing behind it asks for the gene with its own bounds."""
        if not isinstance(value, Mapping):
            return value
        return {
            method: {name: {} if change is None else change for name, change in changes.items()}
            if isinstance(changes, Mapping)
            else changes
            for method, changes in value.items()
        }

    @field_validator("density")
    @classmethod
    def _density(cls, gene: GeneConfig) -> GeneConfig:
        for key in ("low", "high", "fixed"):
            value = getattr(gene, key)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f".{key} is {value:g}; use a value in (0, 1]")
        return gene

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.layer_groups is not None and self.layer_granularity is not None:
            raise ValueError("give either layer_groups or layer_granularity, not both")
        return self


class PinnedConfig(Settings):
    """The first and last layers of a model, which every path keeps."""

    model: str
    first: int = Field(default=1, ge=0)
    last: int = Field(default=1, ge=0)


Form = Literal["path", "slots", "skip", "repeat", "reorder", "graft", "upscale", "interleave"]
SCALED_FORMS = ("path", "slots")
FREE = "free"


class DataFlowConfig(SpaceSettings):
    """The data-flow space: which layers of which models, in what order.

    `sources` are names of models, or `base`; by default all of the models. `embeddings` and `head` name the model that
    gives them, or are `free`; by default the pinned one's, or the first source's. The limits count layers of the whole
    path, and how far a layer may lie from the one that would follow.
    """

    kind: Literal["data_flow"] = "data_flow"
    changes_layers = True
    form: Form = "path"
    sources: tuple[str, ...] | None = Field(default=None, min_length=1)
    granularity: int = Field(default=1, ge=1)
    repeats: int = Field(default=2, ge=1)
    pinned: PinnedConfig | None = None
    embeddings: str | None = None
    head: str | None = None
    max_layers: int | None = Field(default=None, ge=1)
    max_repeats: int | None = Field(default=None, ge=1)
    max_distance: int | None = Field(default=None, ge=0)
    scale: GeneConfig = GeneConfig(low=0.5, high=1.5, start=1.0, step=0.1, fixed=1.0)
    scaling: Literal["mlp", "stream"] = "mlp"

    @field_validator("scale", mode="before")
    @classmethod
    def _partial(cls, value: Any) -> Any:
        """To write bounds for the scale is to ask for it."""
        if not isinstance(value, Mapping):
            return value
        default = cls.model_fields["scale"].default.model_dump()
        return {**default, "fixed": None, **value}

    @field_validator("scale")
    @classmethod
    def _positive(cls, gene: GeneConfig) -> GeneConfig:
        for key in ("low", "fixed"):
            value = getattr(gene, key)
            if value is not None and value <= 0:
                raise ValueError(f".{key} is {value:g}; use a value above 0")
        return gene

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.form not in SCALED_FORMS and self.scale.fixed != 1.0:
            raise ValueError(f".scale cannot be searched in form {self.form}; use form {' or '.join(SCALED_FORMS)}")
        return self


class PathConfig(Settings):
    """The path of a hybrid search: as in the data-flow space, of the merge (`merge`) and of the models named."""

    sources: tuple[str, ...] = ()
    granularity: int = Field(default=1, ge=1)
    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)
    max_layers: int | None = Field(default=None, ge=1)
    max_repeats: int | None = Field(default=None, ge=1)
    max_distance: int | None = Field(default=None, ge=0)


class HybridConfig(SpaceSettings):
    """Both at once: a merge with its parameters, and a path through the merge's layers and those of the models.

    With optimizer.stages the first can find the merge and the second the path (Akiba et al. 2025, section 3.3);
    without, both genomes are searched together.
    """

    kind: Literal["hybrid"] = "hybrid"
    changes_layers = True
    parameter: SpaceConfig = SpaceConfig()
    path: PathConfig = PathConfig()

    @property
    def merging(self) -> "SpaceConfig | None":
        return self.parameter


Maker = str | Callable[..., Any]


def imported(maker: Maker) -> Callable[..., Any]:
    """A row's maker. One written as `module:name` is imported now, so that reading a table imports nothing."""
    if callable(maker):
        return maker
    module, _, name = maker.partition(":")
    made: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return made


@dataclass(frozen=True, slots=True)
class SpaceRow:
    """A kind of search space.

    description: what it searches, in a phrase.
    paper: where it comes from.
    settings: the model of the file's `space` block.
    make: makes the SearchSpace of a SearchConfig, the base's tensor names and its model type.
    genes: makes the list of its kinds of genes (`spaces.table.GeneRow`).
    """

    description: str
    paper: str
    settings: type[SpaceSettings]
    make: Maker
    genes: Maker


@dataclass(frozen=True, slots=True)
class OptimizerRow:
    """An optimizer.

    make: makes the Optimizer of an OptimizerConfig and a Problem.
    population: the usual size of a generation, given the number of genes.
    smallest: the least size of a generation.
    learns_ranks: whether it learns from the ranks in a generation, so that subsets of items pay.
    sequential: whether a generation is built on the scores of the one before: no lag, no stages, no async schedule.
    most: the most candidates that it can try, given the number of models; None where there is no end.
    check: raises InputError where it cannot search a set of kinds of genes; it is given that set.
    """

    make: Maker
    population: Callable[[int], int]
    smallest: int = 1
    learns_ranks: bool = False
    sequential: bool = False
    most: Callable[[int], int] | None = None
    check: Maker | None = None


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a candidate costs, as an objective to be minimized.

    measure: the cost, given the model and the seconds that its evaluation took.
    of_items: whether it depends on how many items are scored.
    """

    measure: Maker
    of_items: bool = False


@dataclass(frozen=True, slots=True)
class PoolRow:
    """A pool of workers.

    make: makes the WorkerPool of a SearchConfig, what makes a worker, and the address of a cluster or None.
    processes: whether its workers are processes of their own, so that one can be stopped.
    """

    make: Maker
    processes: bool = True


def _covariance_population(dimension: int) -> int:
    return max(8, 4 + int(3 * math.log(dimension)))


SPACES: dict[str, SpaceRow] = {
    "parameter": SpaceRow(
        description="the numbers of merge methods, which method, and which models",
        paper="Akiba et al. 2025, Evolutionary optimization of model merging recipes, section 3.1, arXiv:2403.13187",
        settings=SpaceConfig,
        make="evomerge.spaces.parameter:make",
        genes="evomerge.spaces.table:of_parameter_space",
    ),
    "data_flow": SpaceRow(
        description="which layers of which models, in what order",
        paper="Akiba et al. 2025, section 3.2",
        settings=DataFlowConfig,
        make="evomerge.spaces.data_flow:make",
        genes="evomerge.spaces.table:of_paths",
    ),
    "hybrid": SpaceRow(
        description="a merge, and a path through its layers and those of its models",
        paper="Akiba et al. 2025, section 3.3",
        settings=HybridConfig,
        make="evomerge.spaces.hybrid:make",
        genes="evomerge.spaces.table:of_both",
    ),
}
OPTIMIZERS: dict[str, OptimizerRow] = {
    "cma_es": OptimizerRow("evomerge.optimizers.cma_es:CmaEs", _covariance_population, smallest=4, learns_ranks=True),
    "cat_cma": OptimizerRow("evomerge.optimizers.cat_cma:make", _covariance_population, smallest=4, learns_ranks=True),
    "path_evolution": OptimizerRow(
        "evomerge.optimizers.path_evolution:make",
        lambda _: 8,
        check="evomerge.optimizers.path_evolution:check",
    ),
    "group_evolution": OptimizerRow("evomerge.optimizers.group_evolution:GroupEvolution", lambda _: 2),
    "random_search": OptimizerRow("evomerge.optimizers.random_search:RandomSearch", lambda _: 16),
    "greedy_soup": OptimizerRow(
        "evomerge.optimizers.greedy_soup:GreedySoup",
        lambda _: 1,
        sequential=True,
        most=lambda models: models,
        check="evomerge.optimizers.greedy_soup:check",
    ),
}
COSTS: dict[str, CostRow] = {
    "layers": CostRow("evomerge.evaluation.costs:layers"),
    "parameters": CostRow("evomerge.evaluation.costs:parameters"),
    "seconds": CostRow("evomerge.evaluation.costs:seconds", of_items=True),
}
POOLS: dict[str, PoolRow] = {
    "ray": PoolRow("evomerge.workers.ray_pool:make"),
    "local": PoolRow("evomerge.workers.local_pool:make", processes=False),
}


def _one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """That a name stands in a table, as it is when the name is read."""

    def check(name: str) -> str:
        known = list(names())
        if name not in known:
            raise PydanticKnownError("literal_error", {"expected": ", ".join(f"'{each}'" for each in known)})
        return name

    return AfterValidator(check)


OptimizerName = Annotated[str, _one_of(lambda: ["auto", *OPTIMIZERS])]
StageName = Annotated[str, _one_of(lambda: [name for name, row in OPTIMIZERS.items() if not row.sequential])]
CostName = Annotated[str, _one_of(lambda: COSTS)]
PoolName = Annotated[str, _one_of(lambda: POOLS)]


def _as_its_kind(space: Any) -> Any:
    """A `space` block as the settings of its kind; one that does not say is the parameter space."""
    if not isinstance(space, Mapping):
        return space
    kind = space.get("kind", "parameter")
    if not isinstance(kind, str) or kind not in SPACES:
        expected = ", ".join(f"'{name}'" for name in SPACES)
        problem = {"type": "literal_error", "loc": ("kind",), "input": kind, "ctx": {"expected": expected}}
        raise ValidationError.from_exception_data("space", [problem])  # type: ignore[list-item]
    return SPACES[kind].settings.model_validate(space)


AnySpaceConfig = Annotated[SerializeAsAny[SpaceSettings], BeforeValidator(_as_its_kind)]


class ObjectiveConfig(Settings):
    """One score to be optimized: a metric of a task, or with `cost` what the model itself costs.

    `goal` defaults to what the task says of the metric; costs are minimized. A cost takes part in means only with a
    weight of its own, and candidates that cost more than `max` never win. `seconds` is the time that an evaluation
    takes on the machine at hand: recorded once and replayed, but another run will measure another.
    """

    task: str = ""
    metric: str = "acc"
    filter: str | None = None
    cost: CostName | None = None
    goal: Literal["maximize", "minimize"] | None = None
    weight: float = Field(default=1.0, ge=0)
    max: float | None = Field(default=None, gt=0)
    _names_filter: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _cost(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("cost") is not None:
            return {"goal": "minimize", "weight": 0.0, **value}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.cost is None and not self.task:
            raise ValueError(".task is required but missing; add it, or a cost")
        if self.cost is None and self.weight == 0:
            raise ValueError(".weight is 0; use a value greater than 0")
        if self.cost is None and self.max is not None:
            raise ValueError(f".max is {self.max:g}, but only a cost has a limit; remove it")
        if self.cost is not None and (self.task or self.filter is not None or self.metric != "acc"):
            raise ValueError(f".cost is {self.cost}, which belongs to no task; give either a cost or a task")
        return self

    @property
    def name(self) -> str:
        """The objective's name in scores: the cost, or the task, with the metric where it is not plain accuracy, and
        with both metric and filter where a search measures the metric by several filters."""
        if self.cost is not None:
            return self.cost
        if self._names_filter and self.filter is not None:
            return f"{self.task}:{self.metric}:{self.filter}"
        return self.task if self.metric == "acc" else f"{self.task}:{self.metric}"


class ConstraintConfig(Settings):
    """What a candidate must keep: a share `retain` of a score of one of the parents, whether an objective or not.

    of: the name of the parent, or `base`; by default the best parent on the metric. Of a score that is to be small, or
    is below 0, it may be worse by the share 1 - retain.
    """

    task: str
    metric: str = "acc"
    filter: str | None = None
    goal: Literal["maximize", "minimize"] | None = None
    retain: float = Field(gt=0, le=1)
    of: str | None = None
    _names_filter: bool = PrivateAttr(default=False)

    @property
    def guard(self) -> ObjectiveConfig:
        """The metric as it is measured."""
        guard = ObjectiveConfig(task=self.task, metric=self.metric, filter=self.filter, goal=self.goal)
        guard._names_filter = self._names_filter
        return guard

    @property
    def name(self) -> str:
        """The name of the metric in scores, as an objective would have it."""
        return self.guard.name


class TasksConfig(Settings):
    """Where tasks are found, and which of them may run code that comes with their YAML.

    data_root: where data files are looked for that do not lie beside a task's YAML file; by default the directory in
    which the search is started, as lm-eval has it.
    """

    paths: tuple[str, ...] = ()
    allow_code: tuple[str, ...] = ()
    data_root: str | None = None


class ItemsConfig(Settings):
    """How many items the search and the report each see (None: all there are). Never the same ones.

    A task with a validation and a test split is searched on the first and reported on the second. The items of any
    other task are divided by `seed`, `search_fraction` of them for the search. selection: how many more, of those that
    the search leaves, decide which candidate of the front is the best (None: the search items do).
    """

    search: int | None = Field(default=None, ge=1)
    selection: int | None = Field(default=None, ge=1)
    heldout: int | None = Field(default=None, ge=1)
    search_fraction: float = Field(default=0.5, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)


class VllmConfig(Settings):
    """The environment of its own that vLLM has, and what its engine takes there.

    python: the interpreter. cache_gib: memory for keys and values. eager: nothing is compiled, so that it starts sooner
    and writes slower.
    """

    python: str | None = None
    cache_gib: float = Field(default=4, gt=0)
    eager: bool = False


class EvaluationConfig(Settings):
    """Everything that changes the floating-point results of a score, so all of it is frozen with the search.

    backend: what writes the texts of generate_until tasks; log-likelihoods are transformers' in any case.
    compile: whether merges run as compiled code; `auto` does for large models on CPUs that have a compiler, where the
    bits are those of uncompiled code.
    prefix_sharing: whether the options of a document share one row behind a mask; auto asks for it where the base's
    architecture takes such masks. generation_kwargs go over those of the tasks' files.
    fewshot_as_multiturn: whether few-shot examples are turns of their own; by default they are where a chat template is
    applied, as in lm-eval.

    What is not set here is as in lm-eval 0.4.13, but for two things: log-probabilities are taken in float32 whatever
    the model's dtype, and sampled texts start from one seed for every candidate.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(default=128, ge=1)
    threads: int = Field(default=1, ge=1)
    compile: bool | Literal["auto"] = "auto"
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    generation_kwargs: dict[str, bool | int | float | str | list[str] | None] = {}
    prefix_sharing: Literal["auto", "mask", "none"] = "auto"
    backend: Literal["hf", "vllm"] = "hf"
    vllm: VllmConfig = VllmConfig()

    @property
    def multiturn(self) -> bool:
        """Whether few-shot examples are turns of their own."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    @model_validator(mode="after")
    def _interpreter(self) -> Self:
        if self.backend == "vllm" and self.vllm.python is None:
            raise ValueError(
                ".vllm.python is missing, but backend is vllm; name the interpreter of an environment that has vLLM"
            )
        return self


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


class SearchConfig(Settings):
    """One search: models, objectives, space, optimizer, and where it runs.

    subsets: whether candidates are scored on a few of the search items first, and on all of them only where that may
    make them the best or put them on the front; `auto` does where it saves work (`preparation`). In a search that is
    extended, a generation that the budget had cut may have sent on others than the whole one would.
    """

    base: str
    models: dict[Name, str]
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    constraints: tuple[ConstraintConfig, ...] = ()
    tasks: TasksConfig = TasksConfig()
    items: ItemsConfig = ItemsConfig()
    space: AnySpaceConfig = SpaceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    subsets: bool | Literal["auto"] = "auto"
    controls: ControlsConfig = ControlsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)
    storage: str | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _named_models(cls, value: Any) -> Any:
        """A plain list of models is named by the last part of each reference: of the adapter, where there is one."""
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return value
        paths = [item.rpartition("+")[2].partition("@")[0] for item in value]
        names = [Path(path.removeprefix("zoo:")).name for path in paths]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two of them would be called {repeated[0]}; give them names (name: path)")
        return dict(zip(names, value, strict=True))

    @field_validator("storage")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        return refuse_password(value) if value is not None else None

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not self.models and self.space.merging is not None:
            raise ValueError(".models is {}; give at least one")
        device, gpus = self.evaluation.device, self.workers.num_gpus or 0
        if gpus > 1 and device.startswith("cuda:"):
            raise ValueError(f".evaluation.device is {device}, but workers.num_gpus is {gpus:g}; use cuda for several")
        if all(objective.weight == 0 for objective in self.objectives):
            raise ValueError(".objectives are all costs; add a task, or give a cost a weight")
        return self

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.evaluation.backend == "vllm" and self.space.changes_layers:
            raise ValueError(
                f".evaluation.backend is vllm, whose engine has the base's layers only, but space.kind is "
                f"{self.space.kind}; use backend: hf"
            )
        return self

    @model_validator(mode="after")
    def _named_by_filter(self) -> Self:
        """Metrics that are measured by several filters have these in their names."""
        measured: list[ObjectiveConfig | ConstraintConfig] = [*self.constraints]
        measured += [each for each in self.objectives if each.cost is None]
        filters: dict[tuple[str, str], set[str | None]] = {}
        for metric in measured:
            filters.setdefault((metric.task, metric.metric), set()).add(metric.filter)
        for metric in measured:
            metric._names_filter = len(filters[metric.task, metric.metric]) > 1
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [objective.name for objective in self.objectives]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f".objectives[{index}] is {name} again; name each objective once")
        for name in sorted(RESERVED_NAMES & set(self.models)):
            raise ValueError(f".models.{name}: this name is kept for a control; choose another")
        return self

    @model_validator(mode="after")
    def _constrained(self) -> Self:
        for index, constraint in enumerate(self.constraints):
            known = ["base", *self.models]
            if constraint.of is not None and constraint.of not in known:
                raise ValueError(
                    f".constraints[{index}].of is {constraint.of}, which is no parent; {choices(constraint.of, known)}"
                )
        return self

    @property
    def measured(self) -> tuple[ObjectiveConfig, ...]:
        """Every metric that an evaluation has a score of: the objectives, then what only constraints ask for."""
        found = {objective.name: objective for objective in self.objectives}
        for constraint in self.constraints:
            found.setdefault(constraint.name, constraint.guard)
        return tuple(found.values())

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that items are divided into, in the order in which they are scored."""
        return SPLITS if self.items.selection is not None else ("search", "heldout")

    @property
    def budget(self) -> int:
        """How many search candidates there are to be: some optimizers come to an end before."""
        row = self.optimizer.row
        asked = self.optimizer.evaluations
        return asked if row is None or row.most is None else min(asked, row.most(len(self.models)))

    def digest(self) -> str:
        """A hash of all that the archive's content depends on: not the workers, not the budget, not the storage, and
        not where vLLM or the tasks' data files lie."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"workers", "storage"})
        content["optimizer"].pop("evaluations")
        content["tasks"].pop("data_root")
        content["evaluation"]["vllm"].pop("python")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def load(path: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads a search file. Raises InputError naming the file and the key path of the first problem."""
    document = read_yaml(path)
    for override in overrides:
        set_value(document, override)
    config = validate(SearchConfig, document, path)
    with naming(path):
        return _anchored(config, path.parent)


def _anchored(config: SearchConfig, folder: Path) -> SearchConfig:
    """The same config with its relative local paths made absolute."""
    paths = [_absolute(f"tasks.paths[{index}]", path, folder)[0] for index, path in enumerate(config.tasks.paths)]
    root = (
        str(Path.cwd())
        if config.tasks.data_root is None
        else _absolute("tasks.data_root", config.tasks.data_root, folder)[0]
    )
    return config.model_copy(
        update={
            "base": _anchor("base", config.base, folder),
            "models": {name: _anchor(f"models.{name}", model, folder) for name, model in config.models.items()},
            "tasks": config.tasks.model_copy(update={"paths": tuple(paths), "data_root": root}),
            "evaluation": _anchored_interpreter(config.evaluation, folder),
        }
    )


def _anchored_interpreter(evaluation: EvaluationConfig, folder: Path) -> EvaluationConfig:
    """vLLM's interpreter by its absolute path, links not followed: an environment's interpreter is one."""
    python = evaluation.vllm.python
    if python is None:
        return evaluation
    path = os.path.abspath(folder / os.path.expanduser(python))
    return evaluation.model_copy(update={"vllm": evaluation.vllm.model_copy(update={"python": path})})


def _anchor(key: str, reference: str, folder: Path) -> str:
    """A model reference, absolute where it is a local path; a model and its adapter each by itself."""
    if reference.startswith("zoo:") and "+" not in reference:
        return reference
    path, there = _absolute(key, reference, folder)
    model, plus, adapter = reference.partition("+")
    if plus and not there:
        return f"{_anchor(key, model, folder)}+{_anchor(key, adapter, folder)}"
    return path if there or reference.startswith((".", "/", "~")) else reference


def _absolute(key: str, path: str, folder: Path) -> tuple[str, bool]:
    """A path relative to a folder made absolute, and whether there is something at it."""
    try:
        found = (folder / Path(path).expanduser()).resolve()
        return str(found), found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"{key} is {shown(path)}, which cannot be a path ({reason}); correct it.") from None
