"""Layers read off names, beside what mergekit knows of each architecture."""

import json
from importlib.resources import files
from typing import Any

import pytest
import transformers

from evomerge.layers import embedding_names, head_names, is_embedding, is_layer, layer_count, layer_index


def causal_language_models() -> dict[str, dict[str, Any]]:
    """mergekit's descriptions of those that transformers loads without code from the model's folder."""
    descriptions = [
        json.loads(file.read_text())
        for file in files("mergekit._data.architectures").iterdir()
        if file.name.endswith(".json")
    ]
    return {
        name: description
        for description in descriptions
        for name in description.get("architectures", ())
        if name.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(transformers, name)
    }


DESCRIPTIONS = causal_language_models()


@pytest.mark.parametrize("architecture", sorted(DESCRIPTIONS))
def test_names_are_placed_where_mergekit_places_them(architecture):
    description = DESCRIPTIONS[architecture]
    before = [weight["name"] for weight in description["pre_weights"]]
    after = [weight["name"] for weight in description["post_weights"]]
    inside = [
        weight["name"].replace("${layer_index}", str(layer))
        for layer in (0, 1, 11)
        for weight in description["layer_templates"]["weights"]
    ]
    assert embedding_names([*after, *inside, *before]) == sorted(before)
    assert head_names([*after, *inside, *before]) == sorted(after)
    assert {layer_index(name) for name in inside} == {0, 1, 11}
    assert layer_count([*before, *inside, *after]) == 12


def test_common_architectures_are_among_them():
    """An empty list above would pass, too."""
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GPTNeoXForCausalLM"} <= set(DESCRIPTIONS)


def test_experts_and_other_numbers_are_no_layers():
    assert layer_index("model.layers.7.block_sparse_moe.experts.3.w1.weight") == 7
    assert layer_index("model.norm.0.weight") is None
    assert layer_count(["lm_head.weight"]) == 0


def test_a_head_called_embed_out_is_no_embedding():
    assert not is_embedding("embed_out.weight")
    assert is_embedding("gpt_neox.embed_in.weight")


def test_a_layer_is_a_module_and_not_what_is_numbered_inside_of_it():
    names = ("model.layers.3", "transformer.h.11", "model.layers.3.mlp", "model.layers.3.mlp.experts.2", "model.layers")
    assert [is_layer(name) for name in names] == [True, True, False, False, False]
    assert not is_layer("vision_tower.layers.3")
