"""A search's models are diagnosed by one command, and layers are compared as transformers computes them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.diagnosis.activations import layer_similarity
from evomerge.merging.sources.references import ModelSource
from tests.commands import evomerge
from tests.merging.sources.test_adapters import tune
from tests.searches import WriteSearch

TEXTS = ("ask base_qa", "seven plus two", "")


def test_similarities_are_the_mean_cosines_of_states(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["first"]
    found = layer_similarity(ModelSource(folder), TEXTS, "cpu")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    cosines = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.numel():
            states = [state[0].double() for state in model(ids, output_hidden_states=True).hidden_states]
            inside = pairwise(states[:-1])  # the last state is after the final norm
            cosines.append(torch.stack([torch.cosine_similarity(*pair, dim=-1) for pair in inside]))
    wanted = torch.cat(cosines, dim=1).mean(1)
    assert found.tokens == sum(part.shape[1] for part in cosines)
    assert len(found.similarity) == 4
    assert torch.tensor(found.similarity[:-1]) == pytest.approx(wanted.float().detach().numpy(), abs=1e-5)


def test_an_adapter_counts(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter = tune(tiny_models["base"], tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    plain = layer_similarity(ModelSource(tiny_models["base"]), TEXTS, "cpu")
    assert layer_similarity(ModelSource(tiny_models["base"], adapter), TEXTS, "cpu").similarity != plain.similarity


def test_the_command_prints_what_json_says(search: WriteSearch) -> None:
    file = search()
    document = json.loads(evomerge("diagnose", file, "--texts", 2, "--json"))
    assert document["weights"]["places"][0] == "embeddings"
    assert set(document["layers"]) == {"base", *document["weights"]["models"]}
    shown = " ".join(evomerge("diagnose", file, "--texts", 2).split())
    for own in document["weights"]["models"].values():
        assert f"{own['whole']:.3f}" in shown
    for finding in document["findings"]:
        assert finding in shown
    assert json.loads(evomerge("diagnose", file, "--json"))["layers"] is None
