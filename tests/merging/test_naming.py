"""Mixtures of experts: merged by the tensors of their checkpoints, though transformers fuses them in memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError
from evomerge.export import checkpoint
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.recipe import Recipe
from evomerge.search.preparation import prepare_file
from tests import architectures
from tests.models import load_models

EXPERTS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
}


@pytest.fixture(scope="module", params=EXPERTS)
def family(request, tmp_path_factory) -> dict[str, Path]:
    kind, settings = EXPERTS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        known = architectures.ARCHITECTURES["llama"][1] | {"num_experts_per_tok": 2}
        patch.setitem(architectures.ARCHITECTURES, request.param, (kind, known | settings))
        return architectures.family(request.param, tmp_path_factory.mktemp(request.param), layers=2)


def recipe_of(family: dict[str, Path], method: str) -> Recipe:
    parameters = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.6}
    document = {
        "merge_method": method,
        "models": [{"model": str(family[name]), "parameters": parameters} for name in ("first", "second")],
        "dtype": "float32",
    }
    return Recipe.model_validate(document | ({} if method == "linear" else {"base_model": str(family["base"])}))


def test_what_is_evaluated_is_what_is_exported(family, tmp_path):
    recipe = recipe_of(family, "dare_ties")
    resident = load_models({str(folder): folder for folder in family.values()}, family["base"], "cpu", "float32")
    fingerprint = resident.materialize(recipe)
    assert checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")[0] == fingerprint
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(shipped(words).logits, resident.candidate(words).logits)
    ours, theirs = dict(resident.candidate.named_parameters()), dict(shipped.named_parameters())
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_every_expert_is_merged_with_those_of_its_number(family, tmp_path):
    checkpoint.merge(recipe_of(family, "linear"), tmp_path / "out", "recipe.yaml")
    merged, first, second = (
        load_file(folder / WEIGHTS) for folder in (tmp_path / "out", family["first"], family["second"])
    )
    assert merged.keys() == first.keys()
    assert any(".experts.3." in name for name in merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


def test_a_search_over_their_layers_is_refused(family, search_file):
    models = {name: str(family[name]) for name in ("first", "second")}
    file = search_file(base=str(family["base"]), models=models, space={"kind": "data_flow"})
    with pytest.raises(InputError, match=r"space: the layers of a \w+ model cannot be put in another order in memory"):
        prepare_file(file)


def test_a_recipe_of_other_layers_is_refused_in_memory_and_merged_to_a_checkpoint(family, tmp_path):
    slices = [{"sources": [{"model": str(family["base"]), "layer_range": [0, 2]}]}] * 2
    recipe = Recipe.model_validate({"merge_method": "passthrough", "slices": slices, "dtype": "float32"})
    resident = load_models({str(family["base"]): family["base"]}, family["base"], "cpu", "float32")
    with pytest.raises(InputError, match="write the checkpoint with `evomerge merge`"):
        resident.materialize(recipe)
    checkpoint.merge(recipe, tmp_path / "out", "recipe.yaml")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
