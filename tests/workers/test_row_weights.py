"""Row weights: learned from where the loss is least, by gradients of the loss alone, the same each time."""

from pathlib import Path

import pytest
import torch
import yaml

from evomerge.config.spaces import RowsConfig
from evomerge.merging.sources.statistics import read
from evomerge.search.preparation import prepare_file
from evomerge.workers.row_weights import row_weights, starts
from evomerge.workers.worker import Worker
from tests.searches import small_search


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    search = small_search(
        objectives=[{"task": "base_qa"}, {"task": "lang_b"}],
        items={"search": 16, "heldout": 8},
        space={"rows": {"steps": 8, "share": 0.5}},
    )
    path = tmp_path_factory.mktemp("search") / "search.yaml"
    path.write_text(yaml.safe_dump(search))
    return Worker(prepare_file(path, ()).config, statistics=tmp_path_factory.mktemp("statistics"))


def test_learning_starts_where_the_loss_is_least_and_lowers_it(worker: Worker) -> None:
    settings, heard = RowsConfig(steps=8, share=0.5), dict[tuple[int, bool], list[float]]()
    references = list(worker._config.models.values())

    def loss(number: int, backward: bool) -> float:
        found = worker._loss(settings, number, backward)
        heard.setdefault((number, backward), []).append(found)
        return found

    worker._held = None
    measured = row_weights(worker.models, worker._config.base, references, loss, settings)
    tensors = dict(measured.tensors)
    assert list(tensors) == list(measured.layout)
    first = heard[0, False]
    assert len(first) == len(starts(2))
    assert [len(heard[step, True]) for step in range(1, 9)] == [1] * 8
    later = [heard[step, True][0] for step in range(1, 9)]
    assert later[0] < 1.5 * min(first) < max(first)  # another mini-batch, at the best start
    assert sum(later[-2:]) < sum(later[:2])


def test_weights_are_the_same_each_time_and_kept(worker: Worker) -> None:
    first = worker.measure("row_weights", worker._config.models["math"])
    again = worker.measure("row_weights", worker._config.models["lang"])
    assert first.name == again.name  # both models' weights are in one folder
    other = Worker(worker._config, statistics=Path(str(worker._folder) + "-other"))
    assert other.measure("row_weights", worker._config.models["math"]).name == first.name
    assert worker._folder is not None
    stored = read(worker._folder / first.name)
    assert stored.notes.models == tuple(worker._sources[model].identity for model in worker._config.models.values())


def test_settings_that_decide_what_is_learned_decide_the_subject(worker: Worker) -> None:
    models = list(worker._config.models.values())
    before = worker._settings("row_weights", models)
    assert before["rows"] == {"steps": 8, "share": 0.5, "rate": 0.15, "pull": 1.0}
    assert before["weights"] == {"base_qa": 0.5, "lang_b": 0.5}


def test_learning_may_start_at_the_base_a_model_or_the_uniform_merge() -> None:
    assert starts(1) == [(0.0,), (1.0,)]
    assert starts(2) == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    assert len(starts(3)) == 5


def test_a_tensor_that_the_loss_does_not_depend_on_keeps_its_start(worker: Worker) -> None:
    settings, references = RowsConfig(steps=2), list(worker._config.models.values())
    worker._held = None
    measured = row_weights(worker.models, worker._config.base, references, lambda number, backward: 1.0, settings)
    values = torch.cat([own for _, own in measured.tensors])
    assert torch.equal(values, torch.zeros_like(values))  # all starts are as good, and the base is the first
