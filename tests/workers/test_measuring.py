"""Statistics beside what plain torch measures of the same model, whatever room there is for sums."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.candidate import Descent, Gradient
from evomerge.config import files
from evomerge.errors import InputError, WorkFailed
from evomerge.evaluation import activations
from evomerge.evaluation.activations import head_of, name_of
from evomerge.evaluation.calibration import Calibration
from evomerge.evaluation.likelihoods import Request
from evomerge.evaluation.losses import Item
from evomerge.merging.methods.base import Kind
from evomerge.merging.naming import named_weights, naming_in
from evomerge.merging.sources.statistics import NOTES, Names, Shelf, read
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.recipe import Recipe, Source, single
from evomerge.search.statistics import wanted
from evomerge.workers import measuring
from evomerge.workers.worker import Worker
from tests.merging.methods import derived
from tests.searches import WriteSearch

TEXT = Item("texts", (Request((1,), (5, 9, 4, 7)),), (), (2.0,))
OPTIONS = (Request((1, 3), (8,)), Request((1, 3), (6, 2)), Request((1, 3), (4,)))
CHOICE = Item("choice", OPTIONS, (False, True, False), (1.0,) * 3)
REPEATED = Item("texts", (Request((1,), (5, 9, 4, 7)),), (), (1.0,))


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_models["first"], dtype=torch.float32).eval()


def collected(measured: measuring.Measurement) -> dict[str, torch.Tensor]:
    tensors = dict(measured.tensors)
    assert {name: (tuple(own.shape), own.dtype) for name, own in tensors.items()} == dict(measured.layout)
    assert list(tensors) == list(measured.layout)
    return tensors


def log_likelihood(model: Any, request: Request) -> torch.Tensor:
    row = torch.tensor([[*request.context, *request.continuation]])
    logs = model(input_ids=row).logits[0].log_softmax(-1)
    places = range(len(request.context), row.shape[1])
    return torch.stack([logs[place - 1, row[0, place]] for place in places]).sum()


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_fisher_information_is_the_mean_of_squared_gradients(
    model: Any, tiny_models: dict[str, Path], room: int
) -> None:
    values = {}
    for number, item in enumerate((TEXT, CHOICE)):
        model.zero_grad()
        logs = torch.stack([log_likelihood(model, request) for request in item.requests])
        loss = -logs[0] / 2 if number == 0 else logs.logsumexp(0) - logs[1]
        loss.backward()
        for name, own in model.named_parameters():
            values[name] = values.get(name, 0) + own.grad.double().numpy() ** 2 / 2
    model.zero_grad(set_to_none=True)
    measured = measuring.fisher(model, naming_in(tiny_models["first"]), Calibration([TEXT, CHOICE], 64), False, room)
    found = collected(measured)
    assert found.keys() == values.keys()
    for name, expected in values.items():
        assert np.allclose(found[name], expected, rtol=1e-3, atol=1e-12 + 1e-5 * expected.max()), name
    mean = sum(own.sum() for own in values.values()) / sum(own.size for own in values.values())
    assert measured.notes["mean"] == pytest.approx(mean, rel=1e-4)
    assert all(own.grad is None for own in model.parameters())


def test_drawn_answers_are_the_same_every_time_and_follow_the_model_s_predictions(model: Any) -> None:
    items = [dataclasses.replace(CHOICE, requests=CHOICE.requests) for _ in range(300)]
    calibration = Calibration(items, 64)
    with torch.no_grad():
        losses = [float(calibration.loss(model, number, True)) for number in range(300)]
        again = [float(calibration.loss(model, number, True)) for number in range(300)]
        scores = torch.stack([log_likelihood(model, request) for request in CHOICE.requests])
    assert losses == again
    chances = scores.softmax(0)
    for chance in chances.tolist():
        share = sum(math.isclose(loss, -math.log(chance), rel_tol=1e-3) for loss in losses) / 300
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / 300)


@pytest.mark.parametrize("room", [1, 1 << 30])
@pytest.mark.parametrize(("kind", "order"), [("grams", 2), ("activations", 1)])
def test_inputs_are_those_of_every_linear_layer(
    model: Any, tiny_models: dict[str, Path], kind: Any, order: int, room: int
) -> None:
    calibration = Calibration([TEXT, CHOICE, REPEATED], 64)
    assert calibration.rows == [(1, 5, 9, 4, 7), (1, 3, 6, 2)]  # of options only the right one, and no row twice
    inputs: dict[str, list[np.ndarray]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.setdefault(f"{name}.weight", []).append(given[0][0].double().numpy())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        for row in calibration.rows:
            model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    measured = measuring.inputs(kind, model, naming_in(tiny_models["first"]), calibration, 8, room)
    found, shared = collected(measured), measured.notes["shared"]
    assert shared.keys() == inputs.keys()
    assert len(found) == 4 * 4  # queries, keys and values share one, gate and up another
    for name, owner in shared.items():
        rows = np.concatenate(inputs[name])
        expected = rows.T @ rows / len(rows) if order == 2 else np.abs(rows).mean(axis=0)
        assert np.allclose(found[owner], expected, rtol=1e-4, atol=1e-6), name


def test_what_is_written_is_read_and_nothing_stays_of_what_fails(
    model: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    naming, calibration = naming_in(tiny_models["first"]), Calibration([TEXT], 64)
    notes = {"models": ["abc"], "versions": {"torch": "1"}}
    names = {
        measuring.store(tmp_path, "grams", "0" * 16, notes, measuring.inputs("grams", model, naming, calibration, 8))
        for _ in range(2)
    }
    (name,) = names
    stored = read(tmp_path / name)
    expected = collected(measuring.inputs("grams", model, naming, calibration, 8))
    own = stored.tensor_of("model.layers.2.self_attn.v_proj.weight")
    assert own == "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(stored.read(own), expected[own])
    assert stored.tensor_of("model.norm.weight") is None
    broken = measuring.inputs("grams", model, naming, calibration, 8)
    broken.tensors = ((name, tensor * math.nan) for name, tensor in broken.tensors)
    with pytest.raises(WorkFailed, match="are not finite"):
        measuring.store(tmp_path, "grams", "1" * 16, notes, broken)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_layers_put_out_is_written_row_by_row_at_the_last_tokens(
    model: Any, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "PLACES", 3)
    monkeypatch.setattr(measuring, "PLACES", 3)
    rows = [(1, 5, 9, 4, 7), (1, 3, 6, 2), (1, 8)]
    found = collected(measuring.outputs(model, rows, 2))
    kept: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda *given: kept.append(given[-1][0, -3:])) for layer in model.model.layers
    ]
    for row in rows:
        kept.clear()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(found.pop(name_of(row)), torch.stack(kept), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.pop(head_of(row)), logits, rtol=1e-4, atol=1e-6)
    assert not found
    for handle in handles:
        handle.remove()


def test_a_step_that_compares_layers_is_the_same_to_the_bit_wherever_sources_live_and_whoever_measured(
    search: WriteSearch, tmp_path: Path
) -> None:
    steps = []
    for where in ("host", "disk"):
        changes = {
            "evaluation": {"device": "cpu", "dtype": "float32", "sources": where},
            "optimizer": {"name": "learned", "learning": {"loss": "activations"}},
        }
        measurer, worker = (worker_of(search, tmp_path / where, **changes) for _ in range(2))
        pairs = wanted(measurer._config)
        assert [kind for kind, _ in pairs] == ["outputs"] * 3
        for kind, reference in pairs:
            measurer.measure(kind, reference)
        base, (first, second) = worker._config.base, worker._config.models.values()
        models = tuple(Source(model=model, parameters={"weight": 0.5}) for model in (first, second))
        recipe = Recipe(merge_method="task_arithmetic", base_model=base, models=models)
        sources = (("base_qa", ((first, 0.25), (second, 0.75))), ("cross_math_b", ((base, 1.0),)))
        asked = Descent(1, 0.5, 0, 1, (("base_qa", 1.0), ("cross_math_b", 0.5)), ("weight",), sources)
        gradient = worker.descend(recipe, asked)
        assert isinstance(gradient, Gradient)
        assert len(gradient.slopes) == 2 * len(named_weights(worker.models.model))
        steps.append((gradient.losses, gradient.slopes, gradient.fingerprint))
        alone = dataclasses.replace(asked, wanted=(), sources=(("base_qa", ((first, 1.0),)), sources[1]))
        loss = worker.descend(single(first), alone).losses["base_qa"]
        assert loss < 1e-6 < gradient.losses["base_qa"]
    assert steps[0] == steps[1]


def worker_of(search: WriteSearch, folder: Path, names: Names | None = None, **changes: Any) -> Worker:
    path = search({"evaluation": {"device": "cpu", "dtype": "float32"}, **changes})
    return Worker(files.load(path), statistics=folder, names=names)


def test_a_worker_measures_once_and_a_merge_reads_what_it_wrote(search: WriteSearch, tmp_path: Path) -> None:
    worker = worker_of(search, tmp_path / "kept", **{"space.method": "regmean"})
    models = list(worker._config.models.values())
    names = [worker.measure("grams", model).name for model in models]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*")}
    assert [worker.measure("grams", model).name for model in models] == names
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*")} == times
    assert len({*names}) == 2
    sources = tuple(Source(model=model, parameters={"weight": 1.0}) for model in models)
    recipe = Recipe(merge_method="regmean", base_model=worker._config.base, models=sources)
    fingerprint = worker.evaluate(recipe, "search").fingerprint
    other = worker_of(search, tmp_path / "empty", **{"space.method": "regmean"})
    with pytest.raises(InputError, match=r"the Gram matrices of inputs of .* and no such .* lies in "):
        other.evaluate(recipe, "search")
    for model in models:
        other.measure("grams", model)
    assert other.evaluate(recipe, "search").fingerprint == fingerprint


@pytest.mark.parametrize("method", ["fisher", "gradient_matching", "regmean", "fisher+aim"])
def test_merges_with_statistics_are_the_same_wherever_sources_live(
    search: WriteSearch, tmp_path: Path, method: str
) -> None:
    folder, fingerprints = tmp_path / "kept", set()
    for where in ("device", "host", "disk"):
        settings = {"device": "cpu", "dtype": "float32", "sources": where}
        worker = worker_of(search, folder, **{"space.method": method, "evaluation": settings})
        base, models = worker._config.base, list(worker._config.models.values())
        for kind, reference in wanted(worker._config):
            worker.measure(kind, reference)
        sources = tuple(Source(model=model, parameters={"weight": 0.7}) for model in models)
        recipe = Recipe(merge_method=method, base_model=base, models=sources)
        evaluation = worker.evaluate(recipe, "search")
        assert evaluation.error is None
        fingerprints.add(evaluation.fingerprint)
    assert len(fingerprints) == 1


def test_a_searched_alpha_is_solved_anew_and_keeps_one_solution(search: WriteSearch, tmp_path: Path) -> None:
    worker = worker_of(search, tmp_path, **{"space.method": "regmean"})
    base, models = worker._config.base, list(worker._config.models.values())
    for model in models:
        worker.measure("grams", model)
    sources = tuple(Source(model=model, parameters={"weight": 1.0}) for model in models)

    def merged(alpha: float) -> str | None:
        recipe = Recipe(merge_method="regmean", base_model=base, models=sources, parameters={"alpha": alpha})
        return worker.evaluate(recipe, "search").fingerprint

    first, kept = merged(0.2), len(worker.models._kept)
    assert merged(0.9) != first == merged(0.2)
    assert len(worker.models._kept) == kept


def test_regmean_plus_measures_behind_layers_that_are_merged(search: WriteSearch, tmp_path: Path) -> None:
    """The first layer sees what it sees in RegMean++'s own merge, and every layer is the solution for its inputs."""
    worker = worker_of(search, tmp_path, **{"space.method": "regmean_plus"})
    base, models = worker._config.base, list(worker._config.models.values())
    stored = read(tmp_path / worker.measure("merged_grams", models[0]).name)
    sources = tuple(Source(model=model, parameters={"weight": 1.0}) for model in models)
    recipe = Recipe(merge_method="regmean_plus", base_model=base, models=sources)
    worker.evaluate(recipe, "search")
    merged = {name: own.detach().double() for name, own in worker.models.model.named_parameters()}
    last, naming = "model.layers.3.self_attn.q_proj.weight", worker._naming
    deltas, grams = [], []
    for place, model in enumerate(models):
        weights = worker._sources[model].weights
        deltas.append((weights.read(last).double() - worker._sources[base].weights.read(last).double()).numpy())
        grams.append(stored.read(f"{place}:{last}").double().numpy())
    expected = worker._sources[base].weights.read(last).double().numpy() + derived.regmean(deltas, (1, 1), grams, 0.9)
    assert np.allclose(merged[last], expected, atol=1e-5)
    # the queries' inputs follow from the merged layers before, which are in memory now, and the layer's own norm
    for place, model in enumerate(models):
        worker.models.put(model, [name for name in naming.merged if ".layers.3." in name])
        rows: Sequence[torch.Tensor] = worker._calibration(model).batches(8)
        found, _ = measuring.inputs_of(worker.models.model, naming, rows[0][:1])
        (wanted,) = [each for each in found if each.owner == last]
        again = measuring.gathered(worker.models.model, naming, [wanted], rows, 2)[last]
        assert torch.allclose(again, stored.read(f"{place}:{last}"), rtol=1e-3, atol=1e-5)


def test_texts_take_the_place_of_items(search: WriteSearch, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one and two\n\nthree and four\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "one and two"}\n{"text": "three and four"}\n')
    lines, objects, items = (
        worker_of(search, tmp_path / "kept", **changes)._calibration
        for changes in (
            {"statistics": {"texts": str(tmp_path / "texts.txt")}},
            {"statistics": {"texts": str(tmp_path / "texts.jsonl")}},
            {},
        )
    )
    base = files.load(search()).base
    assert lines(base).digest == objects(base).digest != items(base).digest
    assert len(lines(base).items) == 2


def test_models_are_measured_on_their_own_tasks(search: WriteSearch, tmp_path: Path) -> None:
    worker = worker_of(search, tmp_path, statistics={"tasks": {"first": ["base_qa"]}, "items": 5})
    first, second = worker._config.models.values()
    assert {item.objective for item in worker._calibration(first).items} == {"base_qa"}
    assert len(worker._calibration(first).items) == 5
    assert {item.objective for item in worker._calibration(second).items} == {"base_qa", "cross_math_b"}


def test_several_measurements_of_one_model_are_not_mixed_up(search: WriteSearch, tmp_path: Path) -> None:
    few, many = (worker_of(search, tmp_path, statistics={"items": count}) for count in (2, 5))
    model = next(iter(few._config.models.values()))
    names = [worker.measure("grams", model).name for worker in (few, many)]
    with pytest.raises(InputError, match=r"holds 2 measurements"):
        Shelf([tmp_path]).find("grams", model, few._sources)
    for name in names:
        assert Shelf([tmp_path], {model: {"grams": name}}).find("grams", model, few._sources).folder.name == name


def test_what_depends_on_the_base_is_measured_anew_over_another_base(
    search: WriteSearch, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    workers = [worker_of(search, tmp_path, base=str(tiny_models[base])) for base in ("base", "third")]
    models = [str(tiny_models["first"]), str(tiny_models["second"])]
    subjects: dict[Kind, int] = {"row_weights": 2, "merged_grams": 2, "grams": 1, "fisher": 1}
    for kind, count in subjects.items():
        assert len({worker._subject(kind, models) for worker in workers}) == count


def test_statistics_that_a_run_has_used_before_serve_it_though_they_do_not_record_their_base(
    search: WriteSearch, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"space.method": "regmean_plus", "statistics": {"items": 1}}
    worker = worker_of(search, tmp_path, **changes)
    model = next(iter(worker._config.models.values()))
    made = tmp_path / worker.measure("merged_grams", model).name
    old = made.rename(tmp_path / f"merged_grams-{'0' * 16}-{made.name[-16:]}")
    notes = json.loads((old / NOTES).read_text())
    del notes["measured"]["base"]
    (old / NOTES).write_text(json.dumps(notes))
    resumed = worker_of(search, tmp_path, {model: {"merged_grams": old.name}}, **changes)
    assert resumed.measure("merged_grams", model).name == old.name
    assert resumed._statistics("merged_grams", model).folder == old


def test_a_folder_whose_notes_are_lost_is_replaced(search: WriteSearch, tmp_path: Path) -> None:
    worker = worker_of(search, tmp_path, **{"space.method": "regmean"})
    model = next(iter(worker._config.models.values()))
    name = worker.measure("grams", model).name
    (tmp_path / name / NOTES).unlink()
    assert worker.measure("grams", model).name == name
    assert read(tmp_path / name).tensor_of("model.layers.0.self_attn.q_proj.weight") is not None


def test_values_that_have_changed_since_are_not_used(search: WriteSearch, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"space.method": "regmean", "statistics": {"items": 1}}
    worker = worker_of(search, tmp_path, **changes)
    model = next(iter(worker._config.models.values()))
    file = tmp_path / worker.measure("grams", model).name / WEIGHTS
    save_file({name: torch.zeros_like(own) for name, own in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"have changed, .*, or remove the folder, and give the command again"):
        worker_of(search, tmp_path, **changes).measure("grams", model)
