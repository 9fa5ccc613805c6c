"""Making the optimizer that a config names, and the choices that a config leaves to the program."""

from collections.abc import Sequence

from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.config.search import SearchConfig
from evomerge.config.tables import LEARNED, OPTIMIZERS, imported
from evomerge.errors import InputError
from evomerge.optimizers.base import Optimizer, Problem
from evomerge.optimizers.stages import StagedOptimizer
from evomerge.spaces import Gene
from evomerge.spaces.paths import GATE, HOP

_WORTH_A_DIAGONAL = 24  # genes
FORWARD_PASSES = 3  # that a pass forward and back counts as
_LEARNING = 0.6  # of the budget, at most, where evolution follows
_FEWEST_STEPS = 10  # along gradients that are worth taking
_AFTER_LEARNING = "group_evolution"
_WORTH_A_COVARIANCE = 600  # evaluations, from which on cma_es is ahead (scripts/bench/optimizers)
_STOP_AFTER = 80  # candidates


def make_optimizer(config: OptimizerConfig, problem: Problem) -> Optimizer:
    """The optimizer that a config names, in stages where it has any.

    config: the search's optimizer settings, resolved (`resolve`).
    problem: what the optimizer starts from.
    """
    return StagedOptimizer(config, problem, _make) if config.stages else _make(config, problem)


def _make(config: OptimizerConfig, problem: Problem) -> Optimizer:
    made: Optimizer = imported(OPTIMIZERS[config.name].make)(config, problem)
    return made


def passes_before(config: SearchConfig, follows: bool) -> float:
    """What a search reads before its first candidate, in forward passes over all search items.

    config: the search's.
    follows: whether it takes steps along gradients.
    """
    return passes_for_rows(config) + (passes_for_outputs(config) if follows else 0.0)


def passes_for_outputs(config: SearchConfig) -> float:
    """What it costs to read all search items once with the base and with every model, where the loss of steps along
    gradients compares layers with theirs; in forward passes over all search items.

    config: the search's.
    """
    return 1.0 + len(config.models) if config.optimizer.learning.loss == "activations" else 0.0


def passes_for_rows(config: SearchConfig) -> float:
    """What it costs to learn the weights of rows, in forward passes over all search items.

    config: the search's.
    """
    models, rows = len(config.models), config.rows
    if rows is None:
        return 0.0
    merges = 1 + models + (models > 1)  # where learning may start: the base, the models, and their uniform merge
    return rows.share * (merges + FORWARD_PASSES * rows.steps)


def learning_steps(config: OptimizerConfig, limit: float, before: float = 0.0) -> int:
    """How many steps along gradients a search takes at most: as many as the config says, but they and the candidates
    that are scored between them cost at most a part of the budget where evolution follows.

    config: the search's optimizer settings.
    limit: the budget, in evaluations.
    before: what it costs before (`passes_before`).
    """
    share = 1.0 if config.name == LEARNED else _LEARNING
    left = max(0.0, share * limit - before)
    cost = FORWARD_PASSES * config.learning.share + 1 / config.learning.every
    return min(config.learning.steps, int(left / cost))


def learns(config: OptimizerConfig, limit: float, before: float = 0.0) -> bool:
    """Whether a search should follow gradients first, where its tasks and its method allow it."""
    if config.follows_gradients:
        return True
    free = config.name == "auto" and not config.stages and config.schedule == "pipelined"
    return free and learning_steps(config, limit, before) >= _FEWEST_STEPS


def following_gradients(
    config: OptimizerConfig,
    moved: Sequence[str],
    genes: Sequence[Gene],
    limit: float,
    selects: bool,
    before: float = 0.0,
) -> OptimizerConfig:
    """The config of a search that follows gradients first, with its stages.

    config: the search's optimizer settings.
    moved: the kinds of genes that gradients move.
    genes: all genes.
    limit: the budget, in evaluations.
    selects: whether there are selection items.
    before: what it costs before (`passes_before`).
    """
    learning = config.learning.model_copy(update={"steps": max(1, learning_steps(config, limit, before))})
    config = config.model_copy(update={"learning": learning})
    if config.follows_gradients:
        return config
    kinds = tuple(dict.fromkeys(gene.kind for gene in genes))
    first = StageConfig(name=LEARNED, genes=tuple(moved))
    after = StageConfig(name=_AFTER_LEARNING, genes=kinds, scaled=True)
    stop = config.stop_after or (_STOP_AFTER if selects else None)
    return config.model_copy(update={"name": _AFTER_LEARNING, "stages": (first, after), "stop_after": stop})


def resolve(config: OptimizerConfig, dimension: int, objectives: int, genes: Sequence[Gene] = ()) -> OptimizerConfig:
    """The config with its automatic choices made. They are made once, since they must not change when a finished search
    is extended.

    config: the search's optimizer settings.
    dimension: the number of genes.
    objectives: the number of objectives.
    genes: the genes, which decide what `auto` stands for.
    Raises InputError where a population is too small for its optimizer.
    """
    name = _suited(genes, config) if config.name == "auto" else config.name
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


def _suited(genes: Sequence[Gene], config: OptimizerConfig) -> str:
    """The optimizer for genes of these kinds and this budget (measured by scripts/bench/data_flow and optimizers)."""
    kinds, domains = {gene.kind for gene in genes}, {gene.domain for gene in genes}
    if HOP in kinds:
        return "path_evolution"
    many = (config.equivalents or config.evaluations) >= _WORTH_A_COVARIANCE
    return "cma_es" if GATE in kinds or (many and domains <= {"continuous"}) else "group_evolution"


def _check_population(name: str, population: int, where: str) -> None:
    smallest = OPTIMIZERS[name].smallest
    if population < smallest:
        raise InputError(f"{where}.population is {population}; {name} needs at least {smallest}.")
