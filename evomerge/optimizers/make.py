"""Making the optimizer that a config names, and the choices that a config leaves to the program."""

from collections.abc import Sequence

from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.config.tables import OPTIMIZERS, imported
from evomerge.errors import InputError
from evomerge.optimizers.base import Optimizer, Problem
from evomerge.optimizers.stages import StagedOptimizer
from evomerge.spaces import Gene
from evomerge.spaces.paths import GATE, HOP

_WORTH_A_DIAGONAL = 24  # genes


def make_optimizer(config: OptimizerConfig, problem: Problem) -> Optimizer:
    """The optimizer that a config names, in stages where it has any.

    config: the search's optimizer settings, resolved (`resolve`).
    problem: what the optimizer starts from.
    """
    return StagedOptimizer(config, problem, _make) if config.stages else _make(config, problem)


def _make(config: OptimizerConfig, problem: Problem) -> Optimizer:
    made: Optimizer = imported(OPTIMIZERS[config.name].make)(config, problem)
    return made


def resolve(config: OptimizerConfig, dimension: int, objectives: int, genes: Sequence[Gene] = ()) -> OptimizerConfig:
    """The config with its automatic choices made. They are made once, since they must not change when a finished search
    is extended.

    config: the search's optimizer settings.
    dimension: the number of genes.
    objectives: the number of objectives.
    genes: the genes, which decide what `auto` stands for.
    Raises InputError where a population is too small for its optimizer.
    """
    name = _suited(genes) if config.name == "auto" else config.name
    population = config.population or OPTIMIZERS[name].population(dimension)
    stages = tuple(_resolved_stage(stage, config, dimension) for stage in config.stages)
    _check_population(name, population, "optimizer")
    for index, stage in enumerate(stages):
        if stage.name is not None and stage.population is not None:
            _check_population(stage.name, stage.population, f"optimizer.stages[{index}]")
    covariance = config.covariance
    if covariance == "auto":
        wide = dimension >= _WORTH_A_DIAGONAL or config.evaluations <= 10 * dimension
        covariance = "diagonal" if wide else "full"
    ranking = config.ranking
    if ranking == "auto":
        ranking = "elite" if objectives > 1 else "weighted_sum"
    lag = 0 if OPTIMIZERS[name].sequential else config.lag
    chosen = {"name": name, "population": population, "lag": lag, "covariance": covariance, "ranking": ranking}
    return config.model_copy(update={**chosen, "stages": stages})


def _resolved_stage(stage: StageConfig, config: OptimizerConfig, dimension: int) -> StageConfig:
    if stage.name is None:
        return stage
    population = stage.population or config.population or OPTIMIZERS[stage.name].population(dimension)
    return stage.model_copy(update={"population": population})


def _suited(genes: Sequence[Gene]) -> str:
    """The optimizer for genes of these kinds (measured by scripts/bench/data_flow)."""
    kinds, domains = {gene.kind for gene in genes}, {gene.domain for gene in genes}
    if HOP in kinds:
        return "path_evolution"
    return "cma_es" if GATE in kinds or domains <= {"continuous"} else "group_evolution"


def _check_population(name: str, population: int, where: str) -> None:
    smallest = OPTIMIZERS[name].smallest
    if population < smallest:
        raise InputError(f"{where}.population is {population}; {name} needs at least {smallest}.")
