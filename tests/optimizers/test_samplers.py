"""Optuna's samplers: what each proposes is a function of the seed and of what was told, through any kill."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate
from evomerge.config.files import load
from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.events import unheard
from evomerge.optimizers.base import Optimizer, Problem
from evomerge.optimizers.make import make_optimizer, resolve
from evomerge.optimizers.ranking import Ranking
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, prepare
from evomerge.spaces import Gene, Genome, canonical
from tests import commands
from tests.contracts.optimizer import DIMENSION, OptimizerContract, genes, mixed_genes, scores
from tests.fakes import FakePool, Killed
from tests.searches import WriteSearch

EVERY = pytest.mark.parametrize("name", ["tpe", "gp", "nsga_ii", "nsga_iii"])


class TestTpe(OptimizerContract):
    config = OptimizerConfig(name="tpe")


class TestTpeWithChoices(OptimizerContract):
    config = OptimizerConfig(name="tpe")
    genes, start = mixed_genes(), None


class TestTpeByTheMean(OptimizerContract):
    config = OptimizerConfig(name="tpe", ranking="weighted_sum")


class TestTpeInStages(OptimizerContract):
    config = OptimizerConfig(
        name="tpe",
        stages=(StageConfig(genes=("method", "take"), evaluations=16), StageConfig(genes=("weight", "steps"))),
    )
    genes, start = mixed_genes(), None


class TestGp(OptimizerContract):
    config = OptimizerConfig(name="gp", population=2)


@pytest.mark.exhaustive  # a Gaussian process takes seconds to propose
class TestGpWithChoices(OptimizerContract):
    config = OptimizerConfig(name="gp", population=2)
    genes, start = mixed_genes(), None


class TestNsgaIi(OptimizerContract):
    config = OptimizerConfig(name="nsga_ii", population=6)


class TestNsgaIiWithChoices(OptimizerContract):
    config = OptimizerConfig(name="nsga_ii", population=6)
    genes, start = mixed_genes(), None


class TestNsgaIii(OptimizerContract):
    config = OptimizerConfig(name="nsga_iii", population=6)


class TestNsgaIiiWithChoices(OptimizerContract):
    config = OptimizerConfig(name="nsga_iii", population=6)
    genes, start = mixed_genes(), None


def made(name: str, population: int = 4, objectives: int = 2, limited: bool = False, seed: int = 3) -> Optimizer:
    config = OptimizerConfig.model_validate({"name": name, "population": population})
    start = np.array([gene.start for gene in mixed_genes()])
    other = np.array([0.0, 0.0, 5.0, 0.2, 0.5, 0.5])
    known = np.stack([start, other])
    told = np.full((2, objectives + limited), 0.1)
    told[1] = np.nan
    ranking = Ranking(np.ones(objectives), elite=objectives > 1)
    problem = Problem(mixed_genes(), start, seed, ranking, (known, told))
    return make_optimizer(resolve(config, DIMENSION, objectives), problem)


def told_of(genomes: Genome, objectives: int, limited: bool) -> Any:
    """Scores with a failure in each generation, and one limit that some candidates break."""
    values = scores(genomes)[:, :objectives]
    values[len(values) // 2] = np.nan
    return np.hstack([values, np.maximum(genomes[:, [3]] - 1, 0)]) if limited else values


def replays() -> Iterator[Any]:
    """What is replayed: a sampler, how many objectives there are, whether there is a limit, and the lag."""
    *others, hardest = [(1, False, 2), (2, False, 0), (1, True, 1), (2, True, 3)]
    for name in ("tpe", "gp", "nsga_ii", "nsga_iii"):
        more = [pytest.mark.exhaustive] if name == "gp" else []
        yield from (pytest.param(name, *other, marks=more) for other in others)
        yield pytest.param(name, *hardest)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objectives", "limited", "lag"), [*replays()])
def test_a_replay_proposes_the_same_bits_whatever_draws_between(
    name: str, objectives: int, limited: bool, lag: int
) -> None:
    def proposals(other_draws: bool) -> list[Genome]:
        optimizer = made(name, objectives=objectives, limited=limited)
        asked = [optimizer.ask() for _ in range(lag + 1)]
        for generation in range(3 if name == "gp" else 5):  # a Gaussian process takes seconds to propose
            if other_draws:
                np.random.seed(generation), random.seed(generation), torch.manual_seed(generation)
            optimizer.tell(asked[generation], told_of(asked[generation], objectives, limited))
            asked.append(optimizer.ask())
        return asked

    first, second = proposals(False), proposals(True)
    assert [genomes.tobytes() for genomes in first] == [genomes.tobytes() for genomes in second]
    assert len(np.unique(np.concatenate(first), axis=0)) > 12


@EVERY
def test_no_global_random_state_is_used_or_changed(name: str) -> None:
    before = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), torch.get_num_threads()
    optimizer = made(name)
    for _ in range(5):
        genomes = optimizer.ask()
        optimizer.tell(genomes, told_of(genomes, 2, False))
    assert random.getstate() == before[0]
    for part, same in zip(np.random.get_state(legacy=True), before[1], strict=True):
        assert np.array_equal(part, same)
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == before[3]


@EVERY
def test_the_start_comes_first(name: str) -> None:
    start = np.array([gene.start for gene in mixed_genes()])
    assert np.array_equal(made(name).ask()[0], canonical(mixed_genes(), start))


@EVERY
def test_genomes_may_be_told_one_by_one_in_any_order(name: str) -> None:
    single, whole, shuffled = made(name, 6), made(name, 6), made(name, 6)
    for _ in range(3):
        genomes = single.ask()
        assert np.array_equal(genomes, whole.ask())
        whole.tell(genomes, scores(genomes))
        for genome in genomes:
            single.tell(genome[np.newaxis], scores(genome[np.newaxis]))
    pending = np.concatenate([shuffled.ask() for _ in range(3)])
    for index in np.random.default_rng(0).permutation(len(pending)):
        shuffled.tell(pending[[index]], scores(pending[[index]]))
    assert np.isfinite(shuffled.ask()).all()


@EVERY
@pytest.mark.filterwarnings("error")
def test_it_works_without_a_word_and_beats_the_start(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = resolve(OptimizerConfig.model_validate({"name": name, "population": 8}), DIMENSION, 1)
    start = np.full(DIMENSION, 0.0)
    optimizer = make_optimizer(config, Problem(genes(), start, 4, Ranking(np.ones(1), elite=False)))
    best = -np.inf
    for _ in range(6):
        genomes = optimizer.ask()
        told = scores(genomes)[:, :1]
        optimizer.tell(genomes, told)
        best = max(best, told.max())
    assert best > scores(start[np.newaxis])[0, 0]
    assert "".join(capfd.readouterr()) == ""


def test_a_gaussian_process_leaves_what_fails() -> None:
    """The best is at 1, and everything beyond 0.6 fails."""
    gene = Gene("weight", "weight", "all", 0.0, 1.0, 0.1, 0.2)
    config = resolve(OptimizerConfig(name="gp", population=2), 1, 1)
    optimizer = make_optimizer(config, Problem((gene,), np.array([0.1]), 1, Ranking(np.ones(1), elite=False)))
    late = []
    for generation in range(20):
        genomes = optimizer.ask()
        optimizer.tell(genomes, np.where(genomes > 0.6, np.nan, genomes))
        late += genomes[:, 0].tolist() if generation >= 10 else []
    assert np.mean(np.array(late) <= 0.6) >= 0.5
    assert max(value for value in late if value <= 0.6) > 0.5


def quality(candidate: Candidate) -> tuple[float, float] | str:
    if candidate.genome is None:
        return 0.1, 0.1
    if candidate.kind == "search" and candidate.index == 2:
        return "out of memory"
    genome = np.array(candidate.genome)
    return float(np.exp(-((genome - 0.8) ** 2).mean())), float(np.exp(-((genome - 0.3) ** 2).mean()))


def run(prepared: Prepared, directory: Path, **pool: Any) -> Any:
    """What a search leaves in its archive, killed and resumed as often as the pool dies."""
    directory.mkdir()
    for attempt in range(40):
        archive = Archive(directory, prepared.config, prepared.space.genes)
        names = [metric.name for metric in prepared.config.measured]
        try:
            Search(
                prepared.config, prepared.space, archive, FakePool(names, quality, seed=attempt, **pool), unheard
            ).run()
        except Killed:
            continue
        return commands.candidates(archive, prepared.config), commands.front(archive, prepared.config)
    raise AssertionError("the search does not end")


@EVERY
@pytest.mark.slow
def test_a_search_that_is_killed_resumes_to_the_same_archive(
    search_file: WriteSearch, tmp_path: Path, name: str
) -> None:
    optimizer = {"name": name, "evaluations": 12, "population": 3}
    space = {"method": ["linear", "dare_ties"], "participate": True}
    prepared = prepare(load(search_file(optimizer=optimizer, space=space)))
    whole = run(prepared, tmp_path / "whole")
    assert run(prepared, tmp_path / "killed", size=3, dies_after=5) == whole
