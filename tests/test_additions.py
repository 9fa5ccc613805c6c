"""What the notes "to add one" say is enough: a toy of every kind, added from outside the package, runs a search."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from evomerge.config import running
from evomerge.config.search import SearchConfig
from evomerge.config.spaces import SpaceSettings
from evomerge.config.tables import COSTS, OPTIMIZERS, POOLS, SPACES, CostRow, OptimizerRow, PoolRow, SpaceRow
from evomerge.events import Listener, unheard
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs, Method
from evomerge.optimizers.base import Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.recipe import Recipe, Source, linear
from evomerge.spaces import Gene, Genome, at
from evomerge.spaces.table import GeneRow
from evomerge.workers import Evaluator, Job, Result, run_guarded
from tests.commands import evomerge
from tests.searches import WriteSearch


class Middle:
    """An optimizer that proposes the middle of the box and what lies around it."""

    def __init__(self, config: running.OptimizerConfig, problem: Problem) -> None:
        self._genes, self._population = problem.genes, config.population or 1

    def ask(self) -> Genome:
        low, high = (np.array([getattr(gene, end) for gene in self._genes]) for end in ("low", "high"))
        return low + (high - low) * np.linspace(0.4, 0.6, self._population)[:, np.newaxis]

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        return


class LastFirst:
    """A pool that does what was submitted last first."""

    def __init__(self, make_worker: Callable[[], Evaluator]) -> None:
        self._worker = make_worker()
        self._jobs: deque[Job] = deque()
        self.listener: Listener = unheard

    @property
    def size(self) -> int:
        return 2

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def drop(self, job: Job) -> None:
        self._jobs = deque(other for other in self._jobs if other.whole.key != job.key)

    def wait(self) -> tuple[Job, Result]:
        job = self._jobs.pop()
        return job, run_guarded(self._worker, job)

    def close(self) -> None:
        self._jobs.clear()


class BetweenSettings(SpaceSettings):
    """Settings of a space of one gene."""

    kind: Literal["between"] = "between"
    most: float = 1.0


class Between:
    """A space of one gene: how much the first model counts beside the second."""

    def __init__(self, models: Sequence[str], most: float) -> None:
        self._models = models
        self.genes: tuple[Gene, ...] = (Gene("share", "share", "all", 0.0, most, most / 2, 0.1),)

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        first, second, *_ = self._models
        return linear({first: 1e-3 + float(genome[0]), second: 1.0})

    def encode(self, weights: Mapping[str, float]) -> Genome:
        return np.array([self.genes[0].start])

    def draw(self, random: np.random.Generator) -> Genome:
        return at(self.genes, random.random(1))


def make_between(config: SearchConfig, _tensors: Sequence[str], _model_type: str) -> Between:
    assert isinstance(config.space, BetweenSettings)
    return Between(list(config.models.values()), config.space.most)


def genes_between() -> list[GeneRow]:
    return [GeneRow("share", "continuous", "merge", "space.most", True, low=0.0, high=1.0)]


def first_of_all(inputs: Inputs) -> Any:
    return inputs.tensors[0].float()


def norm(model: Any, _seconds: float) -> float:
    return float(model.get_input_embeddings().weight.detach().norm())


def content(directory: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(evomerge("candidates", directory, "--json"))
    return rows


def test_an_optimizer_is_a_class_and_a_row(
    search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "middle", OptimizerRow(Middle, lambda _: 3))
    evomerge("run", search_file(optimizer={"name": "middle", "evaluations": 6}), "--output", tmp_path / "run")
    searched = [row for row in content(tmp_path / "run") if row["kind"] == "search"]
    assert [row["genome"] for row in searched[:3]] == [row["genome"] for row in searched[3:]]
    assert searched[1]["genome"][0] == pytest.approx(0.75)


def test_a_cost_is_a_function_and_a_row(
    search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COSTS, "norm", CostRow(norm))
    search = search_file(
        objectives=[{"task": "base_qa"}, {"cost": "norm"}], optimizer={"name": "cma_es", "evaluations": 4}
    )
    evomerge("run", search, "--output", tmp_path / "run")
    norms = [row["scores"]["norm"] for row in content(tmp_path / "run")]
    assert len(set(norms)) > 4
    assert all(value > 0 for value in norms)


def test_a_pool_is_a_class_and_a_row_and_changes_no_archive(
    search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLS, "last_first", PoolRow(lambda config, maker, address: LastFirst(maker), processes=False))
    search = search_file(optimizer={"evaluations": 8, "population": 4})
    for pool in ("local", "last_first"):
        evomerge("run", search, "--output", tmp_path / pool, "--set", f"workers.pool={pool}")
    assert content(tmp_path / "last_first") == content(tmp_path / "local")


def test_a_space_is_settings_a_class_and_a_row(
    search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = SpaceRow("one share", "nobody's", BetweenSettings, make_between, genes_between)
    monkeypatch.setitem(SPACES, "between", row)
    search = search_file(space={"kind": "between", "most": 0.5}, optimizer={"evaluations": 8})
    evomerge("run", search, "--output", tmp_path / "run")
    searched = [row for row in content(tmp_path / "run") if row["kind"] == "search"]
    assert all(0 <= row["genome"][0] <= 0.5 for row in searched)
    assert "between: one share\nnobody's" in evomerge("spaces")
    evomerge("export", tmp_path / "run", "--candidate", searched[-1]["id"], "-o", tmp_path / "recipe.yaml")


def test_what_is_wrong_in_the_settings_of_an_added_space_is_told_under_its_key(
    search_file: WriteSearch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = SpaceRow("one share", "nobody's", BetweenSettings, make_between, genes_between)
    monkeypatch.setitem(SPACES, "between", row)
    evomerge("check", search_file(space={"kind": "between", "mots": 0.5}), status=2)
    assert "space.mots is not a known key; did you mean 'most'?" in capsys.readouterr().err
    evomerge("check", search_file(space={"kind": "betwen"}), status=2)
    assert "space.kind is \"betwen\"; did you mean 'between'?" in capsys.readouterr().err


def test_a_method_is_a_function_and_a_row(
    search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method(name="first", paper="nobody's", function=first_of_all, base="required")
    monkeypatch.setitem(METHODS, "first", method)
    recipe = Recipe(
        merge_method="first", base_model="zoo:base", models=(Source(model="zoo:math"), Source(model="zoo:lang"))
    )
    (tmp_path / "first.yaml").write_text(recipe.to_yaml())
    (tmp_path / "math.yaml").write_text(linear({"zoo:math": 1.0}).to_yaml())
    printed = [evomerge("merge", tmp_path / f"{name}.yaml", tmp_path / name) for name in ("first", "math")]
    assert printed[0].split("fingerprint ")[1] == printed[1].split("fingerprint ")[1]
    assert "first" in evomerge("methods")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": {"name": "cma"}}, "optimizer.name is \"cma\"; did you mean 'cma_es'?"),
        ({"objectives": [{"task": "base_qa"}, {"cost": "layer"}]}, "did you mean 'layers'?"),
        ({"workers": {"pool": "rai"}}, "workers.pool is \"rai\"; did you mean 'ray'?"),
    ],
)
def test_a_name_that_no_row_has_is_refused_with_the_closest(
    changes: dict[str, Any], says: str, search_file: WriteSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    evomerge("check", search_file(**changes), status=2)
    assert says in capsys.readouterr().err
