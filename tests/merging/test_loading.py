"""A source in memory has the weights that its merge alone would have."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from evomerge.export import checkpoint
from evomerge.merging.loading import load_source
from evomerge.merging.sources.references import ModelSource
from evomerge.recipe import single
from tests.merging.sources.test_adapters import tune


def test_a_source_with_an_adapter_is_loaded_with_the_weights_of_its_merge(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["base"]
    adapter = tune(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    checkpoint.merge(single(f"{base}+{adapter}"), tmp_path / "merged", "recipe.yaml")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    plain = load_source(ModelSource(base), torch.float32).state_dict()
    found = load_source(ModelSource(base, adapter), torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = {name for name in wanted if not torch.equal(plain[name], wanted[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"q_proj", "down_proj", "lm_head"}
