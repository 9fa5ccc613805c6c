"""Models that tests name as they like, as the package takes them."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from evomerge.alignment.structure import Permutations, structure_of
from evomerge.merging.methods import METHODS
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.sources.models import Model, Models, find_models
from evomerge.merging.sources.preflight import preflight
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.weights import Weights, model_config

UNMEASURED = [name for name, method in METHODS.items() if not method.statistics]  # methods that need no statistics


def models(sources: Mapping[str, ModelSource | Path], base: Path) -> Models:
    """Models by any names, over a base that need not be one of them."""

    def found(name: str, source: ModelSource | Path) -> Model:
        source = source if isinstance(source, ModelSource) else ModelSource(source)
        return Model(name, source, model_config(source.folder), Weights(source))

    return Models(found(str(base), base), {name: found(name, source) for name, source in sources.items()})


def load_models(sources_: Mapping[str, ModelSource | Path], base: Path, *given: Any, **named: Any) -> ResidentModels:
    """These models in memory."""
    return ResidentModels(models(sources_, base), *given, **named)


def check_models(base: str, references: Mapping[str, str]) -> list[str]:
    """What `preflight` says of models by the names that they have in a message."""
    return preflight(find_models(base, references.values()), {where: name for name, where in references.items()})


def write_adapter(
    folder: Path, base: Path, seed: int, rank: int = 4, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> Path:
    """A LoRA of a model, as PEFT saves it, with random factors for the attention, one MLP matrix and the embedding.

    config: keys of its config, and `norm` for a final norm that it stores whole.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).to(dtype)

    norm = config.pop("norm", False)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        rows, columns = tensor.shape if tensor.dim() == 2 else (0, 0)
        if re.search(r"(q|v|down)_proj\.weight$", name):
            tensors |= {f"{module}.lora_A.weight": drawn(rank, columns), f"{module}.lora_B.weight": drawn(rows, rank)}
        elif name.endswith("embed_tokens.weight"):
            tensors |= {
                f"{module}.lora_embedding_A": drawn(rank, rows),
                f"{module}.lora_embedding_B": drawn(columns, rank),
            }
        elif norm and name.endswith("model.norm.weight"):
            tensors[f"{module}.weight"] = tensor + 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": 3} | config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def shuffled(base: Path, folder: Path, seed: int) -> Path:
    """A copy of a model with its places in a random order."""
    model = find_models(str(base), [str(base)]).base
    structure, random = structure_of(model), np.random.default_rng(seed)
    heads = []
    for _ in range(structure.layers):
        groups = random.permutation(structure.groups)[:, np.newaxis] * structure.per_group
        heads.append(np.concatenate([group + random.permutation(structure.per_group) for group in groups]))
    units = [random.permutation(structure.units) for _ in range(structure.layers)]
    order = Permutations(structure, random.permutation(structure.hidden), units, heads)
    shutil.copytree(base, folder)
    stored = load_file(base / "model.safetensors")
    moved = {name: order.apply(name, tensor).contiguous() for name, tensor in stored.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
