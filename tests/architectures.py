"""Tiny random models of ten architectures, as transformers builds and saves them, with the zoo's tokenizer.

Weights are drawn wide enough that layers differ visibly in the logits, biases and norms included.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from evomerge import zoo

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOWED: dict[str, Any] = {"head_dim": 8, "sliding_window": 16}
_NEOX = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_GPT2: dict[str, Any] = {"vocab_size": 128, "n_positions": 128, "n_embd": 32, "n_inner": 48, "n_head": 4}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | _WINDOWED | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE | _WINDOWED | {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gpt2": ("GPT2Config", _GPT2 | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
}
TIED = ("gemma2", "gemma3", "gpt2")


def build(architecture: str, seed: int = 0, layers: int = 3, **settings: Any) -> Any:
    """A random model in float32. `settings` go into its config."""
    kind, known = ARCHITECTURES[architecture]
    depth = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": layers}
    config = getattr(transformers, kind)(**known | depth | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    shake(model, seed, 0.1)
    return model.eval()


@torch.no_grad()
def shake(model: Any, seed: int, size: float) -> None:
    """Adds noise to every parameter, each drawn by its place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """A model folder as it lies on the hub: config, weights in safetensors, tokenizer."""
    model.save_pretrained(folder, **options)
    for file in zoo.path("base").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def family(
    architecture: str, root: Path, names: Sequence[str] = ("base", "first", "second"), **settings: Any
) -> dict[str, Path]:
    """A base, and fine-tunes that drifted from it, each in a folder of its name."""
    folders = {}
    for seed, name in enumerate(names):
        torch.manual_seed(0)  # transformers initializes from torch's global generator
        model = build(architecture, **settings)
        if seed:
            shake(model, seed, 0.02)
        folders[name] = save(model, root / name)
    return folders
