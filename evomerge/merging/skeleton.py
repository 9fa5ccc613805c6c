"""Skeleton: a model without its weights, that is its config and what its checkpoint holds.

Parameters have the names that checkpoints use, and tied parameters count once.
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
    """A config, and what a checkpoint of its model holds.

    config: a transformers config.
    parameters: the shapes of the parameters, by name.
    buffers: the shapes and dtypes of the other tensors, by name.
    vocabulary: the names of the parameters with one row per token.
    """

    config: Any
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    vocabulary: frozenset[str]


def skeleton_of(config: Any, folder: Path) -> Skeleton:
    """The skeleton of a config's model.

    config: a transformers config.
    folder: the model's folder, which opens an error's message.
    Raises InputError where transformers cannot build the model.
    """
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
    """Whether a config's model ties its head to its embedding."""
    return any(getattr(section, "tie_word_embeddings", False) for section in (config, config.get_text_config()))


def untied(config: Any) -> Any:
    """A copy of a config whose model has a head of its own, not tied to its embedding."""
    changed = copy.deepcopy(config)
    for section in (changed, changed.get_text_config()):
        section.tie_word_embeddings = False
    return changed


def with_layers(config: Any, layers: Sequence[tuple[Any, int]]) -> Any:
    """A copy of a config for a model of other layers.

    What a config lists for each layer, such as `layer_types`, moves with the layers.

    config: the config to change.
    layers: for each new layer, the config that it comes from and its number there.
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
