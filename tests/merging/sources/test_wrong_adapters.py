"""Adapters that cannot be merged into the base are refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import Refuses
from tests.searches import WriteSearch


def write_adapter(folder: Path, target: str = "model.layers.0.self_attn.q_proj", **config: Any) -> None:
    import torch
    from safetensors.torch import save_file

    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "somebody/else"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    parts = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    tensors = {f"base_model.model.{target}.{part}.weight": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


WRONG_ADAPTERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DoRA": ({"use_dora": True}, ("adapter_config.json: use_dora is set", "with PEFT")),
    "another kind": ({"peft_type": "IA3"}, ("adapter_config.json: peft_type is IA3; only LORA",)),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, ("init_lora_weights is pissa",)),
    "a rank that is no number": ({"r": "many"}, ("adapter_config.json: r: ", "valid integer")),
    "a rank of 0": ({"rank_pattern": {"q_proj": 0}}, ("adapter_config.json: rank_pattern.q_proj: ", "greater than 0")),
    "a pattern that is none": (
        {"alpha_pattern": {"q_(proj": 2}},
        ("adapter_config.json: alpha_pattern.q_(proj", "'q_(proj' is no regular expression"),
    ),
    "another rank": ({"r": 3}, ("says rank 3 (r, rank_pattern)",)),
    "a module that the base lacks": (
        {"target": "model.layers.0.attn.q_proj"},
        ("fits no tensor of the base (the adapter was made for somebody/else)", "did you mean 'model.layers.0.self_at"),
    ),
    "another shape": (
        {"target": "model.layers.0.mlp.up_proj"},
        ("changes a weight of shape [32, 32]", "of the base has [48, 32]", "made for somebody/else"),
    ),
}


@pytest.mark.parametrize("claim", WRONG_ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused(
    claim: str, tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    settings, fragments = WRONG_ADAPTERS[claim]
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", **settings)
    path = search({"models.second": "./adapter"})
    says = (f"evomerge: {path}: models.second: {tmp_path}/adapter", *fragments)
    refuses("run", path, "--output", "new/run", says=says)


def test_an_adapter_for_a_base_is_refused(tmp_path: Path, search: WriteSearch, refuses: Refuses) -> None:
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter")
    path = search({"base": "./adapter"})
    refuses("run", path, "--output", "new/run", says=(f"{path}: base: ", "is an adapter, not a model", "MODEL+"))
