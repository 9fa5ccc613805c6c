"""Which layer a tensor belongs to, read off its name; the same for every architecture that numbers its layers."""

import re
from collections.abc import Iterable

EMBEDDINGS, HEAD = "embeddings", "head"  # the places before and behind the layers
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# modules that see or hear for a language model have layers of their own, which do not count
_SENSES = re.compile(
    r"(?:^|\.)(?:vision\w*|visual\w*|image\w*|video\w*|audio\w*|speech\w*|\w*projector|\w*connector|\w*aligner|\w*qformer)\."
)
_INPUT = re.compile(r"embed(?!_out)|wte|wpe")  # GPT-NeoX calls its head embed_out


def layer_index(name: str) -> int | None:
    """The number of a tensor's layer; None for tensors outside the language model's layers."""
    match = _in_layer(name)
    return int(match.group(1)) if match else None


def is_layer(module: str) -> bool:
    """Whether the module of that name is a layer, and not a numbered module inside of one, such as an expert."""
    match = _in_layer(f"{module}.")
    return match is not None and match.end() == len(module) + 1


def with_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer; a name outside the layers stays as it is.

    name: a tensor's name.
    layer: the number of the other layer.
    """
    match = _in_layer(name)
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}" if match else name


def _in_layer(name: str) -> "re.Match[str] | None":
    return None if _SENSES.search(name) else _LAYER.search(name)


def layer_count(names: Iterable[str]) -> int:
    """How many layers a model has, given the names of its tensors."""
    return 1 + max((index for name in names if (index := layer_index(name)) is not None), default=-1)


def is_embedding(name: str) -> bool:
    """Whether a tensor outside the layers comes before them (embeddings) rather than after (final norm and head)."""
    return _INPUT.search(name) is not None or _SENSES.search(name) is not None


def embedding_names(names: Iterable[str]) -> list[str]:
    """The names of tensors before the layers, sorted."""
    return sorted(name for name in names if layer_index(name) is None and is_embedding(name))


def head_names(names: Iterable[str]) -> list[str]:
    """The names of tensors after the layers (final norm and head), sorted."""
    return sorted(name for name in names if layer_index(name) is None and not is_embedding(name))


def place_of(name: str) -> str:
    """The place of a tensor in its model: `embeddings`, the number of its layer, or `head`."""
    layer = layer_index(name)
    if layer is not None:
        return str(layer)
    return EMBEDDINGS if is_embedding(name) else HEAD


def place_order(place: str) -> tuple[int, int]:
    """A key that sorts places: embeddings, layers by number, head."""
    if place.isdigit():
        return 1, int(place)
    return (0, 0) if place == EMBEDDINGS else (2, 0)
