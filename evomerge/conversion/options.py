"""The options of a conversion: those that stood on the command line of mergekit-evolve, and what files do not say."""

from dataclasses import dataclass
from typing import Any

from evomerge.errors import InputError

STRATEGIES = ("pool", "buffered", "serial")
FEVALS, SIGMA = 100, 1 / 6  # where the command line of mergekit-evolve gives none


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What stood on the command line of mergekit-evolve. None and false stand for what was not given.

    base: the model that the others were tuned from.
    tasks: the tasks of a search that is made of a recipe, as TASK, TASK:METRIC or TASK:METRIC:FILTER.
    max_fevals: how many candidates there are.
    sigma: the first step.
    population: how many candidates a generation has.
    strategy: how evaluations are scheduled.
    seed: of random numbers.
    batch_size: rows in a batch.
    task_paths: where tasks are found.
    num_gpus: how many GPUs there are.
    timeout: after how many seconds the search ends.
    in_memory: whether candidates are merged in memory.
    vllm: whether vLLM evaluates.
    load_in_4bit: whether models are evaluated at 4 bits.
    load_in_8bit: whether models are evaluated at 8 bits.
    trust_remote_code: whether the code of models may run.
    allow_crimes: whether architectures may be mixed.
    unneeded: other options that were given, which a search needs nothing of.
    """

    base: str | None = None
    tasks: tuple[str, ...] = ()
    max_fevals: int | None = None
    sigma: float | None = None
    population: int | None = None
    strategy: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    task_paths: tuple[str, ...] = ()
    num_gpus: int | None = None
    timeout: float | None = None
    in_memory: bool = False
    vllm: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    trust_remote_code: bool = False
    allow_crimes: bool = False
    unneeded: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises InputError for an option that no search can have."""
        least: dict[str, tuple[Any, int]] = {
            "--max-fevals": (self.max_fevals, 1),
            "--force-population-size": (self.population, 1),
            "--random-seed": (self.seed, 0),
            "--batch-size": (self.batch_size, 1),
            "--num-gpus": (self.num_gpus, 0),
        }
        for option, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise InputError(f"{option} is {value}; use a whole number of at least {smallest}.")
        if self.sigma is not None and not 0 < self.sigma < float("inf"):
            raise InputError(f"--sigma is {self.sigma:g}; use a number above 0.")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise InputError(f"--strategy is '{self.strategy}'; valid names: {', '.join(STRATEGIES)}.")
