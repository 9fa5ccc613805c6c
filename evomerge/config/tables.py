"""What a search file can name: kinds of spaces, optimizers, costs and pools, one table each.

To add one, write its file and add its row. Rows name what they make as `module:name`, which is imported when it is
first made, so that reading a search file imports no optimizer and no cluster.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    SerializeAsAny,
    ValidationError,
)
from pydantic_core import PydanticKnownError

from evomerge.config.spaces import DataFlowConfig, HybridConfig, ParameterSpaceConfig, SpaceSettings

Maker = str | Callable[..., Any]


def imported(maker: Maker) -> Callable[..., Any]:
    """A row's maker. A maker written as `module:name` is imported now, so that reading a table imports nothing."""
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
    gradients: whether it follows gradients instead of scores, so that `make` makes a `Learner`.
    most: the most candidates that it can try, given the number of models; None where there is no end.
    check: raises InputError where it cannot search a set of kinds of genes; it is given that set.
    """

    make: Maker
    population: Callable[[int], int]
    smallest: int = 1
    learns_ranks: bool = False
    sequential: bool = False
    gradients: bool = False
    most: Callable[[int], int] | None = None
    check: Maker | None = None


@dataclass(frozen=True, slots=True)
class CostRow:
    """What a candidate costs, as an objective to be minimized.

    measure: the cost, given the model and the seconds that its evaluation took; of texts, what each costs.
    of_items: whether it depends on how many items are scored.
    of_texts: whether it is a mean over the texts that the model writes; `measure` is then given the texts of an item,
        and what makes tokens of a text.
    """

    measure: Maker
    of_items: bool = False
    of_texts: bool = False


@dataclass(frozen=True, slots=True)
class PoolRow:
    """A pool of workers.

    make: makes the WorkerPool of a SearchConfig, what makes a worker, and the address of a cluster or None.
    processes: whether its workers are processes of their own, so that one can be stopped.
    """

    make: Maker
    processes: bool = True


@dataclass(frozen=True, slots=True)
class TrackerRow:
    """A program in which people watch experiments.

    make: makes the Tracker of an OpenRun.
    package: the package that must be installed.
    extra: the extra of evomerge that installs it.
    """

    make: Maker
    package: str
    extra: str


def _covariance_population(dimension: int) -> int:
    return max(8, 4 + int(3 * math.log(dimension)))


SPACES: dict[str, SpaceRow] = {
    "parameter": SpaceRow(
        description="the numbers of merge methods, which method, and which models",
        paper="Akiba et al. 2025, Evolutionary optimization of model merging recipes, section 3.1, arXiv:2403.13187",
        settings=ParameterSpaceConfig,
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
LEARNED = "learned"
OPTIMIZERS: dict[str, OptimizerRow] = {
    LEARNED: OptimizerRow("evomerge.optimizers.learned:Learner", lambda _: 1, gradients=True),
    "cma_es": OptimizerRow("evomerge.optimizers.cma_es:CmaEs", _covariance_population, smallest=4, learns_ranks=True),
    "cat_cma": OptimizerRow("evomerge.optimizers.cat_cma:make", _covariance_population, smallest=4, learns_ranks=True),
    "path_evolution": OptimizerRow(
        "evomerge.optimizers.path_evolution:make",
        lambda _: 8,
        check="evomerge.optimizers.path_evolution:check",
    ),
    "group_evolution": OptimizerRow("evomerge.optimizers.group_evolution:GroupEvolution", lambda _: 2),
    "tpe": OptimizerRow("evomerge.optimizers.samplers:tpe", lambda _: 4),
    "gp": OptimizerRow("evomerge.optimizers.samplers:gp", lambda _: 4),
    "nsga_ii": OptimizerRow("evomerge.optimizers.samplers:nsga_ii", lambda _: 16, smallest=2),
    "nsga_iii": OptimizerRow("evomerge.optimizers.samplers:nsga_iii", lambda _: 16, smallest=2),
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
    "tokens": CostRow("evomerge.evaluation.costs:tokens", of_texts=True),
}
POOLS: dict[str, PoolRow] = {
    "ray": PoolRow("evomerge.workers.ray_pool:make"),
    "local": PoolRow("evomerge.workers.local_pool:make", processes=False),
}

TRACKERS: dict[str, TrackerRow] = {
    "tensorboard": TrackerRow("evomerge.runs.trackers.tensorboard:TensorBoard", "tensorboard", "tensorboard"),
    "wandb": TrackerRow("evomerge.runs.trackers.weights_and_biases:WeightsAndBiases", "wandb", "wandb"),
}


def _one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """A check that a name is in a table; the table is read when the name is checked."""

    def check(name: str) -> str:
        valid = list(names())
        if name not in valid:
            raise PydanticKnownError("literal_error", {"expected": ", ".join(f"'{key}'" for key in valid)})
        return name

    return AfterValidator(check)


OptimizerName = Annotated[str, _one_of(lambda: ["auto", *OPTIMIZERS])]
StageName = Annotated[str, _one_of(lambda: [name for name, row in OPTIMIZERS.items() if not row.sequential])]
CostName = Annotated[str, _one_of(lambda: COSTS)]
PoolName = Annotated[str, _one_of(lambda: POOLS)]
TrackerName = Annotated[str, _one_of(lambda: TRACKERS)]


def _as_its_kind(space: Any) -> Any:
    """A `space` block as the settings of its kind; a block without `kind` is a parameter space."""
    if not isinstance(space, Mapping):
        return space
    kind = space.get("kind", "parameter")
    if not isinstance(kind, str) or kind not in SPACES:
        expected = ", ".join(f"'{name}'" for name in SPACES)
        problem = {"type": "literal_error", "loc": ("kind",), "input": kind, "ctx": {"expected": expected}}
        raise ValidationError.from_exception_data("space", [problem])  # type: ignore[list-item]
    return SPACES[kind].settings.model_validate(space)


AnySpaceConfig = Annotated[SerializeAsAny[SpaceSettings], BeforeValidator(_as_its_kind)]
