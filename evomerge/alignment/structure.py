"""What may be permuted in a transformer: the residual stream, the units of its MLPs, and its attention heads.

Queries share keys and values in groups. So groups move as a whole, and heads move within their group. The numbers
within a head stay in their order, since rotary embeddings tell them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.layers import layer_index
from evomerge.merging.sources.models import Model

if TYPE_CHECKING:
    import torch

Order = NDArray[np.int64]
RESIDUAL, UNITS, QUERIES, KEYS = "residual", "units", "queries", "keys"
# by the end of a tensor's name: what each of its dimensions counts, and what a vector beside it (a bias) counts
_AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": (None, RESIDUAL),
    "lm_head": (None, RESIDUAL),
    "self_attn.q_proj": (QUERIES, RESIDUAL),
    "self_attn.k_proj": (KEYS, RESIDUAL),
    "self_attn.v_proj": (KEYS, RESIDUAL),
    "self_attn.o_proj": (RESIDUAL, QUERIES),
    "mlp.gate_proj": (UNITS, RESIDUAL),
    "mlp.up_proj": (UNITS, RESIDUAL),
    "mlp.down_proj": (RESIDUAL, UNITS),
}
_WITHIN_A_HEAD = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, slots=True)
class Structure:
    """The sizes of a model.

    layers: how many there are.
    hidden: the width of the residual stream.
    units: of each MLP.
    heads: attention heads.
    groups: how many of them have keys and values of their own.
    width: of a head.
    """

    layers: int
    hidden: int
    units: int
    heads: int
    groups: int
    width: int

    @property
    def per_group(self) -> int:
        """How many heads share keys and values."""
        return self.heads // self.groups

    def axes(self, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """What each dimension of a tensor counts; None for what stays in its order.

        name: the tensor's.
        shape: its shape.
        Raises LookupError for a tensor that is not known.
        """
        module, _, kind = name.rpartition(".")
        axes = next((axes for end, axes in _AXES.items() if module.endswith(end)), None)
        if axes is not None:
            return axes if kind == "weight" else axes[:1]
        if module.endswith(_WITHIN_A_HEAD) and shape == (self.width,):
            return (None,)
        if kind == "weight" and shape == (self.hidden,) and "norm" in module.rpartition(".")[2]:
            return (RESIDUAL,)
        raise LookupError(name)


def structure_of(model: Model) -> Structure:
    """The structure of a model.

    model: it.
    Raises InputError for an architecture whose tensors are not known.
    """
    config: Mapping[str, Any] = model.config
    try:
        heads = int(config["num_attention_heads"])
        found = Structure(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            units=int(config["intermediate_size"]),
            heads=heads,
            groups=int(config.get("num_key_value_heads") or heads),
            width=int(config.get("head_dim") or config["hidden_size"] // heads),
        )
        for name, info in model.table.items():
            found.axes(name, info.shape)
    except LookupError as error:
        raise InputError(
            f"{model.reference}: its {error.args[0]} is not known, so a {model.kind} model cannot be aligned; only "
            "models that are built like Llama can (llama, mistral, qwen2, qwen3, gemma and others)."
        ) from None
    return found


@dataclass(slots=True)
class Permutations:
    """For each place of the target, the place in the model that moves there.

    structure: that of both models.
    residual: of the residual stream, shape (hidden,).
    units: of each layer's units, shape (units,).
    heads: of each layer's heads, shape (heads,). Heads of one group stay together.
    """

    structure: Structure
    residual: Order
    units: list[Order]
    heads: list[Order]

    @classmethod
    def identity(cls, structure: Structure) -> "Permutations":
        """Permutations that move nothing.

        structure: that of both models.
        """
        layers = range(structure.layers)
        return cls(
            structure,
            np.arange(structure.hidden),
            [np.arange(structure.units) for _ in layers],
            [np.arange(structure.heads) for _ in layers],
        )

    @property
    def moved(self) -> dict[str, int]:
        """How many places have changed of each kind."""
        here = Permutations.identity(self.structure)
        units = sum(int((own != at).sum()) for own, at in zip(self.units, here.units, strict=True))
        heads = sum(int((own != at).sum()) for own, at in zip(self.heads, here.heads, strict=True))
        return {RESIDUAL: int((self.residual != here.residual).sum()), UNITS: units, "heads": heads}

    def order(self, axis: str | None, layer: int | None) -> Order | None:
        """The order of a dimension's places; None where it stays.

        axis: what the dimension counts.
        layer: the tensor's.
        """
        if axis == RESIDUAL:
            return self.residual
        if axis is None or layer is None:
            return None
        if axis == UNITS:
            return self.units[layer]
        heads = self.heads[layer]
        if axis == KEYS:
            heads = heads[:: self.structure.per_group] // self.structure.per_group
        within = np.arange(self.structure.width)
        return (heads[:, np.newaxis] * self.structure.width + within).ravel()

    def apply(self, name: str, tensor: "torch.Tensor", but: str | None = None) -> "torch.Tensor":
        """A tensor of the model, moved.

        name: its name.
        tensor: its values.
        but: what is left where it is, of what a dimension may count.
        """
        import torch

        layer = layer_index(name)
        for dimension, axis in enumerate(self.structure.axes(name, tuple(tensor.shape))):
            order = None if axis == but else self.order(axis, layer)
            if order is not None:
                tensor = tensor.index_select(dimension, torch.from_numpy(order).to(tensor.device))
        return tensor
