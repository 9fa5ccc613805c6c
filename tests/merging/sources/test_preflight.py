"""Models that are not there, cannot be read or do not fit together are refused in one sentence."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import Refuses, Spoil, without_tokenizer
from tests.searches import WriteSearch

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "a model that the zoo lacks": ({"models.first": "zoo:maths"}, "models.first: zoo:maths", "did you mean 'math'?"),
    "a base that the zoo lacks": ({"base": "zoo:bse"}, "base: zoo:bse", "did you mean 'base'?"),
    "a folder that is not there": ({"models.first": "./nowhere"}, "models.first: ", "nowhere: no such model folder"),
    "a model that the hub lacks": ({"models.first": "nobody/nothing"}, "models.first: nobody/nothing", "hub"),
    "the home of nobody": ({"base": "~nobody-at-all/x"}, "base is", "home directory"),
    "a path too long for a path": ({"base": "./" + "x" * 300}, "base is", "File name too long"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_integers(tensors: dict[str, Any]) -> None:
    import torch

    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def narrower(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def as_gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.rmtree(folder)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_header(header: Any) -> Spoil:
    text = json.dumps(header).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def write_index(weight_map: Any) -> Spoil:
    text = json.dumps({"weight_map": weight_map})
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


WRONG_MODELS: dict[str, tuple[Any, ...]] = {
    "a file": (as_file, "expected a model folder, got a file"),
    "a folder without config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "a config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "model_type is missing"),
    "another architecture": (as_gpt2, "is a gpt2 model, but the base", "is a llama model"),
    "another shape": (lambda folder: change_tensors(folder, narrower), "model.norm.weight has shape [31]", "has [32]"),
    "a tensor too few": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "lacks the tensor model.norm.weight",
    ),
    "a tensor too many": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update(extra=tensors["model.norm.weight"] + 1)),
        "has the tensor extra",
    ),
    "integers": (lambda folder: change_tensors(folder, as_integers), "model.norm.weight is stored as I8", "dequantize"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a pickle": (as_pickle, "weights are pickled (pytorch_model.bin)", "convert them to safetensors"),
    "noise": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 999), "not a valid safetensors file"),
    "three bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "not a valid safetensors file"),
    "half a copy": (truncate, "not a valid safetensors file (expected 160752 bytes, got 160652)"),
    "a header without dtype": (write_header({"x": {"data_offsets": [0, 0]}}), "not a valid safetensors file"),
    "a header that is a list": (write_header([1]), "not a valid safetensors file"),
    "a missing shard": (write_index({"x": "model-1.safetensors"}), "shard model-1.safetensors", "is missing"),
    "a shard elsewhere": (write_index({"x": "../first/model.safetensors"}), "lies outside the model folder; refused"),
    "an index of nothing": (write_index([]), "not a readable safetensors index"),
}


@pytest.mark.parametrize("claim", WRONG_MODELS)
def test_a_model_that_cannot_be_merged_is_refused(
    claim: str, tiny_models: dict[str, Path], tmp_path: Path, refuses_search: Refuses
) -> None:
    spoil, *fragments = WRONG_MODELS[claim]
    spoil(Path(shutil.copytree(tiny_models["second"], tmp_path / "spoiled")))
    refuses_search({"models.second": "./spoiled"}, "spoiled", *fragments)


def edit_config(**changes: Any) -> Spoil:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


WRONG_BASES: dict[str, tuple[Any, ...]] = {
    "without tokenizer": (without_tokenizer, "tokenizer cannot be loaded"),
    "with a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "tokenizer cannot be loaded",
    ),
    "of an unknown kind": (edit_config(model_type="foo"), "model type `foo`"),
    "with more layers than weights": (edit_config(num_hidden_layers=5), "lack model.layers.4."),
    "of another width than its weights": (edit_config(hidden_size=64), "transformers cannot load this model"),
    "with text for a number in its config": (edit_config(hidden_size="wide"), "hidden_size"),
}


@pytest.mark.parametrize("claim", WRONG_BASES)
def test_a_base_that_cannot_be_loaded_is_refused(
    claim: str, tiny_models: dict[str, Path], tmp_path: Path, search: WriteSearch, refuses: Refuses
) -> None:
    spoil, *fragments = WRONG_BASES[claim]
    spoil(Path(shutil.copytree(tiny_models["base"], tmp_path / "spoiled")))
    shutil.copytree(tmp_path / "spoiled", tmp_path / "alike")
    path = search({"base": "./spoiled", "models": {"alike": "./alike"}})
    refuses("run", path, "--output", "new/run", says=("spoiled", *fragments))
