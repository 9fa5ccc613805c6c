"""Skeleton: a model without its weights, which says what a checkpoint holds and what its config says.

Parameters go by the names that checkpoints use, and tied ones count once.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.merging.naming import naming_of


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A config with the shapes of the parameters it leads to.

    buffers: the shapes and dtypes of what else a checkpoint holds. vocabulary: the parameters with one row per token.
    """

    config: Any
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    vocabulary: frozenset[str]


def skeleton_of(config: Any, folder: Path) -> Skeleton:
    """What the model of a config holds. `folder` opens an error's message."""
    naming = naming_of(config, folder)
    config = copy.deepcopy(config)
    config.architectures = [naming.architecture]
    merged = set(naming.merged)
    return Skeleton(
        config=config,
        parameters={name: naming.shapes[name] for name in naming.merged},
        buffers={name: (shape, naming.dtypes[name]) for name, shape in naming.shapes.items() if name not in merged},
        vocabulary=naming.vocabulary,
    )


def ties(config: Any) -> bool:
    """Whether the head of a config's model is its embedding."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def untied(config: Any) -> Any:
    """The same config with a head that is a tensor of its own."""
    changed = copy.deepcopy(config)
    for part in (changed, changed.get_text_config()):
        part.tie_word_embeddings = False
    return changed


def with_layers(config: Any, layers: Sequence[tuple[Any, int]]) -> Any:
    """A config for other layers: for each of them the config and the number of the layer that it comes from.

    What a config lists per layer, such as `layer_types`, goes along with the layers.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    before = text.num_hidden_layers
    listed = {
        key: [getattr(source.get_text_config(), key)[layer] for source, layer in layers]
        for key, value in text.to_dict().items()
        if "layer" in key and isinstance(value, list) and len(value) == before
    }
    text.num_hidden_layers = len(layers)
    for key, values in listed.items():
        setattr(text, key, values)
    return changed
