"""What holds on an accelerator, claimed of a pretended one. `test_pretended.py` runs this in a process of its own."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge import devices
from evomerge.errors import InputError
from evomerge.events import unheard
from evomerge.merging.sources.adapters import WEIGHTS
from evomerge.merging.sources.references import ModelSource
from evomerge.runs import directory as runs
from evomerge.search.preparation import prepare_file
from evomerge.workers.memory import _typical, plan_memory
from evomerge.workers.worker import Worker
from tests.commands import content
from tests.evaluation.test_engine import MERGE, folder, results  # noqa: F401 - a fixture
from tests.evaluation.test_engine import config as writing
from tests.merging.resident.test_models import recipe
from tests.merging.ways import ALIKE, FEW, ON_ONE, ON_TWO, RECIPES, Load, Way, loader, outcomes
from tests.models import load_models, write_adapter
from tests.pretended import accelerator
from tests.searches import WriteSearch

PRETEND = accelerator.install()
HERE = torch.device(accelerator.NAME, 0)
SEARCHES: dict[str, dict[str, Any]] = {
    "evolution": {},
    "views": {"space": {"kind": "data_flow", "max_layers": 6, "scale": {"low": 0.5, "high": 1.5}, "head": "free"}},
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    PRETEND.refused.clear()
    PRETEND.room = 1 << 40


@pytest.fixture
def searched(search: WriteSearch, tmp_path: Path) -> Callable[..., Any]:
    """What a search on a device leaves, without its times and what names the device."""

    def run(name: str, device: str, gpus: int | None = None) -> Any:
        own = {f"optimizer.{key}": value for key, value in {"evaluations": 3, "population": 4}.items()}
        common = {"items": {"search": 4, "heldout": 4}, "evaluation.device": device, "workers.num_gpus": gpus}
        place = tmp_path / f"{name}-{device}-{gpus}"
        runs.start(search(own | common | SEARCHES[name]), place, (), None, unheard)
        return [
            {key: row[key] for key in ("id", "genome", "scores", "state", "fingerprint", "heldout") if key in row}
            for rows in content(place)
            for row in rows
        ]

    return run


def test_tensors_answer_to_their_device_refuse_others_and_are_counted() -> None:
    gc.collect()
    before, copies = PRETEND.live[1], PRETEND.copies.copy()
    tensor = torch.arange(6.0, device="pretend:1").view(2, 3)
    assert (str(tensor.device), PRETEND.live[1] - before) == ("pretend:1", 24)
    for other in (torch.ones(2, 3), torch.ones(2, 3, device="pretend:0")):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            tensor + other
    assert torch.equal((tensor[0] * 2).cpu(), torch.tensor([0.0, 2.0, 4.0]))
    assert PRETEND.copies["pretend:1", "cpu"] - copies["pretend:1", "cpu"] == 1
    del tensor
    assert PRETEND.live[1] == before


def test_auto_takes_the_accelerator_and_other_kinds_are_refused_in_a_sentence() -> None:
    assert devices.resolve_device("auto") == "pretend"
    assert devices.resolve_device("pretend:1") == "pretend:1"
    with pytest.raises(InputError, match="torch sees 2 PRETEND devices here; use auto, cpu or pretend:0 to"):
        devices.resolve_device("pretend:2")
    with pytest.raises(InputError, match="is 'pretent'; did you mean 'pretend'"):
        devices.resolve_device("pretent")


@pytest.fixture(scope="module")
def load(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Load:
    return loader(tiny_models, tmp_path_factory.mktemp("ways"))


def cases() -> Iterator[Any]:
    for method in RECIPES:
        few, most = ([] if held else [pytest.mark.exhaustive] for held in (method in FEW, method not in ALIKE))
        yield pytest.param(method, ON_ONE, (), id=f"{method}-one device", marks=few)
        yield pytest.param(method, ON_TWO, (torch.float64,), id=f"{method}-two without float64", marks=most)


@pytest.mark.parametrize(("method", "ways", "refused"), [*cases()])
def test_fingerprints_are_those_of_the_cpu_wherever_models_live_and_whatever_is_kept_of_them(
    method: str, ways: list[Way], refused: tuple[torch.dtype, ...], load: Load
) -> None:
    PRETEND.refused.update(refused)
    devices._supports.cache_clear()
    found = outcomes(method, "float32", ways, load)
    assert len(set(found.values())) == 1, found
    for way in ways:
        placed = {parameter.device.index for parameter in load(way, "float32").model.parameters()}
        assert placed == ({None} if way.device == "cpu" else set(range(way.count)))


def test_a_device_holds_no_source_that_lives_on_the_host_and_fetches_it_in_two_chunks(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.merging.methods import passes

    monkeypatch.setattr(passes, "STAGED", 256)
    gc.collect()
    before = devices.used_memory(HERE)
    models = load_models(tiny_models, tiny_models["base"], "pretend", "float32", sources="host", fields="made")
    candidate = sum(parameter.nbytes for parameter in models.model.parameters())
    buffers = sum(buffer.nbytes for buffer in models.model.buffers())
    assert devices.used_memory(HERE) - before == candidate + buffers
    devices.reset_peak_memory(HERE)
    copies = PRETEND.copies["cpu", str(HERE)]
    merge = recipe("linear")
    models.materialize(merge)
    sizes = [parameter.numel() for parameter in models.model.parameters()]
    chunks = len(merge.models) * sum(-(-size // 256) for size in sizes)
    assert chunks <= PRETEND.copies["cpu", str(HERE)] - copies <= chunks + 2 * len(sizes)  # and their weights
    assert devices.peak_memory(HERE) - before < candidate + buffers + 40 * 256 * 4


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_leaves_the_scores_and_fingerprints_of_the_cpu(searched: Callable[..., Any], name: str) -> None:
    expected = searched(name, "cpu")
    assert all(row["state"] == "done" for row in expected if "state" in row)
    assert searched(name, "pretend") == expected


def test_a_device_without_bfloat16_keeps_models_in_float32_and_the_user_is_told(search_file: WriteSearch) -> None:
    path = search_file(evaluation={"device": "pretend", "dtype": "bfloat16"})
    PRETEND.refused |= {torch.bfloat16, torch.float64}
    devices._supports.cache_clear()
    with pytest.raises(InputError, match=r"evaluation.dtype is bfloat16, which pretend does not have here"):
        prepare_file(path)
    assert devices.resolve_dtype("auto", ["bfloat16"], "pretend") == "float32"
    notes = list(devices.dtype_notes("pretend", "float32", ["bfloat16"]))
    assert len(notes) == 2
    assert prepare_file(path, ["evaluation.dtype=float32"]).warnings[-1] == notes[0]


def test_a_search_over_two_devices_without_float64_leaves_the_scores_and_fingerprints_of_the_cpu(
    searched: Callable[..., Any],
) -> None:
    expected = searched("evolution", "cpu")
    PRETEND.refused.add(torch.float64)
    devices._supports.cache_clear()
    assert searched("evolution", "pretend", 2) == expected


def test_written_answers_are_those_of_the_cpu(folder: Path) -> None:  # noqa: F811
    on_cpu, pretended = (Worker(writing(folder, "hf", device=device)) for device in ("cpu", "pretend"))
    expected = results(on_cpu, MERGE)
    assert any(text for texts in expected[1] for text in texts)
    assert results(pretended, MERGE) == expected


def test_a_worker_takes_the_memory_that_the_plan_says(search_file: WriteSearch) -> None:
    prepared = prepare_file(search_file(evaluation={"device": "pretend"}))
    plan = plan_memory(prepared.config, prepared.space, prepared.models, prepared.targets)
    gc.collect()
    before = devices.used_memory(HERE)
    worker = Worker(prepared.config, prepared.models, prepared.targets)
    assert before is not None
    models = devices.used_memory(HERE) - before
    devices.reset_peak_memory(HERE)
    for merge in _typical(prepared.space):
        assert not worker.evaluate(merge, "search").failed
    peak = devices.peak_memory(HERE) - before
    assert models == pytest.approx(plan.models, rel=0.02)
    assert peak == pytest.approx(plan.total, rel=0.1)


@pytest.fixture
def adapted(tiny_models: dict[str, Path], tmp_path: Path) -> dict[str, ModelSource | Path]:
    """A base and three LoRAs of it."""
    base = tiny_models["base"]
    tuned = {name: write_adapter(tmp_path / name, base, seed) for seed, name in enumerate(("first", "second", "third"))}
    return {"base": base} | {name: ModelSource(base, place) for name, place in tuned.items()}


def test_three_adapters_cost_a_device_their_factors_beside_the_candidate_and_the_base(
    adapted: dict[str, ModelSource | Path], tiny_models: dict[str, Path]
) -> None:
    def held(names: tuple[str, ...], where: str, form: str) -> int:
        gc.collect()
        before = PRETEND.live[0]
        chosen = {name: adapted[name] for name in names}
        given = "pretend", "float32"
        models = load_models(chosen, tiny_models["base"], *given, sources=where, fields="made", adapters=form)
        assert models.devices == [torch.device("pretend")]
        gc.collect()
        return PRETEND.live[0] - before

    devices._supports.cache_clear()
    whole = sum(tensor.nbytes for tensor in load_file(tiny_models["base"] / "model.safetensors").values())
    files = [load_file(adapted[name].adapter / WEIGHTS) for name in ("first", "second", "third")]
    factors = sum(tensor.nbytes for file in files for tensor in file.values())
    buffers = held(("base",), "host", "factors") - whole
    assert held(tuple(adapted), "device", "factors") == 2 * whole + factors + buffers
    assert held(tuple(adapted), "host", "factors") == whole + factors + buffers
    assert held(tuple(adapted), "device", "expanded") > 2 * whole + 3 * factors
    assert held(tuple(adapted), "host", "expanded") == whole + buffers


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_piece_of_the_base_is_copied_once_for_all_adapters(
    adapted: dict[str, ModelSource | Path], tiny_models: dict[str, Path], where: str
) -> None:
    def copies(form: str) -> int:
        given = "pretend", "bfloat16"
        models = load_models(adapted, tiny_models["base"], *given, sources=where, fields="made", adapters=form)
        before = PRETEND.copies["cpu", "pretend:0"]
        models.materialize(recipe("task_arithmetic"))
        return PRETEND.copies["cpu", "pretend:0"] - before

    touched = sum(name.endswith(("_A", "_A.weight")) for name in load_file(adapted["first"].adapter / WEIGHTS))
    assert copies("expanded") - copies("factors") == 3 * touched
