"""Skeleton: a model without its weights, which says what a checkpoint holds and what its config says.

Parameters go by the names that checkpoints use, and tied ones count once.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import InputError
from evomerge.merging.sources import named_weights
from evomerge.quiet import quiet


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A config with the shapes of the parameters it leads to.

    buffers: the shapes and dtypes of what else a checkpoint holds. vocabulary: the parameters with one row per token.
    """

    config: Any
    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    vocabulary: frozenset[str]


def load_config(folder: Path) -> Any:
    """The transformers config of a model folder, without code from it."""
    try:
        with quiet():
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config is checked by several libraries, each with its own exceptions
        raise _refusal(folder, error) from None


def skeleton_of(config: Any, folder: Path) -> Skeleton:
    """What the causal language model of a config holds. `folder` opens an error's message."""
    model = empty_model(config, folder)
    parameters = named_weights(model)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    rows = {id(parameter) for module in ends for parameter in module.parameters()}
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    return Skeleton(
        config=config,
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        buffers={
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items() if name not in tied
        },
        vocabulary=frozenset(name for name, parameter in parameters.items() if id(parameter) in rows),
    )


def empty_model(config: Any, folder: Path) -> Any:
    """The causal language model of a config, on PyTorch's meta device. `folder` opens an error's message."""
    try:
        with quiet(), torch.device("meta"):
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), trust_remote_code=False
            )
    except Exception as error:
        raise _refusal(folder, error) from None


def ties(config: Any) -> bool:
    """Whether the head of a config's model is its embedding."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def untied(config: Any) -> Any:
    """The same config with a head that is a tensor of its own."""
    changed = copy.deepcopy(config)
    for part in (changed, changed.get_text_config()):
        part.tie_word_embeddings = False
    return changed


def layers_of(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


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


def _refusal(folder: Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    return InputError(f"{folder}: transformers cannot build this model ({reason}); check its config.json.")
