"""What reaches matrices that no plain linear layer holds, beside what plain torch computes of the same model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from evomerge.config import files
from evomerge.evaluation.calibration import Calibration
from evomerge.evaluation.likelihoods import Request
from evomerge.evaluation.losses import Item
from evomerge.export import checkpoint
from evomerge.merging.naming import naming_in
from evomerge.merging.sources.statistics import read
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.recipe import Recipe, Source
from evomerge.workers import measuring
from evomerge.workers.worker import Worker
from tests import architectures
from tests.searches import WriteSearch

ROWS = ((1, 5, 9, 4, 7), (1, 3, 6, 2))
ITEMS = [Item("texts", (Request(row[:1], row[1:]),), (), (1.0,)) for row in ROWS]
EXPERTS: dict[str, Any] = {"num_experts": 16, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
_SPARSE = architectures.ARCHITECTURES["llama"][1] | EXPERTS | {"num_experts_per_tok": 2}
Read = dict[str, np.ndarray]  # what a matrix reads, by its name in checkpoints; shape (tokens, channels)


@pytest.fixture(scope="module", params=["gpt2", "qwen2_moe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, "qwen2_moe", ("Qwen2MoeConfig", _SPARSE))
        return architectures.family(request.param, tmp_path_factory.mktemp(request.param), layers=2)


def read_by_each(folder: Path) -> Read:
    """By hooks on modules, and for experts by the router's choices and the checkpoint's own tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = load_file(folder / WEIGHTS)
    parts: dict[str, list[np.ndarray]] = {}

    def note(name: str, rows: np.ndarray) -> None:
        parts.setdefault(f"{name}.weight", []).append(rows.reshape(-1, rows.shape[-1]))

    def look(name: str, module: Any, given: tuple[torch.Tensor, ...]) -> None:
        if not name.endswith(".experts"):
            note(name, given[0].double().numpy())
            return
        hidden, chosen = given[0].double().numpy(), given[1].numpy()
        for expert in range(EXPERTS["num_experts"]):
            rows = hidden[(chosen == expert).any(axis=-1)]
            gate, up = (rows @ stored[f"{name}.{expert}.{part}_proj.weight"].T for part in ("gate", "up"))
            note(f"{name}.{expert}.gate_proj", rows)
            note(f"{name}.{expert}.up_proj", rows)
            note(f"{name}.{expert}.down_proj", gate / (1 + np.exp(-gate)) * up)

    for name, module in model.named_modules():
        router = name.endswith("mlp.gate")
        if ("layers." in name or ".h." in name) and (
            isinstance(module, torch.nn.Linear | Conv1D) or router or name.endswith(".experts")
        ):
            module.register_forward_pre_hook(lambda module, given, name=name: look(name, module, given))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


@pytest.mark.parametrize(("kind", "order"), [("grams", 2), ("activations", 1)])
def test_every_matrix_of_a_layer_has_the_inputs_that_reach_it(family: dict[str, Path], kind: Any, order: int) -> None:
    expected = read_by_each(family["first"])
    model = AutoModelForCausalLM.from_pretrained(family["first"], dtype=torch.float32).eval()
    measured = measuring.inputs(kind, model, naming_in(family["first"]), Calibration(ITEMS, 64), 8)
    found, shared = dict(measured.tensors), measured.notes["shared"]
    matrices = {name: tensor for name, tensor in load_file(family["first"] / WEIGHTS).items() if tensor.ndim == 2}
    assert shared.keys() == expected.keys() == {name for name in matrices if "layers." in name or ".h." in name}
    for name, rows in expected.items():
        mean = (rows.T @ rows if order == 2 else np.abs(rows).sum(axis=0)) / max(1, len(rows))
        assert np.allclose(found[shared[name]], mean, rtol=1e-4, atol=1e-6), name
    gpt2 = model.config.model_type == "gpt2"
    assert sorted(measured.notes["transposed"]) == (sorted(expected) if gpt2 else [])
    assert gpt2 or any(len(rows) == 0 for rows in expected.values())  # an expert that no token reaches


def solves(deltas: list[np.ndarray], merged: np.ndarray, grams: list[np.ndarray]) -> bool:
    """Whether a change has the least squared distance from the models' outputs: its gradient is null."""
    gradient = sum((merged - delta) @ gram for delta, gram in zip(deltas, grams, strict=True))
    sizes = [np.abs(delta @ gram).max() for delta, gram in zip(deltas, grams, strict=True)]
    return bool(np.abs(gradient).max() < 1e-4 * max(sizes))


def test_regmean_solves_for_every_matrix_and_merges_the_same_from_files(
    family: dict[str, Path], search: WriteSearch, tmp_path: Path
) -> None:
    models = {name: str(family[name]) for name in ("first", "second")}
    settings = {"device": "cpu", "dtype": "float32"}
    changes = {"base": str(family["base"]), "models": models, "space.method": "regmean", "evaluation": settings}
    worker = Worker(files.load(search(changes)), statistics=tmp_path / "kept")
    measured = [read(tmp_path / "kept" / worker.measure("grams", model).name) for model in models.values()]
    sources = tuple(Source(model=model, parameters={"weight": 1.0}) for model in models.values())
    alpha = {"alpha": 1.0}
    recipe = Recipe(merge_method="regmean", base_model=str(family["base"]), models=sources, parameters=alpha)
    fingerprint = worker.evaluate(recipe, "search").fingerprint
    asked = recipe.model_copy(update={"dtype": "float32"})
    assert checkpoint.merge(asked, tmp_path / "out", "recipe.yaml", statistics=tmp_path / "kept")[0] == fingerprint
    merged, base = load_file(tmp_path / "out" / WEIGHTS), load_file(family["base"] / WEIGHTS)
    theirs: list[Mapping[str, np.ndarray]] = [load_file(family[name] / WEIGHTS) for name in models]
    unread = 0
    for name in measured[0].notes.shared:
        changed, *deltas = (each[name].astype(float) - base[name] for each in (merged, *theirs))
        grams = [stored.read(str(stored.tensor_of(name))).double().numpy() for stored in measured]
        if measured[0].transposed(name):
            changed, *deltas = (each.T for each in (changed, *deltas))
        if any(gram.any() for gram in grams):
            assert solves(deltas, changed, grams), name
            assert not solves(deltas, sum(deltas) / 2, grams), name
        else:
            unread += 1
            assert np.allclose(changed, sum(deltas) / 2, atol=1e-6), name
    assert unread < len(measured[0].notes.shared) / 2
