"""Experts: the tensors of a mixture of experts by the names that its checkpoints have for them.

transformers fuses the experts of a layer into two parameters when it loads a model, and takes them apart when it saves
one. Merges follow the checkpoint: every expert's matrices are tensors of their own, here views of the fused ones. Left
out are architectures whose checkpoints hold fused experts, which need none of this.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a checkpoint calls a layer's mixture, and the matrices of an expert."""

    mixture: str
    gate: str
    up: str
    down: str


_BY_PROJECTION = _Layout("mlp", "gate_proj", "up_proj", "down_proj")
_LAYOUTS = {
    "mixtral": _Layout("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": _BY_PROJECTION,
    "qwen2_moe": _BY_PROJECTION,
    "qwen3_moe": _BY_PROJECTION,
}


def check_view(model_type: str) -> None:
    """Raises InputError for models whose layers cannot be shared: their experts are fused in memory."""
    if model_type in _LAYOUTS:
        raise InputError(
            f"the layers of a {model_type} model cannot be put in another order in memory, since its experts are fused "
            "there; write the checkpoint with `evomerge merge` and use that, or search over merges of whole models."
        )


def stored_parts(model_type: str, name: str, parameter: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors that a checkpoint holds for a parameter, by name: the parameter itself, or views of its experts.

    Fused: gate_up_proj (experts, 2 x inner, width), gates first, and down_proj (experts, width, inner).
    """
    layout = _LAYOUTS.get(model_type)
    if layout is None:
        yield name, parameter
        return
    stored = name.replace(".mlp.", f".{layout.mixture}.")
    if name.endswith(_GATE_UP):
        for index, expert in enumerate(parameter.detach()):
            gate, up = expert.chunk(2)
            place = f"{stored.removesuffix(_GATE_UP)}.experts.{index}"
            yield f"{place}.{layout.gate}.weight", gate
            yield f"{place}.{layout.up}.weight", up
    elif name.endswith(_DOWN):
        for index, expert in enumerate(parameter.detach()):
            yield f"{stored.removesuffix(_DOWN)}.experts.{index}.{layout.down}.weight", expert
    else:
        yield stored, parameter
