"""Fixtures: tiny random models to merge, and a small search over the embedded zoo."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # beside other work, Ray's 15 would make a test wait for minutes
# Ray reads once in a process whether it asks for tokens, and searches started here do ask.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from evomerge import zoo

REPOSITORY = Path(__file__).parent.parent

settings.register_profile("suite", deadline=None, derandomize=True)  # the machine's load must decide nothing
settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes minutes to hours, unless -m asks for it. Side by side, tests of one file stay together,
    and so do all that start a Ray: there is one at a time."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    if "exhaustive" in str(config.getoption("-m")):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three fine-tunes: Llamas of 4 layers, 32 wide, float32, random weights, with the zoo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folders = {}
    for seed, name in enumerate(("base", "first", "second", "third")):
        generator = torch.Generator().manual_seed(seed)
        drift = {
            key: value + (0.02 * torch.randn(value.shape, generator=generator) if seed else 0)
            for key, value in start.items()
        }
        model.load_state_dict(drift)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        for file in zoo.path("base").glob("tokenizer*"):
            shutil.copyfile(file, folders[name] / file.name)
    return folders


@pytest.fixture
def search_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small search over the zoo, with top-level keys replaced (None removes one)."""

    def write(name: str = "search.yaml", **changes: Any) -> Path:
        document: dict[str, Any] = {
            "base": "zoo:base",
            "models": {"math": "zoo:math", "lang": "zoo:lang"},
            "tasks": {"paths": [str(REPOSITORY / "evals")]},
            "objectives": [{"task": "base_qa"}, {"task": "cross_math_b"}],
            "items": {"search": 24, "heldout": 24},
            "space": {"layer_groups": ["0-1", "2-3", "4-5"]},
            "optimizer": {"evaluations": 20, "population": 8},
            "workers": {"pool": "local"},
        } | changes
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
        return path

    return write
