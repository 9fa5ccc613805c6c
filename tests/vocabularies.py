"""Copies of models whose tokens are in other rows."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def words_of(folder: Path) -> list[str]:
    """A model's tokens in the order of their rows."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(vocabulary, key=lambda word: int(vocabulary[word]))


def renumbered(folder: Path, out: Path, words: Sequence[str], rows: int | None = None, shift: float = 0.0) -> Path:
    """A copy of a model with other tokens; rows of the tokens that it had move along, others are random.

    folder: a Llama with a tokenizer of whole words.
    out: the copy.
    words: its tokens in the order of their rows.
    rows: how many rows its embeddings have; by default as many as tokens.
    shift: is added to every weight outside of the rows.
    """
    shutil.copytree(folder, out)
    old = {word: row for row, word in enumerate(words_of(folder))}
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: row for row, word in enumerate(words)}
    for token in tokenizer["added_tokens"]:
        token["id"] = words.index(token["content"])
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((out / "config.json").read_text())
    special = {"bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>"}
    config |= {key: words.index(word) for key, word in special.items()} | {"vocab_size": rows or len(words)}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(len(words))
    for name, tensor in tensors.items():
        if name not in ROWS:
            tensors[name] = tensor + shift
            continue
        made = 0.02 * torch.randn(rows or len(words), tensor.shape[1], generator=random)
        for row, word in enumerate(words):
            if word in old:
                made[row] = tensor[old[word]]
        tensors[name] = made.to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
