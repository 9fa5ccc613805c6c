"""Models of true shapes in sparse files: real headers, zeros that no disk holds."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
import transformers

REPOSITORY = Path(__file__).parents[1]
ZOO = REPOSITORY / "evomerge" / "zoo" / "models" / "base"
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
TUNED = ("math", "chat", "code")


def make_sparse_model(folder: Path, size: str) -> None:
    """A Llama in bfloat16 with the tokenizer of the zoo.

    folder: where it is written.
    size: a key of `SHAPES`.
    """
    config = transformers.LlamaConfig(
        **SHAPES[size],
        vocab_size=128256,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": [*parameter.shape], "data_offsets": [end, end + parameter.nbytes]}
        end += parameter.nbytes
    octets = json.dumps(header).encode()
    octets += b" " * (-len(octets) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(octets)) + octets)
        stream.truncate(8 + len(octets) + end)


def make_sparse_search(folder: Path, size: str) -> dict[str, Any]:
    """The content of a search file over a base and three fine-tunes, which are made in a folder."""
    for name in ("base", *TUNED):
        make_sparse_model(folder / name, size)
    return {
        "base": str(folder / "base"),
        "models": {name: str(folder / name) for name in TUNED},
        "tasks": {"paths": [str(REPOSITORY / "evals")]},
        "objectives": [{"task": "math_a"}, {"task": "lang_b"}],
        "items": {"search": 100, "heldout": 100},
        "space": {"method": "dare_ties"},
        "optimizer": {"name": "cma_es", "evaluations": 100},
        "evaluation": {"device": "cuda", "batch_size": 16},
        "workers": {"pool": "ray"},
    }
