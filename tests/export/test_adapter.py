"""A merge written as a LoRA: PEFT loads it, it keeps what it says, and nothing is lost where the rank suffices."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError, WorkFailed
from evomerge.export import adapter, checkpoint
from evomerge.merging.sources.weights import load_tensors
from evomerge.recipe import Provenance, Recipe, Source, load
from evomerge.runs import directory as runs
from tests.architectures import family
from tests.commands import evomerge
from tests.merging.sources.test_adapters import tune

KINDS = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox")  # plain, with biases, tied, Conv1D and tied, LayerNorm
IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family(request.param, tmp_path_factory.mktemp(request.param), ("base", "first", "second"), layers=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return family("llama", tmp_path_factory.mktemp("llama"), ("base", "first", "second"), layers=2)


@pytest.fixture(scope="module")
def tuned(llama: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two LoRAs of rank 4 on the base, as references."""
    root = tmp_path_factory.mktemp("tuned")
    targets = (["q_proj", "v_proj", "up_proj"], ["q_proj", "down_proj"])
    return [
        f"{llama['base']}+{tune(llama['base'], root / str(index), target_modules=own)}"
        for index, own in enumerate(targets)
    ]


def recipe(
    base: object, *others: object, method: str = "task_arithmetic", dtype: str = "float32", **more: Any
) -> Recipe:
    sources = [Source(model=str(other), parameters={"weight": 0.4 + 0.2 * i}) for i, other in enumerate(others)]
    return Recipe(merge_method=method, base_model=str(base), models=tuple(sources), dtype=dtype, **more)


def with_peft(base: object, folder: Path, merged: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(model, folder)
        return (loaded.merge_and_unload() if merged else loaded).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("merged", [False, True], ids=["beside the base", "merged into it"])
def test_with_full_rank_peft_computes_what_the_checkpoint_does(
    models: dict[str, Path], merged: bool, tmp_path: Path
) -> None:
    wanted = recipe(models["base"], models["first"], models["second"])
    checkpoint.merge(wanted, tmp_path / "whole", "recipe.yaml")
    written = adapter.write_adapter(wanted, tmp_path / "adapter", "recipe.yaml", 10_000)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    assert written.kept > 1 - 1e-10
    assert torch.allclose(logits(with_peft(models["base"], tmp_path / "adapter", merged)), logits(ours), atol=1e-4)


def test_the_stated_fingerprint_is_that_of_the_base_with_the_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    wanted = recipe(models["base"], models["first"], models["second"])
    written = adapter.write_adapter(wanted, tmp_path / "adapter", "recipe.yaml", 3)
    reference = f"{models['base']}+{tmp_path / 'adapter'}"
    alone = Recipe(merge_method="linear", models=(Source(model=reference, parameters={"weight": 1.0}),))
    fingerprint, _ = checkpoint.merge(alone.model_copy(update={"dtype": "float32"}), tmp_path / "out", "recipe.yaml")
    assert fingerprint == written.fingerprint
    theirs = with_peft(models["base"], tmp_path / "adapter", merged=True)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)


def test_each_matrix_keeps_the_best_share_that_its_rank_allows(llama: dict[str, Path], tmp_path: Path) -> None:
    wanted = recipe(llama["base"], llama["first"], llama["second"], method="ties")
    checkpoint.merge(wanted, tmp_path / "whole", "recipe.yaml")
    written = adapter.write_adapter(wanted, tmp_path / "adapter", "recipe.yaml", 5)
    before, after = load_tensors(llama["base"]), load_tensors(tmp_path / "whole")
    assert written.matrices
    lost = changed = 0.0
    for name in after:
        delta = after[name].numpy().astype(np.float64) - before[name].numpy()
        changed += (delta**2).sum()
        if name in written.matrices:
            squares = np.linalg.svd(delta, compute_uv=False) ** 2
            assert written.matrices[name].kept == pytest.approx(squares[:5].sum() / squares.sum(), abs=1e-6)
            lost += squares[5:].sum()
        else:
            assert name in written.whole or not delta.any()
    assert written.kept == pytest.approx(1 - lost / changed, abs=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_adapters_of_the_base_are_joined_without_loss_where_the_rank_suffices(
    llama: dict[str, Path], tuned: list[str], method: str, tmp_path: Path
) -> None:
    models = tuned if method == "task_arithmetic" else [llama["base"], *tuned]  # an average has the base as a model
    wanted = recipe(llama["base"], *models, method=method)
    checkpoint.merge(wanted, tmp_path / "whole", "recipe.yaml")
    written = adapter.write_adapter(wanted, tmp_path / "adapter", "recipe.yaml", 8)
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval())
    theirs = logits(with_peft(llama["base"], tmp_path / "adapter", merged=True))
    assert all(fitted.joined for fitted in written.matrices.values())
    assert {fitted.rank for fitted in written.matrices.values()} == {4, 8}
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5


def test_a_rank_below_the_sum_is_fitted_instead(llama: dict[str, Path], tuned: list[str], tmp_path: Path) -> None:
    written = adapter.write_adapter(recipe(llama["base"], *tuned), tmp_path / "adapter", "recipe.yaml", 7)
    by_rank = {name: (fitted.rank, fitted.joined) for name, fitted in written.matrices.items()}
    assert all(rank <= 7 and joined == (rank == 4) for rank, joined in by_rank.values())
    assert any("q_proj" in name and not joined for name, (_, joined) in by_rank.items())


def test_large_matrices_are_fitted_by_random_projections_as_well_as_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(1)
    matrix = torch.randn(90, 70, generator=random, dtype=torch.float64) @ torch.diag(0.9 ** torch.arange(70.0)).double()
    b, a = adapter.truncated(matrix, 10)
    monkeypatch.setattr(adapter, "_DENSE", 8)
    state = torch.get_rng_state()
    quick_b, quick_a = adapter.truncated(matrix, 10)
    assert torch.equal(state, torch.get_rng_state())
    full, quick = ((matrix - x @ y).norm() for x, y in ((b, a), (quick_b, quick_a)))
    assert float(quick) == pytest.approx(float(full), rel=1e-6)
    assert all(map(torch.equal, adapter.truncated(matrix, 10), (quick_b, quick_a)))


def test_the_files_are_the_same_every_time_and_name_no_path(llama: dict[str, Path], tmp_path: Path) -> None:
    wanted = recipe(llama["base"], llama["first"])
    for name in ("one", "other"):
        adapter.write_adapter(wanted, tmp_path / name, "recipe.yaml", 4)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
    for name in (adapter.NOTES, "README.md"):
        assert str(llama["base"]) not in (tmp_path / "one" / name).read_text()
    noted = json.loads((tmp_path / "one" / adapter.NOTES).read_text())
    assert 0 < noted["kept"] < 1
    assert noted["matrices"]


def test_another_fingerprint_than_the_recorded_one_leaves_nothing(llama: dict[str, Path], tmp_path: Path) -> None:
    wanted = recipe(llama["base"], llama["first"], evomerge=Provenance(fingerprint="0" * 16))
    with pytest.raises(WorkFailed, match="0000000000000000 was scored"):
        adapter.write_adapter(wanted, tmp_path / "adapter", "recipe.yaml", 4)
    assert not (tmp_path / "adapter").exists()


def test_what_no_adapter_can_say_is_refused(llama: dict[str, Path], tuned: list[str], tmp_path: Path) -> None:
    base, first = str(llama["base"]), str(llama["first"])
    soup = Recipe(merge_method="linear", models=(Source(model=first, parameters={"weight": 1.0}),))
    layers = Recipe.model_validate(
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": first, "layer_range": [0, 1]}]}]}
    )
    cases: list[tuple[Recipe, dict[str, Any], str]] = [
        (recipe(base, first), {"rank": 0}, "--lora-rank is 0; use a rank of at least 1"),
        (soup, {}, "no base_model, so say which model the adapter changes"),
        (soup, {"base": tuned[0]}, "has an adapter itself; name a whole model"),
        (layers, {"base": base}, "other layers than"),
        (recipe(base, first, tokenizer_source="union"), {}, "a tokenizer of its own"),
        (soup, {"base": first}, "changes no matrix"),
    ]
    for wanted, settings, message in cases:
        with pytest.raises(InputError, match=message):
            adapter.write_adapter(wanted, tmp_path / "adapter", "recipe.yaml", **{"rank": 4} | settings)
        assert not (tmp_path / "adapter").exists()


def test_a_base_can_be_named_where_the_recipe_has_none(llama: dict[str, Path], tmp_path: Path) -> None:
    soup = Recipe(
        merge_method="linear",
        models=tuple(Source(model=str(llama[name]), parameters={"weight": 1.0}) for name in ("first", "second")),
    )
    written = adapter.write_adapter(soup, tmp_path / "adapter", "recipe.yaml", 10_000, base=str(llama["base"]))
    assert written.kept > 1 - 1e-10


def test_the_commands_write_it_show_what_it_keeps_and_score_exactly_that(finished: Path, tmp_path: Path) -> None:
    shown = evomerge("export", finished, "--lora-rank", 3, "-o", tmp_path / "adapter", "--score")
    noted = json.loads((tmp_path / "adapter" / adapter.NOTES).read_text())
    evomerge("export", finished, "-o", tmp_path / "recipe.yaml")
    recorded = load(tmp_path / "recipe.yaml").evomerge.fingerprint
    assert noted["merged"] == recorded
    assert noted["checked"]
    assert f"fingerprint {noted['fingerprint']}" in " ".join(shown.split())
    base = runs.read(finished).prepared.models.base.folder
    config = ["--config", finished / "search.yaml", "--split", "heldout", "--json"]
    scored = json.loads(evomerge("evaluate", f"{base}+{tmp_path / 'adapter'}", *config))
    assert scored["fingerprint"] == noted["fingerprint"]
    assert all(f"{score:.3f}" in shown for score in scored["scores"].values())
    evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "other", "--lora-rank", 3)
    assert (tmp_path / "other" / adapter.NOTES).read_bytes() == (tmp_path / "adapter" / adapter.NOTES).read_bytes()
